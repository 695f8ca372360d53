"""Paths between noise and data, their velocities, and the ODE that follows them; t = 0 is noise, t = 1 is data.

"Flow Matching for Generative Modeling" (Lipman et al., 2023); "Flow Straight and Fast" (Liu et al., 2023). For data of
finitely many points the velocity has a closed form (`DiracMixture`), so a Gaussian can be carried to any law over a
codebook without anything trained: what distilled decoding makes its pairs from.

Shape letters: B batch, D width, V codes. x_t = alpha(t) x_1 + sigma(t) x_0.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice

TIME_CONVENTION = "noise at 0, data at 1"  # stored with every export of a flow; papers on distillation turn it round
SCHEDULES = ("linear", "polynomial", "cosine", "vp")
METHODS = ("euler", "midpoint")  # training takes torchdiffeq for others
FORMS = ("velocity", "data", "noise", "score")
_EDGE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nearest a singular form is evaluated to its end
_COARSE_EDGE = 1e-2
_BETA_MAX, _BETA_MIN = 20.0, 0.1  # of the variance-preserving path

Field = Callable[[Tensor, float], Tensor]  # (x [B, ..., D], t) -> dx/dt


@dataclass(frozen=True)
class Schedule:
    """alpha and sigma of a path, with their derivatives; `power` is the exponent of "polynomial".

    The variance-preserving path starts at alpha(0) = 0.0066, not at 0, and its sigma' is infinite at t = 1.
    Raises InvalidValue for an unknown name or a power below 1.
    """

    name: str = "linear"
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise unknown_choice("flow schedule", self.name, SCHEDULES)
        if self.power < 1:
            raise InvalidValue(f"the power of a polynomial path must be at least 1, got {self.power}")
        if self.power != 1 and self.name != "polynomial":
            raise InvalidValue(f"power {self.power} goes with schedule polynomial only, not with {self.name}")

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, alpha', sigma' at t (any shape, in [0, 1])."""
        one = torch.ones_like(t)
        match self.name:
            case "linear":
                return t, 1 - t, one, -one
            case "polynomial":
                slope = self.power * t ** (self.power - 1)
                return t**self.power, 1 - t**self.power, slope, -slope
            case "cosine":
                angle = t * (math.pi / 2)
                sin, cos = angle.sin(), angle.cos()
                return sin, cos, cos * (math.pi / 2), -sin * (math.pi / 2)
        s = 1 - t
        alpha = (-(s**2) * (_BETA_MAX - _BETA_MIN) / 4 - s * _BETA_MIN / 2).exp()
        sigma = (1 - alpha**2).clamp_min(0).sqrt()
        slope = alpha * (s * (_BETA_MAX - _BETA_MIN) / 2 + _BETA_MIN / 2)
        return alpha, sigma, slope, -alpha * slope / sigma


LINEAR = Schedule()


def check_time(t: Tensor, batch: int) -> Tensor:
    """t as float32 or wider, a scalar or [batch]. Raises InvalidValue outside [0, 1] and for other shapes."""
    if t.ndim > 1 or (t.ndim == 1 and len(t) != batch):
        raise InvalidValue(f"flow time must be a number or one per row ({batch}), got shape {list(t.shape)}")
    if not bool(((t >= 0) & (t <= 1)).all()):
        low, high = t.aminmax()
        raise InvalidValue(f"flow time must be in [0, 1], got values from {low.item():.6g} to {high.item():.6g}")
    return t if t.dtype == torch.float64 else t.float()


def _over(t: Tensor, x: Tensor) -> Tensor:
    """t [B] or scalar, shaped to broadcast over x [B, ..., D]."""
    return t if t.ndim == 0 else t.reshape(-1, *([1] * (x.ndim - 1)))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor, schedule: Schedule = LINEAR) -> tuple[Tensor, Tensor]:
    """x_t and its conditional velocity dx_t/dt; x0 noise and x1 data [B, ..., D], t a scalar or [B].

    Raises InvalidValue for different shapes and for times outside [0, 1].
    """
    if x0.shape != x1.shape:
        raise InvalidValue(f"noise {list(x0.shape)} and data {list(x1.shape)} must have the same shape")
    alpha, sigma, d_alpha, d_sigma = schedule.at(_over(check_time(t, len(x1)), x1))
    return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


def convert(value: Tensor, source: str, to: str, x: Tensor, t: Tensor, schedule: Schedule = LINEAR) -> Tensor:
    """One form of a prediction as another: velocity u, data D = E[x_1|x_t], noise E[x_0|x_t], score of x_t.

    All follow from x = alpha D + sigma eps and u = alpha' D + sigma' eps. Forms are singular at an end of the path, so
    t is kept 1e-3 (below float32: 1e-2) away from both. value and x [B, ..., D], t a scalar or [B].
    """
    for form in (source, to):
        if form not in FORMS:
            raise unknown_choice("form of a prediction", form, FORMS)
    if source == to:
        return value
    edge = _EDGE.get(x.dtype, _COARSE_EDGE)
    alpha, sigma, d_alpha, d_sigma = schedule.at(_over(check_time(t, len(x)).clamp(edge, 1 - edge), x))
    match source:
        case "velocity":
            determinant = alpha * d_sigma - d_alpha * sigma
            data, noise = (d_sigma * x - sigma * value) / determinant, (alpha * value - d_alpha * x) / determinant
        case "data":
            data, noise = value, (x - alpha * value) / sigma
        case _:
            noise = value if source == "noise" else -sigma * value
            data = (x - sigma * noise) / alpha
    match to:
        case "velocity":
            return d_alpha * data + d_sigma * noise
        case "data":
            return data
        case "noise":
            return noise
    return -noise / sigma


