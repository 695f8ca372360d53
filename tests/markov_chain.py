"""A small Markov chain whose conditionals given any visible subset are known exactly: data for any-subset models.

Specification as-arm.md, acceptance B: V=8, N=24, from each state one successor with 0.62, one with 0.22, the rest
spread evenly. Shape letters: B batch, N positions, V states.
"""

import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch

V, N = 8, 24
FIRST, SECOND = 0.62, 0.22


def transition() -> Tensor:
    """float64 [V, V], rows sum to one; the stationary law is uniform."""
    rest = (1.0 - FIRST - SECOND) / V
    chain = torch.full((V, V), rest, dtype=torch.float64)
    state = torch.arange(V)
    chain[state, (state + 1) % V] += FIRST
    chain[state, (state + 3) % V] += SECOND
    return chain


def sample(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, N] from the stationary chain."""
    chain = transition().float()
    states = [torch.randint(V, (count,), generator=generator)]
    for _ in range(N - 1):
        states.append(torch.multinomial(chain[states[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(states, 1)


def batch_of(tokens: Tensor, first: int = 0) -> TokenBatch:
    """Sequences as a loader gives them."""
    mask = torch.ones_like(tokens, dtype=torch.int8)
    mask[:, 0] = 0
    return TokenBatch(
        tokens, mask, torch.zeros_like(tokens, dtype=torch.int32), first + torch.arange(len(tokens), dtype=torch.int64)
    )


def log_marginal(tokens: Tensor, visible: Tensor) -> Tensor:
    """float64 [B]: log p of the visible tokens, the hidden ones summed out (the forward algorithm)."""
    chain = transition()
    state = torch.full((len(tokens), V), 1.0 / V, dtype=torch.float64)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for i in range(tokens.shape[1]):
        if i:
            state = state @ chain
        seen = torch.nn.functional.one_hot(tokens[:, i], V).bool() | ~visible[:, i : i + 1]
        state = state * seen
        mass = state.sum(1, keepdim=True)
        total += mass.squeeze(1).log()
        state = state / mass
    return total


def exact_nll(tokens: Tensor, visible: Tensor) -> Tensor:
    """float64 [B]: -log p(hidden tokens | visible tokens), in nats per hidden token."""
    joint = log_marginal(tokens, torch.ones_like(visible)) - log_marginal(tokens, visible)
    return -joint / (~visible).sum(1)


def bigram_log_likelihood(tokens: Tensor) -> float:
    """Mean log p(x_{i+1} | x_i) of adjacent tokens."""
    return float(transition().log()[tokens[:, :-1], tokens[:, 1:]].mean())
