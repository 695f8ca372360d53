"""The one chunked head (contract 4): hidden states and a head's weight in, a weighted sum of row losses out.

No [N, V] tensor is ever made. Rows of weight 0 are dropped before the head; the rest goes through in chunks of
`chunk_rows`: logits, row loss and both gradients of a chunk are made in the forward pass, and its [c, V] buffers are
gone before the next chunk; backward only scales what is there. So the head runs once (no recomputation), and the price
is one fp32 [V, D] buffer when the head is trained. `naive_head` is the same function written plainly; tests hold the
two together in value and gradient.

Shape letters: N positions, M positions of non-zero weight, c rows of a chunk, D width, V vocabulary.
Limits: first derivatives only.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.divergence import FullLaw, RowLoss, Target, aligned, ce, entropy, overlap

_CHUNK_ELEMENTS = 2**24  # logits per chunk by default: 64 MiB in fp32


@dataclass(frozen=True)
class TeacherHead:
    """A live teacher: its law is computed chunk by chunk, without gradient, over all V tokens.

    Raises InvalidState when either tensor requires a gradient, InvalidValue unless temperature > 0.
    """

    hidden: Tensor  # [N, Dt], after the teacher's final norm
    weight: Tensor  # [Vt, Dt]
    temperature: float = 1.0  # the student is read at the same one
    bias: Tensor | None = None  # [Vt]

    def __post_init__(self) -> None:
        if self.hidden.requires_grad or self.weight.requires_grad:
            raise InvalidState(
                "the teacher requires a gradient: freeze it with requires_grad_(False) and run it under torch.no_grad()"
            )
        if self.temperature <= 0:
            raise InvalidValue(f"distillation needs temperature > 0, got {self.temperature}: greedy targets are labels")

    def __len__(self) -> int:
        return self.hidden.shape[0]


HeadTarget = Tensor | TeacherLaw | TeacherHead


@dataclass(frozen=True)
class HeadStats:
    """Detached statistics of the M positions of non-zero weight."""

    rows: Tensor  # int64 [M]: which of the N positions
    loss: Tensor  # [M]
    agree: Tensor  # bool [M]: the student's most likely token is the teacher's (or the label)
    alpha: Tensor  # [M] sum min(p, q); an upper bound when the law has a tail
    entropy: Tensor  # [M] of the teacher's law in nats, a tail counted as one token; 0 for labels


@dataclass(frozen=True)
class HeadLoss:
    total: Tensor  # [] weighted sum of the row losses, differentiable
    weight: Tensor  # [] sum of the weights
    stats: HeadStats | None  # None with statistics=False

    @property
    def mean(self) -> Tensor:
        """total / weight; 0 (with zero gradients) where every position is ignored."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0)


def chunked_head(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: HeadTarget,  # labels int64 [N], or N laws, or a live teacher at N positions
    *,
    row_loss: RowLoss,
    example_weight: Tensor | None = None,  # [N] >= 0, or bool (a mask); None: all ones
    bias: Tensor | None = None,  # [V]
    chunk_rows: int | None = None,  # more rows: faster, chunk_rows * V more memory
    statistics: bool = True,
) -> HeadLoss:
    """Weighted sum of `row_loss` over the positions, with per-position statistics.

    Cross-entropy on labels without statistics is torch's own `F.linear_cross_entropy`.
    With a live teacher of another (padded) vocabulary size both heads are cut to their common rows.
    Raises InvalidValue for shapes that do not fit or chunk_rows < 1.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise InvalidValue(f"chunk_rows must be at least 1, got {chunk_rows}")
    call = _prepare(hidden, weight, target, example_weight, bias)
    rows = chunk_rows or max(16, _CHUNK_ELEMENTS // call.weight.shape[0])
    if row_loss is ce and isinstance(call.target, Tensor) and not statistics:
        return HeadLoss(_torch_ce(call, rows), call.example_weight.sum(), None)
    out = _ChunkedHead.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        call.hidden, call.weight, call.bias, call, row_loss, rows, statistics, torch.is_grad_enabled()
    )
    total, *stats = cast(tuple[Tensor, ...], out)
    return HeadLoss(total, call.example_weight.sum(), HeadStats(call.rows, *stats) if statistics else None)


def naive_head(
    hidden: Tensor,
    weight: Tensor,
    target: HeadTarget,
    *,
    row_loss: RowLoss,
    example_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> HeadLoss:
    """The reference twin of `chunked_head`: all logits at once, autograd does the rest (several [N, V] buffers)."""
    call = _prepare(hidden, weight, target, example_weight, bias)
    logits = F.linear(call.hidden, call.weight, call.bias)
    law = _law(call.target, slice(None), call.weight.shape[0])
    loss = row_loss(logits, law)
    stats = HeadStats(call.rows, loss.detach(), *_statistics(logits.detach(), law))
    return HeadLoss((loss * call.example_weight).sum(), call.example_weight.sum(), stats)


@dataclass(frozen=True)
class _Call:
    """The arguments after dropping ignored rows, cutting to the common vocabulary and settling one dtype."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    target: HeadTarget  # M positions
    example_weight: Tensor  # [M] fp32
    uniform: bool  # every weight is 1
    rows: Tensor  # int64 [M]


