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
    work = work.view(n, -1, _BLOCK)
    mass = work.sum(-1, dtype=torch.float64)  # [n, V / block]
    rows = torch.arange(n, device=law.device)
    tokens, share = [], []
    for r in range(k):
        total = mass.sum(1)
        block = sample_categorical(mass, u[:, r, 0])
        inner = work[rows, block]
        at = sample_categorical(inner, u[:, r, 1]).unsqueeze(1)
        p = inner.gather(1, at).squeeze(1).double()
        tokens.append((block * _BLOCK + at.squeeze(1)).clamp_max(vocab - 1))
        share.append(torch.where(total > 0, p / total, 0.0 * total))  # NaN stays NaN
        if not replacement and r + 1 < k:
            inner.scatter_(1, at, 0.0)
            work[rows, block] = inner
            mass[rows, block] = inner.sum(-1, dtype=torch.float64)
    return Children(torch.stack(tokens, 1), torch.stack(share, 1))


def pick_children(law: Tensor, k: int) -> Children:
    """The k likeliest tokens of each node in falling order, for a draft that does not draw. law: [n, V]."""
    top, tokens = law.topk(min(k, law.shape[1]), -1)
    top = top.double()
    before = top.cumsum(-1) - top
    share = (top / (1.0 - before).clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    missing = k - tokens.shape[1]  # a vocabulary smaller than k
    return Children(torch.nn.functional.pad(tokens, (0, missing)), torch.nn.functional.pad(share, (0, missing)))
