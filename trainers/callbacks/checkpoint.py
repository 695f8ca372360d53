"""Checkpoints that resume exactly: by steps, best by a metric, and with every generator's state."""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.trainers.runs import BEST_NAME, STEP_NAME, step_of


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved under `checkpoints/`, and when. The end of a run and SIGTERM or Ctrl-C always save."""

    every_n_steps: int = 500  # a crash costs at most these many steps; each save costs three times the weights' bytes
    keep: int = 2  # newest step checkpoints that stay; more than one, so that a torn one is no disaster
    monitor: str | None = "val/loss"  # the best by this metric is kept as weights; null: none is
    mode: str = "min"
    elastic: bool = False  # ZeRO: go on from another number of ranks (converts once, about as long as three saves)

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or self.keep < 1:
            given = f"{self.every_n_steps} and {self.keep}"
            raise InvalidValue(f"checkpoint.every_n_steps and checkpoint.keep must be at least 1, got {given}")
        if self.mode not in ("min", "max"):
            raise unknown_choice("checkpoint.mode", self.mode, ("min", "max"))


class StepCheckpoint(Checkpoint):
    """Everything that resuming needs, every n steps and after the last one; the newest `keep` stay.

    A run has one line of steps: after resuming from an older checkpoint the first save removes the newer ones.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config
        self.saved = 0  # the step saved last
        self._step_before = -1
        self._waiting = False  # a save is due, and the data has not come to rest yet
        self._global_batch: int | None = None
        self._loaded_batch: int | None = None  # of the run that saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._global_batch = global_batch(trainer)
        self._recount(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._step_before = trainer.global_step

    def stepped(self, trainer: pl.Trainer) -> bool:
        """Whether the running batch made an optimizer step (with gradient accumulation most do not)."""
        return bool(trainer.global_step != self._step_before)

    def save_now(self, trainer: pl.Trainer) -> bool:
        """Save this step, unless it is saved already, and say True; every rank must call it.

        Data that cannot be interrupted at this moment (`may_checkpoint` False: contract 13) is asked to come to rest;
        the step at which it has is saved then, without a further call. False meanwhile.
        """
        data = trainer.datamodule
        if not getattr(data, "may_checkpoint", True):
            if not self._waiting:
                data.come_to_rest()
            self._waiting = True
            return False
        self._waiting = False
        self._save(trainer)
        return True

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step <= 0 or step == self.saved:
            return
        trainer.save_checkpoint(self.directory / f"{STEP_NAME.format(step=step)}.ckpt")
        self.saved = step
        if trainer.is_global_zero:
            others = sorted(self.directory.glob("step-*.ckpt"), key=step_of)
            older = [path for path in others if step_of(path) <= step]
            for path in [*older[: -self.config.keep], *others[len(older) :]]:
                trainer.strategy.remove_checkpoint(path)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # Always right after the step, while the loader stands there (ModelCheckpoint lets a due validation go first).
        due = trainer.global_step % self.config.every_n_steps == 0
        last = 0 < trainer.max_steps <= trainer.global_step
        if self.stepped(trainer) and (due or last or self._waiting):
            self.save_now(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"global_batch": self._global_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded_batch = state_dict["global_batch"]

    def _recount(self, trainer: pl.Trainer) -> None:
        """After a change of ranks: the data goes on by samples, the trainer counts batches, so count in new ones."""
        before, now, self._loaded_batch = self._loaded_batch, self._global_batch, None
        if before is None or now is None or before == now:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        samples = progress.current.processed * before
        if samples % now:
            raise InvalidValue(
                f"the checkpoint stands at sample {samples} of its epoch, which is no multiple of the {now} samples of "
                f"a batch over all ranks: choose batch_size so that batch_size x ranks divides {before}, as it was"
            )
        for counts in (progress.current, progress.total):
            more = round(counts.processed * before / now) - counts.processed
            for name, count in dataclasses.asdict(counts).items():  # they differ by what a save at a batch's end leaves
                setattr(counts, name, count + more)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not getattr(trainer.datamodule, "may_checkpoint", True):
            rank_zero_warn(
                "training ended while served requests wait to be learned: the last checkpoint forgets them "
                "(data.buffer.persist keeps them)"
            )
        self._save(trainer)  # also for runs that end by epochs or time


def global_batch(trainer: pl.Trainer) -> int | None:
    """Samples of a batch over all ranks; None for loaders that do not say (online data: updates, not samples)."""
    loader = trainer.train_dataloader
    size = getattr(loader, "global_batch", None)
    return size if isinstance(size, int) else None


def best_checkpoint(directory: Path, config: CheckpointConfig) -> ModelCheckpoint | None:
    """The weights of the best validation; None when nothing is monitored."""
    if config.monitor is None:
        return None
    return ModelCheckpoint(
        dirpath=directory,
        filename=BEST_NAME,
        auto_insert_metric_name=False,
        monitor=config.monitor,
        mode=config.mode,
        save_top_k=1,
        save_weights_only=True,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )


class RandomStates(Callback):
    """Keeps each rank's generators (torch, its device, numpy, random) in the checkpoint.

    They are put back right before the first step, after everything else that may draw from them. With another number of
    ranks they cannot be put back; the run then goes on from its seed.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": _gather(_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._loaded is not None and len(self._loaded) == trainer.world_size:
            _set_random_state(self._loaded[trainer.global_rank])
        self._loaded = None


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's, in order of rank (a collective call where there are several)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {  # plain types and tensors only: checkpoints are read with weights_only=True
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
