"""Statistics of speculative decoding from `RoundStats` alone; torch-only: serving and training share one definition.

alpha  acceptance probability of one position, E[sum_v min(p_v, q_v)] = E[1 - TV(p, q)], over the positions examined:
       the first min(k + 1, n) of the n drafted ones (whatever stands behind the first rejection was never looked at).
       In a tree the position is a test: one of each drawn child that verification came to, with the laws that the
       rejections before it left; of a deterministic tree one of each node's set of children, with beta = sum of its p.
       So the alpha of a tree is that of its tests; it does not say how long accepted paths are: tau does.
tau    tokens committed per target call, the correction or bonus token included; plain rounds (n = 0) count as calls.

Intervals are percentile bootstraps over REQUESTS, since the rounds of one request are not independent.
Shape letters: E entries of RoundStats, R requests, S bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats


@dataclass(frozen=True)
class Estimate:
    """A figure with its percentile bootstrap interval; low and high are None where fewer than two requests speak."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return (
            f"{self.value:.3f}"
            if self.low is None or self.high is None
            else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        )


@dataclass(frozen=True)
class Counts:
    """Sums that determine every point estimate; add them over requests, batches or ranks, then read the estimates."""

    rounds: int = 0  # target calls, counted per row
    drafted: int = 0
    examined: int = 0
    accepted: int = 0
    committed: int = 0
    beta_sum: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def alpha(self) -> float | None:
        """Rao-Blackwell estimate: mean of 1 - TV over the examined positions; None when nothing was examined."""
        return self.beta_sum / self.examined if self.examined else None

    @property
    def accepted_rate(self) -> float | None:
        """accepted / examined, the plain (noisier) estimate of the same probability; None when nothing was examined."""
        return self.accepted / self.examined if self.examined else None

    @property
    def tau(self) -> float | None:
        """Tokens per target call, bonus included; None without a round."""
        return self.committed / self.rounds if self.rounds else None


@dataclass(frozen=True)
class Summary:
    """Everything that one decode call (or several, extended) says about acceptance."""

    counts: Counts
    requests: int
    alpha: Estimate | None  # Rao-Blackwell
    alpha_standard_error: float | None
    accepted_rate: Estimate | None
    tau: Estimate | None  # pooled: all tokens over all target calls
    tau_per_request: Estimate | None  # mean over requests of each one's own tau
    histogram: dict[int, list[int]]  # n drafted -> how many rounds accepted 0, 1, ..., n of them

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the histogram's keys become strings."""

        def plain(value: Any) -> Any:
            return dict(vars(value)) if isinstance(value, Estimate | Counts) else value

        return {name: plain(value) for name, value in vars(self).items()} | {
            "histogram": {str(n): row for n, row in self.histogram.items()}
        }


def count(rounds: RoundStats) -> Counts:
    """Sum the rounds of all rows. Raises InvalidValue for an impossible entry (k > n, betas above min(k + 1, n))."""
    return _counts(_columns(rounds))


def summarize(rounds: RoundStats, *, seed: int = 0, level: float = 0.95, resamples: int = 2000) -> Summary:
    """All statistics of `rounds`, with intervals of coverage `level` from `resamples` seeded bootstrap resamples.

    Raises InvalidValue for impossible entries, and for level outside (0, 1).
    """
    if not 0 < level < 1:
        raise InvalidValue(f"an interval's level lies between 0 and 1, got {level} (95 % is 0.95)")
    columns = _columns(rounds)
    per_request = _per_request(columns)
    call, look = per_request["rounds"], per_request["examined"]
    speaks = look > 0  # a request without drafted tokens says nothing about acceptance

    def ratio(numerator: Tensor, denominator: Tensor) -> Estimate | None:
        return ratio_estimate(numerator, denominator, seed=seed, level=level, resamples=resamples)

    return Summary(
        counts=_counts(columns),
        requests=len(call),
        alpha=ratio(per_request["beta_sum"][speaks], look[speaks]),
        alpha_standard_error=_standard_error(columns, per_request),
        accepted_rate=ratio(per_request["accepted"][speaks], look[speaks]),
        tau=ratio(per_request["committed"], call),
        tau_per_request=ratio(per_request["committed"] / call, torch.ones_like(call)),
        histogram=histogram(rounds),
    )


def summarize_by_tag(
    rounds: RoundStats, tags: Sequence[str], *, seed: int = 0, level: float = 0.95
) -> dict[str, Summary]:
    """`summarize` for each tag apart; tags[r] is the tag of request r (rounds.row indexes it).

    Raises InvalidValue when a row has no tag.
    """
    if rounds.row and max(rounds.row) >= len(tags):
        raise InvalidValue(f"rounds of request {max(rounds.row)}, but only {len(tags)} tags: give one per request")
    split: dict[str, RoundStats] = {}
    for entry in zip(*vars(rounds).values(), strict=True):
        split.setdefault(tags[entry[0]], RoundStats()).append(*entry)
    return {tag: summarize(part, seed=seed, level=level) for tag, part in sorted(split.items())}


