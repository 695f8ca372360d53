"""The one chunked head (contract 4): hidden states and a head's weight in, a weighted sum of row losses out.

No [N, V] tensor is ever made. Rows of weight 0 are dropped before the head; the rest goes through in chunks of
`chunk_rows`. Two ways: `grad_in_forward` makes logits, row loss and both gradients of a chunk in the forward pass, and
backward only scales what is there: the head runs once, at the price of one fp32 [V, D] buffer between forward and
backward when the head is trained. `recompute` keeps nothing but its inputs, and backward goes over the chunks again:
one more product with the head. `naive_head` is the same function written plainly; tests hold the two together in value
and gradient.

Row losses that know their gradient (`row_gradients.py`: cross-entropy, forward KL, EMO) write it over the logits; for
all others autograd is asked, chunk by chunk.

Shape letters: N positions, M positions of non-zero weight, c rows of a chunk, D width, V vocabulary.
Limits: first derivatives only; backward runs once, unless `retain_graph` was asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.divergence import FullLaw, RowLoss, Target, aligned, entropy, overlap
from draftsmith.modules.losses.row_gradients import Context, RowValues, Scratch, VocabShard, own_gradient

_CHUNK_ELEMENTS = 2**24  # logits per chunk by default: 64 MiB in fp32
_GRADIENT_BYTES = 2**30  # a head whose fp32 gradient is larger is recomputed in backward
MODES = ("auto", "grad_in_forward", "recompute")


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
    more: dict[str, Tensor] = field(default_factory=dict)  # what the row loss adds, each [M]


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
    mode: str = "auto",
    retain_graph: bool = False,
    shard: VocabShard | None = None,
) -> HeadLoss:
    """Weighted sum of `row_loss` over the positions, with per-position statistics.

    With a live teacher of another (padded) vocabulary size both heads are cut to their common rows.

    Args:
        mode: "grad_in_forward", "recompute", or "auto": the first unless the head's fp32 gradient exceeds 1 GiB.
        retain_graph: backward may run again, at the price of a copy of the gradients that forward made.
        shard: `weight` and `bias` are this rank's rows of a head that several ranks hold in parts; `hidden` and labels
            are equal on all of them. The gradient of `hidden` comes out summed over the ranks.
    Raises InvalidValue for shapes that do not fit, an unknown mode, chunk_rows < 1, and what the row loss refuses.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise InvalidValue(f"chunk_rows must be at least 1, got {chunk_rows}")
    if mode not in MODES:
        raise unknown_choice("mode of the chunked head", mode, MODES)
    if shard is not None and (own_gradient(row_loss) is None or not isinstance(target, Tensor)):
        raise InvalidValue("a vocabulary shard works with labels and a row loss that knows its gradient: ce or EMO")
    call = _prepare(hidden, weight, target, example_weight, bias, ordered=getattr(row_loss, "by_label", False))
    check: Callable[[HeadTarget, int], None] | None = getattr(row_loss, "check", None)
    if check is not None:
        check(call.target, call.weight.shape[0] if shard is None else shard.total)
    if mode == "auto":
        large = weight.requires_grad and weight.numel() * 4 > _GRADIENT_BYTES
        mode = "recompute" if large else "grad_in_forward"
    settings = _Settings(
        row_loss=row_loss,
        chunk_rows=chunk_rows or max(16, _CHUNK_ELEMENTS // call.weight.shape[0]),
        statistics=statistics,
        grad=torch.is_grad_enabled(),
        recompute=mode == "recompute",
        retain_graph=retain_graph,
        shard=shard,
    )
    names: list[str] = []
    out = _ChunkedHead.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        call.hidden, call.weight, call.bias, call, settings, names
    )
    total, *columns = cast(tuple[Tensor, ...], out)
    if not statistics:
        return HeadLoss(total, call.example_weight.sum(), None)
    if call.order is not None:  # back into the order of the positions
        columns = [torch.empty_like(column).index_copy_(0, call.order, column) for column in columns]
    loss, agree, alpha, entropies, *rest = columns
    stats = HeadStats(call.rows, loss, agree, alpha, entropies, dict(zip(names, rest, strict=True)))
    return HeadLoss(total, call.example_weight.sum(), stats)


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
    agree, alpha, entropies = statistics_of(logits.detach(), law)
    stats = HeadStats(call.rows, loss.detach(), agree, alpha, entropies)
    return HeadLoss((loss * call.example_weight).sum(), call.example_weight.sum(), stats)


