"""Randomness by a counter: every number is a hash of (seed, row_id, position, stream), never of a generator's state.

So a row's output does not depend on its batch-mates, a resumed job repeats itself, and no generator has to be
checkpointed. The hash is the splitmix64 finaliser (Steele, Lea, Flood 2014), chained over the four words in wrapping
int64 arithmetic.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Stream(IntEnum):
    """What a uniform is drawn for.

    Decoders add `NUM_STREAMS * round`, so that a position visited twice gets fresh numbers.
    """

    SAMPLE = 0  # plain sampling, and the residual or bonus token of a speculative round
    DRAFT = 1  # the draft's own samples
    ACCEPT = 2  # acceptance tests
    DATA = 3  # corruption and source choices in training


NUM_STREAMS = len(Stream)


def _fold(state: Tensor, word: Tensor) -> Tensor:
    """Chain one more word into the hash; the arguments broadcast."""
    z = state + (word * _GOLDEN).add_(_GOLDEN)
    # in place, since the tensors are tiny and allocation would dominate; `>>` on int64 is arithmetic: the mask makes it
    # logical
    z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def key(seed: int | Tensor, row_id: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The hash after its first two words: int64, to be finished by `uniform_from` (a decoder keeps it per row)."""
    state = torch.zeros((), dtype=torch.int64, device=device)
    for word in (seed, row_id):
        state = _fold(state, torch.as_tensor(word, dtype=torch.int64, device=device))
    return state


def uniform_from(key: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of a `key`, float64 with 52 random bits; the int64 arguments broadcast."""
    z = _fold(_fold(key, position), stream)
    return (z >> 12).bitwise_and_((1 << 52) - 1).to(torch.float64).mul_(2.0**-52)


def uniform(
    seed: int | Tensor,
    row_id: int | Tensor,
    position: int | Tensor,
    stream: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in [0, 1), float64 with 52 random bits; the four int64 arguments broadcast against each other.

    Limits: not cryptographic.
    """
    return uniform_from(
        key(seed, row_id, device),
        torch.as_tensor(position, dtype=torch.int64, device=device),
        torch.as_tensor(stream, dtype=torch.int64, device=device),
    )


def sample_categorical(probs: Tensor, u: Tensor) -> Tensor:
    """Draw one index per row by inverting the cumulative law at `u`.

    Args: probs: [..., V] non-negative, need not sum to one. u: [...] in [0, 1), float64 from `uniform`.
    Returns: int64 [...]. An index of probability zero is never drawn (the sum is taken in float64).
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    target = (u * cdf[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_max_(probs.shape[-1] - 1)
