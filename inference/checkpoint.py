"""Export directories on disk: written whole or not at all, hashed, checked when read; never a pickle.

An export is written into a private directory beside its destination, synced, and renamed. Whoever kills the process in
between leaves only a hidden `.NAME.xxxxxxxx.draftsmith.tmp`, which `load` refuses and the next export to NAME removes.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.manifest import MANIFEST_FILE, PICKLE_SUFFIXES, FileEntry, Manifest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OURS = (MANIFEST_FILE, "config.json", "router.json")  # an export, a model, a folder of several drafts
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.draftsmith\.tmp")
_STALE_SECONDS = 60.0  # younger ones may just have been made and not yet be locked
_MAX_HEADER = 100_000_000  # the format's own limit
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_ITEM_BYTES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies in its safetensors file."""

    dtype: str  # the format's name: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def is_unfinished(directory: Path) -> bool:
    """Whether this is the private directory of an export that has not ended (or was killed)."""
    return _UNFINISHED.fullmatch(directory.name) is not None


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Refuse a destination that must not be written to. Raises InvalidValue.

    `overwrite` replaces an export or a model directory, never any other directory.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidValue(f"{out} is not a directory: choose another output directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InvalidValue(f"output directory {out} is not empty: choose another one, or replace it with --overwrite")
    if not any((out / name).is_file() for name in _OURS):
        raise InvalidValue(f"{out} holds none of {', '.join(_OURS)}: --overwrite replaces only an export or a model")


def write_export(out: Path, writer: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Make the directory `out` from what `writer(temporary_directory)` writes, atomically.

    Whatever goes wrong (an exception, Ctrl-C, a full disk), `out` is as it was before and nothing is left beside it.
    Raises InvalidValue for a destination that must not be touched, InvalidState when the disk is full or not writable.
    """
    check_destination(out, overwrite=overwrite)
    out = out.absolute()
    with _one_line_for_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.draftsmith.tmp"
        temporary.mkdir()
        mode = temporary.stat().st_mode & 0o777  # what the umask leaves; private until it is finished
        lock = os.open(temporary, os.O_RDONLY)
        try:
            os.chmod(temporary, 0o700)
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when we die: the next export may sweep
            writer(temporary)
            _sync_tree(temporary)
            os.chmod(temporary, mode)
            _publish(temporary, out, overwrite=overwrite)
            _sync(out.parent)
        finally:
            os.close(lock)
            shutil.rmtree(temporary, ignore_errors=True)  # after a swap this is the replaced export


def hash_files(directory: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file below `directory` except the manifest, by relative path."""
    names = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST_FILE)
    return {p.relative_to(directory).as_posix(): FileEntry(sha256(p), p.stat().st_size) for p in names}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(directory: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Check that the files are the ones that the manifest lists. Raises InvalidValue, naming the file.

    hashes=False compares sizes only (milliseconds; sha256 reads every byte). Files that the manifest does not list are
    ignored unless they are weights.
    """
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise InvalidValue(f"{path} is missing though the manifest lists it: export or copy the directory again")
        size = path.stat().st_size
        if size != entry.bytes or hashes:
            found = sha256(path)
            if size != entry.bytes or found != entry.sha256:
                raise InvalidValue(
                    f"{path} is damaged or was changed: expected sha256 {entry.sha256} ({entry.bytes} bytes), "
                    f"found {found} ({size} bytes): export or copy the directory again"
                )
    for path in sorted(directory.rglob("*.safetensors")):
        if path.relative_to(directory).as_posix() not in manifest.files:
            raise InvalidValue(f"{path} holds weights that the manifest does not list: remove it, or export again")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of an HF model directory (one file, or an index and its shards), each with a sound header.

    Raises InvalidValue for missing, truncated or pickled weights.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        files = [directory / SINGLE_FILE]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidValue(f"{index} has no weight_map: the model directory is damaged, copy it again")
        files = [directory / str(name) for name in sorted(set(weight_map.values()))]
        for path in files:
            if path.parent != directory or not path.is_file():
                raise InvalidValue(f"{path} is missing though {INDEX_FILE} lists it: copy the model directory again")
    else:
        refuse_pickles(directory)
        raise InvalidValue(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}: not a model that can be loaded")
    for path in files:
        read_header(path)
    return files


def refuse_pickles(directory: Path) -> None:
    """Raise InvalidValue, naming the file, when the weights are there only as a pickle."""
    for path in sorted(directory.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            raise InvalidValue(
                f"{path} is a pickle, which can run code when it is read: pickles are never loaded; "
                "save the model as safetensors (model.save_pretrained) and give that directory"
            )


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes, shapes and places of the tensors in a safetensors file, without reading them.

    Raises InvalidValue when the file is truncated or its header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise InvalidValue(
                f"{path} is truncated or damaged: a header of {length} bytes in a file of {size}: copy it again"
            )
        raw = file.read(length)
    try:
        table = json.loads(raw)
        table.pop("__metadata__", None)
        header = {name: _tensor_header(entry, 8 + length) for name, entry in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidValue(f"{path}: damaged safetensors header ({error!r}): copy the file again") from None
    expected = max((t.end for t in header.values()), default=8 + length)
    if expected != size:
        raise InvalidValue(
            f"{path} is truncated or damaged: expected {expected} bytes by its header, found {size}: copy it again"
        )
    return header


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InvalidValue, naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidValue(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{path} is not valid JSON ({error}): copy the file again") from None
    if not isinstance(value, dict):
        raise InvalidValue(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _tensor_header(entry: dict[str, Any], data_start: int) -> TensorHeader:
    first, last = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    item = _ITEM_BYTES.get(entry["dtype"])  # sub-byte formats have no whole number of bytes an item
    if not 0 <= first <= last or (item is not None and last - first != item * prod(shape)):
        raise ValueError(f"{entry['dtype']}{list(shape)} does not take {last - first} bytes")
    return TensorHeader(str(entry["dtype"]), shape, data_start + int(first), data_start + int(last))


@contextmanager
def _one_line_for_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error into its text: "... No space left on device (os error 28)"
        number = error.errno if isinstance(error, OSError) else _os_error_number(str(error))
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise InvalidState(
                f"the disk is full: {out} was not written and nothing is left of it; free space or choose another disk"
            ) from error
        raise InvalidState(f"cannot write {out}: {os.strerror(number)}; nothing is left of it") from error


def _os_error_number(message: str) -> int | None:
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None


def _sweep(out: Path) -> None:
    """Remove what killed exports to `out` left behind: old enough, and nobody holds its lock."""
    for path in out.parent.iterdir():
        if not (is_unfinished(path) and path.name.startswith(f".{out.name}.")) or not path.is_dir():
            continue
        if len(path.name) != len(f".{out.name}.12345678.draftsmith.tmp"):  # of a longer name
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(lock).st_mtime >= _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # another export is being written right now
        finally:
            os.close(lock)


def _publish(temporary: Path, out: Path, *, overwrite: bool) -> None:
    """Give the finished directory its name; an existing export is exchanged in one step where the system can."""
    if not overwrite or not out.exists() or not any(out.iterdir()):
        os.rename(temporary, out)  # replaces an empty directory, fails on one that someone has filled meanwhile
    elif not _exchange(temporary, out):
        # not the swept suffix: until the second rename it is the only copy
        aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.draftsmith.old")
        os.rename(out, aside)
        try:
            os.rename(temporary, out)
        except OSError:
            os.rename(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories atomically (Linux renameat2); False where the system or file system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):  # children before their directories
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
