"""What serving measured, one JSON line per request: the raw rounds from which every figure of a report follows.

Holds no text and no token ids, so it may be kept where prompts may not.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats

NAME = "served.jsonl"  # in a run folder


@dataclass(frozen=True)
class Served:
    """One served request."""

    number: int  # in the stream, from 0
    tag: str
    draft: int  # which of several drafts served it
    version: int  # how many times that draft had been swapped
    alpha: float  # mean of 1 - TV(p, q) over the examined positions; NaN when nothing was examined
    examined: int
    tokens: int
    rounds: RoundStats  # of this request alone (row 0); empty for logged requests


def append(path: Path, served: Iterable[Served]) -> None:
    """Add lines at the end, in one write."""
    text = "".join(_line(s) for s in served)
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def read(path: Path) -> list[Served]:
    """All whole lines in the order of the requests. Raises InvalidValue for a line that is no such record.

    A last line without its newline is what a killed process left; it is not there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"cannot read the served requests in {path}: {error}") from error
    whole = text[: text.rfind("\n") + 1].splitlines()
    return sorted((_parse(line, f"{path}:{i}") for i, line in enumerate(whole, 1)), key=lambda s: s.number)


def cut(path: Path, before: int) -> int:
    """Keep only the requests numbered below `before` (what a run that resumes will serve again goes); how many stay."""
    if not path.exists():
        return 0
    kept = [s for s in read(path) if s.number < before]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(_line(s) for s in kept), encoding="utf-8")
    os.replace(temporary, path)
    return len(kept)


def pooled(served: Sequence[Served]) -> RoundStats:
    """The rounds of all requests, the i-th request's as row i."""
    rounds = RoundStats()
    for i, s in enumerate(served):
        rounds.extend(s.rounds, row_offset=i)
    return rounds


def _line(served: Served) -> str:
    row: dict[str, Any] = dict(vars(served)) | {"rounds": dict(vars(served.rounds))}
    if math.isnan(served.alpha):
        row["alpha"] = None
    return json.dumps(row) + "\n"


def _parse(line: str, where: str) -> Served:
    try:
        row = json.loads(line)
        row["rounds"] = RoundStats(**row["rounds"])
        row["alpha"] = math.nan if row["alpha"] is None else row["alpha"]
        return Served(**row)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidValue(f"{where}: no record of a served request ({error})") from error
