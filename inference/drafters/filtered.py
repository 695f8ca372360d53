"""A draft model whose offers a trained filter ends: how many of the drafted tokens are worth verifying.

The filter is Learn2PD's (arXiv 2509.25188), asked about a chain instead of a block: its word on token i is the chance
that the target accepts it if it accepted all before. Token i + 1 is offered iff the product of the chances up to i
reaches the threshold; the first is always offered. So what decides about a token is known before that token is drawn,
and speculative sampling stays exact; a filter that looks to the right, or at the whole chain, is refused.
Shape letters: B batch, g draft length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.drafters.base import DraftTask, Proposal
from draftsmith.inference.drafters.model import ModelDrafter, ModelDraftSession
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.nets.commit_filter import CommitFilter, Signals, law_signals
from draftsmith.inference.sampling import PenaltyState, SamplingParams

CAUSAL = ("confidence", "position", "left", "same_left", "entropy", "margin")  # features that no later token changes


def chain_signals(tokens: Tensor, law: Tensor) -> Signals:
    """What a filter reads of a drafted chain; tokens: int64 [B, g], law: [B, g, V], those they were drawn from."""
    entropy, margin = law_signals(law.clamp_min(1e-30).log())
    confidence = law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Signals(confidence, torch.ones_like(tokens, dtype=torch.bool), tokens, entropy, margin)


class FilteredDrafter(ModelDrafter):
    """Drafts with a causal language model; a filter ends each offer. For schedule "confidence" of the decoder."""

    def __init__(
        self,
        engine: Engine,
        net: CommitFilter,
        threshold: float,
        *,
        sampling: SamplingParams | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """Raises InvalidValue for a threshold outside [0, 1], and for a filter that may see later tokens."""
        super().__init__(engine, sampling=sampling, tokenizer=tokenizer)
        if not 0 <= threshold <= 1:
            raise InvalidValue(f"threshold of a stop rule must lie in [0, 1], got {threshold}")
        config = net.config
        later = [name for name in config.features if name not in CAUSAL]
        if not config.equivariant or config.window or later:
            raise InvalidValue(
                "a stop rule must not look at later tokens, or sampling is no longer exact: train an equivariant "
                f"filter with window 0 and features of {', '.join(CAUSAL)}"
            )
        self.net, self.threshold = net, threshold

    def start(self, task: DraftTask) -> "FilteredDraftSession":
        return FilteredDraftSession(self, self.sampling or task.sampling, task)


class FilteredDraftSession(ModelDraftSession):
    """One decode call's drafting."""

    def __init__(self, drafter: FilteredDrafter, sampling: SamplingParams, task: DraftTask) -> None:
        super().__init__(drafter.engine, sampling, replace(task, want_law=True, confidence=None))
        self._net, self._threshold = drafter.net, drafter.threshold
        self._keep_law = task.want_law or not self._sampling.greedy

    @torch.no_grad()
    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        made = super().propose(tokens, want, u, penalties)
        if made is None or made.law is None:
            return made
        chances = self._net.score(chain_signals(made.tokens, made.law)).sigmoid()
        worth = chances[:, :-1].cumprod(1) >= self._threshold  # of the tokens behind the first
        n = torch.minimum(worth.sum(1) + 1, host_tensor([want], made.tokens.device)[0])
        return Proposal(made.tokens, n, made.law if self._keep_law else None)
