"""Retrieval drafts (REST): what followed the longest matching suffix in a corpus, found by a suffix array.

"REST: Retrieval-Based Speculative Decoding" (2023), section 3. Both arrays are memory-mapped. Of the retrieved
continuations the most frequent prefixes are kept, ordered by (-count, length, ids): a prefix is at least as frequent as
its extensions, so the choice is closed under parents, and ties never depend on a hash's order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftsmith.inference.drafters.tree_base import TreeTask
from draftsmith.inference.drafters.tree_shapes import ShapeSession
from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.ngram_search import Shape

SEPARATOR = -1  # between documents: no token, so nothing matches or continues across


@dataclass(frozen=True)
class RestStore:
    """Documents one after the other, each followed by SEPARATOR, and the order of their suffixes."""

    vocab_size: int
    text: NDArray[np.int32]  # [n]
    suffixes: NDArray[np.int64]  # [n] starts, in the lexicographic order of what begins there
    span: int  # the order holds for so many tokens; longer matches are not looked for

    def __post_init__(self) -> None:
        if self.text.shape != self.suffixes.shape or self.span < 2:
            raise InvalidValue(
                f"a retrieval store wants text [n], suffixes [n] and a span of at least 2, got "
                f"{list(self.text.shape)}, {list(self.suffixes.shape)} and {self.span}"
            )

    def find(self, pattern: Sequence[int]) -> tuple[int, int]:
        """The range of `suffixes` that begin with the pattern (at most `span` tokens). Binary search."""
        low, high = 0, len(self.suffixes)
        for offset, token in enumerate(pattern):  # within the range the next tokens are in order
            low, high = self._bound(low, high, offset, token), self._bound(low, high, offset, token + 1)
            if low == high:
                break
        return low, high

    def _bound(self, low: int, high: int, offset: int, token: int) -> int:
        """The first suffix in low..high-1 whose token at `offset` is `token` or more."""
        while low < high:
            middle = (low + high) // 2
            at = int(self.suffixes[middle]) + offset
            if at < len(self.text) and int(self.text[at]) >= token:
                high = middle
            else:
                low = middle + 1
        return low


def build_store(documents: Sequence[Sequence[int]], vocab_size: int, span: int = 16) -> RestStore:
    """A store of token sequences. Raises InvalidValue for ids outside the vocabulary and for an empty corpus.

    The suffixes are ordered by doubling: after s passes they are sorted by their first 2^s tokens.
    """
    parts = []
    for number, ids in enumerate(documents):
        x = np.asarray(ids, dtype=np.int64)
        outside = np.flatnonzero((x < 0) | (x >= vocab_size))
        if len(outside):
            at = int(outside[0])
            raise InvalidValue(
                f"document {number}, position {at}: id {int(x[at])} is outside the vocabulary 0..{vocab_size - 1}"
            )
        if len(x):
            parts += [x.astype(np.int32), np.array([SEPARATOR], np.int32)]
    if not parts:
        raise InvalidValue("the corpus holds no token: give more text")
    text = np.concatenate(parts)
    rank = np.unique(text, return_inverse=True)[1].astype(np.int64) + 1
    length = 1
    while length < span:
        after = np.concatenate([rank[length:], np.zeros(min(length, len(rank)), np.int64)])[: len(rank)]
        rank = np.unique(rank * (len(rank) + 2) + after, return_inverse=True)[1].astype(np.int64) + 1
        length *= 2
    return RestStore(vocab_size, text, np.argsort(rank, kind="stable"), span)


class RestDrafter:
    """A tree drafter over a store; for decoder `tree`."""

    aux_layers: tuple[int, ...] = ()
    tokenizer: Any | None = None

    def __init__(self, store: RestStore, *, shortest: int = 2, continuations: int = 5000, length: int = 10) -> None:
        """shortest: least tokens that must match. continuations: most that are looked at, `length` tokens each.

        Raises InvalidValue for numbers out of their range.
        """
        if not 1 <= shortest <= store.span or continuations < 1 or length < 1:
            raise InvalidValue(
                f"shortest must lie in 1..{store.span}, continuations and length be at least 1; got {shortest}, "
                f"{continuations}, {length}"
            )
        self.store = store
        self._shortest, self._continuations, self._length = shortest, continuations, length

    @property
    def spec(self) -> EngineSpec:
        """Its vocabulary, for the couplings; no network stands behind it."""
        return EngineSpec("rest-store", self.store.vocab_size, hidden_size=0, num_layers=0, max_length=1 << 31)

    @property
    def vocab_size(self) -> int | None:
        return self.store.vocab_size

    def start(self, task: TreeTask) -> "RestSession":
        return RestSession(self, task)

    def shape(self, text: Sequence[int], nodes: int, depth: int) -> Shape:
        """The most frequent prefixes of what follows the longest match."""
        store = self.store
        for span in range(min(store.span, len(text)), self._shortest - 1, -1):
            low, high = store.find(text[-span:])
            if low < high:
                return self._prefixes(low, high, span, nodes, min(depth, self._length))
        return [], []

    def _prefixes(self, low: int, high: int, span: int, nodes: int, depth: int) -> Shape:
        store = self.store
        counts: Counter[tuple[int, ...]] = Counter()
        for start in store.suffixes[low : min(high, low + self._continuations)].tolist():
            follow = store.text[start + span : start + span + depth].tolist()
            if SEPARATOR in follow:
                follow = follow[: follow.index(SEPARATOR)]
            for n in range(1, len(follow) + 1):
                counts[tuple(follow[:n])] += 1
        kept = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix), prefix))[:nodes]
        index = {prefix: i for i, prefix in enumerate(kept)}
        return [prefix[-1] for prefix in kept], [index.get(prefix[:-1], -1) for prefix in kept]


class RestSession(ShapeSession):
    """One decode call's trees."""

    def __init__(self, drafter: RestDrafter, task: TreeTask) -> None:
        super().__init__(task)
        self._drafter = drafter

    def shape(self, row: int, text: Sequence[int], nodes: int, depth: int) -> Shape:
        return self._drafter.shape(text, nodes, depth)
