"""Beside every checkpoint: command, commit, versions, machine (`provenance.json` of a run folder)."""

import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from draftsmith.inference import environment
from draftsmith.trainers.runs import PROVENANCE, write_json


def command_line(argv: list[str] | None = None) -> str:
    """The command as typed, quoted for a shell, the program without its directory."""
    program, *arguments = argv or sys.argv
    return shlex.join([Path(program).name, *arguments])


def collect(seed: int | None) -> dict[str, Any]:
    """What is known when a session starts; the keys are those of the manifest where it has them."""
    root = Path(__file__).resolve().parent.parent
    changed = environment.git(root, "status", "--porcelain", "--untracked-files=no")
    machine = environment.machine()
    return {
        "command": command_line(),
        "directory": str(Path.cwd()),
        "git_commit": environment.git(root, "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "versions": environment.versions(),
        "hardware": f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Session:
    """One stay of a process in a run folder. The top level of the file is the newest session; earlier ones follow."""

    def __init__(self, run: Path, seed: int | None, resumed_from: str | None) -> None:
        self.path = run / PROVENANCE
        self.began = time.monotonic()
        earlier = self._read()
        history = earlier.pop("earlier", [])
        self.before = float(earlier.get("wall_seconds") or 0.0)
        self.content = {
            **collect(seed),
            "resumed_from": resumed_from,
            "status": "running",
            "wall_seconds": self.before,
            "earlier": [*history, earlier] if earlier else [],
        }
        write_json(self.path, self.content)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def end(self, status: str, step: int, **more: Any) -> None:
        """Note how it ended. `wall_seconds` is the sum over all sessions."""
        seconds = round(self.before + time.monotonic() - self.began, 3)
        self.content |= {"status": status, "steps": step, "wall_seconds": seconds, **more}
        write_json(self.path, self.content)