@dataclass(frozen=True)
class _Call:
    """The arguments after dropping ignored rows, cutting to the common vocabulary and settling one dtype."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    target: HeadTarget  # M positions
    example_weight: Tensor  # [M] fp32
    rows: Tensor  # int64 [M], ascending
    order: Tensor | None  # int64 [M]: hidden, target and example_weight are those of rows[order]; None: of rows


@dataclass(frozen=True)
class _Settings:
    row_loss: RowLoss
    chunk_rows: int
    statistics: bool
    grad: bool
    recompute: bool
    retain_graph: bool
    shard: VocabShard | None


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    target: HeadTarget,
    example_weight: Tensor | None,
    bias: Tensor | None,
    ordered: bool = False,  # rows of one label side by side
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
    picked, order = rows, None
    if example_weight is None:
        example_weight = torch.ones(n, dtype=wide, device=hidden.device)
    else:
        example_weight = example_weight.to(hidden.device, wide)
        rows = picked = example_weight.nonzero().squeeze(-1)
    if ordered and isinstance(target, Tensor):
        order = target[rows].argsort(stable=True)
        picked = rows[order]
    if picked.shape[0] < n or order is not None:
        hidden, example_weight, target = hidden.index_select(0, picked), example_weight[picked], _take(target, picked)
    if isinstance(target, TeacherHead):
        common = min(weight.shape[0], target.weight.shape[0])
        if common < weight.shape[0]:
            weight = weight[:common]
            bias = None if bias is None else bias[:common]
    # one dtype for the products, autocast's if it is on: inside the Function there is no autocast to ask
    kind = _autocast_kind(hidden.device)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _Call(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        target=target,
        example_weight=example_weight,
        rows=rows,
        order=order,
    )


def _autocast_kind(device: torch.device) -> str:
    """The device whose autocast rules; the meta device has none of its own."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def _take(target: HeadTarget, index: Tensor | slice) -> HeadTarget:
    if isinstance(target, TeacherHead):
        return TeacherHead(target.hidden[index], target.weight, target.temperature, target.bias)
    return target[index]


def _law(target: HeadTarget, index: slice, vocab_size: int, scratch: Scratch | None = None) -> Target:
    """The target of one chunk, in the form that row losses take; a live teacher is run here."""
    if not isinstance(target, TeacherHead):
        return target[index]
    with torch.no_grad():
        cut = slice(0, vocab_size)
        bias = None if target.bias is None else target.bias[cut]
        hidden, weight = target.hidden[index], target.weight[cut]
        if scratch is None or hidden.dtype not in (torch.float32, torch.float64):
            return FullLaw.from_logits(F.linear(hidden, weight, bias), target.temperature)
        logits = _logits(hidden, weight, bias, scratch("law", hidden.shape[0], weight.shape[0], hidden))
        if target.temperature != 1.0:
            logits.div_(target.temperature)
        return FullLaw(torch.log_softmax(logits, -1, out=logits), target.temperature)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def statistics_of(logits: Tensor, law: Target) -> tuple[Tensor, Tensor, Tensor]:
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


@dataclass
class _Pass:
    """What one pass over the chunks gave."""

    total: Tensor
    columns: dict[str, Tensor]  # statistics; empty unless asked for
    grads: list[Tensor | None]  # of hidden, weight, bias: unscaled, the last two in fp32


