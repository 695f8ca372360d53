"""Progress with the time left: rich's bar on a terminal, one plain line now and then in a log file. All on stderr."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar


def progress() -> Callback:
    """The one that fits where stderr goes."""
    if sys.stderr.isatty():
        return RichProgressBar(leave=True, console_kwargs={"stderr": True})
    return ProgressLines()


class ProgressLines(ProgressBar):
    """A line for the first and last step and about every `every` seconds between; nothing that needs a terminal."""

    def __init__(self, every: float = 10.0) -> None:
        super().__init__()
        self.every = every
        self.enabled = True
        self._began = self._said = 0.0
        self._first = 0

    def disable(self) -> None:  # Lightning calls it on all ranks but the first
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._said, self._first = time.monotonic(), 0.0, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step, last = time.monotonic(), trainer.global_step, self._last(trainer)
        if not self.enabled or (now - self._said < self.every and step != last):
            return
        self._said = now
        parts = [f"step {step}" + (f"/{last}" if last else "")]
        parts += [
            f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"
        ]
        done = step - self._first
        if last and done:
            parts.append(f"{_clock((now - self._began) / done * (last - step))} left")
        print("  ".join(parts), file=sys.stderr, flush=True)

    def _last(self, trainer: pl.Trainer) -> int | None:
        total = trainer.estimated_stepping_batches
        return int(total) if total != float("inf") else None

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            print(*args, file=sys.stderr, **kwargs)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
