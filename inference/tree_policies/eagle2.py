"""EAGLE-2's dynamic tree: a beam of the most confident nodes is expanded, and the best of all seen are offered.

"EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees" (2024), sections 4.1 and 4.2. A node's score is
the sum of log-probabilities on its path. Nothing is drawn: nodes may be left out after a look at them, and verification
takes the tree as deterministic, with acceptance sum_{children} p. Nothing waits for the device.
Shape letters: B batch, k beam, N nodes with the root, Z candidates, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import LawSource, TreePolicy, Uniforms
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.tree import Tree


class Eagle2Policy(TreePolicy):
    """Expands the `beam` best nodes of each level and offers the `nodes` best of all candidates."""

    sampled = False

    def __init__(self, nodes: int, depth: int, *, beam: int = 10) -> None:
        """Raises InvalidValue for nodes, depth or beam below 1."""
        for name, value in (("nodes", nodes), ("depth", depth), ("beam", beam)):
            if value < 1:
                raise InvalidValue(f"{name} of an EAGLE-2 tree must be at least 1, got {value}")
        self.nodes = nodes
        self.depth = depth
        self.beam = beam

    def columns(self, nodes: int) -> int:
        return self.beam * (self.depth - 1)

    def observe(self, accepted: Sequence[int | None]) -> None:
        """Its scores are not adapted."""

    def grow(
        self, source: LawSource, roots: Tensor, want: Sequence[int], depth: Sequence[int], u: Uniforms | None
    ) -> Tree:
        batch, device = len(roots), roots.device
        levels = max(1, min(self.depth, max(depth)))
        law = source.root()
        k = min(self.beam, law.shape[-1])
        score, token = _log(law).topk(k, -1)  # [B, k]: this level's beam
        number = torch.zeros_like(token)  # the source's numbers of the beam's parents
        scores, tokens = [score], [token]
        parents = [torch.full_like(token, -1)]  # among the candidates; -1: the root
        place = torch.arange(k, device=device).expand(batch, -1)  # the beam's among the candidates
        for level in range(1, levels):
            law = source.expand(token, number)
            more, found = _log(law).topk(k, -1)  # [B, k, k]
            more = (score.unsqueeze(-1) + more).flatten(1)
            scores.append(more)
            tokens.append(found.flatten(1))
            parents.append(place.unsqueeze(-1).expand(-1, -1, k).flatten(1))
            score, best = more.topk(k, -1)
            token = tokens[-1].gather(1, best)
            number = 1 + k * (level - 1) + best // k
            place = k + k * k * (level - 1) + best
        heights = host_tensor([[1] * k + [2 + i // (k * k) for i in range(k * k * (levels - 1))]], device)
        return _offer(
            roots,
            torch.cat(scores, 1),
            torch.cat(tokens, 1),
            torch.cat(parents, 1),
            heights.expand(batch, -1),
            host_tensor([want, depth], device),
            max(want),
            levels,
        )


def _log(law: Tensor) -> Tensor:
    """Log-probabilities in float32, never above 0, so that no child's score passes its parent's."""
    return law.float().log().clamp_max_(0.0)


def _offer(
    roots: Tensor, score: Tensor, token: Tensor, parent: Tensor, level: Tensor, limits: Tensor, most: int, height: int
) -> Tree:
    """The trees of the best candidates [B, Z]; limits: int64 [2, B], nodes and levels.

    Candidates stand level by level. Sorting is stable, so of equal scores the shallower one is kept: a kept node's
    parent is always kept.
    """
    batch, total = score.shape
    most = min(most, total)
    possible = (score > float("-inf")) & (level <= limits[1].unsqueeze(1))
    order = score.masked_fill(~possible, float("-inf")).sort(stable=True, dim=1, descending=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(total, device=order.device).expand(batch, -1))
    keep = possible & (rank < limits[0].unsqueeze(1))
    index = keep.cumsum(1)  # a kept candidate's node; the root is 0
    above = torch.where(parent < 0, 0, index.gather(1, parent.clamp_min(0)))
    first = (~keep).to(torch.uint8).sort(stable=True, dim=1).indices[:, :most]  # kept ones in order, then others
    real = keep.gather(1, first)

    def column(x: Tensor, root: int, fill: int) -> Tensor:
        body = torch.where(real, x.gather(1, first), fill)
        return torch.nn.functional.pad(body, (1, 0), value=root)

    tokens = column(token, 0, 0)
    tokens[:, 0] = roots
    return Tree(tokens, column(above, -1, 0), column(level, 0, 1), 1 + real.sum(1), height)
