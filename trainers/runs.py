"""Run folders (contract 6): `runs/<id>/{config.yaml, provenance.json, checkpoints/, tb/, tokenizer/, exports/}`.

One run, one folder: its lock refuses a second live process; `fit --run ID` goes on from the newest whole checkpoint.
Checkpoints are named by their step: `step-00000120.ckpt` (everything that resuming needs) and `best-00000100.ckpt`
(weights only).
"""

import json
import os
import pickle
import re
import shutil
import socket
import struct
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.trainers import shards, slurm_job

ROOT = Path("runs")
FOLDER_VARIABLE = "DRAFTSMITH_RUN_FOLDER"  # how rank 0 tells the ranks that it launches which folder is theirs
CONFIG, PROVENANCE, CHECKPOINTS, TOKENIZER = "config.yaml", "provenance.json", "checkpoints", "tokenizer"
STEP_NAME, BEST_NAME = "step-{step:08d}", "best-{step:08d}"
_NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step")
_LOCK = ".lock"
# what reading damaged bytes raises
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    struct.error,
)


class TornCheckpoint(UserWarning):
    """A checkpoint was skipped because part of it is missing."""


def folder(run: str | None, name: str) -> Path:
    """The folder of a run: `run` itself when it is a path, else `runs/<run>`.

    Without `run`: the folder that rank 0 chose, else the SLURM job (12, or 12_3 in an array), else `name` and the time.
    Raises InvalidValue for an empty id, or ranks started from outside (torchrun) without an id to agree on.
    """
    if run is not None:
        if not run.strip() or run.strip() in (".", ".."):
            raise InvalidValue(f"--run wants an id or a folder, got {run!r}")
        return Path(run) if os.sep in run else ROOT / run
    if FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    job = slurm_job.name()
    if job is not None:
        return ROOT / job
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidValue("several ranks were started from outside: give --run ID, so that all use one folder")
    return new_folder(name)


def new_folder(name: str) -> Path:
    """A folder that is not there yet, called after `name` and the time."""
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    found, number = ROOT / stem, 1
    while found.exists():
        number += 1
        found = ROOT / f"{stem}-{number}"
    return found


def existing(run: str) -> Path:
    """The folder of a run that must be there. Raises InvalidValue, naming the nearest ones."""
    import difflib

    path = folder(run, "")
    if (path / CONFIG).is_file():
        return path
    others = sorted(p.parent.name for p in path.parent.glob(f"*/{CONFIG}"))
    near = difflib.get_close_matches(path.name, others, n=1) or others[-1:]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidValue(f"no run in {str(path)!r} (a run folder has a {CONFIG}){hint}")


# --- the lock


@dataclass(frozen=True)
class Owner:
    """The process that works in a run folder."""

    pid: int
    host: str
    started: str  # start time of the process in clock ticks, so that a reused pid is not taken for it
    job: str | None  # SLURM job id: a requeued job may take over from itself on another host

    @classmethod
    def current(cls) -> "Owner":
        return cls(os.getpid(), socket.gethostname(), _started(os.getpid()), os.environ.get("SLURM_JOB_ID"))

    def alive(self) -> bool:
        """Whether it still runs. A process on another host cannot be asked and counts as alive."""
        if self.host == socket.gethostname():
            return _started(self.pid) == self.started != ""
        return self.job is None or self.job != os.environ.get(
            "SLURM_JOB_ID"
        )  # our own job, requeued, has left that host


def _started(pid: int) -> str:
    """Start time of a live process; "" for none. Where /proc is missing, "?" for any live pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # alive, and somebody else's
    return "?"


class RunLock:
    """Context manager: the run folder is ours, or InvalidState says whose it is. What dead processes left gives way."""

    def __init__(self, run: Path) -> None:
        self.path = run / _LOCK
        self.owner = Owner.current()
        self.created = False

    def __enter__(self) -> Self:
        self.created = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._take_over()
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(self.owner), file)
            return self
        raise InvalidState(f"cannot lock {self.path}: other processes keep taking it")

    def _take_over(self) -> None:
        other = self._read()
        if other is not None and other.alive():
            raise InvalidState(
                f"{self.path.parent} is in use by process {other.pid} on {other.host}: give another --run, or stop it "
                f"(if that host is gone, remove {self.path})"
            )
        stale = self.path.with_name(f"{_LOCK}-{self.owner.host}-{self.owner.pid}")
        try:
            os.rename(self.path, stale)  # of several that find it stale, one wins
            stale.unlink()
        except FileNotFoundError:
            pass

    def _read(self) -> Owner | None:
        for _ in range(20):  # it may be that its owner is writing it at this moment
            try:
                return Owner(**json.loads(self.path.read_text()))
            except FileNotFoundError:
                return None
            except (ValueError, TypeError):
                time.sleep(0.05)
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._read() == self.owner:
            self.path.unlink(missing_ok=True)
            if self.created and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()  # nothing came of it


# --- checkpoints


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    match = re.fullmatch(r"(?:step|best)-(\d+)\.ckpt", path.name)
    return int(match.group(1)) if match else -1


def missing_part(path: Path, needed: tuple[str, ...] = _NEEDED) -> str | None:
    """What a checkpoint lacks, in words; None for a whole one. Tensors are mapped, not read.

    `needed` are keys of a single file; a directory (trainers/shards.py) holds everything or is not whole.
    """
    if path.is_dir():
        return shards.missing_part(path)
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _DAMAGE as e:
        whole = zipfile.is_zipfile(path)  # torch's format ends in a table of contents
        return f"its end is missing ({path.stat().st_size} bytes)" if not whole else f"damaged ({type(e).__name__})"
    if not isinstance(content, dict):
        return "it is no training checkpoint"
    lacking = [key for key in needed if key not in content]
    return f"it has no {', '.join(lacking)}" if lacking else None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole `step-*.ckpt` of a run, or None. Warns (TornCheckpoint) about each one skipped."""
    for path in sorted((run / CHECKPOINTS).glob("step-*.ckpt"), key=step_of, reverse=True):
        lack = missing_part(path)
        if lack is None:
            return path
        warnings.warn(f"checkpoint {path.name} is skipped: {lack}", TornCheckpoint, stacklevel=2)
    return None


def checkpoint(run: Path, which: str) -> Path:
    """The "best" or "last" checkpoint of a run. Raises InvalidValue when there is none (yet), or for another word."""
    if which == "last":
        found = newest_checkpoint(run)
    elif which == "best":
        kept = [p for p in (run / CHECKPOINTS).glob("best-*.ckpt") if missing_part(p, ("state_dict",)) is None]
        found = max(kept, key=lambda p: p.stat().st_mtime, default=None)  # only a better one is ever written
    else:
        raise InvalidValue(f"checkpoint {which!r}: choose best or last, or give a file")
    if found is None:
        hint = "; validation picks it, so let the run validate, or take last" if which == "best" else ""
        raise InvalidValue(f"{run} has no {which} checkpoint{hint}")
    return found


# --- files


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def keep_tokenizer(run: Path, directory: Path) -> None:
    """Copy the tokenizer's files into the run (once), so that an export does not depend on a cache directory."""
    target = run / TOKENIZER
    if target.is_dir() or not directory.is_dir():
        return
    names = ("*token*", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*", "spiece.model")
    temporary = target.with_name(f".{TOKENIZER}.{os.getpid()}.tmp")
    temporary.mkdir()
    for pattern in names:
        for source in directory.glob(pattern):
            if source.is_file():
                shutil.copy2(source, temporary / source.name)
    temporary.rename(target)
