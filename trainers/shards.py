"""Sharded checkpoints: directories `step-00000120.ckpt/`, one file per rank and kind, written whole or not at all.

DeepSpeed writes its files below a temporary name; when all ranks are done, rank 0 lists them with their sizes in
`shards.json` and renames the directory. So a kill at any moment leaves the checkpoint before as the newest whole one.
The shards are pickles, which can run code when they are read: resume and export only what you trained yourself.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from draftsmith.inference.errors import InvalidValue

TAG = "checkpoint"  # DeepSpeed's folder inside
LIST = "shards.json"
_VERSION = 1
_SUFFIXES = (".tmp", ".old", ".universal")  # of hidden directories that a dead process may leave


@dataclass(frozen=True)
class Shards:
    """What a sharded checkpoint says of itself."""

    version: int
    world_size: int  # ranks that wrote it
    stage: int  # ZeRO stage
    network: str  # hash of the parameters' names and shapes
    files: dict[str, int]  # path inside -> bytes


def network_hash(shapes: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Of (name, shape) of every parameter, in any order."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in shapes))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def temporary(path: Path) -> Path:
    """Where it is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path, *, world_size: int, stage: int, network: str) -> None:
    """List the files (on disk by then) and give the directory its name; one that has it already gives way."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    for file in files:
        _sync(file)
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
    content = asdict(Shards(_VERSION, world_size, stage, network, sizes))
    (temporary / LIST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(temporary / LIST)
    old = _aside(path) if path.exists() else None
    os.rename(temporary, path)
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old)


def remove(path: Path) -> None:
    """Take the name away first: what is half removed must not look like a torn checkpoint."""
    shutil.rmtree(_aside(path))


def _aside(path: Path) -> Path:
    old = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    return old


def clear(directory: Path) -> None:
    """Remove what saves, removals and conversions of dead processes left."""
    for path in directory.glob(".*.ckpt*"):
        if path.is_dir() and path.suffix in _SUFFIXES:
            shutil.rmtree(path)


def read(path: Path) -> Shards:
    """Raises InvalidValue for a path that is no sharded checkpoint."""
    if path.is_file():
        raise InvalidValue(
            f"{path} is a checkpoint of a strategy that does not shard (auto, ddp): resume it with that one, or start "
            "a new run from its export (model.path)"
        )
    try:
        return Shards(**json.loads((path / LIST).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise InvalidValue(f"{path} is no sharded checkpoint ({LIST}: {type(e).__name__})") from e


def missing_part(path: Path) -> str | None:
    """What a checkpoint directory lacks, in words; None for a whole one."""
    if not (path / LIST).is_file():
        return f"its {LIST} is missing"
    try:
        told = read(path)
    except InvalidValue:
        return f"its {LIST} is damaged"
    for name, size in told.files.items():
        file = path / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size} of {size} bytes"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
