"""A smaller language model as the drafter: it samples a chain of tokens and keeps the law of each.

Shape letters: B batch, g draft length, V vocabulary, D width. q draft law, L committed tokens of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.drafters.base import DraftTask, Proposal
from draftsmith.inference.engine import Engine
from draftsmith.inference.feeding import feed, host_tensor, require_eval
from draftsmith.inference.rng import sample_categorical
from draftsmith.inference.sampling import PenaltyState, SamplingParams, argmax, law


class ModelDrafter:
    """Drafts with a causal language model over the target's tokenizer.

    The weights may change between rounds (online learning): q is whatever law the tokens were sampled from.
    """

    def __init__(self, engine: Engine, *, sampling: SamplingParams | None = None, tokenizer: Any | None = None) -> None:
        """sampling: the draft's own temperature and filters; None: the target's, which is best for acceptance.

        Temperature 0 drafts the argmax, a deterministic draft, also for a target that samples. tokenizer: to be
        compared with the target's.
        """
        self.engine = engine
        self.sampling = sampling
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int | None:
        return self.engine.spec.vocab_size

    def start(self, task: DraftTask) -> "ModelDraftSession":
        return ModelDraftSession(self.engine, self.sampling or task.sampling, task)


class ModelDraftSession:
    """One decode call's drafting: a cache that holds L-1 or fewer of each row's committed tokens between rounds."""

    def __init__(self, engine: Engine, sampling: SamplingParams, task: DraftTask) -> None:
        require_eval(engine, "draft")
        self.calls = 0
        self._engine = engine
        # a greedy target looks only at the argmax
        self._sampling = dataclasses.replace(sampling, temperature=0.0) if task.sampling.greedy else sampling
        self._task = task
        self._cache = engine.new_cache(task.rows, min(task.capacity, engine.spec.max_length))
        self._spoiled = False  # the last slot of some row was overwritten in this round

    def room(self, length: int) -> int:
        return max(0, self._cache.capacity - length + 1)

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        g, cache, params = max(want), self._cache, self._sampling
        counts = penalties.counts() if penalties is not None and params.has_penalties else None
        drafted: list[Tensor] = []  # [B, 1] each
        laws: list[Tensor] = []  # [B, 1, V] each
        trust: list[Tensor] = []  # [B, 1] each: q(x)
        keep_law = not params.greedy or self._task.want_law
        # rows that outgrew this draft's context are fed something, and what comes out is not offered
        hidden = feed(self._engine, cache, [t[: cache.capacity] for t in tokens])
        for i in range(g):
            if i:
                hidden = self._step(drafted[-1])
            logits = self._engine.head(hidden)[..., : self._task.vocab_size]
            if params.greedy:
                x = argmax(logits, params, counts)
                q = logits.float().softmax(-1) if keep_law or self._task.confidence is not None else None
            else:
                assert u is not None
                q = law(logits, params, counts)
                x = sample_categorical(q, u[:, i : i + 1])
            drafted.append(x)
            if q is not None and keep_law:
                laws.append(q)
            if q is not None and self._task.confidence is not None:
                trust.append(q.gather(-1, x.unsqueeze(-1)).squeeze(-1))
            if counts is not None and i + 1 < g:
                counts = counts.after(x)
        self.calls += g
        n = None
        if self._task.confidence is not None:
            sure = torch.cat(trust, 1)[:, : g - 1] >= self._task.confidence
            n = torch.minimum(sure.cumprod(1).sum(1) + 1, host_tensor([want], cache.device)[0])
        return Proposal(torch.cat(drafted, 1), n, torch.cat(laws, 1) if laws else None)

    def _step(self, x: Tensor) -> Tensor:
        """Feed one drafted token [B, 1] to every row; hidden [B, 1, D]."""
        cache = self._cache
        if max(cache.lengths) == cache.capacity:  # a row whose offer ended earlier: its last slot is overwritten
            cache.truncate([min(held, cache.capacity - 1) for held in cache.lengths])
            self._spoiled = True
        hidden, _ = self._engine.forward(x, cache=cache)
        return hidden

    def commit(self, lengths: Sequence[int]) -> None:
        end = self._cache.capacity - self._spoiled
        self._spoiled = False
        self._cache.truncate(
            [min(held, length - 1, end) for held, length in zip(self._cache.lengths, lengths, strict=True)]
        )

    def select(self, rows: Sequence[int]) -> None:
        self._cache.select(rows)
