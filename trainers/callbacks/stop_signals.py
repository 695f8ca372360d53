"""Stopping at a signal: SIGTERM and Ctrl-C save on all ranks alike and end the run."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from draftsmith.trainers.callbacks.checkpoint import StepCheckpoint


class Stopped(BaseException):
    """Training was stopped by a signal, after saving. Not an Exception: nothing but the command line may catch it."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the checkpoint is saved")
        self.signum = signum
        self.step = step


class StopSignals(Callback):
    """SIGTERM and Ctrl-C save at the end of the running step, on all ranks alike, and end the run (`Stopped`).

    The handler only sets a flag: saving inside it would save half a step, and hang where collectives are in flight.
    Ranks agree every `agree_every` steps. A second signal of either kind is not waited for.
    """

    def __init__(self, saver: StepCheckpoint, agree_every: int = 8) -> None:
        self.saver = saver
        self.agree_every = agree_every
        self.received: int | None = None
        self._agreed = False  # by all ranks: stop as soon as a checkpoint can be taken
        self.stopping: Stopped | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            signal.raise_signal(signum)
        self.received = signum

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.saver.stepped(trainer):
            return
        if not self._agreed:
            self._agreed = self.received is not None
            if trainer.world_size > 1:
                if trainer.global_step % self.agree_every:
                    self._agreed = False
                    return
                self._agreed = trainer.strategy.reduce_boolean_decision(self._agreed, all=False)
        if self._agreed and self.saver.save_now(trainer):
            self.stopping = Stopped(self.received or signal.SIGTERM, trainer.global_step)

    # It ends at the next hook, so that the step just saved is still logged.
    def on_train_batch_start(self, *args: Any) -> None:
        self._end()

    def on_validation_start(self, *args: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self.stopping is not None:
            raise self.stopping

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()
