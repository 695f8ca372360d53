"""Losses of a draft head whose vocabulary is a part of the target's, and the target's laws over that part.

`p` over the draft vocabulary is kept as it is: what the target gives to tokens outside can never be accepted, so
sum min(p, q) is the true acceptance. Losses that compare distributions (ce, kl, rkl, jsd) renormalise p; those that
optimise acceptance itself (tv, nla, lk_hybrid) do not.

Source: EAGLE-3 (arXiv 2503.01840), section 3; lk_hybrid and nla: the acceptance losses of `speculators`.
Shape letters: N positions, M rows (a position may be several rows), c rows of a chunk, Dt width of the target,
V vocabulary of the target, Vd of the draft.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.modules.losses.divergence import (
    FullLaw,
    RowLoss,
    Target,
    aligned,
    ce,
    forward_kl,
    jsd,
    overlap,
    reverse_kl,
)
from draftsmith.modules.losses.row_gradients import Context, RowValues, own_gradient, rowwise_dot

_CHUNK_ELEMENTS = 2**24  # logits of the whole vocabulary at once
_TABLE_ELEMENTS = 2**26  # laws over the draft vocabulary that are kept (256 MiB); more are computed again each time


@dataclass(frozen=True)
class DraftLaws:
    """The target's laws over the draft vocabulary at M rows; a target of `chunked_head` (statistics included).

    With `table` they are there; else they are computed chunk by chunk from the target's hidden states.
    """

    index: Tensor  # int64 [M]: which of the N positions
    argmax: Tensor  # int64 [N]: the target's most likely token, of all V
    table: Tensor | None  # [N, Vd] log p
    hidden: Tensor  # [N, Dt], after the target's final norm
    weight: Tensor  # [Vd, Dt]: the head's rows of the draft vocabulary
    bias: Tensor | None  # [Vd]
    log_z: Tensor  # [N]: log-normaliser over all V

    def __len__(self) -> int:
        return self.index.shape[0]

    def at(self, index: Tensor) -> "DraftLaws":
        """The laws of other positions: int64 [M]."""
        return replace(self, index=index)

    def __getitem__(self, rows: Tensor | slice) -> "DraftLaws | FullLaw":  # what chunked_head asks of a target
        index = self.index[rows]
        if isinstance(rows, Tensor):
            return replace(self, index=index)
        return FullLaw(self.log_p(index))

    @torch.no_grad()
    def log_p(self, index: Tensor) -> Tensor:
        """log p over the draft vocabulary [c, Vd] at these positions; its mass is below 1 where V > Vd."""
        if self.table is not None:
            return self.table[index]
        logits = F.linear(self.hidden[index], self.weight, self.bias)
        return logits.float() - self.log_z[index].unsqueeze(1)


@torch.no_grad()
def draft_laws(
    hidden: Tensor,  # [N, Dt]
    weight: Tensor,  # [V, Dt]
    bias: Tensor | None,  # [V]
    ids: Tensor | None,  # int64 [Vd]; None: the whole vocabulary
    rows: Tensor | None = None,  # `weight[ids]`, when the caller keeps it
) -> DraftLaws:
    """One pass of the target's head over N positions, in chunks; index = all positions in order."""
    n, vocab = hidden.shape[0], weight.shape[0]
    if rows is None:
        rows = weight if ids is None else weight[ids]
    kept = n * len(rows) <= _TABLE_ELEMENTS
    argmax, log_z, tables = [], [], []
    for part in torch.split(hidden, max(16, _CHUNK_ELEMENTS // vocab)):
        logits = F.linear(part, weight, bias).float()
        log_z.append(logits.logsumexp(-1))
        argmax.append(logits.argmax(-1))
        if kept:
            tables.append((logits if ids is None else logits[:, ids]) - log_z[-1].unsqueeze(1))
    return DraftLaws(
        index=torch.arange(n, device=hidden.device),
        argmax=torch.cat(argmax),
        table=torch.cat(tables) if kept else None,
        hidden=hidden,
        weight=rows,
        bias=bias if bias is None or ids is None else bias[ids],
        log_z=torch.cat(log_z),
    )


def tv(logits: Tensor, target: Target) -> Tensor:
    """1 - sum_v min(p, q) -> [c]: total variation, the target's mass outside the draft vocabulary included."""
    logq, logp = aligned(logits, target)
    return 1.0 - overlap(logq, logp)


def nla(logits: Tensor, target: Target) -> Tensor:
    """-log sum_v min(p, q) -> [c]: negative log acceptance."""
    logq, logp = aligned(logits, target)
    return -torch.minimum(logp, logq).logsumexp(-1)


def lk_hybrid(logits: Tensor, target: Target, rate: float = 3.0) -> Tensor:
    """w KL(p || q) + (1 - w) TV, w = exp(-rate * alpha) without gradient -> [c]: KL far from p, acceptance near it."""
    acceptance = 1.0 - tv(logits, target)
    w = (-rate * acceptance.detach()).exp()
    return w * forward_kl(logits, _normalised(target)) + (1.0 - w) * (1.0 - acceptance)


@dataclass(frozen=True)
class TableCE:
    """Cross-entropy against laws that are this chunk's own copy: they become p in place, which saves three passes."""

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        return ce(logits, target)

    def value_and_grad(self, logits: Tensor, target: Target, weight: Tensor | None, context: Context) -> RowValues:
        """As `row_gradients.RowGradient`; spoils the target too."""
        if context.statistics or not isinstance(target, FullLaw):
            known = own_gradient(ce)
            assert known is not None
            return known(logits, target, weight, context)
        torch.log_softmax(logits, -1, out=logits)
        p = target.logprobs.exp_()
        loss = -rowwise_dot(p, logits)
        if weight is not None:
            logits.exp_().sub_(p).mul_(weight.unsqueeze(-1))
        return RowValues(loss)


@dataclass(frozen=True)
class Renormalised:
    """A row loss against p / sum p over the draft vocabulary."""

    base: RowLoss

    def __call__(self, logits: Tensor, target: Target) -> Tensor:
        return self.base(logits, _normalised(target))


def _normalised(target: Target) -> Target:
    if not isinstance(target, FullLaw):
        return target
    return replace(target, logprobs=torch.log_softmax(target.logprobs, -1))


_DISTRIBUTIONS: dict[str, RowLoss] = {"ce": ce, "kl": forward_kl, "rkl": reverse_kl, "jsd": jsd}
_ACCEPTANCE: dict[str, RowLoss] = {"tv": tv, "nla": nla, "lk_hybrid": lk_hybrid}
DRAFT_LOSSES = (*_DISTRIBUTIONS, *_ACCEPTANCE)


def draft_loss(name: str, reduced: bool) -> RowLoss:
    """The row loss of that name. reduced: Vd < V. Raises InvalidValue with the choices for an unknown name."""
    if name in _ACCEPTANCE:
        return _ACCEPTANCE[name]
    if name not in _DISTRIBUTIONS:
        raise unknown_choice("loss", name, DRAFT_LOSSES)
    if reduced:
        return Renormalised(_DISTRIBUTIONS[name])
    return TableCE() if name == "ce" else _DISTRIBUTIONS[name]


def needs_argmax_inside(name: str) -> bool:
    """Whether a row counts only where the target's most likely token is in the draft vocabulary (EAGLE, SpecForge)."""
    return name in _DISTRIBUTIONS


def draft_vocabulary(counts: Tensor, size: int) -> tuple[Tensor, float]:
    """(ids int64 [size], rising; covered share of all counted tokens). counts: int64 [V], how often each id is a label.

    The most frequent ids, ties by the smaller id; unused ids fill up from the smallest on.
    Raises InvalidValue when nothing was counted or `size` exceeds V.
    """
    total = int(counts.sum())
    if not 1 <= size <= len(counts):
        raise InvalidValue(f"a draft vocabulary has 1..{len(counts)} tokens, got {size}")
    if total == 0:
        raise InvalidValue("no token of the training data is a label (the loss mask is empty everywhere): check it")
    order = torch.argsort(counts, descending=True, stable=True)  # stable: ties stay in the order of ids
    ids = order[:size].sort().values
    return ids, int(counts[ids].sum()) / total
