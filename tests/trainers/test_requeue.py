"""SIGUSR1: the flag, the agreement, `scontrol requeue`; with SLURM's variables and a stub of scontrol, no SLURM."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.trainers import runs, slurm_job
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from draftsmith.trainers.callbacks.stop_signals import Stopped, StopSignals
from tests import tiny_run
from tests.trainers import test_fit as local
from tests.trainers.test_runs import Restless, Signal, fit, saved

JOB = {  # what srun sets for the only task of a job
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "a-run",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def stub(directory: Path, code: int = 0, says: str = "") -> Path:
    """A scontrol that writes down what it is asked, says something and ends with `code`."""
    directory.mkdir(exist_ok=True)
    path = directory / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$@" >> {directory}/asked\necho "{says}" >&2\nexit {code}\n')
    path.chmod(0o755)
    return directory / "asked"


# --- the job


def test_names_of_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert slurm_job.name() is None
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert slurm_job.name() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "14")  # the last task of an array has the array's own id
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job.name() == "14_2" and runs.folder(None, "x") == Path("runs/14_2")
    asked = stub(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert slurm_job.requeue() == "14_2" and asked.read_text() == "requeue 14_2\n"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm_job.name() is None


def test_a_requeue_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InvalidState, match="this is no SLURM job"):
        slurm_job.requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidState, match=r"cannot requeue job 14: no scontrol on PATH .*; the checkpoint is saved"):
        slurm_job.requeue()
    stub(tmp_path / "bin", 1, "Job is not requeueable")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(InvalidState, match="cannot requeue job 14: scontrol says 'Job is not requeueable'"):
        slurm_job.requeue()


def test_tasks_are_devices_times_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_job.check_tasks(1, 1)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    slurm_job.check_tasks(2, 2)
    said = "srun started 4 tasks, and the trainer has 2 x 1 .*: ask for --ntasks-per-node=2 and --nodes=1, or"
    with pytest.raises(InvalidValue, match=said):
        slurm_job.check_tasks(2, 1)


# --- the callback


def test_outside_slurm_it_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=100, keep=9))
    before = signal.getsignal(signal.SIGUSR1)
    toy = fit(tmp_path, [Signal(3, signal.SIGUSR1), Signal(6, signal.SIGUSR1, 3), StopSignals(saver), saver])
    assert len(toy.drawn) == 12
    assert saved(tmp_path) == [f"step-000000{n:02d}.ckpt" for n in (4, 7, 12)]
    assert "SIGUSR1: step 4 is saved, training goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


def test_in_a_job_it_saves_and_ends_for_a_requeue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=100))
    with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 4") as caught:
        fit(tmp_path, [Signal(3, signal.SIGUSR1), StopSignals(saver), saver])
    assert caught.value.requeues and saved(tmp_path) == ["step-00000004.ckpt"]
    with pytest.raises(Stopped) as caught:  # a SIGTERM in the same step wins: somebody wants the job to end
        fit(tmp_path / "b", [Signal(3, signal.SIGUSR1), Signal(3, signal.SIGTERM), StopSignals(saver), saver])
    assert not caught.value.requeues


def test_it_waits_until_the_data_is_at_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=100, monitor=None))
    with pytest.raises(Stopped, match="after step 7"):
        fit(tmp_path, [Signal(4, signal.SIGUSR1), StopSignals(saver), saver], data=Restless(2))
    assert saved(tmp_path) == ["step-00000007.ckpt"]


def test_a_notice_before_training_waits_and_one_after_it_is_dropped(tmp_path: Path) -> None:
    class Late(Callback):
        """Sends one when the handlers are gone: by default it would kill this process."""

        def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)  # to any thread of the process, as the scheduler's

    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=100, keep=9))
    before = signal.getsignal(signal.SIGUSR1)
    with slurm_job.notice_held():
        os.kill(os.getpid(), signal.SIGUSR1)
        fit(tmp_path, [StopSignals(saver), saver, Late()])
    assert not slurm_job.early_notice()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert saved(tmp_path) == ["step-00000001.ckpt", "step-00000012.ckpt"]


class Ranks:
    """Stands in for a trainer of two ranks of which the other one received nothing, or a SIGTERM."""

    world_size = 2

    def __init__(self, seconds: float, other: float = 0.0) -> None:
        self.seconds, self.other, self.calls = seconds, other, 0
        self.strategy = self
        self.root_device = "cpu"

    def reduce(self, own: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.calls += 1
        own[0], own[2] = max(own[0], self.other), self.seconds
        return own


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 6), (0.7, 100), (30.0, 100)])
def test_ranks_ask_each_other_by_the_clock(tmp_path: Path, seconds: float, calls: int) -> None:
    """A hundred short steps cost a few questions; long ones are asked about one by one, so the grace time suffices."""
    signals = StopSignals(StepCheckpoint(tmp_path, CheckpointConfig()))
    trainer = Ranks(seconds)
    assert all(signals._agree(trainer) is None for _ in range(100))  # type: ignore[arg-type]
    assert trainer.calls == calls
    trainer.other = signal.SIGTERM
    assert signal.SIGTERM in [signals._agree(trainer) for _ in range(65)]  # type: ignore[arg-type]


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_place(tmp_path_factory.mktemp("requeue"), local.STEPS)


def start(place: Path, overlay: Path, path: Path) -> "subprocess.Popen[str]":
    """`draftsmith fit` as a task of job 12, with only the programs of `path`."""
    environment = {**os.environ, **JOB, "PYTHONPATH": str(tiny_run.ROOT), "OMP_NUM_THREADS": "1", "PATH": str(path)}
    return subprocess.Popen(
        [*tiny_run.COMMAND, "fit", "-c", "tiny.yaml", "-c", str(overlay)],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_fit_is_requeued_and_goes_on_in_its_job_folder(place: Path) -> None:
    """No scontrol: saved, said, exit 138. With it: requeued. Then on to the end: no step is repeated or left out."""
    overlay = local.recorder(place, "parts", delay=0.15)
    run = place / "runs" / "12"
    process = start(place, overlay, place / "none")
    deadline = time.monotonic() + tiny_run.TIMEOUT
    while not (run / ".lock").exists():  # it still loads: the notice waits
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, err = tiny_run.finish(process, 128 + signal.SIGUSR1)
    assert "cannot requeue job 12: no scontrol on PATH" in err and "Traceback" not in err
    assert saved(run) == ["step-00000001.ckpt"]

    asked = stub(place / "bin")
    process = start(place, overlay, place / "bin")
    local.wait_for_step(place, "parts", 7, process)
    process.send_signal(signal.SIGUSR1)
    _, err = tiny_run.finish(process)
    assert "resumes step-00000001.ckpt" in err and "requeued as job 12" in err
    assert asked.read_text().splitlines()[-1] == "requeue 12"  # doctor may have asked before

    _, err = tiny_run.finish(start(place, overlay, place / "bin"))
    lines = {json.dumps(line): line["step"] for line in local.records(place, "parts")}
    assert list(lines.values()) == list(range(local.STEPS))  # begun twice: with the same samples and draws
    story = json.loads((run / runs.PROVENANCE).read_text())
    assert [s["status"] for s in [*story["earlier"], story]] == ["requeued", "requeued", "finished"]
    assert story["slurm_job"] == "12" and len(local.losses(run)) == local.STEPS
    assert not list(place.rglob("hpc_ckpt*")) and not (run / ".lock").exists()
