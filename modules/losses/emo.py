"""EMO: transport cost between the student's law and the target's, mixed with likelihood; a row loss of the one head.

Source: "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling" (ICLR 2024, arXiv 2310.04691).
Token costs C_ij = 1 - <e_i, e_j> come from the unit rows e of a fixed embedding matrix. Against a label t the transport
cost is exactly D = sum_i q_i C_it, with gradient dD/dz_j = q_j (C_jt - D). Against a law P two feasible couplings bound
it: the product, D = q^T C P (not 0 at q = P: never use it alone), and "residual" (ours), which leaves min(q, P) where
it is and moves the rest: D = (q - min)^T C (P - min) / TV(q, P), 0 only at q = P.

`EMO.__call__` is the reference: the equations, by autograd. `EMO.value_and_grad` is the form for the chunked head: one
more [c, V] buffer, sums of non-negative terms in fp32, and costs for the distinct labels of a chunk only.
MixCE and TaiLr, the paper's baselines, stand beside it.

Shape letters: c rows of a chunk, V vocabulary, m width of the cost embedding, u distinct labels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.chunked_head import HeadLoss, chunked_head
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.divergence import FullLaw, Target, aligned, entropy, forward_kl
from draftsmith.modules.losses.row_gradients import (
    Context,
    RowValues,
    Split,
    label_values,
    rowwise_dot,
    split,
)

MODES = ("mle_anchored", "emo_anchored")
RATIOS = ("plain", "shift")
SOFT = ("residual", "product")
_EPS = 1e-10  # of the ratio's denominator
_TV_EPS = 1e-12  # of the residual's denominator: q = P to the last digit costs 0


class Mixing(Protocol):
    """(nll, transport cost, the target's own mass, each [c] and detached) -> weights (a, b) of a nll + b D."""

    def __call__(self, nll: Tensor, cost: Tensor, mass: Tensor, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Mix:
    """How likelihood and transport are balanced, token by token, without a tuned weight.

    "mle_anchored": 0.5 (nll + min(nll / D', limit) D); "emo_anchored": min(D' / nll, limit) nll + D, the ratios held
    constant. D' is D ("plain") or D + q_t ("shift"). `limit` None: 3 and 10; math.inf: no clamp.
    """

    mode: str = "mle_anchored"
    ratio: str = "plain"
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_choice("EMO mode", self.mode, MODES)
        if self.ratio not in RATIOS:
            raise unknown_choice("EMO ratio", self.ratio, RATIOS)
        if self.limit is not None and not self.limit > 0:
            raise InvalidValue(f"EMO's limit of the ratio must be above 0, got {self.limit}")
        if self.mode == "emo_anchored" and self.limit is not None and self.limit > 10:
            raise InvalidValue(
                f"emo_anchored needs a limit of at most 10, got {self.limit}: unclamped it never stops pushing"
            )

    def __call__(self, nll: Tensor, cost: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        shifted = cost + mass if self.ratio == "shift" else cost
        if self.mode == "mle_anchored":
            return torch.full_like(nll, 0.5), 0.5 * (nll / (shifted + _EPS)).clamp(max=self._limit(3.0))
        return (shifted / (nll + _EPS)).clamp(max=self._limit(10.0)), torch.ones_like(nll)

    def _limit(self, default: float) -> float:
        return default if self.limit is None else self.limit


@dataclass(frozen=True)
class FixedMix:
    """Constant weights: FixedMix(0, 1) is the transport cost alone."""

    nll: float
    cost: float

    def __call__(self, nll: Tensor, cost: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(nll, self.nll), torch.full_like(nll, self.cost)


def label_cost(q: Tensor, labels: Tensor, costs: TokenCosts) -> Tensor:
    """The exact transport cost against labels, sum_i q_i C_it; q [c, V], labels int64 [c]."""
    return (q * costs.rows(labels).to(q.dtype)).sum(-1)


def product_cost(q: Tensor, p: Tensor, costs: TokenCosts) -> Tensor:
    """The cost of the product coupling, q^T C p -> [c]: an upper bound; q and p [c, V]."""
    everything = costs.rows(torch.arange(q.shape[-1], device=q.device)).to(q.dtype)
    return ((q @ everything) * p).sum(-1)


def residual_cost(q: Tensor, p: Tensor, costs: TokenCosts) -> Tensor:
    """The cost of leaving min(q, p) in place and coupling the residuals: an upper bound, 0 only at q = p."""
    everything = costs.rows(torch.arange(q.shape[-1], device=q.device)).to(q.dtype)
    over, under = (q - p).clamp_min(0), (p - q).clamp_min(0)
    return ((over @ everything) * under).sum(-1) / over.sum(-1).clamp_min(_TV_EPS)


_SOFT_COSTS: dict[str, Callable[[Tensor, Tensor, TokenCosts], Tensor]] = {
    "residual": residual_cost,
    "product": product_cost,
}


class EMO:
    """The row loss a nll + b D, with (a, b) from `mix`; labels, stored laws and live teachers are targets.

    Against a law, nll is forward KL, and the tokens of a stored law's tail have the student's own proportions.
    """

    by_label = True  # rows of one label side by side share their costs

    def __init__(self, costs: TokenCosts, mix: Mixing | None = None, soft: str = "residual") -> None:
        if soft not in SOFT:
            raise unknown_choice("soft", soft, SOFT)
        self.costs = costs
        self.mix: Mixing = mix or Mix()
        self.soft = soft

    def check(self, target: Any, vocab_size: int) -> None:
        """Before the loop over chunks. Raises InvalidValue for costs of another vocabulary, labels outside of it."""
        if len(self.costs) != vocab_size:
            raise InvalidValue(f"cost embedding has {len(self.costs)} rows, logits have {vocab_size}")
        if isinstance(target, Tensor) and target.numel() and target.device.type != "meta":
            low, high = (int(x) for x in target.aminmax())
            if low < 0 or high >= vocab_size:
                wrong = low if low < 0 else high
                raise InvalidValue(f"label id {wrong} lies outside the vocabulary 0..{vocab_size - 1}")

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        """The reference: the equations on whole tensors, differentiated by autograd."""
        if isinstance(target, Tensor):
            logq = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
            nll = -logq.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            cost, mass = label_cost(logq.exp(), target, self.costs), (-nll).exp()
        else:
            logq, p = _whole(logits, target)
            nll = forward_kl(logits, target)
            cost, mass = _SOFT_COSTS[self.soft](logq.exp(), p, self.costs), torch.minimum(logq.exp(), p).sum(-1)
        a, b = self.mix(nll.detach(), cost.detach(), mass.detach())
        return a * nll + b * cost

    def value_and_grad(self, logits: Tensor, target: Target, weight: Tensor | None, context: Context) -> RowValues:
        """The form for the chunked head: values, and the weighted gradient in the place of the logits."""
        if isinstance(target, Tensor):
            return self._hard(split(logits, target.unsqueeze(-1), context), target, weight, context)
        return self._against_law(logits, target, weight, context)

    def _hard(self, s: Split, labels: Tensor, weight: Tensor | None, context: Context) -> RowValues:
        # `rest` is 0 at the label, so the cost of the label to itself never enters
        cost_rows = self.costs.chunk_rows(labels, s.rest, context)
        cost = rowwise_dot(s.rest, cost_rows) * s.factor
        if context.shard is not None:
            cost = context.shard.sum(cost)
        nll, mass = -s.logq.squeeze(-1), s.logq.squeeze(-1).exp()
        a, b = self.mix(nll, cost, mass)
        if weight is not None:
            # q_v (a + b (C_vt - D)) at the others, and at the label, where C = 0, the same less a
            wa, wb = a * weight, b * weight
            flat = ((wa - wb * cost) * s.factor).unsqueeze(-1)
            s.rest.mul_(torch.addcmul(flat, cost_rows, (wb * s.factor).unsqueeze(-1), out=cost_rows))
            s.put((-wa * s.logq_rest.exp() - wb * mass * cost).unsqueeze(-1))
        return label_values(s, a * nll + b * cost, nll=nll, cost=cost)

    def _against_law(self, logits: Tensor, law: Target, weight: Tensor | None, context: Context) -> RowValues:
        assert not isinstance(law, Tensor)
        temperature = law.temperature
        logq, p = _whole(logits, law)
        q = logq.exp()
        coarse_q, coarse_p = aligned(logits, law)
        nll = forward_kl(logits, law)
        mass, own_entropy = torch.minimum(coarse_q, coarse_p).exp().sum(-1), entropy(coarse_p)
        if self.soft == "product":
            pull = self.costs.against(p)  # (C p)_v
            cost = (q * pull).sum(-1)
        else:
            over, under = (q - p).clamp_min_(0), (p - q).clamp_min_(0)
            tv = over.sum(-1, keepdim=True).clamp_min(_TV_EPS)
            there = self.costs.against(under)  # what a unit of mass pays that goes where q lacks some
            cost = (over * there).sum(-1) / tv.squeeze(-1)
            back = self.costs.against(over)
            pull = torch.where(q > p, there - cost.unsqueeze(-1), -back).div_(tv)
        a, b = self.mix(nll, cost, mass)
        agree = logits.argmax(-1) == _likeliest(law)
        if weight is not None:
            pull.sub_((q * pull).sum(-1, keepdim=True)).mul_(q).mul_(b.unsqueeze(-1))
            pull.add_((q - p) * a.unsqueeze(-1))  # of forward KL; p has the student's own proportions in the tail
            torch.mul(pull, (weight / temperature).unsqueeze(-1), out=logits)
        return RowValues(a * nll + b * cost, agree, mass, own_entropy, {"nll": nll, "cost": cost})


def _whole(logits: Tensor, law: TeacherLaw | FullLaw) -> tuple[Tensor, Tensor]:
    """(log q, p) over the whole vocabulary, both [c, V]; p without gradient."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    logq = torch.log_softmax(z / law.temperature, -1)
    if isinstance(law, FullLaw):
        return logq, law.logprobs.to(z.dtype).exp()
    rest = logq.detach().scatter(-1, law.ids, -math.inf)
    p = law.logprobs.to(z.dtype).exp()
    if law.ids.shape[-1] == z.shape[-1]:
        return logq, torch.zeros_like(rest).scatter(-1, law.ids, p)
    tail = torch.softmax(rest, -1).mul_(law.tail_logmass.to(z.dtype).exp().unsqueeze(-1))
    return logq, tail.scatter_(-1, law.ids, p)


def _likeliest(law: TeacherLaw | FullLaw) -> Tensor:
    if isinstance(law, FullLaw):
        return law.logprobs.argmax(-1)
    return law.ids.gather(-1, law.logprobs.argmax(-1, keepdim=True)).squeeze(-1)


class WeightedNLL:
    """weight(q_t) nll against labels, the weight held constant. MixCE and TaiLr are of this form."""

    def __init__(self, weight: Callable[[Tensor], Tensor], name: str) -> None:
        self.weight, self.name = weight, name

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        """The reference, by autograd. Raises InvalidValue for a law."""
        logq = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        nll = -logq.gather(-1, self._labels(target).unsqueeze(-1)).squeeze(-1)
        return self.weight((-nll).exp().detach()) * nll

    def value_and_grad(self, logits: Tensor, target: Target, weight: Tensor | None, context: Context) -> RowValues:
        """The form for the chunked head."""
        s = split(logits, self._labels(target).unsqueeze(-1), context)
        nll = -s.logq.squeeze(-1)
        own = self.weight((-nll).exp())
        if weight is not None:
            s.rest.mul_((weight * own * s.factor).unsqueeze(-1))
            s.put(-(weight * own * s.logq_rest.exp()).unsqueeze(-1))
        return label_values(s, own * nll, nll=nll)

    def _labels(self, target: Target) -> Tensor:
        if not isinstance(target, Tensor):
            raise InvalidValue(f"{self.name} learns from labels, got a teacher's law: use EMO or a divergence")
        return target


def mixce(share: float = 0.5) -> WeightedNLL:
    """MixCE: share nll + (1 - share) q_t nll. Raises InvalidValue for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise InvalidValue(f"MixCE's share of cross-entropy must lie in [0, 1], got {share}")
    return WeightedNLL(partial(_mixce_weight, share), "MixCE")


def tailr(gamma: float = 1e-5, low: float = 0.2) -> WeightedNLL:
    """TaiLr: clamp(q_t / ((1 - g) + g q_t), low, 1) nll. Raises InvalidValue for gamma or low outside [0, 1]."""
    if not 0 <= gamma <= 1 or not 0 <= low <= 1:
        raise InvalidValue(f"TaiLr's gamma and low must lie in [0, 1], got {gamma} and {low}")
    return WeightedNLL(partial(_tailr_weight, gamma, low), "TaiLr")


def _mixce_weight(share: float, mass: Tensor) -> Tensor:
    return share + (1.0 - share) * mass


def _tailr_weight(gamma: float, low: float, mass: Tensor) -> Tensor:
    return (mass / ((1.0 - gamma) + gamma * mass)).clamp(low, 1.0)


def emo_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # int64 [N]
    costs: TokenCosts,
    *,
    ignore_index: int = -100,
    mix: Mixing | None = None,
    **options: Any,  # of chunked_head: bias, chunk_rows, mode, shard, statistics
) -> HeadLoss:
    """EMO against labels: `.mean` is the loss over the labels that are not `ignore_index`, 0 when there are none."""
    kept = labels != ignore_index
    return chunked_head(hidden, weight, labels, row_loss=EMO(costs, mix), example_weight=kept, **options)
