"""Signals: SIGTERM and Ctrl-C save on all ranks alike and end the run; SIGUSR1 saves and, under SLURM, requeues it."""

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from draftsmith.trainers import slurm_job
from draftsmith.trainers.callbacks.checkpoint import StepCheckpoint
from draftsmith.trainers.slurm_job import NOTICE

_MOST_STEPS = 64  # between two agreements, however short the steps are


class Stopped(BaseException):
    """Training was stopped by a signal, after saving. Not an Exception: nothing but the command line may catch it."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the checkpoint is saved")
        self.signum = signum
        self.step = step

    @property
    def requeues(self) -> bool:
        """Whether the run wants to go back into SLURM's queue."""
        return self.signum == NOTICE


class StopSignals(Callback):
    """SIGTERM and Ctrl-C save at the end of the running step, on all ranks alike, and end the run (`Stopped`).

    SIGUSR1 saves too; in a SLURM job it then ends the run for a requeue, elsewhere training goes on.
    The handler only sets a flag: saving inside it would save half a step, and hang where collectives are in flight.
    Ranks ask each other about once in `agree_seconds`. A second SIGTERM or Ctrl-C is not waited for.
    """

    def __init__(self, saver: StepCheckpoint, agree_seconds: float = 1.0) -> None:
        self.saver = saver
        self.agree_seconds = agree_seconds
        self.received: int | None = None
        self.noticed = False
        self._agreed: int | None = None  # signal for which all ranks save as soon as a checkpoint can be taken
        self.stopping: Stopped | None = None
        self._before: dict[int, Any] = {}
        self._interval, self._wait = 1, 1  # steps between two agreements, steps that are left
        self._asked = 0.0  # time of the last agreement

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, NOTICE):
                self._before[signum] = signal.signal(signum, self._note)
            self.noticed = slurm_job.early_notice() or self.noticed

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == NOTICE:
            self.noticed = True
            return
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
        if self.stopping is not None or not self.saver.stepped(trainer):
            return
        if self._agreed is None:
            self._agreed = self._agree(trainer)
        if self._agreed is None or not self.saver.save_now(trainer):
            return
        if self._agreed == NOTICE and slurm_job.name() is None:
            if trainer.is_global_zero:
                print(f"SIGUSR1: step {trainer.global_step} is saved, training goes on", file=sys.stderr, flush=True)
        else:
            self.stopping = Stopped(self._agreed, trainer.global_step)
        self._agreed = None

    def _agree(self, trainer: pl.Trainer) -> int | None:
        """The signal that some rank received, the same on all ranks; None mostly. A collective call now and then."""
        received, noticed = self.received or 0, self.noticed
        if trainer.world_size > 1:
            self._wait -= 1
            if self._wait > 0:
                return None
            seconds = time.monotonic() - self._asked
            own = torch.tensor([received, noticed, seconds], dtype=torch.float32, device=trainer.strategy.root_device)
            signum, any_notice, slowest = trainer.strategy.reduce(own, reduce_op="max").tolist()
            received, noticed = round(signum), any_notice > 0
            # All ranks compute the same interval, from the slowest one's time: long steps are asked about one by one.
            if slowest < self.agree_seconds / 2:
                self._interval = min(_MOST_STEPS, self._interval * 2)
            elif slowest > self.agree_seconds:
                self._interval = max(1, self._interval // 2)
            self._wait, self._asked = self._interval, time.monotonic()
        if received:
            return received
        if noticed:
            self.noticed = False  # before the save: a signal that comes during it asks for another one
            return int(NOTICE)
        return None

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
