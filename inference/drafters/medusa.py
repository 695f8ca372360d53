"""Medusa heads as the drafter of trees: the law at a node depends on its depth alone, and costs nothing to ask for.

The last state that the target has read is that of the token before the root; its own head gave the root, head 0 gives
the root's children, head 1 theirs. Baseline: no state of the head's own, so what was drafted before is not seen.
Shape letters: B batch, w nodes expanded at once, M heads, D width of the target, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import Accepted, PolicyDrafter, TreePolicy, TreeTask, Uniforms
from draftsmith.inference.drafters.tree_model import draft_sampling
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.formats import MedusaFields, read_drafter
from draftsmith.inference.nets.medusa import MedusaConfig, MedusaHeads, load_heads
from draftsmith.inference.sampling import PenaltyState, SamplingParams, law
from draftsmith.inference.tree import Tree


def read_medusa(directory: str | Path, *, allow_pickle: bool = False) -> MedusaHeads:
    """Heads from files of the Medusa format. Raises InvalidType for another drafter, InvalidValue for damage."""
    record = read_drafter(directory, allow_pickle=allow_pickle)
    fields = record.fields
    if not isinstance(fields, MedusaFields):
        raise InvalidType(f"{directory} holds no Medusa heads ({record.format})")
    config = MedusaConfig(fields.heads, fields.layers, fields.hidden_size, fields.vocab_size)
    return load_heads(config, record.tensors)


class MedusaTreeDrafter(PolicyDrafter):
    """Drafts trees with Medusa heads. Penalties shape the target's laws only."""

    def __init__(
        self,
        heads: MedusaHeads,
        policy: TreePolicy,
        *,
        target: Engine,
        sampling: SamplingParams | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """sampling: the draft's own; None: the target's. Raises InvalidValue for a target of another width."""
        if heads.config.hidden_size != target.spec.hidden_size:
            raise InvalidValue(
                f"these Medusa heads read states of width {heads.config.hidden_size}, the target has "
                f"{target.spec.hidden_size}: they are heads for another target"
            )
        self.heads, self.policy, self.sampling, self._target = heads, policy, sampling, target
        self._tokenizer = tokenizer
        self.aux_layers = (target.spec.num_layers,)

    @property
    def vocab_size(self) -> int | None:
        return self.heads.config.vocab_size

    @property
    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def with_policy(self, policy: TreePolicy) -> "MedusaTreeDrafter":
        return MedusaTreeDrafter(
            self.heads, policy, target=self._target, sampling=self.sampling, tokenizer=self._tokenizer
        )

    def start(self, task: TreeTask) -> "MedusaTreeSession":
        return MedusaTreeSession(self.heads, self.policy, draft_sampling(self.sampling, task), task)


class MedusaTreeSession:
    """One decode call's drafting: the last state of each row, nothing else."""

    def __init__(self, heads: MedusaHeads, policy: TreePolicy, sampling: SamplingParams, task: TreeTask) -> None:
        if heads.training:
            raise InvalidState("the Medusa heads are in train mode: call eval() first")
        self.calls = 0
        self._heads, self._policy, self._task = heads, policy, task
        self._sampling = dataclasses.replace(
            sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
        )
        weight = next(heads.parameters())
        self._last = torch.zeros(task.rows, heads.config.hidden_size, dtype=weight.dtype, device=weight.device)
        self._read = [False] * task.rows  # whether the target has read anything of a row

    def room(self, length: int) -> int:
        return self._task.nodes

    @torch.inference_mode()
    def propose(
        self,
        tokens: Sequence[Sequence[int]],
        want: Sequence[int],
        depth: Sequence[int],
        u: Uniforms | None,
        penalties: PenaltyState | None,
    ) -> Tree | None:
        depth = [min(d, self._heads.config.heads) if read else 0 for d, read in zip(depth, self._read, strict=True)]
        want = [n if d > 0 else 0 for n, d in zip(want, depth, strict=True)]
        if max(want) == 0:
            return None
        logits = self._heads.logits(self._last)[..., : self._task.vocab_size]
        self.calls += 1
        laws = law(logits, self._sampling).to(self._task.device)
        roots = host_tensor([[t[-1] for t in tokens]], self._task.device)[0]
        return self._policy.grow(_Source(laws), roots, want, depth, u)

    def commit(self, accepted: Accepted) -> None:
        if accepted.features is None or max(accepted.counts) == 0:
            return
        at = host_tensor([[max(0, n - 1)] for n in accepted.counts], accepted.features.device)
        last = accepted.features.gather(1, at.unsqueeze(-1).expand(-1, -1, accepted.features.shape[-1]))[:, 0]
        some = host_tensor([list(accepted.counts)], self._last.device)[0].unsqueeze(1) > 0
        self._last = torch.where(some, last.to(self._last), self._last)
        self._read = [read or n > 0 for read, n in zip(self._read, accepted.counts, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self._last = self._last[host_tensor([list(rows)], self._last.device)[0]]
        self._read = [self._read[r] for r in rows]


class _Source:
    """The heads' laws over one round's trees; implements `LawSource`."""

    def __init__(self, laws: Tensor) -> None:
        """laws: [B, M, V]"""
        self._laws = laws
        self._depth = torch.zeros(len(laws), 1, dtype=torch.int64, device=laws.device)

    def root(self) -> Tensor:
        return self._laws[:, 0]

    def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
        depth = self._depth.gather(1, parent) + 1
        self._depth = torch.cat((self._depth, depth), 1)
        at = depth.clamp_max(self._laws.shape[1] - 1)  # padding of a row whose levels end earlier
        return self._laws.gather(1, at.unsqueeze(-1).expand(-1, -1, self._laws.shape[2]))
