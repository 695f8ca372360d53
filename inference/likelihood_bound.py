"""An upper bound of a masked diffusion model's -log p(answer | prompt), and the masks that it draws.

Source: LLaDA (arXiv 2502.09992), equation 14 (the form with exact counts): E_l [(n / l) * sum of CE over l masked
positions], l uniform in 1..n. It equals the sequential negative log-likelihood averaged over all orders, hence the
bound.
Shape letters: B batch, L canvas, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform

DRAWS = 128  # LLaDA's count for a likelihood


class Denoiser(Protocol):
    """What is asked of a network here."""

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] of tokens [B, L]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """logits [.., V]."""
        ...


def exact_count_mask(noise: Tensor, maskable: Tensor, count: Tensor) -> Tensor:
    """bool [B, L]: in each row the `count` maskable positions with the smallest noise.

    Args: noise: [B, L] in [0, 1). maskable: bool [B, L]. count: int64 [B], at most the row's maskable positions.
    """
    order = noise.masked_fill(~maskable, 2.0).argsort(-1)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count.unsqueeze(-1)) & maskable


@torch.no_grad()
def likelihood_bound(
    net: Denoiser,
    ids: Tensor,
    maskable: Tensor,
    *,
    mask_id: int,
    lengths: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    row_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(bound [B] in nats of the maskable tokens, share [B] of masked tokens that were the most likely ones).

    The counts lie on an even grid over the draws with one offset per row; a row's figures depend on seed and its
    row id (default: its place in the batch) alone. Rows of one maskable token are exact after one draw.
    Args: ids: int64 [B, L], clean. maskable: bool [B, L], the answer.
    Raises InvalidValue for draws < 1 and for a batch without any maskable position.
    """
    if draws < 1:
        raise InvalidValue(f"a likelihood bound wants at least 1 draw, got {draws}")
    sizes = maskable.sum(-1)
    longest = int(sizes.max()) if len(ids) else 0
    if longest == 0:
        raise InvalidValue("no row has a position that may be masked: give answers after the prompts")
    if longest == 1:
        draws = 1
    rows = torch.arange(len(ids), device=ids.device) if row_ids is None else row_ids.to(ids.device)
    offset = uniform(seed, rows, 0, int(Stream.DATA), ids.device)
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    right = torch.zeros_like(total)
    positions = torch.arange(ids.shape[1], device=ids.device)
    for draw in range(draws):
        count = 1 + ((draw + offset) / draws * sizes).long().clamp_max((sizes - 1).clamp_min(0))
        noise = uniform(seed, rows.unsqueeze(1), positions, int(Stream.DATA) + NUM_STREAMS * (draw + 1), ids.device)
        masked = exact_count_mask(noise, maskable, count)
        hidden = net(ids.masked_fill(masked, mask_id), lengths)
        row, at = masked.nonzero(as_tuple=True)
        logp = torch.log_softmax(net.head(hidden[row, at]).float(), -1)
        labels = ids[row, at]
        nll = -logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        weight = sizes[row].double() / count[row]
        total.index_add_(0, row, nll.double() * weight)
        right.index_add_(0, row, (logp.argmax(-1) == labels).double() / count[row])
    return total / draws, right / draws
