"""What speculative decoding will gain, from an acceptance probability and a cost curve; and where it stops paying.

Model: every drafted position is accepted independently with probability alpha ("Fast Inference from Transformers via
Speculative Decoding", 2023: eq. 1, theorems 3.8 and 3.11, corollary 3.9), with measured costs in place of constants.
Limits: acceptance is not i.i.d. (contexts differ, and the tokens behind an accepted one are easier or harder than the
average), so tokens per call can come out higher or lower; every report shows the measured tau beside the forecast.
Rows of a batch advance each at its own pace, so the formula holds per row with the costs of that batch.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.metrics import Estimate

G_MAX = 64  # longest draft that is looked at


@dataclass(frozen=True)
class Forecast:
    """The best draft length at one batch size and what it is expected to gain over plain decoding."""

    batch: int
    alpha: Estimate
    g: int  # cost-optimal draft length, at least 1 (whether to draft at all is told by `speedup`)
    tokens_per_call: float  # tau
    speedup: Estimate  # over plain decoding; its interval carries alpha's over, at this g
    by_g: Mapping[int, float]  # draft length -> speed-up at alpha.value
    break_even_alpha: float | None  # smallest acceptance that gains at this batch; None: no acceptance does

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **vars(self),
            "alpha": dict(vars(self.alpha)),
            "speedup": dict(vars(self.speedup)),
            "by_g": {str(g): s for g, s in self.by_g.items()},
        }


def expected_tokens(alpha: float, g: int) -> float:
    """Tokens committed per round of g drafted ones, bonus included: (1 - alpha^(g+1)) / (1 - alpha), in 1..g+1."""
    _check(alpha, g)
    return math.fsum(alpha**i for i in range(g + 1))  # the sum itself: no 0/0 at alpha = 1


def speedup(alpha: float, g: int, costs: CostCurve) -> float:
    """Plain seconds per token over speculative seconds per token at draft length g; 1 for g = 0 (plain decoding)."""
    return expected_tokens(alpha, g) * costs.plain_round / costs.round_seconds(g)


def best_g(alpha: float, costs: CostCurve, g_max: int = G_MAX) -> int:
    """The draft length in 1..g_max of the largest speed-up (the shortest one among equals)."""
    if g_max < 1:
        raise InvalidValue(f"the longest draft to look at has at least 1 token, got {g_max}")
    return max(range(1, g_max + 1), key=lambda g: speedup(alpha, g, costs))


def gain_possible(alpha: float, c: float) -> bool:
    """Whether some draft length gains where a verification costs no more than a plain step: iff alpha > c."""
    return alpha > c


def arithmetic_factor(alpha: float, g: int, c_flops: float) -> float:
    """Arithmetic per committed token over plain decoding's: (1 - alpha)(g c' + g + 1) / (1 - alpha^(g+1)).

    c_flops: c', one draft step's floating point operations over one target step's.
    """
    return (g * c_flops + g + 1) / expected_tokens(alpha, g)


def forecast(alpha: Estimate, costs: CostCurve, g_max: int = G_MAX, g: int | None = None) -> Forecast:
    """The forecast at one batch size; g: keep this draft length instead of the best one."""
    best = best_g(alpha.value, costs, g_max) if g is None else g
    low, high = (None if a is None else speedup(min(max(a, 0.0), 1.0), best, costs) for a in (alpha.low, alpha.high))
    return Forecast(
        batch=costs.batch,
        alpha=alpha,
        g=best,
        tokens_per_call=expected_tokens(alpha.value, best),
        speedup=Estimate(speedup(alpha.value, best, costs), low, high),  # monotone in alpha: the ends stay the ends
        by_g={n: speedup(alpha.value, n, costs) for n in range(1, g_max + 1)},
        break_even_alpha=break_even_alpha(costs, g_max),
    )


def break_even_alpha(costs: CostCurve, g_max: int = G_MAX) -> float | None:
    """The smallest acceptance probability at which some draft length reaches plain decoding; None when even 1 does not.

    By bisection to 1e-6: the best speed-up grows with alpha.
    """

    def gains(alpha: float) -> bool:
        return speedup(alpha, best_g(alpha, costs, g_max), costs) >= 1.0

    if not gains(1.0):
        return None
    low, high = 0.0, 1.0
    if gains(low):
        return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return high


def break_even_batch(alpha: float, curves: Sequence[CostCurve], g_max: int = G_MAX) -> float | None:
    """The batch size up to which speculative decoding at its own best draft length pays; curves: one per batch size.

    Linear in log(batch) between the last measured batch that gains and the first that does not. None: it does not gain
    even at the smallest batch. math.inf: it still gains at the largest one measured (nothing is claimed beyond it).
    """
    points = sorted((c.batch, speedup(alpha, best_g(alpha, c, g_max), c)) for c in curves)
    if not points:
        raise InvalidValue("no cost curve: measure at least one batch size")
    return crossing(points)


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Where the speed-up falls through 1, from (batch, speed-up) pairs in ascending batch; see `break_even_batch`."""
    if points[0][1] < 1.0:
        return None
    for (b0, s0), (b1, s1) in itertools.pairwise(points):
        if s1 < 1.0:
            share = (s0 - 1.0) / (s0 - s1)
            return float(b0 * (b1 / b0) ** share)
    return math.inf


def break_even_tokens(training_seconds: float, plain_seconds_per_token: float, gain: float) -> float | None:
    """How many served tokens pay back the time that training the draft took on the same machine; None when gain <= 1.

    Each token saves plain_seconds_per_token * (1 - 1 / gain).
    """
    if training_seconds < 0 or plain_seconds_per_token <= 0:
        raise InvalidValue(
            f"times must be positive, got training {training_seconds} s and {plain_seconds_per_token} s per token"
        )
    return training_seconds / (plain_seconds_per_token * (1.0 - 1.0 / gain)) if gain > 1.0 else None


def _check(alpha: float, g: int) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise InvalidValue(f"an acceptance probability lies between 0 and 1, got {alpha}")
    if g < 0:
        raise InvalidValue(f"a draft length is not negative, got {g}")
