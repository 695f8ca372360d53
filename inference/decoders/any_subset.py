"""Any-subset speculative decoding (ASSD): an any-subset model drafts several holes at once and verifies them itself.

"Self-Speculative Decoding Accelerates Lossless Inference in Any-Order and Any-Subset Autoregressive Models"
(arXiv:2504.20456), algorithm 1 (self-draft) and its n-gram form. One pass gives K independent conditionals at the
committed prefix, a second one the joint's own conditionals along the drafts; the rule of speculative sampling
(acceptance.py) keeps a prefix. The first draft of a round is always kept (lemma 1): both passes give it the same law.
So a round of two calls commits at least two tokens, and no row needs more calls than it has holes (theorem 1).

Shape letters: B batch, N canvas, K drafts of a round, V vocabulary. n committed ranks, m visible ones.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Verdict, verify, verify_greedy
from draftsmith.inference.canvas import CanvasCommit, CanvasRequest
from draftsmith.inference.decoders.any_subset_session import CanvasSession, RowRound, drain
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.rng import sample_categorical
from draftsmith.inference.sampling import SamplingParams, law

DRAFTS = ("self", "ngram")
_PRIOR_ALPHA, _PRIOR_WEIGHT, _DECAY = 0.6, 8.0, 0.9  # of the running acceptance of a row, as in draft_length.py


@dataclass(frozen=True)
class AnySubsetSettings:
    """Settings of ASSD."""

    draft: str = field(
        default="self",
        metadata={
            "help": "where drafts come from. self: the model's conditionals at the committed tokens, one more call. "
            "ngram: the pairs of neighbours in the canvas, no call",
            "choices": DRAFTS,
        },
    )
    k: int = field(default=5, metadata={"help": "tokens drafted per round (at most, with adaptive)"})
    bonus: bool = field(
        default=False,
        metadata={"help": "draw one more token from the verifying pass when every draft was accepted (the paper: no)"},
    )
    adaptive: bool = field(
        default=False,
        metadata={"help": "choose k in 2..k, row by row, for the most tokens per cost at the acceptance seen so far"},
    )
    row_cost: float = field(
        default=0.02, metadata={"help": "adaptive: what one more row of a pass costs, as a share of the pass"}
    )
    cache: bool = field(default=True, metadata={"help": "keep keys and values of committed tokens (exact)"})

    def __post_init__(self) -> None:
        if self.draft not in DRAFTS:
            raise unknown_choice("draft", self.draft, DRAFTS)
        if self.draft == "self" and self.k < 2:
            raise InvalidValue(
                f"k must be at least 2 for self-drafting, got {self.k}: one draft a round takes up to 2(N-m)-1 calls "
                "for N-m holes, two or more never take over N-m; decoder 'any_subset_sequential' drafts nothing"
            )
        if self.k < 1:
            raise InvalidValue(f"k must be at least 1, got {self.k}")
        if self.row_cost < 0:
            raise InvalidValue(f"row_cost must be 0 or more, got {self.row_cost}")

    def expected_tokens(self, alpha: float, k: int) -> float:
        """Tokens of a round of k drafts, if each one that is tested passes with probability alpha."""
        tests = k - 1 if self.draft == "self" else k  # a self-draft's first one passes for certain
        certain = 1 if self.draft == "self" else 0
        tokens = certain + sum(alpha**i for i in range(tests))
        return tokens + (alpha**tests if self.bonus else 0.0)

    def cost(self, k: int) -> float:
        """Cost of a round of k drafts in passes of one row: what `row_cost` says of the rows that it computes."""
        more = int(self.bonus)
        if self.draft == "ngram":
            return 1 + self.row_cost * (2 * (k + more))
        return 2 + self.row_cost * (k + 1 + 2 * (k - 1 + more))

    def best_k(self, alpha: float) -> int:
        """The k of the most tokens per cost."""
        least = 2 if self.draft == "self" else 1
        return max(range(least, max(self.k, least) + 1), key=lambda k: self.expected_tokens(alpha, k) / self.cost(k))


@dataclass(frozen=True)
class PlainCanvasSettings:
    """Of the two baselines."""

    cache: bool = field(default=True, metadata={"help": "keep keys and values of committed tokens (exact)"})


class AnySubsetDecoder:
    """Fills canvases; the rows of a batch may differ in length, holes and progress."""

    def __init__(
        self,
        model: AnySubsetLM,
        *,
        sampling: SamplingParams | None = None,
        settings: AnySubsetSettings | None = None,
        seed: int = 0,
    ) -> None:
        """sampling: the defaults are greedy, the argmax of each conditional. Raises InvalidValue for penalties."""
        self._model = model
        self._sampling = sampling or SamplingParams()
        self._settings = settings or AnySubsetSettings()
        self._seed = seed
        if self._sampling.has_penalties:
            raise InvalidValue("penalties count what stands before a token, which a canvas does not define: leave them")

    def decode(self, requests: Sequence[CanvasRequest]) -> DecodeResult:
        """Fill all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[CanvasRequest]) -> Generator[CanvasCommit, None, DecodeResult]:
        """Yields what every round commits to each row; the generator's return value is the DecodeResult."""
        if not requests:
            return self._result(None)
        session = CanvasSession(requests, self._model, self._seed, self._settings.k + 1, self._settings.cache)
        yield from session.opening()
        alphas = [(_PRIOR_ALPHA * _PRIOR_WEIGHT, _PRIOR_WEIGHT)] * len(requests)
        while session.running:
            begin = time.perf_counter()
            with torch.inference_mode():  # closed before each yield: the caller's code is not to run in it
                rounds = self._round(session, [self._width(alphas[row.index]) for row in session.rows])
                commits = session.commit(rounds, time.perf_counter() - begin)
                session.shrink()
            for done in rounds:
                tests = done.examined - (1 if self._settings.draft == "self" and done.drafted else 0)
                if tests > 0:  # the first self-draft passes for certain and says nothing
                    passed, count = alphas[done.index]
                    beta = done.beta_sum - (done.examined - tests)
                    alphas[done.index] = passed * _DECAY + beta, count * _DECAY + tests
            yield from commits
        return self._result(session)

    def _width(self, evidence: tuple[float, float]) -> int:
        return self._settings.best_k(evidence[0] / evidence[1]) if self._settings.adaptive else self._settings.k

    def _round(self, session: CanvasSession, widths: Sequence[int]) -> list[RowRound]:
        offered = [min(k, max(row.left, 1)) for k, row in zip(widths, session.rows, strict=True)]
        width = max(offered)
        u = session.uniforms(width)
        ranks = session.ranks(width)
        own: Tensor | None = None
        if self._settings.draft == "self":
            drafting = session.logits(ranks, ranks[:, :1].expand_as(ranks), session.committed())
            alone = [row.left == 1 for row in session.rows]
            role = "target" if all(a for a, row in zip(alone, session.rows, strict=True) if row.left) else "draft"
            session.count(role, [row.left > 0 for row in session.rows])
            if role == "target":
                return plain(session, drafting[:, :1], u.draft, self._sampling)
            q = self._law(drafting)
            x = drafting.argmax(-1) if self._sampling.greedy else sample_categorical(q, u.draft)
            own = drafting[:, :1]
        else:
            q, x = session.draft_pairs(width, None if self._sampling.greedy else u.draft)
            session.auxiliary += sum(n for n, row in zip(offered, session.rows, strict=True) if row.left)
        session.place(ranks, x)
        # a row whose only hole the self-draft has filled needs no verification
        asks = [row.left > (1 if own is not None else 0) for row in session.rows]
        more = int(self._settings.bonus)
        asked = session.ranks(width + more)[:, 0 if own is None else 1 :]
        reach = [n + width - 1 + more for n in session.committed()]
        verifying = session.logits(asked, asked, reach)
        session.count("target", asks)
        scores = verifying if own is None else torch.cat([own, verifying], 1)
        if not more:  # `verify` reads one position behind the drafts, which is then never used
            scores = torch.cat([scores, scores[:, -1:]], 1)
        n = torch.tensor(offered, device=x.device)
        verdict = self._verify(x, q, scores, n, u.accept, u.sample)
        return session.read(x, verdict, offered, self._settings.bonus)

    def _law(self, logits: Tensor) -> Tensor:
        """[B, K, V]; the mask id has no mass, on both sides."""
        return law(logits, self._sampling)

    def _verify(self, x: Tensor, q: Tensor, scores: Tensor, n: Tensor, accept: Tensor, sample: Tensor) -> Verdict:
        if self._sampling.greedy:
            finite = scores.amax(-1).isfinite()  # a NaN would be its own argmax on both sides, and kept
            return verify_greedy(x, scores.argmax(-1).masked_fill(~finite, -1), n, finite)
        return verify(x, q, self._law(scores), n, accept, sample)

    def _result(self, session: CanvasSession | None) -> DecodeResult:
        s = self._settings
        roles = ("target", "draft") if s.draft == "self" else ("target",)
        notes: dict[str, Any] = {
            "draft": s.draft,
            "k": s.k,
            "bonus": s.bonus,
            "adaptive": s.adaptive,
            "cache": s.cache,
        }
        return result_of(session, roles, notes)


