"""Rotary positions: every variant that transformers ships for the Llama family, as one table per network.

The inverse frequencies come from transformers' own functions, so a new variant there is one here. Two variants depend
on the length of the text at hand, which would make one pass over n tokens differ from n passes over one:
`dynamic` is therefore limited to the length up to which it is plain, and `longrope` takes one of its two sets for good
(see `CausalLMConfig.max_length`).

Shape letters: d head width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


def rope_frequencies(rope: Mapping[str, Any], head_dim: int, max_positions: int, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [d/2] on the CPU and the factor on cos and sin, as transformers computes them.

    Args: rope: transformers' `rope_parameters` (rope_type, rope_theta and the variant's own). max_positions: the
    configuration's max_position_embeddings. context: the longest text that will be seen; it decides between the two
    sets of `longrope`. Raises InvalidValue for a variant that transformers lacks or that turns only part of a head.
    """
    kind = rope["rope_type"]
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        return 1.0 / (rope["rope_theta"] ** exponent), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise InvalidValue(
            f"unknown rope_type {kind!r}: choose one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    # a carrier for exactly what the function reads; hidden_size / num_attention_heads = head_dim
    carrier = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters=dict(rope),
    )
    with torch.device("cpu"):
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](carrier, torch.device("cpu"), seq_len=context)
    if inv_freq.shape[0] * 2 != head_dim:
        raise InvalidValue(
            f"rotary positions on {inv_freq.shape[0] * 2} of {head_dim} head dimensions (partial_rotary_factor): "
            "the native network turns whole heads; load with engine='hf'"
        )
    return inv_freq, float(factor)


class RopeTable:
    """cos and signed sin of all positions, computed once and grown on demand.

    `rotate(x) = x * cos + swap_halves(x) * sin` with the minus sign of the rotation folded into sin, which changes no
    bit of transformers' `x * cos + rotate_half(x) * sin`.
    """

    def __init__(self, frequencies: Callable[[], tuple[Tensor, float]]) -> None:
        self._frequencies = frequencies
        self._known: tuple[Tensor, float] | None = None
        self._table: tuple[Tensor, Tensor] | None = None  # [length, 1, d] each

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [..., d] at any integer positions [...], computed in float32 on their device and then cast."""
        if self._known is None:
            with torch.inference_mode(False):
                self._known = self._frequencies()
        inv_freq, factor = self._known
        angle = positions.unsqueeze(-1).float() * inv_freq.to(positions.device)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def upto(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [>= length, 1, d] of the positions 0, 1, ..., to be sliced or indexed and broadcast over heads."""
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].dtype != dtype or table[0].device != device:
            size = 1 << max(8, (length - 1).bit_length())
            with torch.inference_mode(False):
                table = self._table = self.at(torch.arange(size, device=device).unsqueeze(1), dtype)
        return table
