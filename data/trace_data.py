"""Decode traces as training and validation batches of a commit filter, divided by prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from draftsmith.data.decode_traces import SETTINGS, Traces, TraceSamples, read_traces
from draftsmith.data.stateful_loader import StatefulLoader
from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class TraceConfig:
    """Which traces, and how they become batches."""

    path: str = "traces"  # what `draftsmith trace learn2pd` wrote
    batch_size: int = 512  # records (passes of one row) per rank
    val_fraction: float = 0.15  # of the prompts: records of one prompt never stand on both sides
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InvalidValue(f"traces.batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.val_fraction < 1:
            raise InvalidValue(f"traces.val_fraction must lie between 0 and 1, got {self.val_fraction}")


DEFAULT_TRACES = TraceConfig()


class TraceDataModule(LightningDataModule):
    """`TraceBatch`es of a directory of traces."""

    def __init__(self, traces: TraceConfig = DEFAULT_TRACES) -> None:
        super().__init__()
        self.traces = traces
        self._read: tuple[Traces, dict[str, Any]] | None = None

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.traces.batch_size

    @property
    def traced(self) -> dict[str, Any]:
        """What the traces were made with: base, fingerprint, block_length, vocab_size, prompts, decode settings."""
        path = Path(self.traces.path) / SETTINGS
        if not path.is_file():
            raise InvalidValue(f"no decode traces in {path.parent}: make them with 'draftsmith trace learn2pd'")
        return read_json(path)

    def data_fingerprint(self) -> str:
        traced = self.traced
        return f"traces/{traced['fingerprint']:.16}/{traced['prompts']:.16}"

    def setup(self, stage: str | None = None) -> None:
        """Read all shards (once)."""
        if self._read is None:
            self._read = read_traces(Path(self.traces.path))

    def summary(self) -> str:
        """One line."""
        traces = self.records()
        return f"{len(traces)} records of {len(traces.passes)} prompts, blocks of {traces.block_length}"

    def records(self) -> Traces:
        """All of them."""
        self.setup()
        assert self._read is not None
        return self._read[0]

    def _samples(self, validation: bool) -> TraceSamples:
        config = self.traces
        return TraceSamples(
            self.records(),
            validation=validation,
            val_fraction=config.val_fraction,
            seed=config.seed,
            fingerprint=self.data_fingerprint(),
        )

    def train_dataloader(self) -> StatefulLoader:
        """Shuffled batches; of fewer records than a batch the batch is made smaller."""
        samples = self._samples(validation=False)
        ranks = 1 if self.trainer is None else self.trainer.world_size
        size = max(1, min(self.traces.batch_size, len(samples) // ranks))
        return StatefulLoader(samples, size, seed=self.traces.seed, shuffle=True)

    def val_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._samples(validation=True), 4 * self.traces.batch_size, last="pad")

    def test_dataloader(self) -> StatefulLoader:
        return self.val_dataloader()
