"""The bookkeeping of one call that fills canvases with an any-subset model: rows, order, cache, randomness, statistics.

Invariant between rounds, per row: n ranks are committed, and the cache holds the content of at least n - 1 of them; the
last one is fed with the next pass. Ended rows stay in the batch, on garbage, until they are worth removing.
Shape letters: B rows in the batch, N longest canvas, K ranks of a pass, V vocabulary.
"""

import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Fault, Verdict
from draftsmith.inference.canvas import CanvasCommit, CanvasRequest
from draftsmith.inference.decoders.any_subset_pairs import draft_pairs
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.orders import check_rank, is_lattice, lattice_rank, order_of
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.rng import NUM_STREAMS, Stream, key, uniform_from
from draftsmith.inference.stopping import LENGTH, STOP_ID

_REMOVE_SHARE = 0.25  # as of session.py


class UntrainedWarning(UserWarning):
    """A valid law is asked for that the model has not been trained on."""


@dataclass(slots=True)
class CanvasRow:
    """One canvas on its way."""

    index: int  # into the requests
    order: list[int]  # position of each rank
    n: int  # committed ranks, m at the beginning
    stop_ids: frozenset[int]
    lattice: bool
    filled: dict[int, int] = field(default_factory=dict)  # position -> token
    reason: str | None = None  # why it ended

    @property
    def left(self) -> int:
        """Holes still to fill; 0 when it ended."""
        return 0 if self.reason is not None else len(self.order) - self.n

    @property
    def output(self) -> list[int]:
        """The tokens of the holes in ascending position, up to the first stop id."""
        tokens = [self.filled[position] for position in sorted(self.filled)]
        ends = (i + 1 for i, token in enumerate(tokens) if token in self.stop_ids)
        return tokens[: next(ends, len(tokens))]


@dataclass(frozen=True, slots=True)
class RowRound:
    """What one round decided for one row."""

    index: int
    drafted: int
    accepted: int
    tokens: list[int]  # to commit, by rank, before a stop cuts them
    beta_sum: float
    examined: int
    fault: int


@dataclass(frozen=True, slots=True)
class Uniforms:
    """Numbers of a round in [0, 1)."""

    draft: Tensor  # [B, K]
    accept: Tensor  # [B, K]
    sample: Tensor  # [B]


