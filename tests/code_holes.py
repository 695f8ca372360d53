"""Code with a hole: whole lines of validation files of Python's library, between what stands before and behind them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.corpus import Document

LEAST_CHARS = 8  # a line shorter than this (else:, a bracket) is no task


@dataclass(frozen=True)
class Hole:
    """Token ids; `middle` is hidden. Cut text by text, so that no token crosses an edge."""

    before: tuple[int, ...]
    middle: tuple[int, ...]
    behind: tuple[int, ...]
    text: str  # of the middle


def holes(
    documents: Sequence[Document], tokenizer: Any, *, lines: int, count: int, canvas: int, least: int, most: int
) -> list[Hole]:
    """`count` holes of `lines` whole lines, least..most tokens each, one in each of the first documents that have one.

    The canvas holds at most `canvas` tokens, the hole in its middle. Lines are those half-way into a document.
    """
    found: list[Hole] = []
    for document in documents:
        text = document.text.splitlines(keepends=True)
        for start in range(len(text) // 2, len(text) - lines - 1):
            middle = "".join(text[start : start + lines])
            if any(len(line.strip()) < LEAST_CHARS for line in text[start : start + lines]):
                continue
            ids = tokenizer.encode(middle, add_special_tokens=False)
            if not least <= len(ids) <= most:
                continue
            side = (canvas - len(ids)) // 2
            before = tokenizer.encode("".join(text[max(0, start - 40) : start]), add_special_tokens=False)[-side:]
            behind = tokenizer.encode("".join(text[start + lines : start + lines + 40]), add_special_tokens=False)[
                :side
            ]
            if len(before) == side and len(behind) == side:
                found.append(Hole(tuple(before), tuple(ids), tuple(behind), middle))
                break
        if len(found) == count:
            break
    return found


def edit_similarity(one: str, other: str) -> float:
    """difflib's ratio, 1 for equal texts."""
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
