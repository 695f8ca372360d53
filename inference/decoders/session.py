"""The bookkeeping of one decode call: rows, target cache, randomness, stops, statistics. Decoders add the method.

Invariant between rounds, per row: L tokens are committed and the target's cache holds at most L-1 of them (the last one
is never fed before the next round needs it).
Shape letters: B rows in the batch, g draft length, V vocabulary.
"""

import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Fault
from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.feeding import feed, host_tensor, require_eval
from draftsmith.inference.requests import Commit, DecodeResult, Recorder, RoundStats, RoundView, TokenRequest
from draftsmith.inference.rng import NUM_STREAMS, Stream, key, sample_categorical, uniform_from
from draftsmith.inference.sampling import PenaltyState, SamplingParams, TokenCounts, law, penalise
from draftsmith.inference.stopping import LENGTH, StopScanner

# Rows that ended are removed from the batch once they are this share of it: removal copies the cache.
_REMOVE_SHARE = 0.25


class ContextWarning(UserWarning):
    """Something asked for does not fit into a network's context and was clamped."""


def warn_once(requests: Sequence[int], message: str) -> None:
    """One warning for all the requests that it concerns; none for none."""
    if requests:
        others = f" and {len(requests) - 1} more" if len(requests) > 1 else ""
        warnings.warn(f"request {requests[0]}{others}: {message}", ContextWarning, stacklevel=2)


@dataclass(slots=True)
class Row:
    """One request on its way."""

    index: int  # into the requests
    tokens: list[int]  # prompt and output
    limit: int  # most tokens it may come to hold
    stop: StopScanner
    rounds: int = 0  # that it took part in; keys its randomness
    reason: str | None = None  # why it ended

    @property
    def budget(self) -> int:
        """Tokens that may still be committed."""
        return self.limit - len(self.tokens)


@dataclass(frozen=True)
class RowOutcome:
    """What one round decided for one row."""

    n: int  # offered
    k: int  # accepted
    y: int  # correction or bonus token
    new: list[int]  # tokens to commit, before cutting at a stop
    beta_sum: float
    fault: int
    examined: int | None = None  # tests made; None: min(k + 1, n), as in a chain
    shown: int | None = None  # entries of `drafted` that a recorder is shown; None: n


