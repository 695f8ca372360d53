"""How good sampled text is: diversity, an oracle's perplexity, and the divergence frontier (MAUVE) of two histograms.

Source: "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers" (arXiv 2102.01454).
Shape letters: k clusters, B rows, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue

_SCALING, _MIXTURES = 5.0, 25  # the paper's c, and how many mixtures span its curve


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts; 0 when there is none. Raises InvalidValue for n < 1."""
    if n < 1:
        raise InvalidValue(f"distinct_n counts n-grams of at least 1 token, got n={n}")
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def frontier_area(p: Tensor, q: Tensor, scaling: float = _SCALING) -> float:
    """The area under the divergence frontier of two histograms [k]: 1 for equal ones, 0.004 for disjoint ones.

    Raises InvalidValue unless both are laws over the same k > 0 clusters.
    """
    p, q = p.double(), q.double()
    if p.shape != q.shape or p.ndim != 1 or not len(p):
        raise InvalidValue(f"the frontier needs two histograms over one set of clusters, got {p.shape} and {q.shape}")
    for law in (p, q):
        if bool((law < 0).any()) or abs(float(law.sum()) - 1) > 1e-6:
            raise InvalidValue("the frontier needs histograms that are laws: non-negative, with sum 1")
    share = torch.linspace(1e-6, 1 - 1e-6, _MIXTURES, dtype=torch.float64).unsqueeze(-1)
    mixtures = share * p + (1 - share) * q
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.cat([torch.exp(-scaling * _kl(q, mixtures)), ends])
    y = torch.cat([torch.exp(-scaling * _kl(p, mixtures)), ends.flip(0)])
    return 0.5 * (_area(x, y) + _area(y, x))


def _kl(p: Tensor, r: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - r.clamp_min(1e-300).log()), 0.0).sum(-1)


def _area(x: Tensor, y: Tensor) -> float:
    order = sorted(range(len(x)), key=lambda i: (float(x[i]), -float(y[i])))
    return float(torch.trapezoid(y[order], x[order]))


@torch.no_grad()
def continuation_nll(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], batch: int = 16
) -> tuple[float, int]:
    """(summed nll in nats, tokens) of continuations after their prompts, under a transformers model."""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        rows = list(zip(prompts[start : start + batch], texts[start : start + batch], strict=True))
        ids, _ = padded([[*p, *t] for p, t in rows], model.device)
        logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        nll = -logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        for row, (p, t) in enumerate(rows):
            total += float(nll[row, len(p) - 1 : len(p) + len(t) - 1].sum())
            count += len(t)
    return total, count


@torch.no_grad()
def features(model: Any, texts: Sequence[Sequence[int]], batch: int = 16) -> Tensor:
    """The last hidden state of each text's last token [B, D], on the CPU: what MAUVE clusters."""
    found = []
    for start in range(0, len(texts), batch):
        ids, lengths = padded(texts[start : start + batch], model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found.append(hidden[torch.arange(len(lengths)), lengths - 1].float().cpu())
    return torch.cat(found)


@torch.no_grad()
def mean_entropy(model: Any, texts: Sequence[Sequence[int]], temperature: float = 1.0, batch: int = 16) -> float:
    """Mean entropy in nats of the model's next-token laws along the texts, read at a temperature."""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        ids, lengths = padded(texts[start : start + batch], model.device)
        laws = (model(input_ids=ids).logits.float() / temperature).softmax(-1)
        each = torch.special.entr(laws).sum(-1)
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(-1)
        total += float(each[inside].sum())
        count += int(inside.sum())
    return total / max(1, count)


def matched_temperature(model: Any, texts: Sequence[Sequence[int]], entropy: float, steps: int = 12) -> float:
    """The temperature at which a model's laws along the texts have that mean entropy (bisection within 0.2 to 3)."""
    low, high = 0.2, 3.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean_entropy(model, texts, middle) < entropy else (low, middle)
    return 0.5 * (low + high)


def padded(texts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids [B, T] padded on the right with 0, lengths [B]); causal models do not see what is behind a token."""
    longest = max(len(ids) for ids in texts)
    ids = torch.tensor([[*t, *[0] * (longest - len(t))] for t in texts], device=device)
    return ids, torch.tensor([len(t) for t in texts], device=device)