class CanvasSession:
    """One decode call over a batch of canvases."""

    def __init__(
        self, requests: Sequence[CanvasRequest], model: AnySubsetLM, seed: int, slack: int, cached: bool
    ) -> None:
        """slack: most ranks that a pass looks at beyond the committed ones.

        Raises InvalidValue, one line, for canvases that the model cannot fill; warns of what it was not trained on.
        """
        self.begin = time.perf_counter()
        if model.training:
            raise InvalidState("the model is in train mode, where dropout breaks exactness: call eval()")
        self.net, device = model, model.device
        config = self.net.config
        ranks = [order_checked(i, request, model) for i, request in enumerate(requests)]
        _warn(requests, ranks, model)
        self.all_rows = [_open_row(i, r, rank) for i, (r, rank) in enumerate(zip(requests, ranks, strict=True))]
        self.rows = [row for row in self.all_rows if row.reason is None]
        longest = max(len(request.tokens) for request in requests)
        order = torch.zeros(len(self.rows), longest + slack, dtype=torch.int64)
        by_rank = torch.full_like(order, config.mask_id)
        for b, row in enumerate(self.rows):
            size = len(row.order)
            order[b, :size] = torch.tensor(row.order)
            order[b, size:] = row.order[-1]  # read for padding only
            by_rank[b, :size] = torch.tensor(requests[row.index].tokens)[row.order]
        self._sizes = torch.tensor([len(row.order) for row in self.rows], device=device)
        self._visible = torch.tensor([row.n for row in self.rows], dtype=torch.int64, device=device)
        self._order, self._by_rank = order.to(device), by_rank.to(device)
        self._longest = longest
        self._key = key(seed, torch.tensor([[requests[row.index].row_id] for row in self.rows], dtype=torch.int64))
        self._round = 0
        self._first = [0] * len(self.rows)  # ranks whose content the cache holds
        self._cache = None
        if cached and self.rows:
            with torch.inference_mode():
                self._cache = self.net.new_cache(self._order[:, :longest], slack)
        self.stats = RoundStats()
        self.nfe: dict[str, int] = {}
        self.calls = [0] * len(requests)  # per request, until it ended
        self.auxiliary = 0  # look-ups of the n-gram draft

    @property
    def running(self) -> bool:
        return any(row.reason is None for row in self.rows)

    def opening(self) -> Iterator[CanvasCommit]:
        """The commits of rows that have no hole."""
        for row in self.all_rows:
            if row.reason is not None:
                yield CanvasCommit(row.index, [], [], row.reason)

    def committed(self) -> list[int]:
        """[B] n."""
        return [row.n for row in self.rows]

    def ranks(self, width: int) -> Tensor:
        """int64 [B, K]: the K ranks from n on; past the end of a canvas they are padding."""
        n = torch.tensor(self.committed(), device=self._order.device)
        return n.unsqueeze(1) + torch.arange(width, device=n.device)

    def place(self, ranks: Tensor, tokens: Tensor) -> None:
        """Write tokens int64 [B, K] at ranks, to be fed later."""
        self._by_rank.scatter_(1, ranks, tokens)

    def uniforms(self, width: int) -> Uniforms:
        """This round's numbers, keyed by row, rank and round: a rank visited again gets fresh ones."""
        steps = torch.arange(width)
        offsets = torch.cat([steps, steps, torch.zeros(1, dtype=torch.int64)])
        streams = torch.tensor([Stream.DRAFT] * width + [Stream.ACCEPT] * width + [Stream.SAMPLE])
        at = torch.tensor(self.committed()).unsqueeze(1) + offsets
        u = uniform_from(self._key, at, streams + NUM_STREAMS * self._round).to(self._order.device)
        return Uniforms(u[:, :width], u[:, width : 2 * width], u[:, -1])

    def count(self, role: str, rows: Sequence[bool]) -> None:
        """One network call that these rows of the batch needed."""
        if any(rows):
            self.nfe[role] = self.nfe.get(role, 0) + 1
            for row, asks in zip(self.rows, rows, strict=True):
                self.calls[row.index] += asks

    def logits(self, ranks: Tensor, limit: Tensor, reach: Sequence[int]) -> Tensor:
        """[B, K, V] of queries at ranks [B, K] that see content of ranks below limit [B, K].

        reach: [B], content of ranks below it must be there; what the cache lacks of it is fed in this pass.
        """
        if self._cache is None:
            canvas = torch.full_like(self._by_rank[:, : self._longest], self.net.config.mask_id)
            order = self._order[:, : self._longest]
            inside = torch.arange(self._longest, device=order.device) < self._sizes.unsqueeze(1)
            rank = _rank_of(order, inside)
            canvas.scatter_(1, order_of(rank), self._by_rank[:, : self._longest])
            return self.net.head(self.net(canvas, rank, self._visible, self._order.gather(1, ranks), limit))
        count = max(end - start for start, end in zip(self._first, reach, strict=True))
        fed = torch.tensor(self._first, device=ranks.device).unsqueeze(1) + torch.arange(count, device=ranks.device)
        tokens = self._by_rank.gather(1, fed)
        hidden = self.net.extend(self._cache, tokens, self._first, self._visible, ranks, limit)
        self._first = list(reach)
        return self.net.head(hidden)

    def draft_pairs(self, width: int, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """Laws [B, K, V] and drafts int64 [B, K] of the n-gram draft for the next K ranks."""
        order = self._order[:, : self._longest]
        rank = _rank_of(order, torch.arange(self._longest, device=order.device) < self._sizes.unsqueeze(1))
        tokens = self._by_rank[:, : self._longest].gather(1, rank)
        n = torch.tensor(self.committed(), device=order.device)
        config = self.net.config
        targets = self._order.gather(1, self.ranks(width))
        return draft_pairs(tokens, rank < n.unsqueeze(1), targets, config.vocab_size, config.mask_id, u)

    # --- the end of a round

    def read(self, x: Tensor, verdict: Verdict, offered: Sequence[int], bonus: bool) -> list[RowRound]:
        """What verification of drafts x [B, K] decided for the rows that run: the round's only wait for the device."""
        k = verdict.k.unsqueeze(1)
        # the correction goes to the first rank that was not kept; past kept drafts nothing was committed, or the bonus
        self._by_rank.scatter_(1, self.ranks(1) + k, verdict.y.unsqueeze(1))
        width = x.shape[1]
        columns = (x, k, verdict.y.unsqueeze(1), verdict.fault.unsqueeze(1), verdict.beta)
        found = []
        for row, n, numbers in zip(
            self.rows, offered, torch.cat([c.double() for c in columns], 1).tolist(), strict=True
        ):
            if row.reason is not None:
                continue
            kept, y, fault = (int(value) for value in numbers[width : width + 3])
            tokens = [int(value) for value in numbers[:kept]]
            if kept < n or (bonus and n < row.left):
                tokens.append(y)
            examined = min(kept + 1, n)
            betas = numbers[width + 3 : width + 3 + examined]
            found.append(RowRound(row.index, n, kept, tokens, sum(betas), examined, fault))
        return found

    def read_plain(self, x: Tensor, broken: Tensor) -> list[RowRound]:
        """The same for draws x [B, K] that are committed as they are; broken: bool [B, K]."""
        found = []
        width = x.shape[1]
        for row, numbers in zip(self.rows, torch.cat([x, broken.long()], 1).tolist(), strict=True):
            if row.reason is None:
                tokens, wrong = numbers[:width], numbers[width:]
                count = min(row.left, width)
                fault = Fault.TARGET if any(wrong[:count]) else Fault.NONE
                found.append(RowRound(row.index, 0, 0, tokens[:count], 0.0, 0, fault))
        return found

    def commit(self, rounds: Sequence[RowRound], seconds: float) -> list[CanvasCommit]:
        """Close a round. Raises RuntimeError (InvalidState) where the scores were no law."""
        commits = []
        rows = {row.index: row for row in self.rows}
        for done in rounds:
            row = rows[done.index]
            if done.fault != Fault.NONE:
                at = row.order[min(row.n + done.accepted, len(row.order) - 1)]
                raise InvalidState(
                    f"the model's scores at position {at} of request {row.index} are no law: they hold a NaN or +inf, "
                    "or every token is excluded (check weights and dtype)"
                )
            tokens = done.tokens
            stops = [i + 1 for i, token in enumerate(tokens) if token in row.stop_ids] if row.lattice else []
            tokens = tokens[: stops[0]] if stops else tokens
            positions = row.order[row.n : row.n + len(tokens)]
            row.filled.update(zip(positions, tokens, strict=True))
            row.n += len(tokens)
            if row.left == 0 or stops:
                stopped = any(token in row.stop_ids for token in row.filled.values())
                row.reason = STOP_ID if stopped else LENGTH
            commits.append(CanvasCommit(row.index, positions, tokens, row.reason))
            self.stats.append(
                row.index, done.drafted, done.accepted, len(tokens), done.beta_sum, seconds, done.examined
            )
        self._first = [max(0, row.n - 1) if row.n else 0 for row in self.rows]
        self._round += 1
        return commits

    def shrink(self) -> None:
        """Remove the ended rows from the batch once they are enough of it."""
        live = [b for b, row in enumerate(self.rows) if row.reason is None]
        ended = len(self.rows) - len(live)
        if not live or ended < max(1, _REMOVE_SHARE * len(self.rows)):
            return
        self.rows = [self.rows[b] for b in live]
        self._first = [self._first[b] for b in live]
        index = torch.tensor(live)
        self._key = self._key[index]
        index = index.to(self._order.device)
        self._order, self._by_rank = self._order[index], self._by_rank[index]
        self._sizes, self._visible = self._sizes[index], self._visible[index]
        if self._cache is not None:
            self._cache.select(index)


def drain(stream: Generator[CanvasCommit, None, DecodeResult]) -> DecodeResult:
    """Run a stream to its end; its return value."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # StopIteration is not generic


def _rank_of(order: Tensor, inside: Tensor) -> Tensor:
    """rank int64 [B, N] of order [B, N], whose entries outside a shorter canvas are padding: those rank last."""
    batch, length = order.shape
    steps = torch.arange(length, device=order.device).expand(batch, -1)
    rank = torch.full((batch, length), length, dtype=torch.int64, device=order.device)
    rank.scatter_reduce_(1, order, torch.where(inside, steps, length), "amin")
    return rank.argsort(dim=1, stable=True).argsort(1)  # positions past the end take the last ranks, from left to right


def order_checked(index: int, request: CanvasRequest, model: AnySubsetLM) -> Tensor:
    """int64 [1, N], the order of a request, checked. Raises InvalidValue."""
    config = model.config
    if len(request.tokens) > config.max_length:
        raise InvalidValue(
            f"request {index}: a canvas of {len(request.tokens)} positions, the model has {config.max_length}: "
            "shorten it"
        )
    hole = set(request.holes)
    for position, token in enumerate(request.tokens):
        if not 0 <= token < config.vocab_size:
            raise InvalidValue(
                f"request {index}: id {token} at position {position} is outside the vocabulary "
                f"0..{config.vocab_size - 1}"
            )
        if (token == config.mask_id) != (position in hole):
            said = "is a hole and holds" if position in hole else "is no hole and holds the mask,"
            raise InvalidValue(
                f"request {index}: position {position} {said} id {token}; holes hold the mask id {config.mask_id}, "
                "and nothing else does"
            )
    if hole and len(hole) == len(request.tokens) and not config.sink:
        raise InvalidValue(
            f"request {index} is all holes: this model needs one visible token or a BOS (it has no sink)"
        )
    visible = torch.tensor([[position not in hole for position in range(len(request.tokens))]])
    if request.rank is None:
        return lattice_rank(visible)
    rank = torch.tensor([list(request.rank)])
    check_rank(rank, visible)
    return rank


def _open_row(index: int, request: CanvasRequest, rank: Tensor) -> CanvasRow:
    visible = len(request.tokens) - len(request.holes)
    lattice = bool(is_lattice(rank, torch.tensor([visible])))
    row = CanvasRow(index, order_of(rank)[0].tolist(), visible, frozenset(request.stop_ids), lattice)
    if not request.holes:
        row.reason = LENGTH
    return row


def _warn(requests: Sequence[CanvasRequest], ranks: Sequence[Tensor], model: AnySubsetLM) -> None:
    """Say once what the model was not trained on."""
    trained = model.trained
    low, high = trained.get("mask_rate", (0.0, 1.0))
    # one token of the canvas is the resolution of a share
    shares = [len(request.holes) / len(request.tokens) for request in requests]
    outside = [
        i
        for i, (share, request) in enumerate(zip(shares, requests, strict=True))
        if request.holes and not low - 1 / len(request.tokens) <= share <= high + 1 / len(request.tokens)
    ]
    if outside:
        warnings.warn(
            f"request {outside[0]}: {shares[outside[0]]:.2f} of the canvas are holes, the model was trained at "
            f"{low:.2f} to {high:.2f}: a valid law, of untrained conditionals",
            UntrainedWarning,
            stacklevel=4,
        )
    if trained.get("order") == "lattice":
        for i, (request, rank) in enumerate(zip(requests, ranks, strict=True)):
            if not bool(is_lattice(rank, torch.tensor([len(request.tokens) - len(request.holes)]))):
                warnings.warn(
                    f"request {i}: its rank is not the lattice's, on which the model was trained: a valid law, of "
                    "untrained conditionals",
                    UntrainedWarning,
                    stacklevel=4,
                )
                break
