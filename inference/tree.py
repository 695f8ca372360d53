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

from draftsmith.inference.nets.masks import additive

NO_LAW = -1  # in `Tree.law_row`: no child of this node was sampled


@dataclass(frozen=True)
class Tree:
    """The trees of a batch, padded at the end to the largest: padding is a child of the root that is not offered.

    The law of a node is the one that its first child was sampled from; a later child was sampled from it without the
    earlier ones, renormalised. Only nodes with sampled children have one, so no [N, V] block is kept.
    """

    tokens: Tensor  # int64 [B, N]; padding: 0
    parent: Tensor  # int64 [B, N]; -1 at the root; padding: 0
    depth: Tensor  # int64 [B, N]; 0 at the root; padding: 1
    size: Tensor  # int64 [B]: nodes that are no padding, 1..N
    height: int  # largest depth, known to the host
    law: Tensor | None = None  # [B, M, V] after temperature and filters; None: a deterministic draft (q one-hot)
    law_row: Tensor | None = None  # int64 [B, N]: row of `law` at each node, NO_LAW where no child was sampled

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
