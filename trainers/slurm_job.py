"""The SLURM job that this process is a task of: its name, its notice (SIGUSR1), how it goes back into the queue."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from draftsmith.inference.errors import InvalidState, InvalidValue

# Allocations in which people try things: many commands run in one, so it is not one run (Lightning has the same rule).
INTERACTIVE = ("bash", "interactive")
NOTICE = signal.SIGUSR1  # what SLURM sends before the time is up (--signal=SIGUSR1@seconds)
_SCONTROL_SECONDS = 60


def name() -> str | None:
    """The job as squeue writes it: 12, or 12_3 for a task of an array. None outside, or in an interactive allocation.

    Of an array the last task's own id is that of the whole array: `scontrol requeue` by it would requeue every task.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return job if array is None or task is None else f"{array}_{task}"


def check_tasks(devices: int, nodes: int) -> None:
    """Raises InvalidValue unless srun started one task for each device of each node.

    Lightning looks in its distributed strategies only: with one device, two tasks would be two runs in one folder.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks != devices * nodes:
        each = f"--ntasks-per-node={devices} and --nodes={nodes}"
        raise InvalidValue(
            f"srun started {tasks} tasks, and the trainer has {devices} x {nodes} (devices x nodes): ask for {each}, "
            "or set trainer.devices and trainer.num_nodes to what SLURM gave (submit writes numbers that agree)"
        )


_early: list[int] = []  # notices that came while nobody trained


@contextmanager
def notice_held() -> Iterator[None]:
    """Within, a SIGUSR1 is remembered for `StopSignals` instead of killing a process that still loads, or already ends.

    A handler and not a signal mask: a mask is the thread's own, and the libraries' threads would take the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(NOTICE, lambda signum, frame: _early.append(signum))
    try:
        yield
    finally:
        signal.signal(NOTICE, before)
        _early.clear()


def early_notice() -> bool:
    """Whether a SIGUSR1 came before training began; forgets it."""
    came = bool(_early)
    _early.clear()
    return came


def requeue() -> str:
    """Put our job back into the queue and return its name; SLURM ends this step at once.

    Raises InvalidState where it cannot.
    """
    job = name()
    if job is None:
        raise InvalidState("cannot requeue: this is no SLURM job")
    hint = "the checkpoint is saved, so submit the job again with the same --run to go on"
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        raise InvalidState(
            f"cannot requeue job {job}: no scontrol on PATH (a container needs the host's mounted); {hint}"
        )
    try:
        done = subprocess.run(
            [scontrol, "requeue", job],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SCONTROL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise InvalidState(f"cannot requeue job {job}: {e}; {hint}") from e
    if done.returncode != 0:
        said = " ".join(done.stdout.split()) or f"exit code {done.returncode}"
        raise InvalidState(f"cannot requeue job {job}: scontrol says {said!r}; {hint}")
    return job
