"""Doctor's checks of the SLURM job: tasks, srun, requeue, the signal and its grace; scripts and jobs as read."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers.checks import job, slurm, storage
from draftsmith.trainers.checks.finding import ERROR, OK, WARNING
from draftsmith.trainers.checks.job import Job
from tests.doctor_subject import GOOD, elsewhere, says, stub, subject, two  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_tasks_that_agree() -> None:
    says(slurm.tasks(two(), GOOD), OK, "2 tasks for 2 devices x 1 nodes")
    nodes = dataclasses.replace(GOOD, nodes=2, ntasks=4)
    says(slurm.tasks(two(num_nodes=2), nodes), OK, "4 tasks")
    says(slurm.tasks(subject(), Job()), OK, "one task, one rank")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ntasks": 4, "tasks_per_node": 4}, ("SLURM has 4 tasks", "2 devices x 1 nodes = 2", "--ntasks-per-node=2")),
        ({"tasks_per_node": None}, ("without --ntasks-per-node", "--ntasks-per-node=2")),
        ({"tasks_per_node": 1}, ("1 tasks per node", "trainer.devices is 2")),
        ({"nodes": 2}, ("SLURM has 2 nodes", "trainer.num_nodes is 1")),
        ({"ntasks": None, "tasks_per_node": None}, ("names no tasks", "2 ranks")),
    ],
)
def test_tasks_that_do_not_agree(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    says(slurm.tasks(two(), dataclasses.replace(GOOD, **changes)), ERROR, *words)


def test_devices_that_only_the_gpus_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    says(slurm.tasks(two(devices="auto", accelerator="gpu"), GOOD), WARNING, "'auto'", "number of tasks per node")


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("2", 2), ([0, 1, 3], 3), ("0,1", 2), ("auto", 1)])
def test_devices_as_the_trainer_takes_them(devices: Any, count: int) -> None:
    assert subject(devices=devices).devices == count


def test_srun_is_needed_by_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    says(slurm.srun(two(), GOOD), ERROR, "no srun on PATH", "mount")
    says(slurm.srun(subject(), GOOD), OK, "one rank")
    stub("srun", "", monkeypatch)
    says(slurm.srun(two(), GOOD), OK, "found")
    batch = dataclasses.replace(GOOD, in_step=False)
    says(slurm.srun(two(), batch), OK, "found")  # doctor in a batch script, before srun
    says(slurm.srun(two(starting=True), batch), WARNING, "not started by srun", "srun draftsmith")
    says(slurm.srun(two(), dataclasses.replace(GOOD, inside=False)), OK, "script's business")


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_job_that_is_called_like_a_shell(name: str) -> None:
    shell = dataclasses.replace(GOOD, name=name)
    says(slurm.name(two(), shell), ERROR, repr(name), "--job-name")
    says(slurm.name(subject(), shell), WARNING, repr(name))
    says(slurm.name(two(), GOOD), OK)
    assert [f.check for f in slurm.checks(two(job=dataclasses.replace(shell, ntasks=9)))] == ["slurm name"]


def test_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    says(slurm.requeue(GOOD), WARNING, "no scontrol on PATH")
    stub("scontrol", "", monkeypatch)
    says(slurm.requeue(GOOD), OK)
    says(slurm.requeue(dataclasses.replace(GOOD, requeue=None)), WARNING, "#SBATCH --requeue")
    says(slurm.requeue(dataclasses.replace(GOOD, requeue=False)), WARNING, "--no-requeue")
    says(slurm.requeue(dataclasses.replace(GOOD, script_known=False)), WARNING, "cannot be read")


@pytest.mark.parametrize(
    ("signal", "verdict", "words"),
    [
        ("SIGUSR1@120", OK, ("120 s of grace",)),
        ("USR1@120", OK, ("120 s",)),
        ("10@120", OK, ("120 s",)),
        (None, WARNING, ("no --signal", "SIGUSR1@120")),
        ("SIGTERM@120", ERROR, ("SIGUSR1 alone", "--signal=SIGUSR1@120")),
        ("B:SIGUSR1@120", ERROR, ("only the batch shell", "SIGUSR1@120")),
        ("SIGUSR1@1", ERROR, ("1 s of grace", "about 3 s", "--signal=SIGUSR1@")),
        ("SIGUSR1@5", WARNING, ("5 s of grace is little",)),
    ],
)
def test_the_signal_and_its_grace(signal: str | None, verdict: str, words: tuple[str, ...]) -> None:
    says(slurm.grace(subject(), dataclasses.replace(GOOD, signal=signal)), verdict, *words)


def test_the_grace_follows_the_bytes_of_a_save_and_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    assert storage.save_seconds(one)[0] == pytest.approx(storage.checkpoint_bytes(one) / 2**20 + 3)
    monkeypatch.setattr(storage, "write_speed", lambda folder: storage.checkpoint_bytes(one) / 1000)
    says(slurm.grace(one, GOOD), ERROR, "120 s of grace", "1003 s", "SIGUSR1@203")


def test_without_slurm_there_is_one_line() -> None:
    (found,) = slurm.checks(subject())
    says(found, OK, "no SLURM job around")


def test_a_script_is_read_as_sbatch_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "x.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --job-name=deep -N 2\n#SBATCH --ntasks-per-node 4  # each a GPU\n#SBATCH -n8\n"
        "#SBATCH --requeue --signal=B:USR1\necho '#SBATCH --nodes=9'\n"
    )
    found = job.from_script(script)
    assert (found.name, found.nodes, found.tasks_per_node, found.ntasks) == ("deep", 2, 4, 8)
    assert found.requeue is True and found.signal == "B:USR1" and found.signal_name == "USR1" and found.grace == 60
    assert not found.inside and found.total == 8
    for text, word in (("echo hi\n", "no #SBATCH line"), (None, "cannot read")):
        if text is None:
            script.unlink()
        else:
            script.write_text(text)
        with pytest.raises(InvalidValue, match=word):
            job.from_script(script)


def test_the_job_around_us_tells_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    stub("scontrol", 'echo "$@" > asked; echo "#SBATCH --signal=SIGUSR1@300"; echo "#SBATCH --requeue"', monkeypatch)
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_STEP_ID": "0",
    }
    found = job.from_environment(env)
    assert found == Job("train", 2, 8, 4, "SIGUSR1@300", True, inside=True, in_step=True, number="77")
    assert Path("asked").read_text().split() == ["write", "batch_script", "77", "-"]
    stub("scontrol", "exit 1", monkeypatch)
    found = job.from_environment(env)
    assert found is not None and not found.script_known
    assert job.from_environment({}) is None
