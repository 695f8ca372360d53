"""`draftsmith` in a process of its own, as a user types it; what a run left behind."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from draftsmith.trainers import runs

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "draftsmith.inference.cli"]
TIMEOUT = 240  # seconds


def run(place: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run `draftsmith *arguments` in the folder `place`: its stdout and stderr. Asserts the exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DRAFTSMITH_CACHE": str(place / "cache"),
    }
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_JOB_ID"):
        environment.pop(name, None)
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=place, env=environment, text=True, capture_output=True, timeout=TIMEOUT
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state of the newest checkpoint of the run in `folder`."""
    newest = runs.newest_checkpoint(folder)
    assert newest is not None
    content: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    return content
