"""Training under a real SLURM of two nodes: preempted, moved, out of time, in an array; equal to never interrupted."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from draftsmith.inference import cli
from draftsmith.trainers import runs
from draftsmith.trainers.export import rebuild
from tests.slurm.cluster import NODES, Cluster, wait_until
from tests.tiny_run import COMMAND, ROOT, finish, start
from tests.trainers.test_fit import STEPS, losses, records, weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def overlay(place: Path, name: str, delay: float = 2.0) -> str:
    """A config laid over tiny.yaml: records the samples, slow from step 3 on while the file `name`.gate is there."""
    callback = {
        "class_path": "tests.slurm.gated.GatedRecorder",
        "init_args": {"path": str(place / f"{name}.jsonl"), "gate": str(place / f"{name}.gate"), "delay": delay},
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], "enable_progress_bar": False}}))
    return str(path)


def submit(
    slurm: Cluster,
    place: Path,
    name: str,
    *options: str,
    overrides: tuple[str, ...] = (),
    delay: float = 2.0,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """`draftsmith submit`, slow until `release`. Returns the job's number."""
    (place / f"{name}.gate").touch()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the recorder
    argv = ["submit", "-c", "tiny.yaml", "-c", overlay(place, name, delay), "--run", name, *options]
    assert cli.main([*argv, *(("--", *overrides) if overrides else ())]) == 0
    out = capsys.readouterr().out
    match = re.search(r"^job +(\d+)$", out, re.MULTILINE)
    assert match is not None, out
    return match[1]


def release(place: Path, name: str) -> None:
    (place / f"{name}.gate").unlink()


def reached(place: Path, name: str, step: int, log: Path, ranks: int = 1) -> None:
    """Wait until all ranks are in a step."""

    def there() -> bool:
        return all(any(line["step"] >= step for line in records(place, name, rank)) for rank in range(ranks))

    try:
        wait_until(f"step {step} is not reached", there, 90)
    except AssertionError as e:
        raise AssertionError(f"{e}\n{log.read_text() if log.exists() else 'no log'}") from None


def requeue(slurm: Cluster, job: str, log: Path) -> None:
    """The notice, as SLURM gives it; wait until the scheduler has the job back."""
    slurm.run("scancel", "--signal=USR1", job)
    try:
        back_in_queue(slurm, job)
    except AssertionError as e:
        raise AssertionError(f"{e}\n{log.read_text()}") from None
    assert "stopped by SIGUSR1 after step" in log.read_text()


def back_in_queue(slurm: Cluster, job: str) -> None:
    assert slurm.wait_for(job, "PENDING", 120)["Restarts"] == "1"


def finished(slurm: Cluster, job: str, log: Path) -> None:
    try:
        slurm.wait_for(job, "COMPLETED", 90)
    except AssertionError as e:
        raise AssertionError(f"{e}\n{log.read_text()}") from None


def assert_same(place: Path, whole: str, name: str, ranks: int = 1, run: Path | None = None) -> None:
    """Same samples and draws in every step on every rank, same losses, same weights, bit for bit."""
    for rank in range(ranks):
        one, parts = records(place, whole, rank), records(place, name, rank)
        assert parts == one and [line["step"] for line in parts] == list(range(1, STEPS + 1))
    folder = place / "runs" / name if run is None else run
    assert losses(folder) == losses(place / "runs" / whole) and len(losses(folder)) == STEPS
    mine, theirs = (rebuild(run, "last").state_dict() for run in (folder, place / "runs" / whole))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def sessions(run: Path) -> list[str]:
    story = json.loads((run / runs.PROVENANCE).read_text())
    return [*(session["status"] for session in story["earlier"]), story["status"]]


def uninterrupted(place: Path, name: str, *arguments: str) -> None:
    """The run that is never stopped, without SLURM."""
    command = ("fit", "-c", "tiny.yaml", "-c", overlay(place, name), "--run", name, *arguments)
    finish(start(place, *command))


@pytest.fixture(scope="module")
def whole(place: Path) -> str:
    uninterrupted(place, "whole")
    return "whole"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_scheduler_takes_the_shipped_scripts(slurm: Cluster, script: Path, tmp_path: Path) -> None:
    said = slurm.run("sbatch", "--test-only", str(script), "-c", "lm/debug", cwd=tmp_path)
    assert re.search(r"Job \d+ to start at", said), said
    said = slurm.run("sbatch", "--test-only", "--nodes=9", str(script), check=False)
    assert "to start at" not in said  # the same check refuses what the cluster does not have


