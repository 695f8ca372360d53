"""Semi-autoregressive block sampling of a masked diffusion model, with any rule for what a pass commits.

Source: LLaDA (arXiv 2502.09992, algorithms 4 and 5), Fast-dLLM (arXiv 2505.22618, algorithm 1: rules and caches),
Learn2PD (arXiv 2509.25188: the learned filter, the end-of-text modes). `docs/masked_diffusion.md` says what is exact.

Each row is on its own: its block, its passes, its random numbers and the age of its cache do not depend on who shares
the batch. The head is computed for masked positions of active blocks alone, and a pass waits for the device once.
Shape letters: B rows still running, K block length, M masked positions of the active blocks, n positions fed, D width,
V vocabulary.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith.inference.canvas import CanvasCommit, CanvasRequest
from draftsmith.inference.commit_rules import (
    RULES,
    SCORES,
    BlockView,
    CommitRule,
    EntropyBound,
    Factor,
    LearnedFilter,
    Threshold,
    TopN,
    best,
)
from draftsmith.inference.diffusion_passes import CACHES, CanvasPasses
from draftsmith.inference.diffusion_rows import EOT, Active, Bools, DiffusionRows, Ints
from draftsmith.inference.errors import InvalidType, InvalidValue, unknown_choice
from draftsmith.inference.nets.commit_filter import CommitFilter
from draftsmith.inference.nets.masked_lm import MaskedLM, refuse_causal
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.rng import NUM_STREAMS, Stream, key, sample_categorical, uniform_from
from draftsmith.inference.sampling import SamplingParams, law

EOS = ("free", "forbid", "last")
_DEFAULT_THRESHOLD = {"threshold": 0.9, "learned_filter": 0.96}  # Fast-dLLM's and Learn2PD's


@dataclass(frozen=True)
class ParallelDiffusionSettings:
    """Settings of the block sampler."""

    block_length: int = field(
        default=32, metadata={"help": "tokens of a block; blocks are filled from left to right; 0: one block"}
    )
    rule: str = field(
        default="threshold", metadata={"help": "which masked positions a pass commits; at least one", "choices": RULES}
    )
    threshold: float = field(
        default=0.0,
        metadata={
            "help": "rule threshold: commit what is more confident than this (0: 0.9; 1: one by one). Rule "
            "learned_filter: commit what the filter finds likelier than this to be final (0: 0.96)"
        },
    )
    factor: float = field(
        default=1.0, metadata={"help": "rule factor: commit the n best while (n + 1)(1 - confidence_n) is below this"}
    )
    entropy_bound: float = field(
        default=0.1, metadata={"help": "rule entropy_bound: nats that the committed positions may know of each other"}
    )
    steps: int = field(
        default=0, metadata={"help": "rule top_n: passes for the whole answer, shared evenly; 0: one token a pass"}
    )
    score: str = field(
        default="confidence",
        metadata={
            "help": "what 'best' means where positions are ranked or a rule takes none; random at temperature 1 with "
            "low_confidence samples the model's own law",
            "choices": tuple(SCORES),
        },
    )
    cache: str = field(
        default="none",
        metadata={
            "help": "prefix keeps keys and values left of the block between its passes, dual also those right of it: "
            "faster and approximate, renewed at each block",
            "choices": CACHES,
        },
    )
    eot: str = field(
        default="left_done",
        metadata={
            "help": "when a text has ended: left_done as soon as an end stands with nothing masked left of it (changes "
            "no output), first_committed cuts the canvas behind any committed end, reference also behind a predicted "
            "one; none fills every canvas",
            "choices": EOT,
        },
    )
    eos: str = field(
        default="free",
        metadata={"help": "forbid never writes an end of text; last commits it after all else", "choices": EOS},
    )
    guidance: float = field(
        default=0.0, metadata={"help": "w of logits u + (w + 1)(c - u), u with a masked prompt; doubles the cost"}
    )

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("rule", self.rule, RULES),
            ("score", self.score, tuple(SCORES)),
            ("cache", self.cache, CACHES),
            ("eot", self.eot, EOT),
            ("eos", self.eos, EOS),
        ):
            if value not in choices:
                raise unknown_choice(name, value, choices)
        if self.block_length < 0 or self.steps < 0:
            raise InvalidValue(f"block_length and steps must be at least 0, got {self.block_length} and {self.steps}")
        if self.steps and self.rule != "top_n":
            raise InvalidValue(f"steps belong to rule top_n; rule {self.rule!r} decides the passes: leave steps at 0")
        if self.threshold < 0 or self.guidance < 0:
            raise InvalidValue(f"threshold and guidance must be at least 0, got {self.threshold} and {self.guidance}")

    def make_rule(self, net: CommitFilter | None = None) -> CommitRule:
        """The rule; `net` for learned_filter. Raises InvalidValue where its numbers or the filter do not fit."""
        threshold = self.threshold or _DEFAULT_THRESHOLD.get(self.rule, 0.0)
        if net is not None and self.rule != "learned_filter":
            raise InvalidValue(f"a filter was given, but rule is {self.rule!r}: set rule learned_filter")
        if self.rule == "learned_filter":
            if net is None:
                raise InvalidValue("rule learned_filter needs a filter: give an export of kind 'filter'")
            if not net.config.equivariant and net.config.block_length != self.block_length:
                raise InvalidValue(
                    f"this filter was trained for blocks of {net.config.block_length}, block_length is "
                    f"{self.block_length}: make them equal, or train an equivariant filter"
                )
            return LearnedFilter(net, threshold)
        if self.rule == "threshold":
            return Threshold(threshold)
        if self.rule == "factor":
            return Factor(self.factor)
        if self.rule == "entropy_bound":
            return EntropyBound(self.entropy_bound)
        return TopN(self.score, 1 if self.rule == "low_confidence" or not self.steps else None)


@dataclass
class _Call:
    """One decode call."""

    state: DiffusionRows
    passes: CanvasPasses
    keys: Tensor  # int64 [R, 1]
    ends: Tensor | None  # int64 [R, E], where the settings treat ends of text apart
    previous: BlockView | None = None


class ParallelDiffusionDecoder:
    """Fills canvases with a masked diffusion model; approximate unless one position is committed a pass."""

    def __init__(
        self,
        net: MaskedLM,
        settings: ParallelDiffusionSettings | None = None,
        *,
        rule: CommitRule | None = None,
        filter: CommitFilter | None = None,
        sampling: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        """rule: instead of the settings'. filter: the net of rule learned_filter.

        Raises InvalidType for another kind of network, InvalidValue for a causal one, for penalties, and for a filter
        that does not fit.
        """
        if not hasattr(net, "states"):
            raise InvalidType(
                f"parallel_diffusion fills canvases with a masked diffusion model, got {type(net).__name__}: a causal "
                "model cannot fill holes"
            )
        refuse_causal(net)
        self._net = net
        self._settings = settings or ParallelDiffusionSettings()
        self._sampling = sampling or SamplingParams()
        if self._sampling.has_penalties:
            raise InvalidValue("penalties count the tokens before a position, and canvases are filled in any order")
        self._rule = rule if rule is not None else self._settings.make_rule(filter)
        self._written = getattr(self._rule, "written", None)
        self._score = SCORES[self._settings.score]
        self._seed = seed

    def decode(self, requests: Sequence[CanvasRequest]) -> DecodeResult:
        """Fill all canvases as one batch."""
        stream = self.stream(requests)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: DecodeResult = end.value
                return result

    def stream(self, requests: Sequence[CanvasRequest]) -> Generator[CanvasCommit, None, DecodeResult]:
        """Yields what every pass commits in each row; the generator's return value is the DecodeResult.

        Notes of the result: rule; passes and token_passes (positions fed to the network, over all passes) per request.
        """
        begin = time.perf_counter()
        if not requests:
            return DecodeResult([], RoundStats(), {"target": 0}, 0.0, [])
        call = self._open(requests)
        state = call.state
        while len(state.rows):
            with torch.inference_mode():  # closed before each yield: the caller's code is not to run in it
                commits = self._pass(call)
            yield from commits
        count = len(requests)
        return DecodeResult(
            output=[state.output(i) for i in range(count)],
            rounds=state.statistics(),
            nfe={"target": call.passes.calls},
            seconds=time.perf_counter() - begin,
            stop=[state.stop(i) for i in range(count)],
            notes={
                "rule": str(self._rule),
                "passes": state.passes.tolist(),
                "token_passes": state.fed.tolist(),
            },
        )

    def _open(self, requests: Sequence[CanvasRequest]) -> _Call:
        settings, net = self._settings, self._net
        state = DiffusionRows(
            requests,
            net.config,
            block_length=settings.block_length,
            steps=settings.steps,
            eot=settings.eot,
            guided=settings.guidance > 0,
        )
        keys = key(self._seed, torch.tensor([[request.row_id] for request in requests])).to(net.device)
        with torch.inference_mode():
            passes = CanvasPasses(net, state, settings.cache, settings.guidance)
        ends = None if settings.eos == "free" else torch.from_numpy(state.ends).to(net.device)
        return _Call(state, passes, keys, ends)

    def _pass(self, call: _Call) -> list[CanvasCommit]:
        """One network pass over every running row, and what it commits."""
        begin = time.perf_counter()
        state, size = call.state, call.state.block_length
        active = state.active()
        at, column = np.nonzero(active.masked)
        position = active.position[at, column]
        count = len(at)
        if self._settings.eot == "reference":  # it also looks for ends right of the block
            more, where = state.waiting(active)
            fed = call.passes.seen(active, more)
            at, position = np.concatenate((at, more[fed])), np.concatenate((position, where[fed]))
        logits = call.passes.logits(active, at, position)
        rows = torch.from_numpy(active.rows).to(logits.device)
        predicted, confidence, laws = self._choose(call, active, logits, rows, at, position)
        view = self._view(call, active, rows, logits[:count], laws[:count], predicted[:count], confidence[:count])
        accept = self._rule(view) & view.masked
        none = ~accept.any(-1, keepdim=True)
        accept = accept | (best(self._score(view), view.masked) & none)
        written = self._written(view) if self._written is not None else view.predicted
        read = torch.cat((accept.long(), written), 1).cpu().numpy()  # the pass's only wait for the device
        accepted, tokens = read[:, :size].astype(np.bool_), read[:, size:]
        faulty = active.masked & (tokens < 0)
        if faulty.any():
            raise InvalidValue(
                f"the network's scores on the canvas of request {active.rows[faulty.any(1).argmax()]} are no law: "
                "they hold a NaN or +inf (check weights and dtype)"
            )
        cut_at = None
        if self._settings.eot == "reference":
            still = np.ones(len(at), dtype=np.bool_)
            still[:count] = ~accepted[at[:count], column]
            cut_at = _likeliest_ends(state, active, at, position, still, predicted, confidence)
        commits = state.commit(active, accepted, tokens, time.perf_counter() - begin, cut_at)
        call.previous = replace(view, packed=None, law=None, previous=None)
        if len(state.rows) < len(active.rows):
            kept = np.flatnonzero(np.isin(active.rows, state.rows))
            if len(kept):
                call.passes.drop(kept)
                call.previous = call.previous.select(torch.from_numpy(kept).to(logits.device))
        return commits

    def _choose(
        self, call: _Call, active: Active, logits: Tensor, rows: Tensor, at: Ints, position: Ints
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The token that each position [M] would get (-1 where its logits are no law), its probability, and the law."""
        of = torch.from_numpy(at).to(logits.device)
        ends = None if call.ends is None else call.ends[rows[of]]  # [M, E]
        if ends is not None and self._settings.eos == "forbid":
            # -1 stands for no id; the mask's logit is -inf already
            logits.scatter_(1, torch.where(ends < 0, self._net.config.mask_id, ends), float("-inf"))
        top, predicted = logits.max(-1)
        finite = top.isfinite()
        laws = logits.softmax(-1)
        confidence = laws.amax(-1)
        if not self._sampling.greedy:
            passes = torch.from_numpy(active.passes[at]).to(logits.device) * NUM_STREAMS + int(Stream.SAMPLE)
            places = torch.from_numpy(position).to(logits.device)
            u = uniform_from(call.keys[rows[of], 0], places, passes)
            predicted = sample_categorical(law(logits.unsqueeze(0), self._sampling)[0], u)
            confidence = laws.gather(1, predicted.unsqueeze(1)).squeeze(1)
        if ends is not None and self._settings.eos == "last":
            confidence = confidence.masked_fill((ends == predicted.unsqueeze(1)).any(-1), 0.0)
        return predicted.masked_fill(~finite, -1), confidence, laws

    def _view(
        self,
        call: _Call,
        active: Active,
        rows: Tensor,
        logits: Tensor,
        laws: Tensor,
        predicted: Tensor,
        confidence: Tensor,
    ) -> BlockView:
        state, device = call.state, logits.device
        masked = torch.from_numpy(active.masked).to(device)
        standing = torch.from_numpy(state.tokens[active.rows[:, None], active.position]).to(device)
        step = torch.from_numpy(active.step).to(device)
        previous = call.previous
        if previous is not None:
            begun = (step == 0).unsqueeze(1)
            previous = replace(previous, predicted=previous.predicted.masked_fill(begun, -1))
        return BlockView(
            confidence=torch.ones(masked.shape, device=device).masked_scatter_(masked, confidence),
            predicted=standing.masked_scatter_(masked, predicted),
            masked=masked,
            step=step,
            position=torch.from_numpy(active.position).to(device),
            row=rows,
            block_start=torch.from_numpy(active.start).to(device),
            quota=torch.from_numpy(active.quota).to(device),
            order_key=call.keys[rows],
            passes=torch.from_numpy(active.passes).to(device),
            packed=logits,
            law=laws,
            previous=previous,
        )


def _likeliest_ends(
    state: DiffusionRows,
    active: Active,
    at: Ints,
    position: Ints,
    still: Bools,
    predicted: Tensor,
    confidence: Tensor,
) -> Ints:
    """[B] the position of the most confident predicted end of text that is still masked; -1 where there is none."""
    tokens, sure = predicted.cpu().numpy(), confidence.cpu().numpy()
    candidates = np.flatnonzero(still & (tokens[:, None] == state.ends[active.rows[at]]).any(1))
    found = np.full(len(active.rows), -1, dtype=np.int64)
    for i in candidates[np.argsort(sure[candidates], kind="stable")]:  # the last one of a row to be written stays
        found[at[i]] = position[i]
    return found


def build(
    parts: dict[str, Any],
    *,
    sampling: SamplingParams | None,
    settings: ParallelDiffusionSettings,
    seed: int,
) -> ParallelDiffusionDecoder:
    """For the registry."""
    return ParallelDiffusionDecoder(parts["target"], settings, filter=parts.get("filter"), sampling=sampling, seed=seed)
