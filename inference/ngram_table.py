"""Tri-gram tables: the last two tokens give the likeliest next ones; counted from a corpus, updated while decoding.

"Adaptive Draft-Verification for Efficient Large Language Model Decoding" (AAAI 2025). The counted table is immutable
and stored as compressed sparse rows; what decoding teaches lies in an overlay over it, so a base file is never written
back and text of one user reaches another one only through an overlay that both share.

A table may also hold what follows one token (bi-grams): keys (V, b), where V stands for any token. They answer for keys
that were never seen.
Shape letters: E keys, S entries, K most entries of a key, V vocabulary. eta: rate of an update.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftsmith.inference.errors import InvalidValue

K = 12  # entries a key, as the paper's repository reads its table
_CHUNK = 1 << 22  # tri-grams that are counted before they are merged
_EMPTY: tuple[list[int], list[float]] = ([], [])


@dataclass(frozen=True)
class NgramTable:
    """Key (a, b) = the last two tokens -> at most K (token, weight), by falling weight, then rising id."""

    vocab_size: int
    k: int
    keys: NDArray[np.int64]  # [E, 2] in lexicographic order; bi-grams, with V in the first column, come last
    offsets: NDArray[np.int64]  # [E + 1]; key e has the entries offsets[e]..offsets[e+1]-1
    tokens: NDArray[np.int32]  # [S]
    weights: NDArray[np.float32]  # [S]; of a key: above 0, at most 1 in sum
    description: Mapping[str, Any] = field(default_factory=dict)  # of the corpus

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_codes", self.keys[:, 0] * self.vocab_size + self.keys[:, 1])

    def __len__(self) -> int:
        return len(self.keys)

    def lookup(self, a: int, b: int) -> tuple[list[int], list[float]]:
        """Tokens and weights behind two tokens: of their key, else of the bi-gram, else empty lists."""
        found = self.row(a, b)
        return found if found[0] else self.row(self.vocab_size, b)

    def row(self, a: int, b: int) -> tuple[list[int], list[float]]:
        """Tokens and weights of this very key; empty lists where it was never seen. a = V: of the bi-gram."""
        codes: NDArray[np.int64] = self._codes  # type: ignore[attr-defined]  # of __post_init__
        code = a * self.vocab_size + b
        e = int(codes.searchsorted(code))
        if e == len(codes) or codes[e] != code:
            return _EMPTY
        row = slice(int(self.offsets[e]), int(self.offsets[e + 1]))
        return self.tokens[row].tolist(), self.weights[row].tolist()


def _check(table: NgramTable) -> None:
    """Raises InvalidValue for arrays that are no such table."""
    if table.vocab_size < 1 or table.k < 1:
        raise InvalidValue(f"vocab_size and K must be at least 1, got {table.vocab_size} and {table.k}")
    e, s = len(table.keys), len(table.tokens)
    if table.keys.shape != (e, 2) or table.offsets.shape != (e + 1,) or table.weights.shape != (s,):
        raise InvalidValue(
            f"an n-gram table wants keys [E, 2], offsets [E+1], tokens and weights [S]; got {list(table.keys.shape)}, "
            f"{list(table.offsets.shape)}, {list(table.tokens.shape)}, {list(table.weights.shape)}"
        )
    steps = np.diff(table.offsets)
    bad = np.flatnonzero((steps < 1) | (steps > table.k))
    if len(bad) or table.offsets[0] != 0 or table.offsets[-1] != s:
        row = int(bad[0]) if len(bad) else 0 if table.offsets[0] != 0 else e - 1
        raise InvalidValue(f"n-gram table, row {row}: its offsets are damaged (1 to {table.k} entries a key, in order)")
    for ids, most in (
        (table.keys[:, 0], table.vocab_size),
        (table.keys[:, 1], table.vocab_size - 1),
        (table.tokens, table.vocab_size - 1),
    ):
        if ids.size and not (ids.min() >= 0 and ids.max() <= most):
            raise InvalidValue(f"n-gram table: a token id is outside the vocabulary 0..{table.vocab_size - 1}")
    codes = table.keys[:, 0] * table.vocab_size + table.keys[:, 1]
    if (np.diff(codes) <= 0).any():
        row = int(np.flatnonzero(np.diff(codes) <= 0)[0]) + 1
        raise InvalidValue(f"n-gram table, row {row}: keys must rise lexicographically, each once")
    if s:
        sums = np.add.reduceat(table.weights.astype(np.float64), table.offsets[:-1])
        wrong = np.flatnonzero(~((sums <= 1 + 1e-3) & (np.minimum.reduceat(table.weights, table.offsets[:-1]) > 0)))
        if len(wrong):
            raise InvalidValue(f"n-gram table, row {int(wrong[0])}: weights are above 0 and sum to at most 1")


def empty_table(vocab_size: int, k: int = K) -> NgramTable:
    """A table without a key: everything is learned while decoding."""
    none = np.zeros(0)
    return NgramTable(
        vocab_size,
        k,
        np.zeros((0, 2), np.int64),
        np.zeros(1, np.int64),
        none.astype(np.int32),
        none.astype(np.float32),
    )


class TableBuilder:
    """Counts tri-grams of documents as they come, never across their borders."""

    def __init__(self, vocab_size: int, k: int = K, *, bigrams: bool = False) -> None:
        """bigrams: count what follows single tokens, too. Raises InvalidValue for numbers out of their range."""
        if vocab_size < 1 or k < 1:
            raise InvalidValue(f"vocab_size and K must be at least 1, got {vocab_size} and {k}")
        if vocab_size > 2_000_000:
            raise InvalidValue(f"vocab_size {vocab_size} is too large: a tri-gram's code must fit into 63 bits")
        self._v, self._k, self._bigrams = vocab_size, k, bigrams
        self.documents = self.tokens = self.skipped = 0
        self._codes = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []
        self._waiting = 0

    def add(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """One document; fewer than three tokens hold no tri-gram and are counted as skipped.

        Raises InvalidValue with document and position for an id outside the vocabulary.
        """
        x = np.asarray(ids, dtype=np.int64)
        outside = np.flatnonzero((x < 0) | (x >= self._v))
        if len(outside):
            at = int(outside[0])
            raise InvalidValue(
                f"document {self.documents + self.skipped}, position {at}: id {int(x[at])} is outside the vocabulary "
                f"0..{self._v - 1}"
            )
        if len(x) < 3:
            self.skipped += 1
            return
        self.documents += 1
        self.tokens += len(x)
        self._pending.append((x[:-2] * self._v + x[1:-1]) * self._v + x[2:])
        if self._bigrams:
            self._pending.append((self._v * self._v + x[1:-1]) * self._v + x[2:])  # the very positions of the tri-grams
        self._waiting += (len(x) - 2) * (2 if self._bigrams else 1)
        if self._waiting >= _CHUNK:
            self._merge()

    def _merge(self) -> None:
        codes, counts = np.unique(np.concatenate([*self._pending, np.zeros(0, np.int64)]), return_counts=True)
        every = np.concatenate([self._codes, codes])
        self._codes, where = np.unique(every, return_inverse=True)
        total = np.zeros(len(self._codes), np.int64)
        np.add.at(total, where, np.concatenate([self._counts, counts]))
        self._counts = total
        self._pending, self._waiting = [], 0

    def table(self, description: Mapping[str, Any] | None = None) -> NgramTable:
        """The table so far: the K highest of C(a,b,u) / sum_u C(a,b,u) at each key. Raises InvalidValue for none."""
        self._merge()
        if not len(self._codes):
            raise InvalidValue(
                f"the corpus holds no tri-gram ({self.skipped} documents of fewer than 3 tokens were skipped): give "
                "more text"
            )
        pair, token = np.divmod(self._codes, self._v)
        order = np.lexsort((token, -self._counts, pair))
        pair, token, counts = pair[order], token[order], self._counts[order]
        keys, starts = np.unique(pair, return_index=True)
        sizes = np.diff(np.append(starts, len(pair)))
        rank = np.arange(len(pair)) - np.repeat(starts, sizes)
        weights = counts / np.repeat(np.add.reduceat(counts, starts), sizes)
        kept = rank < self._k
        offsets = np.concatenate([[0], np.minimum(sizes, self._k).cumsum()])
        noted = {"documents": self.documents, "tokens": self.tokens, "skipped": self.skipped, **(description or {})}
        return NgramTable(
            self._v,
            self._k,
            np.stack(np.divmod(keys, self._v), 1),
            offsets,
            token[kept].astype(np.int32),
            weights[kept].astype(np.float32),
            noted,
        )


def build_table(
    documents: Iterable[Sequence[int]], vocab_size: int, k: int = K, *, bigrams: bool = False
) -> NgramTable:
    """A table of token sequences, for example sampled from the target itself. Raises as `TableBuilder`."""
    builder = TableBuilder(vocab_size, k, bigrams=bigrams)
    for ids in documents:
        builder.add(ids)
    return builder.table()


class AdaptiveTable:
    """A table with an overlay that follows the target's laws; the least recently updated keys go first."""

    def __init__(self, base: NgramTable, eta: float = 0.5, capacity: int = 2_000_000, *, bigrams: bool = False) -> None:
        """bigrams: learn and use what follows single tokens, too.

        Raises InvalidValue for a rate outside (0, 1] and for a capacity below 1.
        """
        if not 0 < eta <= 1:
            raise InvalidValue(f"the update rate eta lies above 0 and is at most 1, got {eta}")
        if capacity < 1:
            raise InvalidValue(f"the overlay's capacity must be at least 1 key, got {capacity}")
        self.base = base
        self.updates = 0
        self._eta = eta
        self._capacity = capacity
        self._bigrams = bigrams
        self._overlay: OrderedDict[tuple[int, int], tuple[list[int], list[float]]] = OrderedDict()

    @property
    def learned(self) -> int:
        """Keys in the overlay."""
        return len(self._overlay)

    def lookup(self, a: int, b: int) -> tuple[list[int], list[float]]:
        """As `NgramTable.lookup`, what was learned first."""
        found = self.row(a, b)
        return self.row(self.base.vocab_size, b) if self._bigrams and not found[0] else found

    def row(self, a: int, b: int) -> tuple[list[int], list[float]]:
        """As `NgramTable.row`, what was learned first."""
        found = self._overlay.get((a, b))
        return self.base.row(a, b) if found is None else found

    def update(self, a: int, b: int, tokens: Sequence[int], probs: Sequence[float]) -> None:
        """Blend the target's likeliest tokens into a key: w <- (1 - eta) w + eta p over the union, K highest kept.

        A new key takes them as they are; the bi-gram is treated alike. a = V: the token before is not known, and only
        the bi-gram learns. tokens, probs: at most K of the target's law before temperature.
        """
        new = {t: p for t, p in itertools.islice(zip(tokens, probs, strict=True), self.base.k) if p > 0}
        if self._bigrams:
            self._blend(self.base.vocab_size, b, new)
        if a < self.base.vocab_size:
            self._blend(a, b, new)
        self.updates += 1

    def _blend(self, a: int, b: int, new: Mapping[int, float]) -> None:
        old_tokens, old_weights = self.row(a, b)
        blend = dict(new)
        if old_tokens:
            blend = {t: (1 - self._eta) * w for t, w in zip(old_tokens, old_weights, strict=True)}
            for t, p in new.items():
                blend[t] = blend.get(t, 0.0) + self._eta * p
        best = sorted(blend.items(), key=lambda entry: (-entry[1], entry[0]))[: self.base.k]
        self._overlay[a, b] = ([t for t, _ in best], [w for _, w in best])
        self._overlay.move_to_end((a, b))
        if len(self._overlay) > self._capacity:
            self._overlay.popitem(last=False)

    def forget(self) -> None:
        """Drop everything that was learned."""
        self._overlay.clear()

    def merged(self) -> NgramTable:
        """Base and overlay as one table, to be written to a new file."""
        rows = {(int(a), int(b)): self.base.row(int(a), int(b)) for a, b in self.base.keys}
        rows.update(self._overlay)
        ordered = sorted((key, row) for key, row in rows.items() if row[0])
        sizes = [len(row[0]) for _, row in ordered]
        return NgramTable(
            self.base.vocab_size,
            self.base.k,
            np.array([key for key, _ in ordered], np.int64).reshape(-1, 2),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.array([t for _, row in ordered for t in row[0]], np.int32),
            np.array([w for _, row in ordered for w in row[1]], np.float32),
            {**self.base.description, "updates": self.updates},
        )