class Session:
    """One decode call over a batch of requests."""

    def __init__(
        self,
        requests: Sequence[TokenRequest],
        *,
        target: Engine,
        vocab_size: int,
        sampling: SamplingParams,
        seed: int,
        tokenizer: Any | None,
        recorder: Recorder | None,
        headroom: int,
    ) -> None:
        """headroom: the longest draft; so many slots are kept behind the longest row."""
        self._begin = time.perf_counter()
        require_eval(target, "target")
        self.requests = requests
        self.target = target
        self.vocab_size = vocab_size
        self.sampling = sampling
        self._tokenizer = tokenizer
        self._recorder = recorder
        context = target.spec.max_length
        self.all_rows = [_open_row(i, request, context, vocab_size, tokenizer) for i, request in enumerate(requests)]
        warn_once(
            [row.index for row in self.all_rows if row.budget < requests[row.index].max_new_tokens],
            f"prompt and max_new_tokens exceed the context of {context}: the output ends there",
        )
        self.rows = list(self.all_rows)  # in the order of the cache; ended rows stay until they are worth removing
        self.capacity = min(max(row.limit for row in self.rows) + headroom, context)
        self.cache = target.new_cache(len(self.rows), self.capacity)
        if not isinstance(self.cache, StaticCache):
            raise InvalidType(
                f"{type(self.cache).__name__} cannot be rolled back to any length: use an engine over a StaticCache"
            )
        self._key = key(seed, torch.tensor([[request.row_id] for request in requests]))
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}
        self.penalties: PenaltyState | None = None
        if sampling.has_penalties:
            self.penalties = PenaltyState([r.prompt for r in requests], vocab_size, target.device)
        self.stats = RoundStats()
        self.nfe = {"target": 0}

    @property
    def running(self) -> bool:
        return any(row.reason is None for row in self.rows)

    def tokens(self) -> list[list[int]]:
        """[B] committed tokens of the rows in the batch."""
        return [row.tokens for row in self.rows]

    def uniforms(self, g: int) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of a round with g drafts: for sampling them [B, g], for testing them [B, g], for the next token [B].

        Keyed by the row's own round: a position is visited again after a rejection, and how many tokens are drafted
        then (or whether any are) depends on numbers of earlier visits. Reusing one of them would condition it on having
        been seen; fresh numbers are independent of everything that the draft length was chosen by.
        """
        if g not in self._columns:
            steps = torch.arange(g)
            offsets = torch.cat([steps, steps, torch.zeros(1, dtype=torch.int64)])
            kinds = [Stream.DRAFT] * g + [Stream.ACCEPT] * g + [Stream.SAMPLE]
            self._columns[g] = offsets, torch.tensor(kinds, dtype=torch.int64)
        offsets, streams = self._columns[g]
        state = torch.tensor([[len(row.tokens), NUM_STREAMS * row.rounds] for row in self.rows])
        # made on the host, where its operands are, and sent in one piece
        u = uniform_from(self._key, state[:, :1] + offsets, state[:, 1:] + streams)
        u = u.to(self.target.device, non_blocking=True)
        return u[:, :g], u[:, g : 2 * g], u[:, 2 * g]

    def numbers(self, stream: Stream, index: Tensor) -> Tensor:
        """float64 [B, ...]: this round's numbers of a stream at any indices; index: int64 [B or 1, ...] on the host."""
        shape = (-1, *[1] * (index.dim() - 1))
        length = torch.tensor([len(row.tokens) for row in self.rows]).view(shape)
        rounds = torch.tensor([NUM_STREAMS * row.rounds + stream for row in self.rows]).view(shape)
        return uniform_from(self._key.view(shape), length + index, rounds).to(self.target.device, non_blocking=True)

    @property
    def records(self) -> bool:
        """Whether a recorder looks at the rounds."""
        return self._recorder is not None

    def target_logits(self, drafted: Tensor | None) -> Tensor:
        """One target call on what the cache lacks and on `drafted` [B, g]: logits [B, g+1, V] of what follows."""
        hidden = feed(self.target, self.cache, self.tokens(), drafted)
        self.nfe["target"] += 1
        return self.target.head(hidden)[..., : self.vocab_size]

    def plain_round(self, begin: float) -> tuple[list[Commit], float]:
        """Every row samples its next token from the target alone. begin: when the round began, for its statistics."""
        logits = self.target_logits(None)
        counts = self.penalties.counts() if self.penalties is not None else None
        p = None
        if self.sampling.greedy:
            best, finite = greedy_choice(logits, self.sampling, counts)
            y, bad = best[:, 0], ~finite[:, 0]
        else:
            p = law(logits, self.sampling, counts)
            bad = p[:, 0, 0].isnan()
            y = sample_categorical(p[:, 0], self.uniforms(0)[2])
        fault = bad.long() * int(Fault.TARGET)
        read = torch.stack([y, fault], 1).tolist()  # the round's only wait for the device
        outcomes = [RowOutcome(0, 0, token, [token], 0.0, wrong) for token, wrong in read]
        none = torch.zeros(len(self.rows), 0, dtype=torch.int64, device=logits.device)
        return self.commit(outcomes, begin, drafted=none, logits=logits, p=p, q=None)

    def commit(
        self,
        outcomes: Sequence[RowOutcome],
        begin: float,
        *,
        drafted: Tensor,
        logits: Tensor,
        p: Tensor | None,
        q: Tensor | None,
    ) -> tuple[list[Commit], float]:
        """Close a round: show it to the recorder, commit up to each row's stop, roll the target's cache back.

        Returns: what the live rows committed, and the seconds of the round.
        """
        live = [b for b, row in enumerate(self.rows) if row.reason is None]
        for b in live:
            self._check(self.rows[b], outcomes[b])
        if self._recorder is not None:
            self._record(self._recorder, live, outcomes, drafted, logits, p, q)
        commits: list[Commit] = []
        added: list[list[int]] = [[] for _ in self.rows]
        for b in live:
            row, outcome = self.rows[b], outcomes[b]
            count, row.reason = row.stop.push(outcome.new)
            added[b] = outcome.new[:count]
            row.tokens.extend(added[b])
            row.rounds += 1
            commits.append(Commit(row.index, added[b], min(outcome.k, count), row.reason))
        self.cache.truncate(
            [min(held, len(row.tokens) - 1) for held, row in zip(self.cache.lengths, self.rows, strict=True)]
        )
        if self.penalties is not None:
            self.penalties.add(added)
        seconds = time.perf_counter() - begin
        for b, commit in zip(live, commits, strict=True):
            o = outcomes[b]
            self.stats.append(commit.row, o.n, o.k, len(commit.tokens), o.beta_sum, seconds, o.examined)
        return commits, seconds

    def _check(self, row: Row, outcome: RowOutcome) -> None:
        if outcome.fault == Fault.TARGET:
            raise InvalidValue(
                f"the target's scores at position {len(row.tokens) + outcome.k} of request {row.index} are no law: "
                "they hold a NaN or +inf, or every token is excluded (check weights, dtype and masks)"
            )
        if outcome.fault == Fault.DRAFT:
            raise InvalidValue(
                f"draft law does not match its samples: request {row.index}, in the draft after position "
                f"{len(row.tokens) - 1}: a drafted token has no probability under q (NaN weights, or processors "
                "applied to one side only)"
            )

    def _record(
        self,
        recorder: Recorder,
        live: Sequence[int],
        outcomes: Sequence[RowOutcome],
        drafted: Tensor,
        logits: Tensor,
        p: Tensor | None,
        q: Tensor | None,
    ) -> None:
        # A row that lockstep cut short shows itself as what it committed: all of it drafted and accepted, and a law for
        # the token behind it, which stands on committed tokens only.
        cut = {b: len(o.new) for b in live if len((o := outcomes[b]).new) <= o.k}
        pick = None
        if len(live) < len(self.rows):
            pick = host_tensor([live], logits.device)[0]
        # outside inference mode, so that what the recorder computes is ordinary and can be learned from
        with torch.inference_mode(False), torch.no_grad():

            def rows_of(x: Tensor | None) -> Tensor | None:
                return x if x is None or pick is None else x.index_select(0, pick)

            recorder(
                RoundView(
                    requests=self.requests,
                    rows=[self.rows[b].index for b in live],
                    context=[self.rows[b].tokens for b in live],
                    drafted=drafted if pick is None else drafted.index_select(0, pick),
                    num_drafted=[
                        cut.get(b, n if (n := outcomes[b].shown) is not None else outcomes[b].n) for b in live
                    ],
                    accepted=[cut.get(b, outcomes[b].k) for b in live],
                    next_token=[outcomes[b].y for b in live],
                    target_logits=logits if pick is None else logits.index_select(0, pick),
                    target_law=rows_of(p),
                    draft_law=rows_of(q),
                )
            )

    def shrink(self) -> list[int] | None:
        """Remove the ended rows from the batch once they are enough of it; the rows kept, None when nothing changed."""
        live = [b for b, row in enumerate(self.rows) if row.reason is None]
        ended = len(self.rows) - len(live)
        if not live or not ended or ended < _REMOVE_SHARE * len(self.rows):
            return None
        self.rows = [self.rows[b] for b in live]
        self.cache.select(live)
        self._key = self._key[live]
        if self.penalties is not None:
            self.penalties.select(live)
        return live

    def result(self) -> DecodeResult:
        """What the call came to (rows that have not ended count as cut)."""
        text = None if self._tokenizer is None else [row.stop.text() for row in self.all_rows]
        return DecodeResult(
            output=[row.stop.output for row in self.all_rows],
            rounds=self.stats,
            nfe=self.nfe,
            seconds=time.perf_counter() - self._begin,
            stop=[row.reason or LENGTH for row in self.all_rows],
            text=text,
        )


