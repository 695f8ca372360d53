"""What every training module of ours does alike: the mean over the global batch, bad steps, and what exports say.

Gradients are those of the mean over all counted rows of the global batch, however unevenly the ranks hold them, so that
the number of ranks does not change the training. A step whose loss is not finite is skipped; ten in a row end the run.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from draftsmith.data.batches import Batch
from draftsmith.inference import manifest
from draftsmith.inference.errors import InvalidState
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.modules.optim import FiniteGuard, spoilt

_META = "draftsmith"  # key of our own entry in a checkpoint


def on_meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers without storage, for the batches of `plan_batch`."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class LearnedPart(pl.LightningModule, ABC):
    """Base of the modules that train a net of ours (`self.net`, built in `configure_model`)."""

    net: Any

    DEFINITIONS: ClassVar[Mapping[str, str]] = {}  # of the metrics that go into the manifest

    def __init__(self) -> None:
        super().__init__()
        self._finite = FiniteGuard()
        self._skip = False
        self._meta: dict[str, Any] = {}  # what the export needs to know of the data; travels in the checkpoint

    # --- what `draftsmith plan` asks: nothing here reads samples

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, fresh; what it starts from is read in `configure_model`."""

    @abstractmethod
    def plan_batch(self, data: Any) -> Batch:
        """A full micro batch of `data` (which says its `rows`) on the meta device."""

    @abstractmethod
    def plan_loss(self, batch: Any) -> Tensor:
        """The loss of such a batch."""

    @abstractmethod
    def positions(self, data: Any) -> int:
        """Positions of a row of `data` that the loss looks at: tokens, codes, pixels."""

    def configure_model(self) -> None:
        """Build the network (once), inside the strategy's context, so that sharding strategies shard at birth."""
        if self.net is None:
            self.net = self.build()

    @property
    def step_number(self) -> int:
        """Batches so far, whatever is accumulated: what draws in a step are keyed by."""
        number: int = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return number

    def global_mean(self, total: Tensor, count: Tensor, batch_size: int, name: str = "train/loss") -> Tensor:
        """The loss to return from training_step for a sum `total` over `count` things of this rank's batch.

        Logs their mean over all ranks as `name`, and skips the step where it is not finite.
        """
        sums = torch.stack([total.detach().double(), count.double()])
        whole, things = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        things = things.clamp_min(1)
        self.log(name, (whole / things).float(), prog_bar=True, batch_size=batch_size)
        self._skip = not self._finite(whole) or self._skip  # of accumulated batches one bad one spoils the whole step
        self.log("train/skipped", float(self._finite.skipped), batch_size=batch_size)
        scale: Tensor = self.trainer.world_size / things  # the strategy averages over ranks
        return total * (spoilt(scale) if self._skip else scale).float()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._skip:  # returning no loss instead is refused by Lightning on more than one rank
            for p in self.parameters():
                p.grad = None  # AdamW leaves parameters without a gradient, and their moments, alone
        self._skip = False

    def note_data(self) -> None:
        """Remember, once, what the data says of itself, for the export."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "data_fingerprint") and "data_fingerprint" not in self._meta:
            self._meta["data_fingerprint"] = data.data_fingerprint()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k in self.DEFINITIONS}
        seed = os.environ.get("PL_GLOBAL_SEED")  # where lightning.seed_everything leaves it
        checkpoint[_META] = {**self._meta, "metrics": values, "seed": None if seed is None else int(seed)}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._meta = {**checkpoint.get(_META, {}), "steps": checkpoint.get("global_step")}

    def spec_of(self, kind: str, net: nn.Module, **more: Any) -> ExportSpec:
        """An ExportSpec with what the checkpoint says: metrics, data, seed, steps."""
        meta = self._meta
        return ExportSpec(
            kind=kind,
            model=net,
            tokenizer_dir=meta.get("tokenizer_dir"),
            metrics={k: manifest.Metric(v, self.DEFINITIONS[k]) for k, v in meta.get("metrics", {}).items()},
            data_fingerprint=meta.get("data_fingerprint"),
            seed=meta.get("seed"),
            steps=meta.get("steps"),
            **more,
        )

    def not_built(self) -> InvalidState:
        return InvalidState("the network is not built yet: call configure_model() first (the trainer does)")
