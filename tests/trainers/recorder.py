"""A callback for runs in other processes: which samples each step saw, on each rank. Named in a config overlay."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


def append_line(path: Path, trainer: pl.Trainer, batch: Any) -> None:
    """{"step", "rank", "samples", "random"} of this moment, as one more line of `path`."""
    line = {
        "step": trainer.global_step,
        "rank": trainer.global_rank,
        "samples": batch.sample_id.tolist(),
        "random": torch.rand(()).item(),  # what dropout would draw
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


class SampleRecorder(pl.Callback):
    """Appends {"step", "rank", "samples", "random"} to `path` when a step begins; `delay` gives time to kill it."""

    def __init__(self, path: str, delay: float = 0.0) -> None:
        self.path = Path(path)
        self.delay = delay

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        append_line(self.path, trainer, batch)
        time.sleep(self.delay)