def greedy_choice(logits: Tensor, params: SamplingParams, counts: TokenCounts | None) -> tuple[Tensor, Tensor]:
    """The argmax of each position [B, n] and whether it won with a finite score. logits: [B, n, V]."""
    scores = penalise(logits, params, counts) if params.has_penalties else logits
    best = scores.argmax(-1)
    return best, scores.gather(-1, best.unsqueeze(-1)).squeeze(-1).isfinite()


def _open_row(index: int, request: TokenRequest, context: int, vocab_size: int, tokenizer: Any | None) -> Row:
    prompt = [int(t) for t in request.prompt]
    wrong = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise InvalidValue(f"request {index}: prompt id {wrong} is outside the vocabulary 0..{vocab_size - 1}")
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None and prompt[-1] == pad and pad != getattr(tokenizer, "eos_token_id", None):
        raise InvalidValue(
            f"request {index}: the prompt ends with padding (id {pad}): give each prompt without its padding, as a "
            "list of its own length"
        )
    if len(prompt) >= context:
        raise InvalidValue(
            f"request {index}: a prompt of {len(prompt)} tokens leaves no room in a context of {context}: shorten it"
        )
    limit = min(len(prompt) + request.max_new_tokens, context)
    return Row(index, prompt, limit, StopScanner(request, tokenizer, limit - len(prompt)))


def drain(stream: Generator[Commit, None, DecodeResult]) -> DecodeResult:
    """Run a stream to its end; its return value."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # StopIteration is not generic


def empty_result(*roles: str) -> DecodeResult:
    """The result of no requests."""
    return DecodeResult([], RoundStats(), dict.fromkeys(roles, 0), 0.0, [])


def check_vocab_size(vocab_size: int | None, head: int) -> int:
    """How many ids to decode over; the head's size by default. Raises InvalidValue when there are fewer."""
    if vocab_size is None:
        return head
    if not 1 <= vocab_size <= head:
        raise InvalidValue(f"vocab_size must be between 1 and the head's {head}, got {vocab_size}")
    return vocab_size