def histogram(rounds: RoundStats) -> dict[int, list[int]]:
    """For each draft length n > 0 that occurred: how many rounds accepted 0, 1, ..., n tokens."""
    table: dict[int, list[int]] = {}
    for n, k in zip(rounds.drafted, rounds.accepted, strict=True):
        if n:
            table.setdefault(n, [0] * (n + 1))[k] += 1
    return dict(sorted(table.items()))


def tau_by_request(rounds: RoundStats) -> dict[int, float]:
    """Each request's own tokens per target call, keyed by its row."""
    columns = _columns(rounds)
    rows = torch.unique(columns["row"]).tolist()
    per_request = _per_request(columns)
    return dict(zip(rows, (per_request["committed"] / per_request["rounds"]).tolist(), strict=True))


def ratio_estimate(
    numerator: Tensor, denominator: Tensor, *, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> Estimate | None:
    """sum(numerator) / sum(denominator) with a percentile bootstrap over the R pairs; None when the divisor is 0.

    Args: numerator, denominator: [R], one entry per independent unit (a request, a repetition).
    """
    if not len(denominator) or float(denominator.sum()) == 0:
        return None
    top, bottom = numerator.double(), denominator.double()
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(value, None, None)
    draw = torch.randint(len(top), (resamples, len(top)), generator=torch.Generator().manual_seed(seed))  # [S, R]
    below = bottom[draw].sum(1)
    drawn = (top[draw].sum(1) / below)[below > 0]
    low, high = torch.quantile(drawn, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def median_estimate(values: Tensor, *, seed: int = 0, level: float = 0.95, resamples: int = 2000) -> Estimate:
    """Median with a percentile bootstrap over the R entries (timings of repetitions, or their ratios pair by pair).

    Raises InvalidValue for no entry.
    """
    if not len(values):
        raise InvalidValue("the median of nothing was asked for: give at least one repetition")
    sample = values.double()
    value = float(sample.quantile(0.5))
    if len(sample) < 2:
        return Estimate(value, None, None)
    draw = torch.randint(len(sample), (resamples, len(sample)), generator=torch.Generator().manual_seed(seed))
    medians = sample[draw].quantile(0.5, dim=1)
    low, high = torch.quantile(medians, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def _columns(rounds: RoundStats) -> dict[str, Tensor]:
    columns = {
        name: torch.tensor(getattr(rounds, name), dtype=torch.int64)
        for name in ("row", "drafted", "accepted", "committed")
    }
    columns["beta_sum"] = torch.tensor(rounds.beta_sum, dtype=torch.float64)
    columns["examined"] = torch.tensor(rounds.examined, dtype=torch.int64)
    bad = (columns["accepted"] > columns["drafted"]) | (columns["accepted"] < 0)
    bad |= (columns["accepted"] > columns["examined"]) | (columns["examined"] > columns["drafted"])
    bad |= (columns["beta_sum"] < -1e-6) | (columns["beta_sum"] > columns["examined"] * (1 + 1e-4) + 1e-6)
    if bool(bad.any()):
        e = int(bad.nonzero()[0])
        raise InvalidValue(
            f"impossible round {e}: drafted {rounds.drafted[e]}, accepted {rounds.accepted[e]}, "
            f"sum of betas {rounds.beta_sum[e]}"
        )
    return columns


def _counts(columns: dict[str, Tensor]) -> Counts:
    return Counts(
        rounds=len(columns["row"]),
        **{name: int(columns[name].sum()) for name in ("drafted", "examined", "accepted", "committed")},
        beta_sum=float(columns["beta_sum"].sum()),
    )


def _per_request(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums per request, float64 [R] each, in ascending order of the row; "rounds" counts the entries."""
    rows, index = torch.unique(columns["row"], return_inverse=True)
    values = {name: columns[name].double() for name in ("examined", "accepted", "committed", "beta_sum")}
    values["rounds"] = torch.ones(len(columns["row"]), dtype=torch.float64)
    return {name: torch.zeros(len(rows), dtype=torch.float64).index_add(0, index, x) for name, x in values.items()}


def _standard_error(columns: dict[str, Tensor], per_request: dict[str, Tensor]) -> float | None:
    """Standard error of alpha as a ratio of sums (linearised), clustered by request; by round for a single request.

    Source: the usual ratio estimator, se^2 = m / (m - 1) * sum_i (b_i - alpha e_i)^2 / (sum_i e_i)^2 over m clusters.
    """
    for source in (per_request, columns):
        keep = source["examined"] > 0
        b, e = source["beta_sum"][keep].double(), source["examined"][keep].double()
        m = len(e)
        if m >= 2:
            alpha = b.sum() / e.sum()
            return float((m / (m - 1) * (b - alpha * e).square().sum()).sqrt() / e.sum())
    return None
