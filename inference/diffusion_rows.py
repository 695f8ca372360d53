"""The host side of the block sampler: canvases, blocks, ends of text, and what every pass committed.

Everything here is small and lives in numpy; a pass sends the network what it feeds and reads back what was accepted.

Shape letters: R requests, B rows still running, L longest canvas, G most holes of a request, K block length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftsmith.inference.canvas import CanvasCommit, CanvasRequest
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.masked_lm import MaskedLMConfig
from draftsmith.inference.requests import RoundStats
from draftsmith.inference.stopping import LENGTH, STOP_ID

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EOT = ("none", "left_done", "first_committed", "reference")


@dataclass(frozen=True)
class Active:
    """The active blocks of the running rows, one pass; columns behind a block's end are not masked."""

    rows: Ints  # [B] indices of requests
    position: Ints  # [B, K] in the canvas; L where there is none
    masked: Bools  # [B, K]
    step: Ints  # [B] passes spent in the block
    passes: Ints  # [B] passes spent in all
    start: Ints  # [B] position of the block's first hole
    quota: Ints  # [B]


class DiffusionRows:
    """State of one decode call."""

    def __init__(
        self,
        requests: Sequence[CanvasRequest],
        config: MaskedLMConfig,
        *,
        block_length: int,
        steps: int,
        eot: str,
        guided: bool,
    ) -> None:
        """Raises InvalidValue for requests that do not fit the network or the blocks."""
        self._eot = eot
        self._steps = steps
        ends = [_end_ids(i, request, config, eot) for i, request in enumerate(requests)]
        for i, request in enumerate(requests):
            _check(i, request, config, block_length, steps, guided)
        count, width = len(requests), max((len(r.tokens) for r in requests), default=1)
        most = max((len(r.holes) for r in requests), default=0)
        self.block_length = block_length or max(most, 1)
        self.width = width
        blocks = -(-most // self.block_length)
        self.tokens = np.full((count, width + 1), config.mask_id, dtype=np.int64)  # [R, L + 1]
        self.lengths = np.array([len(r.tokens) for r in requests], dtype=np.int64)  # [R]
        self._holes = np.full((count, blocks * self.block_length), width, dtype=np.int64)  # [R, G]
        self._open = np.zeros(self._holes.shape, dtype=np.bool_)
        self._size = np.array([len(r.holes) for r in requests], dtype=np.int64)  # [R] holes that count, until a cut
        for i, request in enumerate(requests):
            holes = len(request.holes)
            self.tokens[i, : len(request.tokens)] = request.tokens
            self._holes[i, :holes] = request.holes
            self._open[i, :holes] = True
            self.tokens[i, self._holes[i, :holes]] = config.mask_id
        self.given = np.ones(self.tokens.shape, dtype=np.bool_)  # [R, L + 1]: not a hole
        np.put_along_axis(self.given, self._holes, False, 1)
        self.ends = np.full((count, max(map(len, ends), default=0) or 1), -1, dtype=np.int64)  # [R, E]
        for i, ids in enumerate(ends):
            self.ends[i, : len(ids)] = ids
        self.passes = np.zeros(count, dtype=np.int64)
        self.fed = np.zeros(count, dtype=np.int64)  # positions fed to the network, over all passes
        self._block = np.zeros(count, dtype=np.int64)
        self._step = np.zeros(count, dtype=np.int64)
        self._block_size = np.minimum(self._size, self.block_length)
        self._blocks = np.maximum(1, self._size // self.block_length)
        self.rows: Ints = np.flatnonzero(self._size > 0)  # still running
        self._events: list[tuple[int, Ints, float]] = []  # (row, holes that were filled, seconds of the pass)

    def active(self) -> Active:
        """What the next pass works on."""
        rows, size = self.rows, self.block_length
        columns = (self._block[rows] * size)[:, None] + np.arange(size)
        position = self._holes[rows[:, None], columns]
        step = self._step[rows]
        if self._steps:
            base, more = np.divmod(self._block_size[rows], self._steps // self._blocks[rows])
            quota = np.maximum(base + (step < more), 1)
        else:
            quota = np.ones(len(rows), dtype=np.int64)
        return Active(
            rows, position, self._open[rows[:, None], columns], step, self.passes[rows], position[:, 0], quota
        )

    def waiting(self, active: Active) -> tuple[Ints, Ints]:
        """(index into the running rows, position) of the masked holes outside the active blocks."""
        at, holes = np.nonzero(self._open[active.rows])
        outside = holes // self.block_length != self._block[active.rows][at]
        at, holes = at[outside], holes[outside]
        return at, self._holes[active.rows[at], holes]

    def commit(
        self, active: Active, accept: Bools, predicted: Ints, seconds: float, cut_at: Ints | None = None
    ) -> list[CanvasCommit]:
        """Write what a pass accepted, look for ends of text, go on to the next blocks; rows that are done leave.

        Args: accept, predicted: [B, K]. cut_at: [B] position behind which the canvas is cut although it is still
        masked (EoT mode "reference"), -1: none.
        """
        rows, size = active.rows, self.block_length
        self.passes[rows] += 1
        self._step[rows] += 1
        row_of, column = np.nonzero(accept)
        where, tokens = active.position[row_of, column], predicted[row_of, column]
        self.tokens[rows[row_of], where] = tokens
        holes = self._block[rows[row_of]] * size + column
        self._open[rows[row_of], holes] = False
        self._end_texts(active, accept, cut_at)
        first_open = _first(self._open[rows])
        running = first_open < self._open.shape[1]
        if self._eot == "left_done":
            running &= ~(self._first_end(rows) < first_open)
        block = first_open // size
        moved = running & (block != self._block[rows])
        self._block[rows[moved]] = block[moved]
        self._step[rows[moved]] = 0
        columns = block[moved][:, None] * size + np.arange(size)
        self._block_size[rows[moved]] = self._open[rows[moved][:, None], columns].sum(1)
        self.rows = rows[running]
        bounds = np.searchsorted(row_of, np.arange(len(rows) + 1))
        commits = []
        for b, row in enumerate(rows.tolist()):
            mine = slice(bounds[b], bounds[b + 1])
            self._events.append((row, holes[mine], seconds))
            stop = None if running[b] else self._stop(row)
            commits.append(CanvasCommit(row, where[mine].tolist(), tokens[mine].tolist(), stop))
        return commits

    def output(self, row: int) -> list[int]:
        """The tokens of a row's holes up to the first end of text, in ascending position."""
        tokens = self.tokens[row, self._holes[row, : self._size[row]]]
        end = np.flatnonzero(np.isin(tokens, self.ends[row]))
        found: list[int] = (tokens[: end[0] + 1] if len(end) else tokens).tolist()
        return found

    def stop(self, row: int) -> str:
        """Why a finished row ended."""
        return self._stop(row)

    def statistics(self) -> RoundStats:
        """One plain round per pass and row; committed: tokens that stayed in the output."""
        stats = RoundStats()
        kept = [len(self.output(row)) for row in range(len(self.tokens))]
        for row, holes, seconds in self._events:
            stats.append(row, 0, 0, int((holes < kept[row]).sum()), 0.0, seconds, 0)
        return stats

    def _stop(self, row: int) -> str:
        return STOP_ID if set(self.output(row)[-1:]) & set(self.ends[row].tolist()) else LENGTH

    def _first_end(self, rows: Ints) -> Ints:
        """[B] the first committed end of text among the holes; as many as there are holes where there is none."""
        tokens = self.tokens[rows[:, None], self._holes[rows]]
        there = ~self._open[rows] & (np.arange(self._holes.shape[1]) < self._size[rows, None])
        return _first(there & (tokens[:, :, None] == self.ends[rows][:, None, :]).any(-1))

    def _end_texts(self, active: Active, accept: Bools, cut_at: Ints | None) -> None:
        """Cut canvases behind their end of text; what stands left of a cut stays masked and is decoded on."""
        rows = active.rows
        if self._eot == "first_committed":
            last = self._first_end(rows)
        elif self._eot == "reference":
            holes = self._block[rows][:, None] * self.block_length + np.arange(self.block_length)
            tokens = self.tokens[rows[:, None], active.position]
            ended = accept & (tokens[:, :, None] == self.ends[rows][:, None, :]).any(-1)
            last = np.where(ended.any(1), holes[np.arange(len(rows)), _first(ended) % holes.shape[1]], 1 << 40)
            if cut_at is not None:
                at = (self._holes[rows] == cut_at[:, None]).argmax(1)
                last = np.where(~ended.any(1) & (cut_at >= 0), at, last)
        else:
            return
        cut = last + 1 < self._size[rows]
        short, last = rows[cut], last[cut]
        self._size[short] = last + 1
        self._open[short] &= np.arange(self._open.shape[1]) <= last[:, None]
        self.lengths[short] = self._holes[short, last] + 1


def _first(found: Bools) -> Ints:
    """[B] the first true column of each row [B, n]; n where there is none."""
    first: Ints = np.where(found.any(1), found.argmax(1), found.shape[1])
    return first


def _end_ids(index: int, request: CanvasRequest, config: MaskedLMConfig, eot: str) -> tuple[int, ...]:
    """What ends the request's text: its stop ids, else, where nothing is given behind the holes, the network's."""
    holes = request.holes
    suffix = bool(holes) and holes[-1] - holes[0] == len(holes) - 1 and holes[-1] == len(request.tokens) - 1
    ids = request.stop_ids or (config.end_ids if suffix else ())
    if suffix and not ids and eot != "none":
        raise InvalidValue(
            f"request {index}: eot {eot!r} needs an id that ends a text, and neither the network (eos_id) nor the "
            "request (stop_ids) has one: give stop_ids, or set eot to none"
        )
    return ids


def _check(
    index: int, request: CanvasRequest, config: MaskedLMConfig, block_length: int, steps: int, guided: bool
) -> None:
    length, count = len(request.tokens), len(request.holes)
    where = f"request {index}"
    if length > config.max_length:
        raise InvalidValue(
            f"{where}: {length - count} given tokens and {count} to fill exceed this network's canvas of "
            f"{config.max_length}: shorten one of them"
        )
    holes = set(request.holes)
    given: list[Any] = [token for i, token in enumerate(request.tokens) if i not in holes]
    if config.mask_id in given:
        raise InvalidValue(f"{where}: the mask id {config.mask_id} stands among the given tokens: name it as a hole")
    wrong = next((t for t in given if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise InvalidValue(f"{where}: id {wrong} is outside the vocabulary 0..{config.vocab_size - 1}")
    if guided and not given:
        raise InvalidValue(f"{where}: guidance compares with a masked prompt, and this canvas has none: set guidance 0")
    if not count:
        return
    if block_length and count % block_length:
        raise InvalidValue(
            f"{where}: {count} tokens to fill are no multiple of block_length {block_length}: change one of them, or "
            "set block_length 0 (one block)"
        )
    if steps > count:
        raise InvalidValue(f"{where}: more steps ({steps}) than tokens to fill ({count}): lower steps")
    blocks = count // block_length if block_length else 1
    if steps % blocks:
        raise InvalidValue(f"{where}: {steps} steps are no multiple of {blocks} blocks: change steps or block_length")