class SequentialCanvasDecoder:
    """One token a call along the order: the law that ASSD keeps, and the baseline of its speed."""

    def __init__(
        self,
        model: AnySubsetLM,
        *,
        sampling: SamplingParams | None = None,
        settings: PlainCanvasSettings | None = None,
        seed: int = 0,
        parallel: bool = False,
    ) -> None:
        """parallel: all holes at once from the prompt alone, one call: fast, and not the model's joint law."""
        self._model = model
        self._sampling = sampling or SamplingParams()
        self._settings = settings or PlainCanvasSettings()
        self._seed = seed
        self._parallel = parallel
        if self._sampling.has_penalties:
            raise InvalidValue("penalties count what stands before a token, which a canvas does not define: leave them")

    def decode(self, requests: Sequence[CanvasRequest]) -> DecodeResult:
        """Fill all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[CanvasRequest]) -> Generator[CanvasCommit, None, DecodeResult]:
        """Yields what every call commits to each row; the generator's return value is the DecodeResult."""
        notes: dict[str, Any] = {"draft": "none", "parallel": self._parallel, "cache": self._settings.cache}
        if not requests:
            return result_of(None, ("target",), notes)
        most = max(len(request.holes) for request in requests) if self._parallel else 1
        session = CanvasSession(requests, self._model, self._seed, most, self._settings.cache)
        yield from session.opening()
        while session.running:
            begin = time.perf_counter()
            with torch.inference_mode():
                ranks = session.ranks(max(most, 1))
                logits = session.logits(ranks, ranks[:, :1].expand_as(ranks), session.committed())
                session.count("target", [row.left > 0 for row in session.rows])
                u = session.uniforms(ranks.shape[1])
                rounds = plain(session, logits, u.draft, self._sampling)
                commits = session.commit(rounds, time.perf_counter() - begin)
                session.shrink()
            yield from commits
        return result_of(session, ("target",), notes)


