"""Sequoia: the best fixed tree for an acceptance vector, by dynamic programming.

"Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding" (2024), section 3.1 (the tree) and 3.3 (its size).
Shape letters: M largest size (root included), L largest depth, W widest node.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree_calibration import check_acceptance_vector
from draftsmith.inference.tree_policies.template import Template, TemplatePolicy

_GUESS = 0.6  # P[1] where nothing was measured
_WIDEST = 32


def guess(width: int = _WIDEST) -> tuple[float, ...]:
    """An acceptance vector for a pair that nobody measured: the power law that section 3.1 finds, P[k] ~ k^-2."""
    return (0.0, *(_GUESS / k**2 for k in range(1, width + 1)))


@dataclass(frozen=True)
class BestTrees:
    """Expected tokens per round of the best tree of every size and depth, and how to build it."""

    value: Tensor  # float64 [L+1, M+1]: at size m (root included), at most l levels below the root; -inf: impossible
    width: Tensor  # int64 [L+1, M+1]: children of the root of that tree
    left: Tensor  # int64 [L+1, W+1, M+1]: size of what remains beside the last of b children

    def template(self, size: int, depth: int) -> Template:
        """The best tree of `size` nodes, root included. Raises InvalidValue when there is none of that depth."""
        if not (1 <= size < self.value.shape[1] and 0 <= depth < self.value.shape[0]):
            raise InvalidValue(f"no tree of {size} nodes and {depth} levels was computed")
        if math.isinf(float(self.value[depth, size])):
            raise InvalidValue(f"no tree of {size} nodes fits into {depth} levels of this acceptance vector's width")
        parent = [-1]
        open_nodes = [(0, size, depth)]
        while open_nodes:
            node, m, level = open_nodes.pop()
            sizes = []
            for b in range(int(self.width[level, m]), 0, -1):
                rest = int(self.left[level, b, m])
                sizes.append(m - rest)
                m = rest
            for child in reversed(sizes):  # the first child first
                open_nodes.append((len(parent), child, level - 1))
                parent.append(node)
        return Template.of(parent)


def best_trees(p: Sequence[float], size: int, depth: int) -> BestTrees:
    """All best trees of up to `size` nodes (root included) and `depth` levels, in O(M^2 L W), vectorised over sizes.

    p: P[k], the probability that the k-th child is the accepted one; P[0] = 0.
    T[m][l][b] = max_{y < m} T[y][l][b-1] + P[b] max_b' T[m-y][l-1][b'], T[1][l][0] = 1.
    Raises InvalidValue for a P that is none, size or depth below 1.
    """
    check_acceptance_vector(p)
    if size < 2 or depth < 1:
        raise InvalidValue(f"a Sequoia tree has at least one node below its root, got size {size} and depth {depth}")
    width = min(len(p) - 1, size - 1)
    none = float("-inf")
    value = torch.full((depth + 1, size + 1), none, dtype=torch.float64)
    value[:, 1] = 1.0
    chosen = torch.zeros(depth + 1, size + 1, dtype=torch.int64)
    left = torch.zeros(depth + 1, width + 1, size + 1, dtype=torch.int64)
    m = torch.arange(size + 1)
    rest = m.unsqueeze(1) - m  # [m, y]: nodes of the last child's subtree
    for level in range(1, depth + 1):
        alone = torch.full((size + 1,), none, dtype=torch.float64)
        alone[1] = 1.0
        for b in range(1, width + 1):
            below = value[level - 1][rest.clamp_min(0)].masked_fill(rest < 1, none)
            gain = torch.where(below.isfinite(), p[b] * below, none)  # 0 * -inf would be NaN
            alone, left[level, b] = (alone + gain).max(1)
            better = alone > value[level]
            value[level] = torch.where(better, alone, value[level])
            chosen[level] = torch.where(better, b, chosen[level])
    return BestTrees(value, chosen, left)


def choose_size(
    trees: BestTrees, t_draft: float, t_target: Callable[[int], float], nodes: int, depth: int
) -> tuple[int, int]:
    """(size with the root, depth) of least expected time per token: (l t_draft + t_target(m)) / T (section 3.3).

    t_target: seconds of a target call on m tokens. Raises InvalidValue for costs that are not positive.
    """
    if t_draft < 0 or t_target(1) <= 0:
        raise InvalidValue(f"costs must be positive, got t_draft {t_draft} and t_target(1) {t_target(1)}")
    best, found = math.inf, (2, 1)
    for level in range(1, depth + 1):
        for m in range(2, nodes + 2):
            tokens = float(trees.value[level, m])
            if math.isfinite(tokens) and (cost := (level * t_draft + t_target(m)) / tokens) < best:
                best, found = cost, (m, level)
    return found


class SequoiaPolicy(TemplatePolicy):
    """Grows the tree that is best for an acceptance vector."""

    def __init__(
        self,
        nodes: int,
        depth: int,
        *,
        p: Sequence[float] | None = None,
        t_draft: float = 0.0,
        t_target: Callable[[int], float] | None = None,
    ) -> None:
        """p: measured acceptance vector (tree_calibration.py), None: a guess. With t_target, a smaller tree is taken
        where it costs less time per token."""
        p = guess() if p is None else p
        trees = best_trees(p, nodes + 1, depth)
        if t_target is None:
            fitting = torch.arange(nodes + 2)[trees.value[depth].isfinite()]
            size, levels = int(fitting.max()), depth
        else:
            size, levels = choose_size(trees, t_draft, t_target, nodes, depth)
        self.expected = float(trees.value[levels, size])  # tokens per round, if P is right
        super().__init__(trees.template(size, levels))
