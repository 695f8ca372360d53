"""Fitting the overheads of a roofline forecast on measured rows, and checking it on targets that it has not seen.

Every fit minimises squared residuals of the log speed-up, each target weighing the same however many rows it has.
Public rows hold baselines that were measured badly, so large residuals weigh less (Cauchy's loss, by reweighted least
squares), and rows faster than their accepted length, which no cost above zero explains, are left out of fits. Neither
is done where a forecast is scored: there every row counts.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.roofline import Overheads, Plan, Terms, plain_step, speedup, whole_round

SCALE = 0.1  # a log residual of this size already weighs half
PLAIN = 1e4  # all weigh the same
START = Overheads(call=1.0, draft=0.1, tree=0.03, round=0.1)
ROUNDS, DAMPING = 200, 1e-3


@dataclass(frozen=True)
class Row:
    """One measured configuration."""

    target: str
    plan: Plan
    terms: Terms
    accepted_length: float  # tokens per target call, bonus included
    speedup: float  # measured

    @property
    def possible(self) -> bool:
        """Whether some cost of drafting above zero explains the row: a round takes no less than a plain step."""
        return self.speedup < self.accepted_length


class Forecaster(Protocol):
    """A fitted forecast."""

    def __call__(self, row: Row) -> float: ...


Fit = Callable[[Sequence[Row]], Forecaster]


@dataclass(frozen=True)
class Score:
    """Relative errors |forecast / measured - 1| of rows whose target was left out of the fit."""

    errors: Mapping[str, tuple[float, ...]]  # target -> of its rows
    forecasts: Mapping[str, tuple[float, ...]]  # in the order of the rows

    @property
    def all(self) -> list[float]:
        """Of every row."""
        return [e for errors in self.errors.values() for e in errors]

    @property
    def median(self) -> float:
        """Over all rows."""
        return statistics.median(self.all)

    @property
    def by_target(self) -> dict[str, float]:
        """Medians."""
        return {target: statistics.median(errors) for target, errors in self.errors.items()}

    def quantile(self, q: float) -> float:
        """Over all rows, linear between neighbours."""
        return float(torch.quantile(torch.tensor(self.all, dtype=torch.float64), q))

    def interval(self, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95% bootstrap interval of the median: whole targets are drawn anew, as rows of one target err together."""
        generator = torch.Generator().manual_seed(seed)
        targets = list(self.errors)
        picks = torch.randint(len(targets), (draws, len(targets)), generator=generator).tolist()
        medians = sorted(statistics.median(e for i in pick for e in self.errors[targets[i]]) for pick in picks)
        return medians[int(0.025 * draws)], medians[min(int(0.975 * draws), draws - 1)]


def fit_roofline(rows: Sequence[Row], *, robust: bool = True) -> "Roofline":
    """Fits the four `Overheads`; robust=False: by plain least squares on every row, to see what robustness is worth.

    Raises InvalidValue for no usable row, InvalidState when the fit finds no finite loss.
    """
    used = _usable(rows) if robust else list(rows)
    columns = {
        name: torch.tensor([float(getattr(row.terms, name)) for row in used], dtype=torch.float64)
        for name in Terms.__dataclass_fields__
    }
    log_tau = torch.tensor([math.log(row.accepted_length) for row in used], dtype=torch.float64)

    def forecast(log_overheads: Tensor) -> Tensor:
        t, o = Terms(**columns), _Tensors(*log_overheads.exp())  # type: ignore[arg-type]  # the same formulas, by column
        return log_tau + torch.log(plain_step(o) / whole_round(t, o))  # type: ignore[arg-type]

    start = torch.tensor([math.log(value) for value in vars(START).values()], dtype=torch.float64)
    return Roofline(Overheads(*_minimise(forecast, used, start, SCALE if robust else PLAIN).exp().tolist()))


@dataclass(frozen=True)
class Roofline:
    """The forecast of `roofline` with these overheads."""

    overheads: Overheads

    def __call__(self, row: Row) -> float:
        return speedup(row.accepted_length, row.terms, self.overheads)


@dataclass(frozen=True)
class ConstantRatio:
    """Baseline: a draft step costs c plain steps whatever the target, and a verification as much as a plain step."""

    c: float

    def __call__(self, row: Row) -> float:
        return row.accepted_length / (1.0 + self.c * row.plan.steps)


