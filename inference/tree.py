"""Token trees: what a round offers to the target when it drafts more than one continuation.

Node 0 is the root, the last committed token (not yet in the target's cache); a node stands behind its parent, and the
children of a node were drawn in the order of their indices. A chain is the tree in which every node's parent is the
node before it.
Shape letters: B batch, N nodes with the root, M nodes with a law, C cache slots, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.masks import additive

NO_LAW = -1  # in `Tree.law_row`: no child of this node was sampled
_SUM_TOLERANCE = 1e-3  # how far a law's sum may be from 1


@dataclass(frozen=True)
class Tree:
    """The trees of a batch, padded at the end to the largest: padding is a child of the root that is not offered.

    The law of a node is the one that its first child was sampled from; a later child was sampled from it without the
    earlier ones, renormalised (or, with `replacement`, from the same law again). In a tree with laws every node with
    children has one; nodes without children need none, so no [N, V] block is kept.
    """

    tokens: Tensor  # int64 [B, N]; padding: 0
    parent: Tensor  # int64 [B, N]; -1 at the root; padding: 0
    depth: Tensor  # int64 [B, N]; 0 at the root; padding: 1
    size: Tensor  # int64 [B]: nodes that are no padding, 1..N
    height: int  # largest depth, known to the host
    law: Tensor | None = None  # [B, M, V] after temperature and filters; None: a deterministic draft (q one-hot)
    law_row: Tensor | None = None  # int64 [B, N]: row of `law` at each node, NO_LAW where no child was sampled
    replacement: bool = False  # siblings were drawn independently of each other and may be equal
    fanout: tuple[int, ...] | None = None  # most children of a node at each depth 0..height-1, known to the host
    share: Tensor | None = None  # float64 [B, N]: draft probability of each node when it was drawn or picked (R[y])

    @staticmethod
    def bare(roots: Tensor) -> "Tree":
        """Roots alone: a round that offers nothing. roots: int64 [B]."""
        zero = torch.zeros_like(roots).unsqueeze(1)
        return Tree(roots.unsqueeze(1), zero - 1, zero, torch.ones_like(roots), 0, fanout=())

    @staticmethod
    def from_rows(
        tokens: Sequence[Sequence[int]],
        parent: Sequence[Sequence[int]],
        device: torch.device,
        law: Tensor | None = None,
        law_row: Sequence[Sequence[int]] | None = None,
    ) -> "Tree":
        """A batch of trees from host lists, the root first in each. law_row: of a sampled tree, as long as `tokens`.

        Raises InvalidValue for a node that does not stand behind its parent.
        """
        width = max(map(len, tokens))
        depth: list[list[int]] = []
        fanout: list[int] = []
        for b, above in enumerate(parent):
            levels = [0]
            children = [0] * len(above)
            for i, p in enumerate(above):
                if (i == 0) != (p == -1) or not -1 <= p < max(i, 1) or len(tokens[b]) != len(above):
                    raise InvalidValue(
                        f"tree not topological at node {i} of row {b}: its parent is {p}; node 0 is the only root "
                        "(parent -1) and every other node stands behind its parent"
                    )
                if i:
                    levels.append(levels[p] + 1)
                    children[p] += 1
            depth.append(levels)
            fanout += [0] * (max(levels) - len(fanout))
            for level, count in zip(levels, children, strict=True):
                if count:
                    fanout[level] = max(fanout[level], count)

        def table(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            padded = [[*row, *[fill] * (width - len(row))] for row in rows]
            return torch.tensor(padded, dtype=torch.int64).to(device, non_blocking=True)

        sizes = torch.tensor([len(row) for row in tokens]).to(device, non_blocking=True)
        rows = None if law_row is None else table(law_row, NO_LAW)
        return Tree(
            table(tokens, 0), table(parent, 0), table(depth, 1), sizes, len(fanout), law, rows, fanout=tuple(fanout)
        )

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """N, root and padding included."""
        return self.tokens.shape[1]

    def real(self) -> Tensor:
        """bool [B, N]: nodes that are no padding."""
        return torch.arange(self.width, device=self.tokens.device) < self.size.unsqueeze(1)

    def ancestors(self) -> Tensor:
        """bool [B, N, N]: [b, i, j] is true iff j is i itself or an ancestor of i. Nothing waits for the device."""
        itself = torch.eye(self.width, dtype=torch.bool, device=self.tokens.device).expand(self.batch, -1, -1)
        above = self.parent.clamp_min(0).unsqueeze(-1).expand_as(itself)
        seen = itself
        for _ in range(self.height):
            seen = itself | seen.gather(1, above)
        return seen

    def kin(self) -> tuple[Tensor, Tensor]:
        """int64 [B, N] each: a node's first child and its next sibling, -1 where there is none (root: no sibling)."""
        index = torch.arange(self.width, device=self.tokens.device)
        offered = (self.real() & (index > 0)).unsqueeze(1)
        child = (self.parent.unsqueeze(1) == index.unsqueeze(-1)) & offered  # [b, i, j]: j is a child of i
        later = index > index.unsqueeze(-1)
        sibling = child.gather(1, self.parent.clamp_min(0).unsqueeze(-1).expand_as(child)) & later
        sibling = sibling & (index > 0).unsqueeze(-1)
        first, following = (torch.where(x, index, self.width).amin(-1) for x in (child, sibling))
        return first.masked_fill(first == self.width, -1), following.masked_fill(following == self.width, -1)

    def check(self) -> None:
        """Raises InvalidValue for a tree that no round may use; waits for the device.

        Every node stands behind its parent; laws are non-negative and sum to 1; every drawn child is possible.
        """
        real, parent = self.real(), self.parent
        index = torch.arange(self.width, device=parent.device)
        bad = torch.where(index > 0, (parent < 0) | (parent >= index), parent != -1) & real
        above = self.depth.gather(1, parent.clamp(0, self.width - 1)) + 1
        bad |= (self.depth != torch.where(index > 0, above, 0)) & real
        if bad.any():
            b, i = bad.nonzero()[0].tolist()
            raise InvalidValue(
                f"tree not topological at node {i} of row {b}: its parent is {int(parent[b, i])}, its depth "
                f"{int(self.depth[b, i])}; node 0 is the only root (parent -1) and a node stands behind its parent"
            )
        if self.law is None or self.law_row is None:
            return
        whose = self.law_row.gather(1, parent.clamp_min(0))  # the law that a node was drawn from
        child = real & (index > 0)
        if (child & (whose < 0)).any():
            b, i = (child & (whose < 0)).nonzero()[0].tolist()
            raise InvalidValue(
                f"node {int(parent[b, i])} of row {b} has children but no law: a sampled tree keeps the law that they "
                "were drawn from; leave `law` out for a deterministic draft"
            )
        total = self.law.sum(-1, dtype=torch.float64)
        wrong = (self.law < 0).any(-1) | ~((total - 1).abs() <= _SUM_TOLERANCE)
        broken = wrong.gather(1, self.law_row.clamp_min(0)) & (self.law_row >= 0) & real
        if broken.any():
            b, i = broken.nonzero()[0].tolist()
            raise InvalidValue(
                f"the draft law at node {i} of row {b} is none: it sums to {float(total[b, self.law_row[b, i]]):.6g} "
                "or holds a negative entry or a NaN (check the draft's weights and processors)"
            )
        rows = torch.arange(self.batch, device=parent.device).unsqueeze(1)
        chance = self.law[rows, whose.clamp_min(0), self.tokens].masked_fill(~child, 0.0)
        sibling = (parent.unsqueeze(1) == parent.unsqueeze(-1)) & (index < index.unsqueeze(-1))  # [b, i, j]: j earlier
        spent = (sibling * chance.unsqueeze(1)).sum(-1)
        # behind siblings that hold all of the law nothing was left to draw, and verification stops before such a node
        impossible = child & ~(chance > 0) & (spent < 1 - _SUM_TOLERANCE)
        if impossible.any():
            b, i = impossible.nonzero()[0].tolist()
            raise InvalidValue(
                f"node {i} of row {b} is an impossible draw: token {int(self.tokens[b, i])} has no probability under "
                "its parent's draft law (processors applied to one side only)"
            )

    def positions(self, lengths: Sequence[int]) -> Tensor:
        """int64 [B, N]: where each node stands in the text. lengths: [B] tokens in the cache, without the root."""
        first = torch.tensor(list(lengths), dtype=torch.int64).unsqueeze(1)
        return first.to(self.depth.device, non_blocking=True) + self.depth

    def mask(self, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, N, C] of a pass over all nodes behind a cache of `lengths` tokens, C = longest + N.

        A node sees its row's committed tokens, its ancestors and itself.
        """
        first = torch.tensor(list(lengths), dtype=torch.int64).to(self.tokens.device, non_blocking=True)
        slot = torch.arange(max(lengths) + self.width, device=self.tokens.device)
        committed = slot < first.unsqueeze(1)
        node = slot - first.unsqueeze(1)  # [B, C]: which node a slot holds
        index = node.clamp(0, self.width - 1).unsqueeze(1).expand(-1, self.width, -1)
        seen = self.ancestors().gather(2, index) & ((node >= 0) & (node < self.width)).unsqueeze(1)
        return additive(~(seen | committed.unsqueeze(1)), dtype).unsqueeze(1)


def depth_first(parent: Sequence[int]) -> list[int]:
    """The nodes of one tree in depth-first order, a node's largest subtree first: fewer blocks in the mask.

    Entry j is the old index of the node that comes to stand at j; parents stay before their children.
    """
    size = [1] * len(parent)
    children: list[list[int]] = [[] for _ in parent]
    for i in range(len(parent) - 1, 0, -1):
        size[parent[i]] += size[i]
        children[parent[i]].append(i)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += sorted(children[node], key=lambda c: (size[c], -c))  # the largest is popped first
    return order


def count_blocks(seen: Tensor, block: int) -> Tensor:
    """How many block x block tiles of a mask hold anything, int64 [...]: what a block-skipping kernel computes.

    seen: bool [..., n, m], for example `Tree.ancestors()`.
    """
    if block < 1:
        raise InvalidValue(f"a block has at least one row, got {block}")
    n, m = seen.shape[-2:]
    padded = torch.nn.functional.pad(seen, (0, -m % block, 0, -n % block))
    high, wide = (size // block for size in padded.shape[-2:])
    tiles = padded.reshape(*seen.shape[:-2], high, block, wide, block)
    return tiles.any(-1).any(-2).sum((-1, -2))
