"""Random laws keyed by the path of tokens: a target and a draft without networks, for experiments on token trees.

The logits behind a path are normal numbers that hash its tokens, so every tree, however deep, meets laws that are fixed
and known. Imports inference only (contract 7). Shape letters: B rows, N nodes, w nodes expanded at once, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import TreePolicy, Uniforms
from draftsmith.inference.rng import key, uniform_from
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_verification import TreeVerdict, verify_tree

_STEP = 6364136223846793005


@dataclass(frozen=True)
class PathTables:
    """Target logits sd * N(0, 1), draft logits those plus noise * N(0, 1); laws at temperature 1."""

    vocab: int = 6
    sd: float = 1.5
    noise: float = 1.0
    seed: int = 0

    def roots(self, rows: int, apart: bool) -> Tensor:
        """Contexts int64 [B]: the same for all rows, or one for each."""
        return torch.arange(rows) * 7919 + 1 if apart else torch.ones(rows, dtype=torch.int64)

    def below(self, context: Tensor, token: Tensor) -> Tensor:
        """The context one token later."""
        return context * _STEP + token + 1

    def _normal(self, context: Tensor, stream: int) -> Tensor:
        index = torch.arange(self.vocab)
        u = uniform_from(key(self.seed, 0), context.unsqueeze(-1) * self.vocab + index, torch.tensor(stream))
        return torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))

    def target(self, context: Tensor) -> Tensor:
        """Laws float64 [..., V]."""
        return (self.sd * self._normal(context, 1)).softmax(-1)

    def draft(self, context: Tensor) -> Tensor:
        """Laws float64 [..., V]."""
        return (self.sd * self._normal(context, 1) + self.noise * self._normal(context, 2)).softmax(-1)

    def contexts(self, tree: Tree, roots: Tensor) -> Tensor:
        """int64 [B, N]: the context of every node of a tree."""
        found = roots.unsqueeze(1).expand(-1, tree.width)
        for level in range(1, tree.height + 1):
            above = found.gather(1, tree.parent.clamp_min(0))
            found = torch.where(tree.depth == level, self.below(above, tree.tokens), found)
        return found


class TableSource:
    """A `LawSource` over the tables; counts its calls."""

    def __init__(self, tables: PathTables, roots: Tensor) -> None:
        self.tables = tables
        self.contexts = roots.unsqueeze(1)  # of the source's nodes
        self.calls = 0

    def root(self) -> Tensor:
        self.calls += 1
        return self.tables.draft(self.contexts[:, 0])

    def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
        self.calls += 1
        new = self.tables.below(self.contexts.gather(1, parent), tokens)
        self.contexts = torch.cat([self.contexts, new], 1)
        return self.tables.draft(new)


def numbers(rows: int, stream: int, seed: int = 0) -> Uniforms:
    """Uniforms of one round of `rows` rows."""
    keys = key(seed, torch.arange(rows).unsqueeze(1))

    def u(index: Tensor) -> Tensor:
        return uniform_from(keys.view(-1, *[1] * (index.dim() - 1)), index, torch.tensor(stream))

    return u


@dataclass(frozen=True)
class Round:
    """One round of every row."""

    tree: Tree
    verdict: TreeVerdict
    contexts: Tensor  # int64 [B, N]
    calls: int

    @property
    def emitted(self) -> float:
        """Mean tokens committed by a row, the last one included."""
        return float(self.verdict.k.double().mean()) + 1.0


def play(
    tables: PathTables,
    policy: TreePolicy,
    rows: int,
    *,
    depth: int,
    apart: bool = True,
    seed: int = 0,
    change: "Sequence[object] | None" = None,
) -> Round:
    """Grow a tree for each row and verify it; `change`: functions Tree -> Tree applied before verification."""
    roots = tables.roots(rows, apart)
    source = TableSource(tables, roots)
    start = torch.zeros(rows, dtype=torch.int64)
    tree = policy.grow(source, start, [policy.nodes] * rows, [depth] * rows, numbers(rows, 1, seed))
    for function in change or ():
        tree = function(tree)  # type: ignore[operator]
    contexts = tables.contexts(tree, roots)
    index = torch.arange(rows)
    verdict = verify_tree(
        tree, lambda node: tables.target(contexts[index, node]), numbers(rows, 2, seed)(torch.arange(tree.width)[None])
    )
    return Round(tree, verdict, contexts, source.calls)


def first_pairs(tables: PathTables, played: Round, seed: int = 0) -> Tensor:
    """int64 [B, 2]: the first two tokens that a row emits; the second is the target's own where one was committed."""
    tree, verdict = played.tree, played.verdict
    path = torch.nn.functional.pad(verdict.path, (0, 2))
    tokens = tree.tokens.gather(1, path)
    first = torch.where(verdict.k >= 1, tokens[:, 1], verdict.y)
    following = torch.where(verdict.k >= 2, tokens[:, 2], verdict.y)
    law = tables.target(tables.below(played.contexts[:, 0], first))
    u = numbers(len(first), 3, seed)(torch.zeros(1, 1, dtype=torch.int64)).squeeze(1)
    own = torch.searchsorted(law.cumsum(-1), u.unsqueeze(1), right=True).squeeze(1).clamp_max(tables.vocab - 1)
    return torch.stack([first, torch.where(verdict.k >= 1, following, own)], 1)


def pair_law(tables: PathTables) -> Tensor:
    """float64 [V, V]: the target's law of the first two tokens behind the common root."""
    root = tables.roots(1, apart=False)
    first = tables.target(root)[0]
    second = tables.target(tables.below(root, torch.arange(tables.vocab)))
    return first.unsqueeze(1) * second
