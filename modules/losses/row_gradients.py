"""Row losses that know their gradient: value and gradient at once, the gradient written over the logits themselves.

The chunked head asks `own_gradient` for such a form of a row loss and takes autograd's where there is none. Each form
is held to its plain twin (`divergence.ce`, `divergence.forward_kl`, `emo.EMO.__call__`) in value and gradient.

Everything rests on one split of a row: the tokens that the target names, and a softmax over all the others. The mass of
the others is summed from themselves, so that neither a small rest nor a small 1 - q_t loses its digits.

Shape letters: c rows of a chunk, V vocabulary (of this rank's shard), K explicit tokens of a law.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.divergence import FLOOR, FullLaw, RowLoss, Target, ce, entropy, forward_kl, overlap

_BLOCK = 2048  # terms of a sum that are added one after the other


class Scratch:
    """Buffers that one pass over the chunks uses again and again: fresh ones of this size cost a page fault a page."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """The buffer `name` as [rows, columns], of the dtype and device of `like`; its content is undefined."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns or held.dtype != like.dtype:
            held = self._held[name] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return held[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows [start, start + size) of a head that the ranks of a process group hold in parts."""

    start: int
    size: int
    total: int  # rows of the whole head
    group: Any = None  # a torch.distributed process group; None: all ranks

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidState("a vocabulary shard needs torch.distributed: call init_process_group first")
        if not 0 <= self.start <= self.start + self.size <= self.total or self.size < 2:
            raise InvalidValue(
                f"a shard of {self.size} rows from {self.start} on does not fit a head of {self.total} rows"
            )

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks."""
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """log of the sum over the ranks of exp(x)."""
        top = self.max(x)
        return top + self.sum((x - top).exp()).log()

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(ids within the shard, clamped into it, whether they lie in it)."""
        own = (ids >= self.start) & (ids < self.start + self.size)
        return (ids - self.start).clamp(0, self.size - 1), own


@dataclass(frozen=True)
class Context:
    """What a pass over the chunks hands to a row loss."""

    scratch: Scratch = field(default_factory=Scratch)
    shard: VocabShard | None = None
    statistics: bool = True


@dataclass(frozen=True)
class RowValues:
    """Detached values of the rows of a chunk; the statistics may be None where they were not asked for."""

    loss: Tensor  # [c]
    agree: Tensor | None = None  # bool [c]
    alpha: Tensor | None = None  # [c]
    entropy: Tensor | None = None  # [c]
    more: dict[str, Tensor] = field(default_factory=dict)  # further columns [c], the same ones in every chunk


class RowGradient(Protocol):
    """(logits [c, V], target, weight [c], context) -> values; the logits become weight * d loss / d logits.

    Without a weight only the values are wanted, and the logits are spoilt.
    """

    def __call__(self, logits: Tensor, target: Target, weight: Tensor | None, context: Context, /) -> RowValues: ...


def own_gradient(row_loss: RowLoss) -> RowGradient | None:
    """The form of a row loss that knows its gradient: its `value_and_grad`, or ours for ce and forward_kl."""
    found: RowGradient | None = getattr(row_loss, "value_and_grad", None)
    return found or _OURS.get(row_loss)


@dataclass(frozen=True)
class Split:
    """A chunk of laws q as the tokens that the target names and the rest."""

    ids: Tensor  # int64 [c, K] within the shard
    own: Tensor | None  # bool [c, K]: which of them lie in the shard; None: all
    logits: Tensor  # [c, K] of those tokens
    logq: Tensor  # [c, K]
    logq_rest: Tensor  # [c]: log of the mass of all other tokens
    top: Tensor  # [c]: the largest logit among all other tokens
    rest: Tensor  # [c, V], in the logits' memory: the law of the shard's other tokens; 0 at `ids`
    factor: Tensor  # [c]: q = factor * rest at those tokens

    def put(self, values: Tensor) -> None:
        """Write [c, K] values at the named tokens."""
        if self.own is not None:
            values = torch.where(self.own, values, self.rest.gather(-1, self.ids))
        self.rest.scatter_(-1, self.ids, values)


def split(logits: Tensor, ids: Tensor, context: Context) -> Split:
    """Split rows in place (`logits` becomes `rest`); ids [c, K], distinct in a row, K < V."""
    shard, own = context.shard, None
    if shard is not None:
        ids, own = shard.local(ids)
    named = logits.gather(-1, ids)
    if shard is None or own is None:
        logits.scatter_(-1, ids, -math.inf)
    else:
        if ids.shape[-1] != 1:
            raise InvalidValue("a vocabulary shard works on labels: laws with several tokens are not sharded")
        logits.scatter_(-1, ids, torch.where(own, -math.inf, named))
        named = shard.sum(torch.where(own, named, 0.0))
    top = logits.amax(-1)
    torch.softmax(logits, -1, out=logits)
    lse_own = top - logits.amax(-1).log()  # the likeliest token has at least 1 / V: its log keeps its digits
    if shard is None:
        lse_rest = lse_own
    else:
        top, lse_rest = shard.max(top), shard.logsumexp(lse_own)
    lse_named = named.logsumexp(-1)
    # -log(1 + x) keeps the digits of a small x, where the difference of two logsumexps would lose them
    logq_named = -torch.logaddexp(torch.zeros_like(lse_rest), lse_rest - lse_named)
    logq_rest = -torch.logaddexp(torch.zeros_like(lse_rest), lse_named - lse_rest)
    return Split(
        ids=ids,
        own=own,
        logits=named,
        logq=(named - lse_named.unsqueeze(-1)) + logq_named.unsqueeze(-1),
        logq_rest=logq_rest,
        top=top,
        rest=logits,
        factor=(lse_own - lse_rest + logq_rest).exp(),
    )


def label_values(s: Split, loss: Tensor, **more: Tensor) -> RowValues:
    """Values of rows with a label: the token is right when no other one is likelier."""
    return RowValues(
        loss=loss,
        agree=s.logits.squeeze(-1) >= s.top,
        alpha=s.logq.squeeze(-1).exp(),
        entropy=torch.zeros_like(loss),
        more=more,
    )


def _divergence(with_entropy: bool) -> RowGradient:
    """Forward KL; with the law's entropy added it is cross-entropy."""

    def values(logits: Tensor, target: Target, weight: Tensor | None, context: Context) -> RowValues:
        if isinstance(target, TeacherLaw) and target.ids.shape[-1] == logits.shape[-1]:
            whole = torch.full_like(logits, -math.inf).scatter_(-1, target.ids, target.logprobs.to(logits.dtype))
            target = FullLaw(whole, target.temperature)
        if isinstance(target, FullLaw):
            return _full(logits, target, weight, context, with_entropy)
        if isinstance(target, Tensor):
            s = split(logits, target.unsqueeze(-1), context)
            if weight is not None:  # q_t - 1 is minus the mass of the rest
                s.rest.mul_((weight * s.factor).unsqueeze(-1))
                s.put(-(weight * s.logq_rest.exp()).unsqueeze(-1))
            return label_values(s, -s.logq.squeeze(-1))
        return _named(logits, target, weight, context, with_entropy)

    return values


def _named(logits: Tensor, law: TeacherLaw, weight: Tensor | None, context: Context, with_entropy: bool) -> RowValues:
    """Against K tokens and a tail: the gradient is q - p at the tokens, and scales the student's own tail elsewhere."""
    if law.temperature != 1.0:
        logits.div_(law.temperature)
    s = split(logits, law.ids, context)
    logq = torch.cat([s.logq, s.logq_rest.unsqueeze(-1)], -1)
    logp = torch.cat([law.logprobs, law.tail_logmass.unsqueeze(-1)], -1).to(logits.dtype)
    p, q = logp.exp(), logq.exp()
    own_entropy = entropy(logp)
    loss = torch.where(p > 0, p * (logp.clamp_min(FLOOR) - logq), 0.0).sum(-1)
    if weight is not None:
        scale = weight / law.temperature
        gap = (q - p) * scale.unsqueeze(-1)
        s.rest.mul_(gap[:, -1:])  # q_v (1 - p_tail / q_tail), and `rest` is q_v / q_tail
        s.put(gap[:, :-1])
    best = law.logprobs.argmax(-1, keepdim=True)
    agree = s.logits.gather(-1, best).squeeze(-1) >= torch.maximum(s.top, s.logits.amax(-1))
    return RowValues(loss + own_entropy if with_entropy else loss, agree, overlap(logq, logp), own_entropy)


def _full(logits: Tensor, law: FullLaw, weight: Tensor | None, context: Context, with_entropy: bool) -> RowValues:
    rows, columns = logits.shape
    values = RowValues(loss=logits.new_zeros(0))
    logp = law.logprobs.to(logits.dtype)
    if context.statistics:
        values = replace(values, agree=logits.argmax(-1) == logp.argmax(-1))
    if law.temperature != 1.0:
        logits.div_(law.temperature)
    torch.log_softmax(logits, -1, out=logits)
    p = torch.exp(logp, out=context.scratch("p", rows, columns, logits))
    room = torch.clamp(logp, min=FLOOR, out=context.scratch("terms", rows, columns, logits)).sub_(logits)
    loss = rowwise_dot(p, room)
    if context.statistics or with_entropy:
        own_entropy = torch.special.entr(p, out=room).sum(-1)
        loss = loss + own_entropy if with_entropy else loss
        if context.statistics:
            alpha = torch.minimum(logp, logits, out=room).exp_().sum(-1)
            values = replace(values, alpha=alpha, entropy=own_entropy)
    if weight is not None:
        logits.exp_().sub_(p).mul_((weight / law.temperature).unsqueeze(-1))
    return replace(values, loss=loss)


def rowwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a b -> [c], without a buffer for the products; in blocks, since one long fp32 sum loses a digit."""
    parts = []
    for start in range(0, a.shape[1], _BLOCK):
        x, y = (t[:, start : start + _BLOCK] for t in (a, b))
        parts.append(torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).view(-1))
    return torch.stack(parts).sum(0)


_OURS: dict[Callable[..., Any], RowGradient] = {ce: _divergence(True), forward_kl: _divergence(False)}
