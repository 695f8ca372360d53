"""A masked model with exact conditionals: a joint law over a short canvas, written down as a table.

Shape letters: B batch, N canvas, V tokens (the mask is id V).
"""

import torch
from torch import Tensor

from draftsmith.inference.nets.masked_lm import CanvasCache, MaskedLMConfig


class TabularNet:
    """Marginals of every position given what is visible, of `joint` [V, ..., V] (N axes), float64."""

    def __init__(self, joint: Tensor, eos_id: int | None = None) -> None:
        self.joint = joint.double() / joint.sum()
        vocab, length = joint.shape[0], joint.dim()
        self.config = MaskedLMConfig(vocab + 1, 4, 1, 1, 4, max_length=length, mask_id=vocab, eos_id=eos_id)
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.calls: list[Tensor] = []

    def states(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        cache: CanvasCache | None = None,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Log marginals [B, n, V + 1]; what lies behind n, or a row's length, counts as masked."""
        assert cache is None and columns is None and rows is None
        self.calls.append(tokens)
        vocab, length = self.joint.shape[0], self.joint.dim()
        batch, n = tokens.shape
        out = torch.full((batch, n, vocab + 1), float("-inf"), dtype=torch.float64)
        for b in range(batch):
            known = n if lengths is None else int(lengths[b])
            law = self.joint
            for i in range(known):
                if tokens[b, i] != vocab:
                    keep = torch.zeros(vocab, dtype=torch.float64)
                    keep[tokens[b, i]] = 1.0
                    law = law * keep.view(*[1] * i, -1, *[1] * (length - i - 1))
            for i in range(n):
                marginal = law.sum([j for j in range(length) if j != i])
                out[b, i, :vocab] = (marginal / marginal.sum()).log()
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """The states are the logits."""
        return hidden.clone()


def random_joint(vocab: int, length: int, seed: int, sharpness: float = 2.0) -> Tensor:
    """A joint law [V] * N whose positions depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn([vocab] * length, generator=generator, dtype=torch.float64) * sharpness).exp()
