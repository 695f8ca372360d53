"""Small any-subset models and the enumerated joint of their holes, for tests of the decoders of canvases."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM
from draftsmith.inference.orders import lattice_rank, order_of
from draftsmith.inference.sampling import SamplingParams, law
from tests.fakes import ChiSquare, chi_square


def small_net(vocab: int = 4, *, seed: int = 1, scale: float = 2.5, **fields: Any) -> AnySubsetLM:
    """A random network over `vocab` tokens and a mask id behind them; with `scale` 2.5 its laws depend strongly on what
    they are given (at the birth of a network they hardly do, and a test of the law would have no power)."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_length": 24,
    }
    config = AnySubsetConfig(vocab_size=vocab + 1, mask_id=vocab, **(sizes | fields))
    net = AnySubsetLM(config).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 or name in ("query", "sink"):
            parameter.normal_(std=scale / parameter.shape[-1] ** 0.5)
    return net


def canvas_of(text: str, mask_id: int, row_id: int = 0, **fields: Any) -> CanvasRequest:
    """A canvas written in digits, with _ for holes."""
    tokens = [mask_id if c == "_" else int(c) for c in text]
    holes = [i for i, c in enumerate(text) if c == "_"]
    return CanvasRequest(tokens, holes, row_id=row_id, **fields)


def conditionals(net: AnySubsetLM, tokens: Tensor, holes: Sequence[int], params: SamplingParams) -> Tensor:
    """float64 [B, S]: each hole's own conditional probability, in lattice order, of complete canvases [B, N]."""
    visible = torch.ones_like(tokens, dtype=torch.bool)
    visible[:, list(holes)] = False
    rank = lattice_rank(visible)
    targets = order_of(rank)[:, -len(holes) :]
    p = law(net.head(net(tokens, rank, visible.sum(1), targets)), params).double()
    return p.gather(2, tokens.gather(1, targets).unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class HoleLaw:
    """The law of the tokens of a canvas's holes by enumeration."""

    outcomes: list[tuple[int, ...]]
    probs: Tensor  # float64

    def test(self, outputs: Sequence[Sequence[int]]) -> ChiSquare:
        """Chi-square of filled holes."""
        index = {outcome: i for i, outcome in enumerate(self.outcomes)}
        return chi_square(
            torch.tensor([index[tuple(o)] for o in outputs]).bincount(minlength=len(self.probs)), self.probs
        )


def hole_law(net: AnySubsetLM, request: CanvasRequest, params: SamplingParams) -> HoleLaw:
    """Every completion and its probability."""
    vocab = net.config.mask_id
    outcomes = list(itertools.product(range(vocab), repeat=len(request.holes)))
    tokens = torch.tensor([request.filled(outcome) for outcome in outcomes])
    return HoleLaw(outcomes, conditionals(net, tokens, request.holes, params).prod(1))
