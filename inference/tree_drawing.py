"""Drawing the children of tree nodes from draft laws, without replacement, each by numbers of its own.

Siblings are drawn one after the other from the law without the earlier ones, renormalised: the law that verification
tests them against. The vocabulary is cut into blocks whose masses are kept, so that a law is read once, however many
children it has; a removed token's block is summed anew, so that small masses keep their digits.
Shape letters: n nodes, k children, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.rng import sample_categorical

ROOT_SLOT = 1  # the root's number
NUMBERS = 2  # uniforms of one draw
_BLOCK = 256
_MASK = (1 << 60) - 1


def slot(parent: int, rank: int) -> int:
    """The number of a tree place: the child of rank 0, 1, ... of the place `parent`. It keys the child's randomness."""
    return (parent * 6364136223846793005 + 1442695040888963407 * (rank + 1)) & _MASK


@dataclass(frozen=True)
class Children:
    """Children of n nodes in the order of drawing."""

    tokens: Tensor  # int64 [n, k]
    share: Tensor  # float64 [n, k]: R[y], the probability of the draw; 0 where nothing was left: no child then


def draw_children(law: Tensor, u: Tensor, *, taken: Tensor | None = None, replacement: bool = False) -> Children:
    """Sample k children of each node, one after the other.

    Args: law: [n, V]; u: float64 [n, k, 2]; taken: int64 [n, t] children drawn before, filled up with V.
    """
    n, vocab = law.shape
    k = u.shape[1]
    work = torch.nn.functional.pad(law, (0, _BLOCK - vocab % _BLOCK))  # at least one entry more than V
    if taken is not None:
        work.scatter_(1, taken, 0.0)
    work = work.view(-1, _BLOCK)
    mass = work.sum(-1).double().view(n, -1)  # of blocks; summed in the law's dtype, as accurate as its entries are
    flat = mass.view(-1)
    first = torch.arange(n, device=law.device) * mass.shape[1]  # each node's first block
    blocks, places, chance, left = [], [], [], []
    for r in range(k):  # few and cheap operations: each costs more in its call than in its work
        block = sample_categorical(mass, u[:, r, 0])
        here = first + block
        inner = work.index_select(0, here)
        at = sample_categorical(inner, u[:, r, 1]).unsqueeze(1)
        blocks.append(block)
        places.append(at)
        chance.append(inner.gather(1, at))
        left.append(mass.sum(1))
        if not replacement and r + 1 < k:
            inner.scatter_(1, at, 0.0)
            work.index_copy_(0, here, inner)
            flat.index_copy_(0, here, inner.sum(-1).double())
    total = torch.stack(left, 1)
    tokens = (torch.stack(blocks, 1) * _BLOCK + torch.cat(places, 1)).clamp_max(vocab - 1)
    share = torch.cat(chance, 1).double() / total
    return Children(tokens, torch.where(total > 0, share, 0.0 * total))  # NaN stays NaN


def pick_children(law: Tensor, k: int) -> Children:
    """The k likeliest tokens of each node in falling order, for a draft that does not draw. law: [n, V]."""
    top, tokens = law.topk(min(k, law.shape[1]), -1)
    top = top.double()
    before = top.cumsum(-1) - top
    share = (top / (1.0 - before).clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    missing = k - tokens.shape[1]  # a vocabulary smaller than k
    return Children(torch.nn.functional.pad(tokens, (0, missing)), torch.nn.functional.pad(share, (0, missing)))
