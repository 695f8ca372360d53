"""The n-gram draft of ASSD: a context bigram out of the canvas itself, without a network call (arXiv:2504.20456).

Counts are of committed tokens only: of single tokens, and of neighbours (i, i + 1), each site once. They are read off
the canvas in every round, so there is no table that could go stale. Shape letters: B batch, N canvas, K drafts,
V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.inference.rng import sample_categorical


def pair_law(tokens: Tensor, committed: Tensor, left: Tensor, vocab_size: int, mask_id: int) -> Tensor:
    """float32 [B, V]: the law of what follows `left` int64 [B] (-1: unknown) in canvases int64 [B, N].

    The pairs that begin with it; where there is none, the single tokens; where nothing is committed, all tokens alike.
    Args: committed: bool [B, N], the positions that count.
    """
    zeros = torch.zeros(tokens.shape[0], vocab_size, device=tokens.device)
    begins = committed[:, :-1] & committed[:, 1:] & (tokens[:, :-1] == left.unsqueeze(1))
    pairs = zeros.scatter_add(1, tokens[:, 1:], begins.float())
    single = zeros.scatter_add(1, tokens, committed.float())
    alike = torch.ones_like(zeros)
    alike[:, mask_id] = 0.0
    counts = torch.where(single.sum(1, keepdim=True) > 0, single, alike)
    counts = torch.where(pairs.sum(1, keepdim=True) > 0, pairs, counts)
    return counts / counts.sum(1, keepdim=True)


def draft_pairs(
    tokens: Tensor, committed: Tensor, targets: Tensor, vocab_size: int, mask_id: int, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Laws [B, K, V] and drafts int64 [B, K] for the positions `targets` int64 [B, K], one after the other.

    The left neighbour of a target may be a draft of this round: holes are filled from left to right on the lattice.
    Position 0, which has none, is drafted from the single tokens: any law serves, and this one needs no call.
    Args: u: float64 [B, K] uniforms; None takes the likeliest token (greedy).
    """
    known, canvas = committed.clone(), tokens.clone()
    laws, drafts = [], []
    for j in range(targets.shape[1]):
        at = targets[:, j : j + 1]
        before = (at - 1).clamp_min(0)
        seen = known.gather(1, before) & (at > 0)
        left = torch.where(seen, canvas.gather(1, before), -1).squeeze(1)
        q = pair_law(tokens, committed, left, vocab_size, mask_id)
        x = q.argmax(-1) if u is None else sample_categorical(q, u[:, j])
        canvas.scatter_(1, at, x.unsqueeze(1))
        known.scatter_(1, at, True)
        laws.append(q)
        drafts.append(x)
    return torch.stack(laws, 1), torch.stack(drafts, 1)
