"""Whole documents in rows of at most T tokens: no document is cut that fits into a row.

`PackedTokens` cuts one long stream of tokens every T tokens; what lies behind a cut has lost its beginning, which for a
conversation is its question. Here rows are filled by best fit, longest first (Johnson 1974: at most 11/9 of the fewest
rows, and 6/9 of a row), so a little of each row is padding. A document longer than T becomes pieces of T tokens and a
rest; no token is lost.
Shape letters: T tokens of a row, D documents, P pieces (documents, or parts of long ones), R rows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.token_store import PackedTokens, TokenStore, make_batch
from draftsmith.inference.errors import InvalidValue


def fill_rows(sizes: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """int64 [P]: the row of each piece, 0..R-1, rows being filled to at most `length` by best fit, longest first.

    Equal pieces keep their order. Raises InvalidValue for a piece longer than `length`.
    """
    if len(sizes) and int(sizes.max()) > length:
        raise InvalidValue(f"a piece of {int(sizes.max())} tokens does not fit a row of {length}")
    row_of = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # free tokens that some row has, ascending, each once
    rows: dict[int, list[int]] = {}  # free tokens -> rows that have as many
    count = 0
    for piece in np.argsort(-sizes, kind="stable"):
        size = int(sizes[piece])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room, count = count, length, count + 1
        else:
            room = rooms[at]
            row = rows[room].pop()
            if not rows[room]:
                del rows[room], rooms[at]
        row_of[piece] = row
        left = room - size
        if left:
            if left not in rows:
                rows[left] = []
                insort(rooms, left)
            rows[left].append(row)
    return row_of


class WholeDocuments(PackedTokens):
    """A store as rows of whole documents; within a row they keep their order."""

    def __init__(self, store: TokenStore, length: int, *, separate: bool, pad_id: int, fingerprint: str = "") -> None:
        """Args: as `PackedTokens`. Raises InvalidValue unless documents are kept apart."""
        super().__init__(store, length, separate=separate, pad_id=pad_id, fingerprint=fingerprint)
        if not separate:
            raise InvalidValue("text.packing whole keeps documents apart: set text.separate_documents to true")
        self.fingerprint += "/whole"
        starts, sizes, owner = _pieces(store.offsets, length)
        row_of = fill_rows(sizes, length)
        order = np.argsort(row_of, kind="stable")
        self._starts, self._sizes, self._owner = starts[order], sizes[order], owner[order]
        self._rows = np.searchsorted(row_of[order], np.arange(int(row_of.max(initial=-1)) + 2))  # [R + 1]

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def fill(self) -> float:
        """Share of all places that hold a token; 1 for an empty store."""
        return self.store.num_tokens / (len(self) * self.length) if len(self) else 1.0

    @property
    def divided(self) -> int:
        """Documents that are longer than a row."""
        return int((np.diff(self.store.offsets) > self.length).sum())

    def fetch(self, indices: Sequence[int]) -> TokenBatch:
        """The batch of these rows; an index PADDING gives a row of padding."""
        shape = len(indices), self.length
        ids, mask = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.uint8)
        document = np.full(shape, PADDING, np.int64)
        for b, row in enumerate(indices):
            end = 0
            for piece in range(self._rows[row], self._rows[row + 1]) if row != PADDING else ():
                start, size = self._starts[piece], self._sizes[piece]
                here, there = slice(end, end + size), slice(start, start + size)
                ids[b, here], mask[b, here] = self.store.ids[there], self.store.mask[there]
                document[b, here] = self._owner[piece]
                end += size
        return make_batch(ids, mask, document, [int(i) for i in indices], separate=True)


def _pieces(offsets: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(first token, tokens, number) of every piece, int64 [P] each, in the order of the text. offsets: [D + 1].

    Numbers differ between any two pieces: parts of one document must not see each other where others lie between.
    """
    sizes = np.diff(offsets)
    parts = -(-sizes // length)  # an empty document has none
    document = np.repeat(np.arange(len(sizes)), parts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = offsets[document] + part * length
    return starts, np.minimum(offsets[document + 1] - starts, length), np.arange(len(document))
