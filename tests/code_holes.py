"""Code with a hole: whole lines of validation files of Python's library, between what stands before and behind them."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.corpus import Document

APART = 20
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
    """`count` holes of `lines` whole lines, least..most tokens each, from all documents as evenly as they allow.

    The canvas holds at most `canvas` tokens, the hole in its middle. Two holes of a document are `APART` lines apart.
    """
    sources = [_of(document.text, tokenizer, lines, canvas, least, most) for document in documents]
    found: list[Hole] = []
    while sources and len(found) < count:
        for source in list(sources):
            hole = next(source, None)
            if hole is None:
                sources.remove(source)
            elif len(found) < count:
                found.append(hole)
    return found


def _of(document: str, tokenizer: Any, lines: int, canvas: int, least: int, most: int) -> Iterator[Hole]:
    text, start = document.splitlines(keepends=True), 0
    while start < len(text) - lines:
        part = text[start : start + lines]
        ids = tokenizer.encode("".join(part), add_special_tokens=False)
        side = (canvas - len(ids)) // 2
        if all(len(line.strip()) >= LEAST_CHARS for line in part) and least <= len(ids) <= most:
            before = tokenizer.encode("".join(text[max(0, start - 40) : start]), add_special_tokens=False)[-side:]
            behind = tokenizer.encode("".join(text[start + lines :][:40]), add_special_tokens=False)[:side]
            if len(before) == side and len(behind) == side:
                yield Hole(tuple(before), tuple(ids), tuple(behind), "".join(part))
                start += APART
        start += 1


def edit_similarity(one: str, other: str) -> float:
    """difflib's ratio, 1 for equal texts."""
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