def _run(
    call: _Call,
    settings: _Settings,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need: list[bool],
    statistics: bool,
    scale: Tensor | None = None,
) -> _Pass:
    """Go over the chunks once: values, and the gradients that are needed, times `scale`."""
    wide, size = call.example_weight.dtype, weight.shape[0]
    d_hidden = torch.empty_like(hidden) if need[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if need[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need[2] else None
    total = torch.zeros((), dtype=wide, device=hidden.device)
    parts: list[RowValues] = []
    context = Context(shard=settings.shard, statistics=statistics)
    own = own_gradient(settings.row_loss)
    with torch.autocast(_autocast_kind(hidden.device), enabled=False):
        for start in range(0, hidden.shape[0], settings.chunk_rows):
            index = slice(start, start + settings.chunk_rows)
            h, w = hidden[index], call.example_weight[index]
            logits = _logits(h, weight, bias, context.scratch("logits", h.shape[0], size, h))
            if logits.dtype != wide:
                logits = context.scratch("wide", h.shape[0], size, w).copy_(logits)
            law = _law(call.target, index, size, context.scratch)
            scaled = w if scale is None else w * scale
            if own is not None:
                values = own(logits, law, scaled if any(need) else None, context)
                d_logits = logits
            else:
                values, d_logits = _by_autograd(
                    settings.row_loss, logits, law, scaled if any(need) else None, statistics
                )
            total += (values.loss * w).sum()
            if statistics:
                parts.append(values)
            if any(need):
                low = d_logits.to(h.dtype)
                if d_hidden is not None:
                    torch.mm(low, weight, out=d_hidden[index])
                if d_weight is not None:
                    if low.dtype == wide:
                        d_weight.addmm_(low.T, h)
                    else:
                        d_weight += low.T @ h
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
    if settings.shard is not None and d_hidden is not None:
        settings.shard.sum(d_hidden)
    return _Pass(total, _columns(parts, total) if statistics else {}, [d_hidden, d_weight, d_bias])


def _by_autograd(
    row_loss: RowLoss, logits: Tensor, law: Target, weight: Tensor | None, statistics: bool
) -> tuple[RowValues, Tensor]:
    logits = logits.detach()
    with torch.set_grad_enabled(weight is not None):
        loss = row_loss(logits.requires_grad_(weight is not None), law)
        d_logits = logits if weight is None else torch.autograd.grad((loss * weight).sum(), logits)[0]
    measured = statistics_of(logits.detach(), law) if statistics else (None, None, None)
    return RowValues(loss.detach(), *measured), d_logits


def _columns(parts: list[RowValues], total: Tensor) -> dict[str, Tensor]:
    """The statistics of all chunks, by name; the four of every row loss come first."""
    if not parts:
        none = total.new_zeros(0)
        return {"loss": none, "agree": none.bool(), "alpha": none, "entropy": none}
    rows = [{"loss": p.loss, "agree": p.agree, "alpha": p.alpha, "entropy": p.entropy, **p.more} for p in parts]
    return {name: torch.cat([cast(Tensor, row[name]) for row in rows]) for name in rows[0]}


class _ChunkedHead(torch.autograd.Function):
    """(total, loss [M], agree [M], alpha [M], entropy [M], what the row loss adds); all but the first only with
    statistics. `names` receives the names of what it adds.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, settings: _Settings,
        names: list[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        need = [settings.grad and needed for needed in ctx.needs_input_grad[:3]]
        ctx.need, ctx.settings = need, settings
        ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype]
        ctx.grads = None
        if settings.recompute:
            ctx.save_for_backward(hidden, weight, bias)
            done = _run(call, settings, hidden, weight, bias, [False] * 3, settings.statistics)
            ctx.call = replace(call, hidden=hidden.new_empty(0), weight=weight.new_empty(0))
        else:
            done = _run(call, settings, hidden, weight, bias, need, settings.statistics)
            ctx.grads = done.grads
        names += list(done.columns)[4:]
        columns = tuple(done.columns.values())
        ctx.mark_non_differentiable(*columns)
        return (done.total, *columns)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        if settings.recompute:
            hidden, weight, bias = ctx.saved_tensors
            grads = _run(ctx.call, settings, hidden, weight, bias, ctx.need, False, d_total).grads
        else:
            if ctx.grads is None:
                raise InvalidState("backward through the chunked head a second time: pass retain_graph=True to it")
            grads = ctx.grads
            if settings.retain_graph:
                grads = [None if g is None else g * d_total.to(g.dtype) for g in grads]
            else:  # in place: no second [V, D] buffer, and AccumulateGrad takes this one as .grad
                ctx.grads = None
                grads = [None if g is None else g.mul_(d_total.to(g.dtype)) for g in grads]
        cast_grads = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*cast_grads, None, None, None)
