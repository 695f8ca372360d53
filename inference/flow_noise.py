"""The Gaussian noise of flows, by counter: a function of (seed, number of the sample, position), never stored.

Shape letters: B batch, N codes of an image, D code width.
"""

import math

import torch
from torch import Tensor

from draftsmith.inference.rng import NUM_STREAMS, Stream, key, uniform_from

_RADIUS, _ANGLE = (int(Stream.DATA) + NUM_STREAMS * i for i in (2, 3))


def noise(seed: int, numbers: Tensor, tokens: int, width: int) -> Tensor:
    """Standard normal float32 [B, N, D] of the pairs `numbers` int64 [B]: Box-Muller on counter uniforms.

    Equal on every machine up to the last bits of log and cos.
    """
    at = torch.arange(tokens * width, device=numbers.device)
    keys = key(seed, numbers, numbers.device).unsqueeze(1)

    def draw(stream: int) -> Tensor:
        return uniform_from(keys, at, torch.tensor(stream, device=numbers.device))

    radius = (-2.0 * torch.log1p(-draw(_RADIUS))).sqrt()  # 1 - u lies in (0, 1]
    normal = radius * (2.0 * math.pi * draw(_ANGLE)).cos()
    return normal.float().view(len(numbers), tokens, width)