def _prepare(
    hidden: Tensor, weight: Tensor, target: HeadTarget, example_weight: Tensor | None, bias: Tensor | None
) -> _Call:
    n = hidden.shape[0]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise InvalidValue(
            f"the head wants hidden [N,D] and weight [V,D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if len(target) != n or (example_weight is not None and example_weight.shape != (n,)):
        sizes = (len(target), None if example_weight is None else tuple(example_weight.shape))
        raise InvalidValue(f"{n} positions, but target and example_weight are for {sizes[0]} and {sizes[1]}")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = torch.arange(n, device=hidden.device)
    uniform = example_weight is None or example_weight.dtype == torch.bool
    if example_weight is None:
        example_weight = torch.ones(n, dtype=wide, device=hidden.device)
    else:
        example_weight = example_weight.to(hidden.device, wide)
        kept = example_weight.nonzero().squeeze(-1)
        if kept.shape[0] < n:
            rows, hidden, example_weight = kept, hidden.index_select(0, kept), example_weight[kept]
            target = _take(target, kept)
    if isinstance(target, TeacherHead):
        common = min(weight.shape[0], target.weight.shape[0])
        if common < weight.shape[0]:
            weight = weight[:common]
            bias = None if bias is None else bias[:common]
    # one dtype for the products, autocast's if it is on: inside the Function there is no autocast to ask
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _Call(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        target=target,
        example_weight=example_weight,
        uniform=uniform,
        rows=rows,
    )


def _take(target: HeadTarget, index: Tensor | slice) -> HeadTarget:
    if isinstance(target, TeacherHead):
        return TeacherHead(target.hidden[index], target.weight, target.temperature, target.bias)
    return target[index]


def _law(target: HeadTarget, index: slice, vocab_size: int) -> Target:
    """The target of one chunk, in the form that row losses take; a live teacher is run here."""
    if not isinstance(target, TeacherHead):
        return target[index]
    with torch.no_grad():
        cut = slice(0, vocab_size)
        bias = None if target.bias is None else target.bias[cut]
        return FullLaw.from_logits(F.linear(target.hidden[index], target.weight[cut], bias), target.temperature)


def _statistics(logits: Tensor, law: Target) -> tuple[Tensor, Tensor, Tensor]:
    """(agree, alpha, entropy) of one chunk."""
    logq, logp = aligned(logits, law)
    if isinstance(law, Tensor):
        agree = logits.argmax(-1) == law
    elif isinstance(law, FullLaw):
        agree = logits.argmax(-1) == logp.argmax(-1)
    else:
        best = law.logprobs.max(-1)
        agree = logits.argmax(-1) == law.ids.gather(-1, best.indices.unsqueeze(-1)).squeeze(-1)
    return agree, overlap(logq, logp), entropy(logp)


class _ChunkedHead(torch.autograd.Function):
    """(total, loss [M], agree [M], alpha [M], entropy [M]); the last three only with statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: _Call,
        row_loss: RowLoss,
        chunk_rows: int,
        statistics: bool,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        need = [grad and needed for needed in ctx.needs_input_grad[:3]]
        wide = call.example_weight.dtype
        d_hidden = torch.empty_like(hidden) if need[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        stats: list[tuple[Tensor, ...]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_rows):
                index = slice(start, start + chunk_rows)
                h, w = hidden[index], call.example_weight[index]
                logits = F.linear(h, weight, bias).to(wide)
                law = _law(call.target, index, weight.shape[0])
                with torch.set_grad_enabled(any(need)):
                    loss = row_loss(logits.requires_grad_(any(need)), law)
                    part = (loss * w).sum()
                total += part.detach()
                if statistics:
                    stats.append((loss.detach(), *_statistics(logits.detach(), law)))
                if any(need):
                    (d_logits,) = torch.autograd.grad(part, logits)
                    d_low = d_logits.to(h.dtype)
                    if d_hidden is not None:
                        torch.mm(d_low, weight, out=d_hidden[index])
                    if d_weight is not None:
                        d_weight += d_low.T @ h
                    if d_bias is not None:
                        d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.weight_dtype = weight.dtype
        columns = tuple(torch.cat(column) for column in zip(*stats, strict=True)) if stats else ()
        if statistics and not stats:
            none = total.new_zeros(0)
            columns = (none, none.bool(), none, none)
        ctx.mark_non_differentiable(*columns)
        return (total, *columns)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scaled = (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_total).to(ctx.weight_dtype),
            None if d_bias is None else (d_bias * d_total).to(ctx.weight_dtype),
        )
        return (*scaled, None, None, None, None, None)


def _torch_ce(call: _Call, chunk_rows: int) -> Tensor:
    """Cross-entropy on labels by torch's own chunked op; with all weights 1 it makes the gradients in forward."""
    assert isinstance(call.target, Tensor)
    if call.hidden.shape[0] == 0:
        return (call.hidden.sum() + 0.0 * call.weight.sum()).to(call.example_weight.dtype)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows, chunking_method=None)
    loss: Tensor = F.linear_cross_entropy(
        call.hidden,
        call.weight,
        call.target,
        linear_bias=call.bias,
        reduction="sum" if call.uniform else "none",
        options=options,
    )
    return loss.to(call.example_weight.dtype) if call.uniform else (loss * call.example_weight).sum()
