"""Medusa heads: M small heads on the target's last state, head m predicting m + 1 tokens further than the target's own.

Source: Medusa (arXiv 2401.10774), section 2.1; FasterDecoding/Medusa. There `[block] * layers` repeats one module, so
that heads of several layers share their weights; here every layer has its own, and such files load all the same.
Shape letters: D width of the target, M heads, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of a set of heads. Raises InvalidValue for sizes below 1."""

    heads: int  # M
    layers: int  # residual blocks of a head
    hidden_size: int  # D
    vocab_size: int  # V

    def __post_init__(self) -> None:
        for name in ("heads", "layers", "hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"medusa {name} must be at least 1, got {getattr(self, name)}")


class ResBlock(nn.Module):
    """x + SiLU(W x + b); W and b start at zero, so that a fresh block changes nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """The heads; names of its state dict are those of medusa_lm_head.safetensors."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(
            nn.Sequential(
                *(ResBlock(config.hidden_size) for _ in range(config.layers)),
                nn.Linear(config.hidden_size, config.vocab_size, bias=False),
            )
            for _ in range(config.heads)
        )
        self.config = config

    def parts(self) -> Iterator[tuple[nn.Sequential, nn.Linear]]:
        """Of each head: its residual blocks, and its last matrix."""
        for head in self:
            assert isinstance(head, nn.Sequential)
            last = head[-1]
            assert isinstance(last, nn.Linear)
            yield nn.Sequential(*list(head)[:-1]), last

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Make every head the target's own, [V, D], with blocks that change nothing."""
        for blocks, last in self.parts():
            last.weight.copy_(weight[: self.config.vocab_size])
            for parameter in blocks.parameters():
                parameter.zero_()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., M, V] of the target's last states [..., D], after its final norm."""
        return torch.stack([head(hidden) for head in self], -2)


def load_heads(config: MedusaConfig, tensors: Mapping[str, Tensor]) -> MedusaHeads:
    """Heads in eval mode with these tensors. Raises InvalidValue that names what does not fit."""
    heads = MedusaHeads(config)
    own = heads.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or sorted(n for n in own if own[n].shape != tensors[n].shape)
    if wrong:
        raise InvalidValue(f"these are not the tensors of {config}: {wrong[0]} is missing, unknown or misshapen")
    heads.to(next(iter(tensors.values())).dtype)
    heads.load_state_dict(dict(tensors))
    return heads.eval().requires_grad_(False)
