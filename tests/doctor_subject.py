"""What the tests of `draftsmith doctor` share: a run to check, a job around it, and what a finding says."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.data.text import TextDataModule
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.trainers import runs
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig
from draftsmith.trainers.checks import storage
from draftsmith.trainers.checks.finding import Finding
from draftsmith.trainers.checks.job import Job
from draftsmith.trainers.checks.subject import Subject
from tests.tiny_run import ARCH

GOOD = Job(
    name="train", nodes=1, ntasks=2, tasks_per_node=2, signal="SIGUSR1@120", requeue=True, inside=True, in_step=True
)
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "callbacks": None,
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory; no job around us; the disk's speed is not measured."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SBATCH_", runs.FOLDER_VARIABLE, "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "write_speed", lambda folder: 2.0**20)
    return tmp_path


def subject(**changes: Any) -> Subject:
    """A run of the tiny model; `changes` go to the trainer, or to the subject where it has such a field."""
    own = {f.name for f in dataclasses.fields(Subject)}
    made: dict[str, Any] = {
        "checkpoint": CheckpointConfig(),
        "module": LM(HFModel(arch=ARCH)),
        "data": TextDataModule(),
        "run": Path("runs/x"),
        "env": {},
        "job": None,
    }
    made |= {name: value for name, value in changes.items() if name in own}
    trainer = TRAINER | {name: value for name, value in changes.items() if name not in own}
    return Subject(trainer=SimpleNamespace(**trainer), **made)


def two(**changes: Any) -> Subject:
    return subject(**({"devices": 2, "strategy": "ddp"} | changes))


def says(found: Finding, verdict: str, *words: str) -> None:
    assert found.verdict == verdict, found
    for word in words:
        assert word in found.text, found
    assert "\n" not in found.text


def stub(name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is alone on PATH, with what the system has."""
    folder = Path("bin").absolute()
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
