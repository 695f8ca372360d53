"""How fast training runs: `perf/tokens_per_s`, `perf/steps_per_s`, and `perf/mfu` on devices whose peak is known."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from draftsmith.trainers.strategies import full_size


class Throughput(Callback):
    """Rates over the last `window` steps, validation and saving left out; no device synchronisation of its own.

    Tokens are those of `batch.ids`, padding included, over all ranks. MFU counts 6 operations per trainable parameter
    and token (Kaplan et al. 2020, no attention term) against the peak of the computing dtype.
    """

    def __init__(self, window: int = 20) -> None:
        self.steps: deque[tuple[float, int]] = deque(maxlen=window)  # (seconds, tokens)
        self.flops_per_token = 0
        self.peak: float | None = None
        self._began: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.flops_per_token = 6 * sum(full_size(p) for p in pl_module.parameters() if p.requires_grad)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            precision = str(trainer.precision)
            dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
            self.peak = get_available_flops(device, dtype)
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._began is not None:
            ids = getattr(batch, "ids", None)
            self.steps.append((now - self._began, ids.numel() * trainer.world_size if isinstance(ids, Tensor) else 0))
        self._began = now
        if self.steps and trainer.global_step % trainer.log_every_n_steps == 0:  # each `log` takes a share of a ms
            seconds, tokens = (sum(column) for column in zip(*self.steps, strict=True))
            rates = {"perf/steps_per_s": len(self.steps) / seconds}
            if tokens:
                rates["perf/tokens_per_s"] = tokens / seconds
            if tokens and self.peak:
                rates["perf/mfu"] = self.flops_per_token * tokens / seconds / (self.peak * trainer.world_size)
            pl_module.log_dict(rates, batch_size=1)

    def on_validation_start(self, *args: Any) -> None:
        self._began = None  # the step around it is not counted

    def on_save_checkpoint(self, *args: Any) -> None:
        self._began = None
