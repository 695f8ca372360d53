"""The network of the timings of any-subset models: small, trained on the Markov chain at N=256, then widened exactly.

Widening repeats every feature: a layer norm over r copies of the same numbers is the layer norm of one, and products
divide by r what they read r times. So a network of 20M parameters has the law, and the acceptance, of the small one
that was trained in minutes, at the cost of its own size. Shape letters: D width, r times.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM
from draftsmith.inference.orders import lattice_rank, order_of
from tests.markov_chain import V, transition

N, HOLES = 256, 192


def chain(count: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [count, length] from the stationary chain."""
    moves = transition().float()
    states = [torch.randint(V, (count,), generator=generator)]
    for _ in range(length - 1):
        states.append(torch.multinomial(moves[states[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(states, 1)


def chain_canvases(count: int, seed: int) -> list[CanvasRequest]:
    """Canvases with 75% holes; the tag is the whole text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, tokens in enumerate(chain(count, N, generator)):
        holes = torch.rand(N, generator=generator).argsort().argsort() < HOLES
        text = "".join(map(str, tokens.tolist()))
        made.append(CanvasRequest.from_mask(torch.where(holes, V, tokens).tolist(), V, row_id=row, tag=text))
    return made


def trained_chain() -> AnySubsetLM:
    """3 layers, D=64, the joint loss at mask rates that rise to 0.6..0.95: windows of 24 positions, then all 256."""
    torch.manual_seed(0)
    net = AnySubsetLM(AnySubsetConfig(V + 1, 64, 3, 4, 256, N, V))
    with torch.no_grad():  # sinusoids: that neighbours are near has not to be learned for each of 256 positions apart
        angle = torch.arange(N).unsqueeze(1) * torch.pow(300.0, -torch.arange(0, 64, 2) / 64)
        net.embed_positions.weight.copy_(0.3 * torch.cat([angle.sin(), angle.cos()], 1))
        net.embed_tokens.weight.normal_(std=0.2)
    generator = torch.Generator().manual_seed(1)
    _train(net, 500, 64, 24, 3e-3, generator)
    _train(net, 120, 16, N, 1e-3, generator)
    return net.eval().requires_grad_(False)


def _train(net: AnySubsetLM, steps: int, batch: int, length: int, lr: float, generator: torch.Generator) -> None:
    """Steps on windows of `length` positions, placed anywhere; the mask rate rises while they are short."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        warm = min(1.0, 2 * step / steps) if length < N else 1.0
        low, high = 0.15 + warm * 0.45, 0.15 + warm * 0.80
        hidden = max(1, int(length * (low + (high - low) * float(torch.rand(1, generator=generator)))))
        tokens = chain(batch, length, generator)
        visible = torch.rand(batch, length, generator=generator).argsort(1).argsort(1) < length - hidden
        rank = lattice_rank(visible)
        targets = order_of(rank)[:, length - hidden :]
        first = int(torch.randint(0, N - length + 1, (1,), generator=generator))
        window = {"embed_positions.weight": net.embed_positions.weight[first : first + length]}
        states = torch.func.functional_call(net, window, (tokens, rank, visible.sum(1), targets))
        loss = F.cross_entropy(net.lm_head(states).flatten(0, 1), tokens.gather(1, targets).flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def widened(net: AnySubsetLM, r: int, num_layers: int) -> AnySubsetLM:
    """The same function in r times the width, heads and inner width, and in more layers, which add nothing."""
    c = net.config
    wide = AnySubsetLM(
        dataclasses.replace(
            c,
            hidden_size=r * c.hidden_size,
            num_heads=r * c.num_heads,
            intermediate_size=r * c.intermediate_size,
            num_layers=num_layers,
        )
    )
    source = dict(net.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if name in source:
                parameter.copy_(_repeated(name, source[name], r))
            elif name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")):
                parameter.zero_()  # a layer that the small network lacks
    return wide.eval().requires_grad_(False)


def _repeated(name: str, weight: Tensor, r: int) -> Tensor:
    if weight.dim() == 1:
        return weight.repeat(r)
    if name.startswith("embed"):
        return weight.repeat(1, r)
    rows = 1 if name.startswith("lm_head") else r
    return weight.repeat(rows, r) / r
