"""A callback for jobs: records the samples, and holds the run up while a file is there. Named in a config overlay."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.trainers.recorder import append_line


class GatedRecorder(pl.Callback):
    """Appends {"step", "rank", "samples", "random"} to `path` when a step is done.

    From step `after` on, each step takes `delay` seconds as long as the file `gate` exists.
    """

    def __init__(self, path: str, gate: str, after: int = 3, delay: float = 1.0) -> None:
        self.path, self.gate, self.after, self.delay = Path(path), Path(gate), after, delay

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        end = time.monotonic() + self.delay
        while trainer.global_step >= self.after and self.gate.exists() and time.monotonic() < end:
            time.sleep(0.05)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        append_line(self.path, trainer, batch)