@dataclass(frozen=True)
class AcceptedLengthOnly:
    """Baseline: one share of the accepted length becomes speed-up."""

    share: float

    def __call__(self, row: Row) -> float:
        return self.share * row.accepted_length


def fit_constant_ratio(rows: Sequence[Row]) -> ConstantRatio:
    """Fits c like `fit_roofline` fits its overheads."""
    used = _usable(rows)
    log_tau = torch.tensor([math.log(row.accepted_length) for row in used], dtype=torch.float64)
    steps = torch.tensor([float(row.plan.steps) for row in used], dtype=torch.float64)
    start = torch.tensor([math.log(0.1)], dtype=torch.float64)
    return ConstantRatio(
        float(_minimise(lambda log_c: log_tau - torch.log1p(log_c.exp() * steps), used, start).exp()[0])
    )


def fit_accepted_length_only(rows: Sequence[Row]) -> AcceptedLengthOnly:
    """Fits the share like `fit_roofline` fits its overheads."""
    used = _usable(rows)
    log_tau = torch.tensor([math.log(row.accepted_length) for row in used], dtype=torch.float64)
    start = torch.tensor([math.log(0.5)], dtype=torch.float64)
    return AcceptedLengthOnly(float(_minimise(lambda log_share: log_tau + log_share, used, start).exp()[0]))


def leave_one_target_out(rows: Sequence[Row], fit: Fit) -> Score:
    """Score a forecast on each target's rows, all of them, after fitting it on the other targets' rows."""
    targets = sorted({row.target for row in rows})
    if len(targets) < 2:
        raise InvalidValue(f"leaving a target out needs rows of at least two targets, got {targets}")
    errors, forecasts = {}, {}
    for target in targets:
        fitted = fit([row for row in rows if row.target != target])
        held = [row for row in rows if row.target == target]
        forecasts[target] = tuple(fitted(row) for row in held)
        errors[target] = tuple(abs(f / row.speedup - 1.0) for f, row in zip(forecasts[target], held, strict=True))
    return Score(errors, forecasts)


@dataclass(frozen=True)
class _Tensors:
    """`Overheads` while they are fitted: scalars with a gradient."""

    call: Tensor
    draft: Tensor
    tree: Tensor
    round: Tensor


def _usable(rows: Sequence[Row]) -> list[Row]:
    used = [row for row in rows if row.possible]
    if not used:
        raise InvalidValue("no row to fit on: each needs a speed-up below its accepted length")
    return used


def _minimise(forecast: Callable[[Tensor], Tensor], rows: Sequence[Row], start: Tensor, scale: float = SCALE) -> Tensor:
    """Levenberg and Marquardt's method on reweighted squares. forecast: parameters [P] -> log speed-ups [rows]."""
    measured = torch.tensor([math.log(row.speedup) for row in rows], dtype=torch.float64)
    counts = {row.target: sum(other.target == row.target for other in rows) for row in rows}
    even = torch.tensor([1.0 / counts[row.target] for row in rows], dtype=torch.float64)

    def loss(x: Tensor) -> float:
        return float((even * scale**2 * torch.log1p(((forecast(x) - measured) / scale) ** 2)).sum())

    x, now, damping = start, loss(start), DAMPING
    for _ in range(ROUNDS):
        residual = forecast(x) - measured
        weight = even / (1.0 + (residual / scale) ** 2)
        jacobian = torch.autograd.functional.jacobian(forecast, x)  # type: ignore[no-untyped-call]
        normal = jacobian.T @ (weight[:, None] * jacobian)
        gradient = jacobian.T @ (weight * residual)
        step = torch.linalg.solve(normal + damping * torch.eye(len(x), dtype=x.dtype) * normal.trace(), -gradient)
        there = x + step.clamp(-1.0, 1.0)
        after = loss(there)
        if after < now:
            small = now - after < 1e-12 * now
            x, now, damping = there, after, damping / 4
            if small:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    if not math.isfinite(now):
        raise InvalidState("the fit found no finite loss: are all speed-ups and accepted lengths above 0?")
    return x
