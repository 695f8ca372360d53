"""The mask rule, written once: the query in slot t sees slot j iff j <= t, and t - j < window where the layer has one.

Shape letters: B batch, n new tokens, C cache slots up to the longest row.
"""

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


def check_mask(mask: Tensor, n: int, end: int) -> None:
    """Raises InvalidValue unless `mask` is float and [B or 1, 1, n, C]."""
    if mask.dim() != 4 or mask.shape[1:] != (1, n, end) or not mask.is_floating_point():
        raise InvalidValue(
            f"mask must be additive and float, [B or 1, 1, {n}, {end}], 0 where visible and -inf where hidden; "
            f"got {mask.dtype} {list(mask.shape)}"
        )


def additive(hidden: Tensor, dtype: torch.dtype, low: float = float("-inf")) -> Tensor:
    """0 where visible, `low` where `hidden` (bool, any shape)."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, low)


def unseen(window: int | None, start: int, end: int, slots: Tensor | None, first: int, device: torch.device) -> Tensor:
    """bool [B or 1, 1, n, C - first]: the slots first..C-1 that the causal rule hides.

    slots: int64 [B, n] of the queries, None: all rows' queries are in start..end-1.
    """
    query = torch.arange(start, end, device=device).unsqueeze(0) if slots is None else slots
    query = query[:, None, :, None]
    key = torch.arange(first, end, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def beyond_window(
    window: int, start: int, end: int, slots: Tensor | None, positions: Tensor | None, device: torch.device
) -> Tensor:
    """bool [B or 1, 1, n, C]: keys whose position lies `window` or more before the query's.

    In a tree a token's position (its depth) is not its slot; the keys before `start` stand in order.
    """
    slot = torch.arange(start, end, device=device).unsqueeze(0) if slots is None else slots
    query = slot if positions is None else positions
    rows = max(slot.shape[0], query.shape[0])
    key = torch.arange(end, device=device).repeat(rows, 1)
    key.scatter_(1, slot.expand(rows, -1), query.expand(rows, -1))
    return key[:, None, None, :] <= query[:, None, :, None] - window
