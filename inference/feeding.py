"""Feeding committed tokens to a network over a static cache: one call, whatever each row still lacks.

Shape letters: B batch, g drafted tokens, D width, w columns of the call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState


def require_eval(engine: Engine, role: str) -> None:
    """Raises InvalidState for a network in train mode: dropout would change the law from call to call."""
    if engine.training:
        raise InvalidState(f"the {role} is in train mode: call eval() first (dropout breaks exactness)")


def host_tensor(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 [B, n] tensor from host numbers, without waiting for the device."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def feed(engine: Engine, cache: StaticCache, tokens: Sequence[Sequence[int]], drafted: Tensor | None = None) -> Tensor:
    """Feed what the cache lacks of each row's committed tokens, then the `drafted` ones, in one call.

    Rows that lack fewer tokens are padded on the right: what the padding writes lies behind the row's length, where no
    real query sees it and the next call overwrites it. A row so near the cache's end that the padding would not fit is
    rolled back a little and fed some tokens again instead.

    Args: tokens: [B] committed tokens, prompt included, each longer than its row in the cache. drafted: int64 [B, g].
    Returns: hidden [B, g+1, D] at the last committed token and at each drafted one. The cache then holds committed and
    drafted tokens (but never more than its capacity; drafts of a row that do not fit are not to be used).
    """
    g = 0 if drafted is None else drafted.shape[1]
    lacking = [len(t) - held for t, held in zip(tokens, cache.lengths, strict=True)]
    most = max(lacking)
    if (
        most + g > cache.capacity
    ):  # a prompt that fills the cache beside a row with a long draft: feed the prompts first
        feed(engine, cache, [t[:-1] if n > 1 else t for t, n in zip(tokens, lacking, strict=True)])
        cache.truncate([min(held, len(t) - 1) for t, held in zip(tokens, cache.lengths, strict=True)])
        return feed(engine, cache, tokens, drafted)
    start = cache.capacity - most - g
    if max(cache.lengths) > start:
        cache.truncate([min(held, start) for held in cache.lengths])
        lacking = [len(t) - held for t, held in zip(tokens, cache.lengths, strict=True)]
    if most == 1 and max(lacking) == 1:  # the steady state
        ids = host_tensor([t[-1:] for t in tokens], cache.device)
        hidden, _ = engine.forward(ids if drafted is None else torch.cat([ids, drafted], 1), cache=cache)
        return hidden
    width = most + g
    rows = [[*t[len(t) - n :], *[t[-1]] * (width + g - n)] for t, n in zip(tokens, lacking, strict=True)]
    ids = host_tensor(rows, cache.device)
    first = host_tensor([[n] for n in lacking], cache.device)
    steps = torch.arange(g + 1, device=cache.device)
    if drafted is not None:
        ids.scatter_(1, first + steps[:g], drafted)
    hidden, _ = engine.forward(ids[:, :width], cache=cache)
    cache.truncate([min(len(t) + g, held) for t, held in zip(tokens, cache.lengths, strict=True)])
    if min(lacking) == max(lacking) == most:
        return hidden[:, most - 1 :]
    at = (first - 1 + steps).clamp_max_(width - 1)
    return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
