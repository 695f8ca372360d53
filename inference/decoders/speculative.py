"""Speculative sampling over chains: a drafter proposes g tokens, one target call verifies them, its law is kept.

"Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1. A round is: draft, one target call on
[what its cache lacks, x_1..x_g], the accept/residual rule (acceptance.py), one read of the outcome by the host, commit,
roll-back of both caches. Rows of a batch advance each at its own pace ("ragged") or all by the same count ("lockstep").
Shape letters: B rows in the batch, g draft length, V vocabulary. n offered, k accepted.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Verdict, one_hot, verify, verify_greedy
from draftsmith.inference.block_verification import RULES, rule_used, verify_block
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.session import (
    RowOutcome,
    Session,
    check_vocab_size,
    drain,
    empty_result,
    greedy_choice,
    warn_once,
)
from draftsmith.inference.draft_length import DraftLengths, DraftLengthSettings, Outcome, RowLength
from draftsmith.inference.drafters.base import Drafter, DraftSession, DraftTask, Proposal
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.drafters.prompt_lookup import PromptLookupDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.requests import Commit, DecodeResult, Recorder, TokenRequest
from draftsmith.inference.sampling import SamplingParams, law, penalise

BATCHING = ("ragged", "lockstep")


@dataclass(frozen=True)
class SpeculativeSettings(DraftLengthSettings):
    """Settings of the speculative decoder."""

    batching: str = field(
        default="ragged",
        metadata={
            "help": "ragged: every row commits what it accepted. lockstep: all rows advance by the fewest accepted "
            "plus one, for equal cache lengths; progress falls fast with the batch, and sampled ids then depend on "
            "batch-mates",
            "choices": BATCHING,
        },
    )
    verification: str = field(
        default="token",
        metadata={
            "help": "token: drafted tokens are tested one after the other. block: the chain is tested as a whole, "
            "which accepts at least as many in expectation; greedy decoding and deterministic drafts gain nothing and "
            "keep the token rule",
            "choices": RULES,
        },
    )
    lossy_mix: float = field(
        default=0.0,
        metadata={
            "help": "weight of the DRAFT's law in the law that is verified; above 0 the output is not the target's"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batching not in BATCHING:
            raise unknown_choice("batching", self.batching, BATCHING)
        if self.verification not in RULES:
            raise unknown_choice("verification", self.verification, RULES)
        if not 0.0 <= self.lossy_mix < 1.0:
            raise InvalidValue(f"lossy_mix must be at least 0 (lossless) and below 1, got {self.lossy_mix}")


@dataclass(frozen=True)
class PromptLookupSettings(SpeculativeSettings):
    """Settings of speculative decoding with drafts copied from the row's own text."""

    ngram_max: int = field(default=3, metadata={"help": "longest n-gram that is looked up, first"})
    ngram_min: int = field(default=1, metadata={"help": "shortest n-gram that is looked up, last"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "confidence" or self.lossy_mix:
            raise InvalidValue("prompt lookup has no draft law: schedule 'confidence' and lossy_mix do not apply to it")


@dataclass
class _Call:
    """One decode call: the session, its drafts, and what makes a round's time typical."""

    session: Session
    draft: DraftSession
    lengths: dict[int, RowLength]  # by request
    rounds: int = 0
    undrafted: int = 0  # rounds since the drafter was asked last: it then has more to catch up on
    rules: set[str] = field(default_factory=set)  # what the drafts were really verified by


class SpeculativeDecoder:
    """Decodes with drafts; lossless unless `lossy_mix` is set.

    The draft lengths' evidence, the fall-back to plain decoding and its probes persist over decode calls.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Drafter,
        *,
        sampling: SamplingParams | None = None,
        settings: SpeculativeSettings | None = None,
        seed: int = 0,
        tokenizer: Any | None = None,
        recorder: Recorder | None = None,
        costs: CostCurve | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """costs: what a round costs on this machine, for schedule 'cost' and the fall-back.

        vocab_size: the tokenizer's size, where the two heads are padded to different sizes above it.
        """
        self._target = target
        self._drafter = drafter
        self._sampling = sampling or SamplingParams()
        self._settings = settings or SpeculativeSettings()
        self._seed = seed
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._vocab_size = shared_vocabulary(
            target.spec.vocab_size, drafter.vocab_size, vocab_size, tokenizer, drafter.tokenizer
        )
        self.lengths = DraftLengths(self._settings, costs, greedy=self._sampling.greedy)
        self._full: dict[tuple[int, int], Tensor] = {}  # (B, g) -> n = g for every row

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields what every round commits to each row; the generator's return value is the DecodeResult."""
        if not requests:
            return empty_result("target", "draft")
        call = self._open(requests)
        session = call.session
        try:
            while session.running:
                with torch.inference_mode():  # closed before each yield: the caller's code is not to run in it
                    commits = self._round(call)
                    kept = session.shrink()
                    if kept is not None:
                        call.draft.select(kept)
                yield from commits
        finally:  # also when the caller gives up the stream
            self.lengths.close(list(call.lengths.values()))
        session.nfe["draft"] = call.draft.calls
        result = session.result()
        result.notes["rule"] = "; ".join(sorted(call.rules)) or "none (nothing was drafted)"
        return result

    def _open(self, requests: Sequence[TokenRequest]) -> _Call:
        settings = self._settings
        session = Session(
            requests,
            target=self._target,
            vocab_size=self._vocab_size,
            sampling=self._sampling,
            seed=self._seed,
            tokenizer=self._tokenizer,
            recorder=self._recorder,
            headroom=settings.longest,
        )
        task = DraftTask(
            rows=len(requests),
            capacity=max(row.limit for row in session.rows) + settings.longest,
            longest=settings.longest,
            vocab_size=self._vocab_size,
            sampling=self._sampling,
            device=self._target.device,
            want_law=settings.lossy_mix > 0 and self._sampling.greedy,
            confidence=settings.confidence_threshold if settings.schedule == "confidence" else None,
        )
        draft = self._drafter.start(task)
        context = self._target.spec.max_length
        rooms = {row.index: min(context - len(row.tokens) - 1, draft.room(len(row.tokens))) for row in session.rows}
        warn_once(
            [i for i, room in rooms.items() if room < min(settings.draft_length, requests[i].max_new_tokens - 1)],
            f"draft length {settings.draft_length} does not fit behind the prompt into the context and is clamped to "
            f"what does ({max(0, min(rooms.values()))} or more tokens)",
        )
        lengths = self.lengths.open(len(requests))
        return _Call(session, draft, dict(enumerate(lengths)))

    def _round(self, call: _Call) -> list[Commit]:
        """Draft, verify, commit; one host synchronisation."""
        begin = time.perf_counter()
        session, draft, clock = call.session, call.draft, self.lengths.clock
        batch = len(session.rows)
        steady = call.rounds > 0  # the first round reads the prompts: its time is not typical
        call.rounds += 1
        calibrate = steady and clock is not None and clock.wants_plain(batch)
        want = [0] * batch if calibrate else self._want(call)
        live = [b for b, row in enumerate(session.rows) if row.reason is None]
        proposal = None
        if longest := max(want):
            u_draft, u_accept, u_next = (None, None, None) if self._sampling.greedy else session.uniforms(longest)
            proposal = draft.propose(session.tokens(), want, u_draft, session.penalties)
        if proposal is None:
            outcomes = [RowOutcome(0, 0, 0, [], 0.0, 0)] * batch
            lengths = [call.lengths[session.rows[b].index] for b in live]
            commits, seconds = session.plain_round(begin)
            g = 0
            call.undrafted += 1
        else:
            g = proposal.tokens.shape[1]
            n = self._offered(want, g) if proposal.n is None else proposal.n
            logits = session.target_logits(proposal.tokens)
            call.rules.add(
                rule_used(self._settings.verification, greedy=self._sampling.greedy, law=proposal.law is not None)
            )
            verdict, p = self._verify(session, proposal, logits, n, u_accept, u_next)
            outcomes = self._outcomes(_read(verdict, n, proposal.tokens), live)
            lengths = [call.lengths[session.rows[b].index] for b in live]
            commits, seconds = session.commit(
                outcomes, begin, drafted=proposal.tokens, logits=logits, p=p, q=proposal.law
            )
            draft.commit([len(row.tokens) for row in session.rows])
            steady = steady and call.undrafted == 0  # after plain rounds the drafter has more than a token to read
            call.undrafted = 0
        if steady and clock is not None:
            clock.add(batch, g, seconds)
        self.lengths.end_round(
            [
                Outcome(length, want[b], outcomes[b].n, outcomes[b].k, outcomes[b].beta_sum)
                for b, length in zip(live, lengths, strict=True)
            ],
            batch,
        )
        return commits

    def _want(self, call: _Call) -> list[int]:
        """[B] tokens to draft; never past the row's last but one token, since each round commits one more."""
        gain = self.lengths.gain(len(call.session.rows))
        want = []
        for row in call.session.rows:
            n = call.lengths[row.index].want(gain) if row.reason is None else 0
            want.append(max(0, min(n, row.budget - 1, call.draft.room(len(row.tokens)))))
        return want

    def _offered(self, want: Sequence[int], g: int) -> Tensor:
        """n as an int64 [B] tensor on the device."""
        if min(want) < g:
            return host_tensor([want], self._target.device)[0]
        at = (len(want), g)
        if at not in self._full:
            with torch.inference_mode(False):
                self._full[at] = torch.full((len(want),), g, dtype=torch.int64, device=self._target.device)
        return self._full[at]

    def _verify(
        self,
        session: Session,
        proposal: Proposal,
        logits: Tensor,
        n: Tensor,
        u_accept: Tensor | None,
        u_next: Tensor | None,
    ) -> tuple[Verdict, Tensor | None]:
        """The verdict on one round's drafts, and the target's laws [B, g+1, V] (None when greedy)."""
        x, q, params, mix = proposal.tokens, proposal.law, self._sampling, self._settings.lossy_mix
        g = x.shape[1]
        counts = session.penalties.counts(x) if session.penalties is not None else None
        if not params.greedy:
            assert u_accept is not None and u_next is not None
            p = law(logits, params, counts)
            judge = _mixed(p, one_hot(x, p[:, :g]) if q is None else q, mix) if mix else p
            if self._settings.verification == "block" and q is not None:
                return verify_block(x, q, judge, n, u_accept[:, :g], u_next), p
            return verify(x, q, judge, n, u_accept[:, :g], u_next), p
        if mix:
            assert q is not None
            soft = penalise(logits, params, counts).softmax(-1)
            best, finite = greedy_choice(_mixed(soft, q, mix), SamplingParams(), None)
        else:
            best, finite = greedy_choice(logits, params, counts)
        return verify_greedy(x, best, n, finite), None

    def _outcomes(self, read: Sequence[Sequence[float]], live: Sequence[int]) -> list[RowOutcome]:
        """What each row commits. read: per row k, y, n, fault, beta sum, then the drafted tokens."""
        fewest = min(int(read[b][0]) for b in live) if self._settings.batching == "lockstep" else None
        outcomes = []
        for k_, y_, n_, fault, beta_sum, *x in read:
            k, y = int(k_), int(y_)
            new = [int(token) for token in x[:k]]
            if fewest is not None and k > fewest:
                new = new[: fewest + 1]
            else:
                new.append(y)
            outcomes.append(RowOutcome(int(n_), k, y, new, beta_sum, int(fault)))
        return outcomes


def _mixed(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """(1 - weight) p + weight q at drafted positions, p alone at the bonus one. p: [B, g+1, V], q: [B, g, V]."""
    g = q.shape[1]
    return torch.cat([p[:, :g].lerp(q.to(p.dtype), weight), p[:, g:]], 1)


def _read(verdict: Verdict, n: Tensor, x: Tensor) -> list[list[float]]:
    """The round's only wait for the device: all that the host must know, in one copy (ids are exact in float64)."""
    examined = torch.minimum(verdict.k + 1, n).unsqueeze(1)
    seen = torch.arange(x.shape[1], device=x.device) < examined
    beta_sum = (verdict.beta * seen).sum(1, dtype=torch.float64)
    head = torch.stack([verdict.k, verdict.y, n, verdict.fault], 1)
    rows: list[list[float]] = torch.cat([head, beta_sum.unsqueeze(1), x], 1).tolist()
    return rows


def shared_vocabulary(
    target: int, draft: int | None, vocab_size: int | None, target_tokenizer: Any | None, draft_tokenizer: Any | None
) -> int:
    """How many ids target and draft share; both heads are cut to it.

    Args: target, draft: rows of the heads (draft None: it has none). vocab_size: the tokenizer's size, if known.
    Raises InvalidValue naming the first id that differs, unless one head is the other padded.
    """
    if target_tokenizer is not None and draft_tokenizer is not None and target_tokenizer is not draft_tokenizer:
        _compare_tokens(target_tokenizer, draft_tokenizer)
    smaller = target if draft is None else min(target, draft)
    if vocab_size is not None or draft is None or target == draft:
        return check_vocab_size(vocab_size, smaller)
    if target_tokenizer is not None and len(target_tokenizer) <= smaller:
        return len(target_tokenizer)
    only = "target" if target > draft else "draft"
    raise InvalidValue(
        f"draft and target vocabularies differ: id {smaller} exists only in the {only} ({target} ids in the target, "
        f"{draft} in the draft); if both heads are padded over one tokenizer, give vocab_size=<the tokenizer's size>"
    )


def _compare_tokens(target: Any, draft: Any) -> None:
    """Raises InvalidValue naming the first id that means different tokens."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (target, draft))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise InvalidValue(
                f"draft and target vocabularies differ: id {i} is {ours.get(i)!r} in the target and {theirs.get(i)!r} "
                "in the draft; use a draft of the target's tokenizer"
            )


def build(
    parts: Mapping[str, Any],
    *,
    sampling: SamplingParams | None,
    settings: SpeculativeSettings,
    seed: int,
    tokenizer: Any | None,
    recorder: Recorder | None,
    costs: CostCurve | None,
    vocab_size: int | None,
) -> SpeculativeDecoder:
    """For the registry: the draft is an engine, or any Drafter."""
    draft = parts["draft"]
    return SpeculativeDecoder(
        parts["target"],
        draft if hasattr(draft, "start") else ModelDrafter(draft),
        sampling=sampling,
        settings=settings,
        seed=seed,
        tokenizer=tokenizer,
        recorder=recorder,
        costs=costs,
        vocab_size=vocab_size,
    )


def build_prompt_lookup(parts: Mapping[str, Any], *, settings: PromptLookupSettings, **rest: Any) -> SpeculativeDecoder:
    """For the registry."""
    drafter = PromptLookupDrafter(settings.ngram_max, settings.ngram_min)
    return build({**parts, "draft": drafter}, settings=settings, **rest)
