"""Row losses: one value per position, no mean, in fp32 (float64 inputs stay float64, for gradient checks).

Shape letters: c positions (rows of one chunk), V vocabulary, K explicit tokens of a law, C aligned categories.
`p` is the target's law, `q` the student's; both are read at the law's temperature, and nothing is multiplied by T^2.

A row loss takes the student's raw logits [c, V] and a target: labels int64 [c] (p is one-hot), a `TeacherLaw` (K tokens
and ONE tail category; the student's tail is its mass outside `ids`), or a `FullLaw` (all V). Coarse-graining never
raises a divergence: with a tail the losses are lower bounds of the full ones, and `overlap` is an upper bound of alpha.
Zeros of p are exact: a category with log p = -inf costs nothing in forward KL, and makes the reverse KL infinite.

Source: "Online Speculative Decoding" (arXiv 2310.07177), section 3; TVD is ours: it is what acceptance measures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.laws import TeacherLaw

# stands in for log 0 where a finite number is needed: its exp is exactly 0, and 0 * FLOOR is 0 where 0 * -inf is NaN
FLOOR = -1e9


@dataclass(frozen=True)
class FullLaw:
    """A teacher's law over the whole vocabulary: what a live teacher gives for one chunk (no ids, no tail)."""

    logprobs: Tensor  # float32 [c, V], normalised
    temperature: float = 1.0

    @staticmethod
    def from_logits(logits: Tensor, temperature: float = 1.0) -> "FullLaw":
        """softmax(logits / temperature); logits [c, V]."""
        return FullLaw(torch.log_softmax(_wide(logits) / temperature, -1), temperature)


Target = Tensor | TeacherLaw | FullLaw
RowLoss = Callable[[Tensor, Target], Tensor]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def aligned(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(log q, log p), both [c, C]: the student and the target over the same categories.

    C = V for a `FullLaw`, K + 1 for a `TeacherLaw` with a tail, K when its ids are the whole vocabulary, 2 for labels.
    """
    z = _wide(logits)
    if isinstance(target, FullLaw):
        return torch.log_softmax(z / target.temperature, -1), target.logprobs.to(z.dtype)
    if isinstance(target, TeacherLaw):
        if target.temperature != 1.0:
            z = z / target.temperature
        ids, logp, tail = target.ids, target.logprobs.to(z.dtype), target.tail_logmass.to(z.dtype)
    else:
        ids = target.unsqueeze(-1)
        logp, tail = torch.zeros_like(ids, dtype=z.dtype), torch.full_like(target, -math.inf, dtype=z.dtype)
    log_z = z.logsumexp(-1, keepdim=True)
    logq = z.gather(-1, ids) - log_z
    if ids.shape[-1] == z.shape[-1]:
        return logq, logp
    # the tail's mass is summed from the tail itself: 1 - (mass on ids) would lose every digit of a small one
    rest = z.scatter(-1, ids, FLOOR).logsumexp(-1, keepdim=True) - log_z
    return torch.cat([logq, rest], -1), torch.cat([logp, tail.unsqueeze(-1)], -1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """sum_v p (log p - log q) -> [c]; 0 log 0 = 0; +inf where p > 0 = q. Gradients are finite on both sides."""
    p_zero, q_zero = logp == -math.inf, logq == -math.inf
    lp, lq = logp.masked_fill(p_zero, FLOOR), logq.masked_fill(q_zero, FLOOR)
    p = lp.exp()
    terms = torch.where(p_zero | q_zero, 0.0, p * (lp - lq))
    return torch.where((~p_zero & q_zero & (p > 0)).any(-1), math.inf, terms.sum(-1))


def ce(logits: Tensor, target: Target) -> Tensor:
    """Cross-entropy -sum_v p log q -> [c]; for a law this is forward KL plus the law's entropy (same gradient)."""
    if isinstance(target, Tensor):
        return F.cross_entropy(_wide(logits), target, reduction="none")
    logq, logp = aligned(logits, target)
    return _kl(logp, logq) + entropy(logp)


def forward_kl(logits: Tensor, target: Target) -> Tensor:
    """KL(p || q) -> [c]; labels give cross-entropy."""
    logq, logp = aligned(logits, target)
    return _kl(logp, logq)


def reverse_kl(logits: Tensor, target: Target) -> Tensor:
    """KL(q || p) -> [c].

    +inf where p has a zero that q does not share (laws after top-k or top-p): see `NEEDS_FULL_SUPPORT`.
    Raises InvalidValue for labels, against which it is infinite for every student.
    """
    _refuse_labels("reverse_kl", target)
    logq, logp = aligned(logits, target)
    return _kl(logq, logp)


def jsd(logits: Tensor, target: Target, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q -> [c].

    beta in (0, 1); at .5 symmetric and within [0, log 2].
    """
    if not 0.0 < beta < 1.0:
        raise InvalidValue(
            f"jsd beta must lie strictly between 0 and 1, got {beta}: use forward_kl or reverse_kl at the ends"
        )
    logq, logp = aligned(logits, target)
    lq, lp = logq.clamp_min(FLOOR), logp.clamp_min(FLOOR)  # two exact zeros in one category would give NaN gradients
    logm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    return (beta * lp.exp() * (lp - logm) + (1.0 - beta) * lq.exp() * (lq - logm)).sum(-1)


def fkl_rkl_mix(logits: Tensor, target: Target, forward_share: float = 0.9) -> Tensor:
    """0.9 KL(p || q) + 0.1 KL(q || p) -> [c]: what the reference implementation of the paper calls "jsd"."""
    _refuse_labels("fkl_rkl_mix", target)
    logq, logp = aligned(logits, target)
    return forward_share * _kl(logp, logq) + (1.0 - forward_share) * _kl(logq, logp)


def tvd(logits: Tensor, target: Target) -> Tensor:
    """Total variation 0.5 sum_v |p - q| = 1 - alpha -> [c], within [0, 1]; sub-gradient 0 where p = q.

    Start it after a forward-KL warm-up: far from p its gradient is flat.
    """
    logq, logp = aligned(logits, target)
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def overlap(logq: Tensor, logp: Tensor) -> Tensor:
    """alpha = sum_v min(p, q) -> [c]: how often a draft sampled from q is accepted. Arguments from `aligned`."""
    return torch.minimum(logp, logq).exp().sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """-sum_v p log p -> [c], in nats, over the given categories (a tail counts as one)."""
    terms: Tensor = torch.special.entr(logp.exp())
    return terms.sum(-1)


def _refuse_labels(name: str, target: Target) -> None:
    if isinstance(target, Tensor):
        raise InvalidValue(f"{name} needs a teacher's law: against hard labels it is infinite; use ce, jsd or tvd")


ROW_LOSSES: dict[str, RowLoss] = {
    "ce": ce,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "fkl_rkl_mix": fkl_rkl_mix,
    "tvd": tvd,
}
NEEDS_FULL_SUPPORT = frozenset({"reverse_kl", "fkl_rkl_mix"})  # infinite against labels and against laws with zeros


def row_loss(name: str, jsd_beta: float = 0.5) -> RowLoss:
    """The row loss of that name. Raises InvalidValue with the choices for an unknown name or a beta outside (0, 1)."""
    if name not in ROW_LOSSES:
        raise unknown_choice("loss", name, ROW_LOSSES)
    if not 0.0 < jsd_beta < 1.0:
        raise InvalidValue(
            f"jsd beta must lie strictly between 0 and 1, got {jsd_beta}: use forward_kl or reverse_kl at the ends"
        )
    return partial(jsd, beta=jsd_beta) if name == "jsd" else ROW_LOSSES[name]
