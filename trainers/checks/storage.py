"""Checks of what a run writes to: the folder, the room on its disk, who else works there, what lies there already."""

import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from draftsmith.trainers import runs, shards
from draftsmith.trainers.checks.finding import Finding, error, ok, size, warning
from draftsmith.trainers.checks.subject import Subject

_PROBE_BYTES = 32 * 2**20  # written once, to see how fast the disk is
_OVERHEAD_SECONDS = 3.0  # the running step, the agreement of the ranks, many small files
# how the keys of a checkpoint begin
_METHODS = {"net.fc.": "EagleDrafter", "net.": "LM", "nets.": "OSDDrafter"}


def checks(subject: Subject) -> list[Finding]:
    """All of them."""
    folder = _existing(subject.run)
    if not writable(folder):
        return [
            error(
                "run folder",
                f"{subject.run} cannot be written: {folder} {_trouble(folder)}; give another --run",
            )
        ]
    return [in_use(subject), disk(subject), *checkpoint(subject)]


def checkpoint_bytes(subject: Subject) -> int:
    """Of one checkpoint that resuming needs, over all its files: weights, and AdamW's two moments of those that learn.

    All in float32. DeepSpeed stores the weights as the network computes with them, and float32 masters beside.
    """
    if subject.deepspeed is None:
        return 4 * subject.stored + 8 * subject.parameters
    low = 2 if str(subject.trainer.precision).startswith(("bf16", "16")) else 4
    return low * subject.stored + 12 * subject.parameters


def best_bytes(subject: Subject) -> int:
    """Of the best checkpoint: weights alone, in float32; 0 where none is kept."""
    return 0 if subject.checkpoint.monitor is None else 4 * subject.stored


def disk(subject: Subject) -> Finding:
    """Room for `keep` + 1 checkpoints (a new one is written before an old one goes) and for the best one."""
    one = checkpoint_bytes(subject)
    best = best_bytes(subject)
    needed = (subject.checkpoint.keep + 1) * one + 2 * best  # it too is replaced, not overwritten
    here = subject.run / runs.CHECKPOINTS
    present = sum(f.stat().st_size for f in here.rglob("*") if f.is_file()) if here.is_dir() else 0
    free = shutil.disk_usage(_existing(subject.run)).free
    room = free + present
    what = f"{subject.checkpoint.keep} + 1 checkpoints of {size(one)}" + (f" and the best of {size(best)}" * bool(best))
    if room < needed:
        fix = "free some, give --run on a larger disk, or lower checkpoint.keep"
        word = "not even one fits" if room < one else "too little"
        return error("disk", f"{size(room)} free at {subject.run}, {word}: {what} need {size(needed)}; {fix}")
    if room < 1.2 * needed:
        return warning("disk", f"{size(room)} free at {subject.run}, hardly more than the {size(needed)} of {what}")
    return ok("disk", f"{size(room)} free, {what} need {size(needed)}")


def save_seconds(subject: Subject) -> tuple[float, str]:
    """How long a save takes, and how that is known: bytes over the write speed of the run's disk, seen just now."""
    one, folder = checkpoint_bytes(subject), _existing(subject.run)
    if not writable(folder):
        return 0.0, "unknown: the run folder cannot be written"
    speed = write_speed(folder)
    seconds = one / speed + _OVERHEAD_SECONDS
    return seconds, f"{size(one)} at {size(speed)}/s as measured, and {_OVERHEAD_SECONDS:.0f} s for the running step"


