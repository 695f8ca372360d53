"""Token costs of EMO: C_ij = 1 - <e_i, e_j> over the unit rows of a fixed embedding matrix, made when they are needed.

Not a metric (the triangle inequality can fail); C_ii = 0 exactly. Rows that are zero (unused or padded ids) cost 1 to
all others. Shape letters: V vocabulary (of the shard), m width, k and c rows asked for, u distinct labels.
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.modules.losses.row_gradients import Context

_NORM_FLOOR = 1e-8
_PAIRS = 10_000  # random pairs on which an approximation is judged
_MAX_ERROR = 0.1
_BLOCK = 8192  # rows widened at once
_MIN_MEAN = 0.05  # mean cost below which embeddings are too alike
_MIN_COSINE = 0.05  # mean |cosine| below which embeddings look random


class CostWarning(UserWarning):
    """Token costs that EMO will work badly with."""


@dataclass(frozen=True)
class TokenCosts:
    """The costs between all tokens, as an embedding.

    With a vocabulary shard `unit` holds this rank's rows and `total` counts all of them.
    """

    unit: Tensor  # [V, m] unit rows (after a projection: at most unit)
    projection_error: float = 0.0  # largest |C - C'| on random pairs
    total: int | None = None

    @staticmethod
    def of(
        embedding: Tensor,  # [V, m]
        *,
        center: bool = False,
        project: int | None = None,
        dtype: torch.dtype | None = None,
        pretrained: bool = True,
        judge: bool = True,
    ) -> "TokenCosts":
        """Costs from an embedding matrix (by default a pretrained head), normalised once in fp32.

        Args:
            center: subtract the mean embedding first: for embeddings that all point one way.
            project: keep so many principal directions; cheaper by project / m.
            dtype: of what is kept (bfloat16 halves the memory); None: fp32.
            pretrained: False warns when the rows look random.
            judge: False neither checks nor warns: for costs that are made anew at every step.
        Raises InvalidValue for rows that are not finite, and for a projection that moves a cost by more than 0.1.
        Warns (CostWarning) when the matrix requires a gradient, or all tokens are nearly the same.
        """
        judge = judge and embedding.device.type != "meta"  # there are no numbers to judge
        if judge and embedding.requires_grad:
            _warn("the cost embedding requires a gradient; costs are constants, so a detached copy is used")
        rows = embedding.detach().to(torch.float64 if embedding.dtype == torch.float64 else torch.float32)
        if rows.ndim != 2:
            raise InvalidValue(f"a cost embedding is a matrix [V, m], got {tuple(rows.shape)}")
        if judge and not bool(rows.isfinite().all()):
            bad = int((~rows.isfinite().all(-1)).nonzero()[0])
            raise InvalidValue(f"cost embedding: row {bad} holds NaN or infinity; give it finite numbers or zeros")
        if center:
            used = rows.abs().amax(-1, keepdim=True) > _NORM_FLOOR
            rows = torch.where(used, rows - rows.sum(0) / used.sum().clamp_min(1), rows)
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(_NORM_FLOOR)
        costs = TokenCosts(unit)
        if judge:
            costs._warn_if_useless(pretrained)
        if project is not None:
            costs = costs._projected(project)
        return costs if dtype is None else replace(costs, unit=costs.unit.to(dtype))

    def __len__(self) -> int:
        return self.unit.shape[0] if self.total is None else self.total

    @property
    def mean(self) -> float:
        """Mean cost between two different tokens."""
        count = len(self.unit)
        alike = self.unit.float().sum(0).square().sum() - torch.linalg.vector_norm(self.unit.float()).square()
        return 1.0 - float(alike) / max(1, count * (count - 1))

    def to(self, device: torch.device | str) -> "TokenCosts":
        return replace(self, unit=self.unit.to(device))

    def shard(self, start: int, size: int) -> "TokenCosts":
        """The costs to the tokens [start, start + size), for the rank that holds their rows of the head."""
        return replace(self, unit=self.unit[start : start + size], total=len(self))

    def rows(self, ids: Tensor) -> Tensor:
        """C_ij of the tokens `ids` to all tokens: [k, V], 0 at themselves; fp32 unless the embedding is float64."""
        wide = torch.float64 if self.unit.dtype == torch.float64 else torch.float32
        out = torch.empty(len(ids), len(self.unit), dtype=wide, device=self.unit.device)
        return self._fill(self.unit.index_select(0, ids), out).scatter_(-1, ids.unsqueeze(-1), 0.0)

    def chunk_rows(self, labels: Tensor, like: Tensor, context: Context) -> Tensor:
        """As `rows` for the labels [c] of a chunk, one product per distinct label; what stands at the labels is
        undefined. The result [c, V] lies in scratch memory, in the dtype of `like`.
        """
        rows, columns = like.shape
        out = context.scratch("costs", rows, columns, like)
        distinct, place = torch.unique(labels, return_inverse=True)
        if len(distinct) == rows:
            return self._fill(self._embedded(labels, context), out)
        few = context.scratch("distinct costs", len(distinct), columns, like)
        return torch.index_select(self._fill(self._embedded(distinct, context), few), 0, place, out=out)

    def against(self, mass: Tensor) -> Tensor:
        """(C x)_v of non-negative masses x [c, V] -> [c, V], the cost of a token to itself left out."""
        unit = self.unit.to(mass.dtype)
        reach = mass.sum(-1, keepdim=True) - (mass @ unit) @ unit.T
        own = 1.0 - unit.square().sum(-1)  # not 0 in zero rows, after a projection, and in half precision
        return reach.sub_(mass * own).clamp_min_(0.0)

    def _embedded(self, ids: Tensor, context: Context) -> Tensor:
        if context.shard is None:
            return self.unit.index_select(0, ids)
        local, own = context.shard.local(ids)
        return context.shard.sum(torch.where(own.unsqueeze(-1), self.unit.index_select(0, local), 0.0))

    def _fill(self, embedded: Tensor, out: Tensor) -> Tensor:
        """Costs of embedded tokens [k, m] to all tokens, written into `out` [k, V]."""
        if self.unit.dtype == out.dtype:
            torch.mm(embedded, self.unit.T, out=out)
        else:  # the difference 1 - <e, e'> wants the wide dtype: widened block by block, never as a whole
            embedded = embedded.to(out.dtype)
            for start in range(0, len(self.unit), _BLOCK):
                block = self.unit[start : start + _BLOCK].to(out.dtype)
                out[:, start : start + _BLOCK] = embedded @ block.T
        return out.neg_().add_(1.0).clamp_(min=0.0)

    def _projected(self, width: int) -> "TokenCosts":
        if not 1 <= width <= self.unit.shape[1]:
            raise InvalidValue(f"project must lie in 1..{self.unit.shape[1]} (the embedding's width), got {width}")
        _, directions = torch.linalg.eigh((self.unit.T @ self.unit).double())
        low = self.unit @ directions[:, -width:].to(self.unit.dtype)
        g = torch.Generator().manual_seed(0)
        i, j = torch.randint(len(low), (2, _PAIRS), generator=g).to(low.device)
        error = float(((self.unit[i] * self.unit[j]).sum(-1) - (low[i] * low[j]).sum(-1))[i != j].abs().max())
        if error > _MAX_ERROR:
            raise InvalidValue(
                f"{width} principal directions move a token cost by {error:.3f}, allowed are {_MAX_ERROR}: "
                "raise project, or leave it out"
            )
        return TokenCosts(low.contiguous(), projection_error=error)

    def _warn_if_useless(self, pretrained: bool) -> None:
        mean = self.mean
        if mean < _MIN_MEAN:
            _warn(
                f"the mean cost between two tokens is {mean:.3f}: all embeddings point one way and EMO's weights grow; "
                "set center: true"
            )
        if not pretrained:
            g = torch.Generator().manual_seed(0)
            i, j = torch.randint(len(self.unit), (2, _PAIRS), generator=g).to(self.unit.device)
            cosine = float((self.unit[i] * self.unit[j]).sum(-1)[i != j].abs().mean())
            if cosine < _MIN_COSINE:
                _warn(
                    f"EMO needs trained embeddings (mean |cosine| is {cosine:.3f}); from-scratch training should start "
                    "with MLE"
                )


def _warn(text: str) -> None:
    warnings.warn(text, CostWarning, stacklevel=4)
