"""Figures that acceptance tests measured: `record` writes them to docs/figures/<slug>.json (contract 14).

Only tests marked `acceptance` call it. `python -m draftsmith.trainers.results` renders docs/results.md from the files.
A figure is a number, a string, a boolean, or {"value": ..., "low": ..., "high": ..., "unit": ..., "need": ">= 1.3"},
of which all but "value" may be left out; "need" is the requirement that the test asserts.
"""

import datetime
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.inference.environment import blob_hash, git, machine, versions

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
SOURCES = ("inference/**/*.py", "data/**/*.py", "modules/**/*.py", "trainers/**/*.py", "configs/**/*.yaml")
DECODING = tuple(
    f"inference/{name}.py"
    for name in (
        *(
            "decoders/*",
            "drafters/*",
            "nets/*",
            "acceptance",
            "sampling",
            "stopping",
            "draft_length",
            "cache",
            "rng",
            "engine",
            "feeding",
        ),
        *("native", "hf_adapter", "requests", "metrics", "costs", "forecast"),
    )
)
SYSTEM_FILES: dict[str, tuple[str, ...]] = {  # what a system's figures depend on; a slug not listed: all of SOURCES
    "speculative-sampling": DECODING,
    "osd": (
        *DECODING,
        *("data/online_*.py", "data/request_logs.py", "data/router.py", "data/batches.py"),
        *("modules/osd_drafter.py", "modules/losses/*.py", "trainers/callbacks/draft_swap.py", "configs/osd/*.yaml"),
    ),
    "bench": (*DECODING, "inference/bench.py", "inference/peers.py"),
}


def record(
    slug: str,
    figures: Mapping[str, Any],
    seeds: Sequence[int],
    files: Iterable[str] | None = None,  # globs from the repository's root; default: SYSTEM_FILES
    *,
    root: Path = ROOT,
    folder: Path | None = None,
) -> Path:
    """Merge `figures` into docs/figures/<slug>.json, atomically; a name that was there is replaced. Returns the file.

    The file holds runs: each has its commit, dirty flag, machine, date, seeds, library versions, and every source file
    of the system with its git blob hash when it was measured; a figure belongs to the run that measured it last.
    Raises ValueError for figures that JSON cannot hold (NaN and infinities too).
    """
    if not figures:
        raise ValueError("record() was given no figure")
    text = json.dumps(dict(figures), allow_nan=False)  # raises before anything is touched
    folder = folder or FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    globs = tuple(files) if files is not None else SYSTEM_FILES.get(slug, SOURCES)
    paths = sorted({path for pattern in globs for path in root.glob(pattern) if path.is_file() and path.stat().st_size})
    if not paths:
        raise ValueError(f"no file of {slug!r} matches {globs}")
    names = [path.relative_to(root).as_posix() for path in paths]
    run: dict[str, Any] = {
        "commit": git(root, "rev-parse", "HEAD") or "unknown",
        "dirty": bool(git(root, "status", "--porcelain", "--", *names)),
        "machine": machine(),
        "seeds": list(seeds),
        "versions": versions(),
        "files": {name: blob_hash(path) for name, path in zip(names, paths, strict=True)},
    }
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests may record at once
        return _merge(folder / f"{slug}.json", slug, run, json.loads(text))
    finally:
        os.close(lock)


def _merge(path: Path, slug: str, run: dict[str, Any], figures: dict[str, Any]) -> Path:
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for old in runs:
        old["figures"] = {name: value for name, value in old["figures"].items() if name not in figures}
    same = next((old for old in runs if all(old[key] == value for key, value in run.items())), None)
    if same is None:
        same = {**run, "figures": {}}
        runs.append(same)
    same["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    same["figures"] = dict(sorted({**same["figures"], **figures}.items()))
    kept = [old for old in runs if old["figures"]]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as stream:
        json.dump({"system": slug, "runs": kept}, stream, indent=1, sort_keys=True, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, path)
    return path