def plain(session: CanvasSession, logits: Tensor, u: Tensor, sampling: SamplingParams) -> list[RowRound]:
    """Commit one draw for each of logits [B, K, V], as far as the rows have holes; u: [B, K or more]."""
    if sampling.greedy:
        x, broken = logits.argmax(-1), ~logits.amax(-1).isfinite()
    else:
        p = law(logits, sampling)
        x, broken = sample_categorical(p, u[:, : logits.shape[1]]), p[..., 0].isnan()
    session.place(session.ranks(x.shape[1]), x)
    return session.read_plain(x, broken)


def result_of(session: CanvasSession | None, roles: Sequence[str], notes: dict[str, Any]) -> DecodeResult:
    """The outcome of a session; of none, that of no requests."""
    if session is None:
        return DecodeResult([], RoundStats(), dict.fromkeys(roles, 0), 0.0, [], notes=notes)
    nfe = {role: session.nfe.get(role, 0) for role in roles}
    notes |= {"nfe_per_row": list(session.calls), "auxiliary": session.auxiliary}
    return DecodeResult(
        [row.output for row in session.all_rows],
        session.stats,
        nfe,
        time.perf_counter() - session.begin,
        [row.reason or "length" for row in session.all_rows],
        notes=notes,
    )


def build(
    parts: Mapping[str, Any], *, sampling: SamplingParams | None, settings: AnySubsetSettings, seed: int
) -> AnySubsetDecoder:
    """For the registry."""
    return AnySubsetDecoder(parts["target"], sampling=sampling, settings=settings, seed=seed)


def build_sequential(
    parts: Mapping[str, Any], *, sampling: SamplingParams | None, settings: PlainCanvasSettings, seed: int
) -> SequentialCanvasDecoder:
    """For the registry."""
    return SequentialCanvasDecoder(parts["target"], sampling=sampling, settings=settings, seed=seed)


def build_parallel(
    parts: Mapping[str, Any], *, sampling: SamplingParams | None, settings: PlainCanvasSettings, seed: int
) -> SequentialCanvasDecoder:
    """For the registry."""
    return SequentialCanvasDecoder(parts["target"], sampling=sampling, settings=settings, seed=seed, parallel=True)
