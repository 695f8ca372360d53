"""A smaller language model as the drafter of trees: laws over its own static cache, which expanded nodes join.

The cache holds a row's committed tokens with the root, then the expanded nodes in the order of expansion, whatever
their place in the tree: a mask says what each one sees, and positions say where it stands.
Shape letters: B batch, S nodes of the source's tree with the root, w nodes expanded at once, V vocabulary, C slots.
L committed tokens of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import Accepted, TreePolicy, TreeTask, Uniforms
from draftsmith.inference.engine import Engine
from draftsmith.inference.feeding import feed, host_tensor, require_eval
from draftsmith.inference.nets.masks import additive
from draftsmith.inference.sampling import PenaltyState, SamplingParams, TokenCounts, law
from draftsmith.inference.tree import Tree


class TreeModelDrafter:
    """Drafts trees with a causal language model over the target's tokenizer."""

    aux_layers: tuple[int, ...] = ()

    def __init__(
        self,
        engine: Engine,
        policy: TreePolicy,
        *,
        sampling: SamplingParams | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """sampling: the draft's own temperature and filters; None: the target's. tokenizer: to be compared with it.

        Temperature 0 reads the draft's plain law at temperature 1: from it the likeliest tokens are picked.
        """
        self.engine = engine
        self.policy = policy
        self.sampling = sampling
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int | None:
        return self.engine.spec.vocab_size

    def with_policy(self, policy: TreePolicy) -> "TreeModelDrafter":
        return TreeModelDrafter(self.engine, policy, sampling=self.sampling, tokenizer=self.tokenizer)

    def start(self, task: TreeTask) -> "TreeModelSession":
        return TreeModelSession(self.engine, self.policy, draft_sampling(self.sampling, task), task)


def draft_sampling(own: SamplingParams | None, task: TreeTask) -> SamplingParams:
    """The parameters that draft laws are made with: the draft's own or the target's, never one-hot.

    A greedy draft's law is the plain softmax, which says what is likely after the likeliest; filters then are off.
    """
    params = own or task.sampling
    if not params.greedy:
        return params
    return dataclasses.replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


class TreeModelSession:
    """One decode call's drafting; between rounds the cache holds fewer than L of each row's committed tokens."""

    def __init__(self, engine: Engine, policy: TreePolicy, sampling: SamplingParams, task: TreeTask) -> None:
        require_eval(engine, "draft")
        self.calls = 0
        self._engine = engine
        self._policy = policy
        self._sampling = sampling
        self._task = task
        self._longest = min(task.capacity, engine.spec.max_length)
        self._cache = engine.new_cache(task.rows, self._longest)
        self._cache.widen(self._longest + policy.columns(task.nodes))
        self._source: _Source | None = None
        self._tree: Tree | None = None
        self._held: list[int] = [0] * task.rows  # committed tokens in the cache when the tree began, the root included

    def room(self, length: int) -> int:
        return self._task.nodes if length < self._longest else 0

    def depth_room(self, length: int) -> int:
        """Most levels behind `length` committed tokens: the draft's positions may end before the target's."""
        return max(0, self._longest - length)

    def propose(
        self,
        tokens: Sequence[Sequence[int]],
        want: Sequence[int],
        depth: Sequence[int],
        u: Uniforms | None,
        penalties: PenaltyState | None,
    ) -> Tree | None:
        depth = [min(d, self.depth_room(len(t))) for d, t in zip(depth, tokens, strict=True)]
        want = [n if d > 0 else 0 for n, d in zip(want, depth, strict=True)]
        if max(want) == 0:
            return None
        cache = self._cache
        # rows that outgrew this draft's context are fed something, and what comes out is not offered
        fed = [t[: self._longest] for t in tokens]
        hidden = feed(self._engine, cache, fed)
        self._held = list(cache.lengths)
        counts = penalties.counts() if penalties is not None and self._sampling.has_penalties else None
        roots = host_tensor([[t[-1] for t in tokens]], cache.device)[0]
        self._source = _Source(self, hidden, roots, counts)
        # a session lasts one call, its policy longer: what a policy keeps of a round is asked for before the next
        tree = self._policy.grow(self._source, roots.to(self._task.device), want, depth, u)
        self._tree = tree
        return tree

    def commit(self, accepted: Accepted) -> None:
        """Keep the slots of the accepted nodes; the last one's token is fed again, as it may never have been expanded.

        So what is kept needs no look at the device: every accepted node but the last one has a child.
        """
        cache, source, tree = self._cache, self._source, self._tree
        keep = [max(0, kept - 2) for kept in accepted.kept]  # expanded nodes of the path, the root excluded
        ends = [min(length, self._longest) - 1 for length in accepted.lengths]
        if source is not None and tree is not None and max(keep):
            path = accepted.path[:, 1 : 1 + max(keep)].to(cache.device)
            cache.keep(source.find(tree, path), self._held)
            ends = [min(end, held + n) for end, held, n in zip(ends, self._held, keep, strict=True)]
        elif source is not None:
            ends = [min(end, held) for end, held in zip(ends, self._held, strict=True)]
        cache.truncate([min(held, end) for held, end in zip(cache.lengths, ends, strict=True)])
        self._source = self._tree = None

    def select(self, rows: Sequence[int]) -> None:
        self._cache.select(rows)
        self._held = [self._held[r] for r in rows]


class _Source:
    """The draft network over one round's trees; implements `LawSource`."""

    def __init__(self, session: TreeModelSession, hidden: Tensor, roots: Tensor, counts: TokenCounts | None) -> None:
        """hidden: [B, 1, D] at the roots, which the cache holds already."""
        self._session = session
        self._hidden = hidden
        batch, device = len(roots), roots.device
        self._first = list(session._cache.lengths)  # slots of committed tokens and root
        # of the source's nodes, the root first: [B, S]
        self._tokens = roots.unsqueeze(1)
        self._parent = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
        self._depth = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._seen = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)  # [B, S, S]: ancestors and itself
        self._counts = counts
        self._outputs = None if counts is None else counts.output  # [B, S, V]: what stands up to each node

    def root(self) -> Tensor:
        self._session.calls += 1
        return self._laws(self._hidden, self._outputs).squeeze(1)

    def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
        session = self._session
        cache, engine = session._cache, session._engine
        tokens, parent = tokens.to(cache.device), parent.to(cache.device)
        w = tokens.shape[1]
        depth = self._depth.gather(1, parent) + 1
        above = self._seen.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._seen.shape[2]))  # [B, w, S]
        itself = torch.eye(w, dtype=torch.bool, device=above.device).expand(len(tokens), -1, -1)
        seen = torch.cat([above, itself], 2)
        self._seen = torch.cat([torch.nn.functional.pad(self._seen, (0, w)), seen], 1)
        self._tokens = torch.cat([self._tokens, tokens], 1)
        self._parent = torch.cat([self._parent, parent], 1)
        self._depth = torch.cat([self._depth, depth], 1)
        first = host_tensor([[n - 1] for n in self._first], cache.device)  # the root's slot and position
        hidden, _ = engine.forward(
            tokens,
            cache=cache,
            positions=(first + depth).clamp_max(engine.spec.max_length - 1),
            mask=self._mask(seen, first, max(cache.lengths) + w),
        )
        session.calls += 1
        output = None
        if self._outputs is not None:
            before = self._outputs.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._outputs.shape[-1]))
            at = tokens.unsqueeze(-1)
            output = before.scatter_add(-1, at, torch.ones_like(at, dtype=before.dtype))
            self._outputs = torch.cat([self._outputs, output], 1)
        return self._laws(hidden, output)

    def _mask(self, seen: Tensor, first: Tensor, end: int) -> Tensor:
        """Additive [B, 1, w, C]: committed tokens, ancestors and itself. first: [B, 1], the root's slot."""
        node = torch.arange(end, device=seen.device) - first  # [B, C]: which of the source's nodes a slot holds
        inside = (node >= 0) & (node < seen.shape[2])
        index = node.clamp(0, seen.shape[2] - 1).unsqueeze(1).expand(-1, seen.shape[1], -1)
        visible = seen.gather(2, index) & inside.unsqueeze(1) | (node < 0).unsqueeze(1)
        return additive(~visible, self._session._engine.dtype).unsqueeze(1)

    def _laws(self, hidden: Tensor, output: Tensor | None) -> Tensor:
        """[B, w, V] of hidden states [B, w, D]; output: token counts up to each."""
        session = self._session
        logits = session._engine.head(hidden)[..., : session._task.vocab_size]
        counts = None
        if output is not None:
            assert self._counts is not None
            counts = TokenCounts(self._counts.prompt, output)
        return law(logits, session._sampling, counts).to(session._task.device)

    def find(self, tree: Tree, path: Tensor) -> Tensor:
        """Offsets [B, P] behind the root's slot of the nodes [B, P] of a path; 0 for what was not expanded."""
        # siblings that were drawn alike (with replacement) stand for each other: their keys and values are the same
        here = self._parent < 0
        above = self._parent.clamp_min(0)
        found = []
        wanted = tree.tokens.to(path.device).gather(1, path)
        for j in range(path.shape[1]):
            here = here.gather(1, above) & (self._tokens == wanted[:, j : j + 1]) & (self._parent >= 0)
            found.append((here.byte().argmax(1, keepdim=True) - 1).clamp_min(0))
        return torch.cat(found, 1)