def time_grid(steps: int | None, grid: Tensor | None) -> list[float]:
    """The times of an integration, from exactly one of `steps` (uniform over [0, 1]) and `grid` (ascending).

    Raises InvalidValue when both or none are given, for steps below 1, and for a grid that does not ascend in [0, 1].
    """
    if (steps is None) == (grid is None):
        raise InvalidValue("give exactly one of steps (a number) and grid (the times), never both or none")
    if steps is not None:
        if steps < 1:
            raise InvalidValue(f"an integration needs at least one step, got steps={steps}")
        return [i / steps for i in range(steps + 1)]
    assert grid is not None
    times = [float(t) for t in grid.tolist()]
    if len(times) < 2 or any(a >= b for a, b in itertools.pairwise(times)) or times[0] < 0 or times[-1] > 1:
        raise InvalidValue(f"grid must be strictly ascending times in [0, 1], at least two, got {times[:8]}")
    return times


def integrate(
    field: Field, x0: Tensor, *, steps: int | None = None, grid: Tensor | None = None, method: str = "midpoint"
) -> Tensor:
    """Follow dx/dt = field(x, t) from x0 [B, ..., D] over a fixed grid: rows do not depend on their batch-mates.

    Neither method evaluates the field at the last time, where the closed-form one is 0/0. Held to torchdiffeq.
    Raises InvalidValue for a bad grid or method, InvalidState where the result is not finite.
    """
    if method not in METHODS:
        raise unknown_choice("solver", method, METHODS)
    times, x = time_grid(steps, grid), x0
    for t, after in itertools.pairwise(times):
        h = after - t
        x = x + h * (field(x, t) if method == "euler" else field(x + h / 2 * field(x, t), t + h / 2))
    return finite(x)


def finite(x: Tensor) -> Tensor:
    """x. Raises InvalidState naming the first row that is not finite."""
    bad = ~x.isfinite().reshape(len(x), -1).all(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InvalidState(
            f"the flow of row {row} is not finite: the field was evaluated at t = 1, or its network diverged"
        )
    return x


class DiracMixture:
    """The velocity that carries N(0, I) to the law `p` over the codes of a codebook [V, D], in closed form.

    With x_1 = c_j with probability p_j, independent of x_0, the posterior of j at (x, t) is the softmax of
    log p_j - ||x - t c_j||^2 / (2 (1-t)^2), and u = (E[c_j] - x) / (1 - t). The linear path; float32 or wider.
    log_p [B, V] belongs to rows of x [B, D]; codes without mass are -inf.
    Raises InvalidValue for log_p that is no log-law: NaN, a value above 0, a row without mass, another number of codes.
    """

    def __init__(self, codebook: Tensor, log_p: Tensor) -> None:
        if log_p.ndim != 2 or codebook.ndim != 2 or log_p.shape[1] != codebook.shape[0]:
            raise InvalidValue(
                f"log_p must be [B, V] for a codebook [V, D], got {list(log_p.shape)} and {list(codebook.shape)}"
            )
        _check_laws(log_p)
        self.codebook = codebook if codebook.dtype == torch.float64 else codebook.float()
        self.log_p = log_p.to(self.codebook.dtype)
        self._half_squares = self.codebook.square().sum(-1) / 2
        # rows that share their support look at its codes alone: a filter that keeps 900 of 16384 pays here
        kept = self.log_p.isfinite().any(0)
        self._kept: Tensor | None = None if bool(kept.all()) else kept.nonzero()[:, 0]
        if self._kept is not None:
            self.codebook, self.log_p = self.codebook[self._kept], self.log_p[:, self._kept]
            self._half_squares = self._half_squares[self._kept]

    def posterior(self, x: Tensor, t: float) -> Tensor:
        """Logits of the code that x [B, D] is on its way to, [B, kept codes]; t in [0, 1)."""
        if x.ndim != 2 or x.shape[1] != self.codebook.shape[1]:
            raise InvalidValue(f"x must be [B, {self.codebook.shape[1]}] like the codes, got {list(x.shape)}")
        # ||x||^2 is the same for all codes and is left out
        pull = x.to(self.codebook.dtype) @ self.codebook.T
        return self.log_p + pull.sub_(self._half_squares, alpha=t).mul_(t / (1 - t) ** 2)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """u(x, t), [B, D]."""
        mean = self.posterior(x, t).softmax(-1) @ self.codebook
        return (mean - x) / (1 - t)

    def codes(self, x0: Tensor, *, steps: int = 20, method: str = "midpoint") -> Tensor:
        """The code that each x0 [B, D] ~ N(0, I) is carried to, int64 [B]; distributed as p (chi-square in the tests).

        40 evaluations of the field at the default; the code is the nearest one, here the likeliest at the last time.
        """
        x = integrate(self, x0.to(self.codebook.dtype), steps=steps, method=method)
        nearest = (x @ self.codebook.T).sub_(self._half_squares)
        index = nearest.masked_fill_(self.log_p == -math.inf, -math.inf).argmax(-1)
        return index if self._kept is None else self._kept[index]


def _check_laws(log_p: Tensor) -> None:
    if bool(log_p.isnan().any()):
        row = int(log_p.isnan().any(-1).nonzero()[0])
        raise InvalidValue(f"log_p of row {row} holds NaN")
    if bool((log_p > 1e-4).any()):
        raise InvalidValue(f"expected log-probabilities, got a value of {log_p.max().item():.4g}: take the log of p")
    empty = (log_p == -math.inf).all(-1)
    if bool(empty.any()):
        raise InvalidValue(f"log_p of row {int(empty.nonzero()[0])} gives no code any mass: the filters removed all")