def test_a_preempted_run_goes_on_on_another_node(
    slurm: Cluster, place: Path, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node is drained and the notice comes; the job goes to the other node, and the first one is resumed."""
    job = submit(slurm, place, "moved", "--time", "10", monkeypatch=monkeypatch, capsys=capsys)
    run, log = place / "runs" / "moved", place / "runs" / "moved" / "slurm.log"
    reached(place, "moved", 4, log)
    node = slurm.job(job)["NodeList"]
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=maintenance")
    try:
        requeue(slurm, job, log)
        assert not list(run.glob("hpc_ckpt*")) and not (run / ".lock").exists()
        saved = runs.newest_checkpoint(run)
        assert saved is not None and 4 < runs.step_of(saved) < STEPS
        release(place, "moved")
        slurm.start_now(job)
        finished(slurm, job, log)
        assert slurm.job(job)["NodeList"] == next(other for other in NODES if other != node)
    finally:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert f"resumes {saved.name}" in log.read_text() and "starts" in log.read_text()  # one log
    assert_same(place, whole, "moved")
    assert sessions(run) == ["requeued", "finished"]
    assert not list(run.glob("hpc_ckpt*")) and not (run / ".lock").exists()


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_nodes_are_preempted_drained_and_resumed(
    slurm: Cluster, place: Path, strategy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank on each node (gloo); the requeued job waits for the drained node, then goes on where it was."""
    whole, name = f"whole-{strategy}", f"nodes-{strategy}"
    settings = ("--data.text.batch_size=2", f"--trainer.strategy={strategy}")
    uninterrupted(place, whole, *settings, "--trainer.devices=2")
    job = submit(
        slurm,
        place,
        name,
        *("--nodes", "2", "--tasks-per-node", "1", "--time", "10"),
        overrides=settings,
        monkeypatch=monkeypatch,
        capsys=capsys,
    )
    run, log = place / "runs" / name, place / "runs" / name / "slurm.log"
    reached(place, name, 4, log, ranks=2)
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=maintenance")
    requeue(slurm, job, log)
    release(place, name)
    slurm.start_now(job)
    wait_until("n2 is not drained", lambda: slurm.states()["n2"] == "drained", 30)
    assert slurm.job(job)["JobState"] == "PENDING"
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    finished(slurm, job, log)
    assert_same(place, whole, name, ranks=2)
    assert sessions(run) == ["requeued", "finished"]
    assert "terminate called" not in log.read_text()  # a rank that leaves inside the process group aborts


def test_out_of_time(
    slurm: Cluster, place: Path, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM itself sends the notice before the limit of one minute; nobody else interferes until the job is back."""
    options = ("--time", "1", "--signal-grace", "40")
    job = submit(slurm, place, "late", *options, delay=5.0, monkeypatch=monkeypatch, capsys=capsys)
    log = place / "runs" / "late" / "slurm.log"
    slurm.wait_for(job, "RUNNING")
    back_in_queue(slurm, job)
    assert "stopped by SIGUSR1 after step" in log.read_text()
    release(place, "late")
    slurm.start_now(job)
    finished(slurm, job, log)
    assert_same(place, whole, "late")
    assert sessions(place / "runs" / "late") == ["requeued", "finished"]


def test_an_array_of_three_seeds(
    slurm: Cluster, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder for each; the notice to one task requeues that one alone (its job id is that of the whole array)."""
    options = ("--array", "3-5", "--time", "10")
    array = submit(slurm, place, "sweep", *options, delay=4.0, monkeypatch=monkeypatch, capsys=capsys)
    folder = place / "runs" / "sweep"
    tasks = {seed: f"{array}_{seed}" for seed in (3, 4, 5)}

    def in_step(step: int) -> bool:  # three tasks write into one file of records
        return sum(line["step"] == step for line in records(place, "sweep")) == len(tasks)

    wait_until("the tasks do not train", lambda: in_step(4), 120)
    assert slurm.job(tasks[5])["JobId"] == array  # the case that is easily got wrong
    requeue(slurm, tasks[5], folder / "seed-5.log")
    assert [slurm.job(tasks[seed])["JobState"] for seed in (3, 4)] == ["RUNNING"] * 2
    release(place, "sweep")
    slurm.start_now(tasks[5])
    for seed, task in tasks.items():
        finished(slurm, task, folder / f"seed-{seed}.log")
    assert [slurm.job(tasks[seed])["Restarts"] for seed in (3, 4, 5)] == ["0", "0", "1"]
    assert sorted(path.name for path in folder.glob("seed-?")) == ["seed-3", "seed-4", "seed-5"]
    assert [sessions(folder / f"seed-{seed}") for seed in tasks] == [["finished"]] * 2 + [["requeued", "finished"]]
    finals = [weights(folder / f"seed-{seed}") for seed in tasks]
    seeds = [yaml.safe_load((folder / f"seed-{seed}" / runs.CONFIG).read_text())["seed_everything"] for seed in tasks]
    assert seeds == [3, 4, 5]
    assert not all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    # seed 5 was interrupted
    uninterrupted(place, "five", "--seed_everything=5")
    torch.testing.assert_close(finals[2], weights(place / "runs" / "five"), rtol=0, atol=0)


def test_wrong_numbers_of_tasks_end_at_once(slurm: Cluster, place: Path, tmp_path: Path) -> None:
    """Two tasks, one device: refused in one line; they would be two runs in one folder."""
    script = tmp_path / "wrong.sbatch"
    fit = f"{' '.join(COMMAND)} fit -c {place}/tiny.yaml --run {tmp_path}/wrong"
    script.write_text(f"#!/bin/bash\nsrun {fit}\n")
    options = ("--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={tmp_path}/log", f"--chdir={tmp_path}")
    slurm.wait_for(slurm.run("sbatch", *options, str(script)).strip(), "FAILED")
    said = (tmp_path / "log").read_text()
    assert (
        "error: srun started 2 tasks, and the trainer has 1 x 1 (devices x nodes)" in said and "Traceback" not in said
    )
    assert not (tmp_path / "wrong" / "checkpoints").exists()