@functools.lru_cache
def write_speed(folder: Path) -> float:
    """Bytes per second of one writer, synced to the disk."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".draftsmith-probe-") as file:
        begin = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - begin)


def in_use(subject: Subject) -> Finding:
    """Nobody else works in the folder."""
    lock = runs.RunLock(subject.run)
    try:
        owner = runs.Owner(**json.loads(lock.path.read_text("utf-8")))
    except FileNotFoundError:
        return ok("run folder", f"{subject.run} is free")
    except (OSError, ValueError, TypeError):
        return warning("run folder", f"{lock.path} cannot be read: if no fit is running there, remove it")
    if owner == runs.Owner.current():
        return ok("run folder", f"{subject.run} is ours")
    if owner.alive():
        return error(
            "run folder",
            f"{subject.run} is in use by process {owner.pid} on {owner.host}: give another --run, or stop it (if that "
            f"host is gone, remove {lock.path})",
        )
    return ok("run folder", f"{subject.run} was left by process {owner.pid}, which is gone")


def checkpoint(subject: Subject) -> list[Finding]:
    """The newest checkpoint of the folder fits this config, where there is one."""
    name = "checkpoint"
    newest = runs.newest_checkpoint(subject.run)
    if newest is None:
        return [ok(name, f"none in {subject.run}: the run starts from the beginning")]
    if newest.is_dir():
        return [_sharded(subject, newest, shards.read(newest))]
    content: dict[str, Any] = torch.load(newest, map_location="cpu", mmap=True, weights_only=True)
    found = {key: tuple(value.shape) for key, value in content["state_dict"].items()}
    fault = _misfit(subject, newest, found)
    if fault is not None:
        return [fault]
    if subject.deepspeed is not None:
        fix = "set trainer.strategy to ddp, or give another --run"
        return [error(name, f"{newest} is a single file and {subject.strategy} resumes from its own shards: {fix}")]
    saved = len(content["callbacks"].get("RandomStates", {}).get("ranks", ())) or None
    if saved is not None and subject.world_size not in (None, saved):
        return [
            warning(
                name,
                f"{newest.name} was saved by {saved} ranks and this run has {subject.world_size}: weights, optimizer "
                "and data position go on, random states begin anew; keep the number of ranks for an exact resume",
            )
        ]
    return [ok(name, f"{newest.name} fits; the run goes on from step {runs.step_of(newest)}")]


def _sharded(subject: Subject, path: Path, told: shards.Shards) -> Finding:
    """A checkpoint of ZeRO: of this stage, this network, this number of ranks."""
    saved = told.world_size
    if subject.deepspeed is None:
        fix = "set trainer.strategy to the one it was saved by, or give another --run"
        return error("checkpoint", f"{path} is a DeepSpeed checkpoint and the strategy is {subject.strategy}: {fix}")
    stage = subject.deepspeed["zero_optimization"]["stage"]
    if told.stage != stage:
        fix = f"set trainer.strategy to zero{told.stage}, or give another --run"
        return error("checkpoint", f"{path} was saved by zero{told.stage} and the stage is {stage}: {fix}")
    if told.network != _network(subject):
        fix = "resume with the run's own config, or start another --run"
        return error("checkpoint", f"{path} holds another network (or method) than this config describes: {fix}")
    if subject.world_size not in (None, saved) and not subject.checkpoint.elastic:
        return error(
            "checkpoint",
            f"{path} was saved by {saved} ranks and this run has {subject.world_size}: start it with {saved}, or allow "
            "another number with --checkpoint.elastic true",
        )
    return ok("checkpoint", f"{path.name} of {saved} ranks; the run goes on from step {runs.step_of(path)}")


def _network(subject: Subject) -> str:
    """The hash that a sharded checkpoint of this config would carry."""
    named = ((f"{prefix}{name}", p.shape) for prefix, net in subject.nets.items() for name, p in net.named_parameters())
    return shards.network_hash(named)


def _misfit(subject: Subject, path: Path, found: dict[str, tuple[int, ...]]) -> Finding | None:
    """Why a state does not fit the networks of this config; None if it does."""
    wanted = {
        f"{prefix}{key}": tuple(v.shape) for prefix, net in subject.nets.items() for key, v in net.state_dict().items()
    }
    fix = "resume with the run's own config, or start another --run"
    method, own = _method(found), type(subject.module).__name__
    if method != _method(wanted):
        return error("checkpoint", f"{path} is of another method ({method}; this config trains {own}): {fix}")
    for key, shape in wanted.items():
        if key not in found:
            return error("checkpoint", f"{path} has no {key}, which the network of this config has: {fix}")
        if found[key] != shape:
            return error("checkpoint", f"{path} has {key} as {list(found[key])}, this config {list(shape)}: {fix}")
    return None


def _method(keys: Iterable[str]) -> str:
    return next((name for start, name in _METHODS.items() if any(key.startswith(start) for key in keys)), "unknown")


def writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _trouble(folder: Path) -> str:
    return "is read-only, or another user's" if folder.is_dir() else "is no folder"
