"""Orders of any-subset models: when each position of a canvas is decoded.

`rank[b, i]` is when position i is decoded, 0-based (the reference code calls it sigma); `order[b, r]` is the position
that is decoded at step r (the paper's sigma). Each is the argsort of the other, and neither is called sigma here.
Source: arXiv:2504.20456; the binary lattice is that of arXiv:2205.13554. Shape letters: B batch, N canvas.
"""

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


def lattice_rank(visible: Tensor) -> Tensor:
    """rank int64 [B, N] of the binary lattice for visible bool [B, N].

    The m visible positions get ranks 0..m-1 and the others m..N-1, both from left to right: one order for each subset.
    """
    first, rest = visible.cumsum(1), (~visible).cumsum(1)
    return torch.where(visible, first, visible.sum(1, keepdim=True) + rest) - 1


def order_of(rank: Tensor) -> Tensor:
    """order int64 [B, N]: the position of each rank (and, given an order, its rank)."""
    return rank.argsort(1)


def check_rank(rank: Tensor, visible: Tensor) -> None:
    """Raises InvalidValue, naming the first bad position, unless every row of `rank` [B, N] is a permutation whose
    ranks below m are exactly the m positions of `visible` bool [B, N]."""
    if rank.shape != visible.shape or rank.dim() != 2 or rank.is_floating_point():
        raise InvalidValue(f"rank must be int64 {list(visible.shape)}, one entry a position, got {list(rank.shape)}")
    size = rank.shape[1]
    inside = (rank >= 0) & (rank < size)
    counts = torch.zeros_like(rank).scatter_add_(1, rank.clamp(0, size - 1), inside.long())
    wrong = ~inside | (counts.gather(1, rank.clamp(0, size - 1)) != 1)
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        raise InvalidValue(
            f"rank of row {row} is no permutation of 0..{size - 1}: position {position} has rank "
            f"{int(rank[row, position])}"
        )
    prompt = rank < visible.sum(1, keepdim=True)
    wrong = prompt != visible
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        raise InvalidValue(
            f"row {row} has {int(visible[row].sum())} visible positions, which take the lowest ranks: position "
            f"{position} is {'visible' if bool(visible[row, position]) else 'a hole'} and has rank "
            f"{int(rank[row, position])}"
        )


def is_lattice(rank: Tensor, num_visible: Tensor) -> Tensor:
    """bool [B]: whether the rows of rank [B, N] are lattice orders of their num_visible [B] first ranks."""
    return (rank == lattice_rank(rank < num_visible.unsqueeze(1))).all(1)
