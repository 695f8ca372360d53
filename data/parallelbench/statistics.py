"""Scores of a sweep: intervals, the per-sample oracle, parallelizability, order preference, order of commits.

Shape letters: S samples. Source: "ParallelBench" (arXiv 2510.04767), section 4 and its repository's analysis.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from draftsmith.inference.errors import InvalidValue


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share. Raises InvalidValue for no trial or impossible counts."""
    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidValue(f"a share needs 0 <= successes <= trials and a trial at least, got {successes} of {trials}")
    found = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def oracle(scores: Sequence[Sequence[float]], passes: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(mean score, mean passes) when every sample is decoded at its own best threshold.

    scores, passes: one row of S per threshold. Per sample: the fewest passes among the thresholds of the best score.
    Raises InvalidValue for tables of different shape or none.
    """
    s, p = np.asarray(scores, dtype=float), np.asarray(passes, dtype=float)
    if s.ndim != 2 or s.shape != p.shape or not s.size:
        raise InvalidValue(
            f"scores and passes are two equal tables (thresholds x samples), got {s.shape} and {p.shape}"
        )
    best = s.max(0)
    return float(best.mean()), float(np.where(s == best, p, np.inf).min(0).mean())


def parallelizability(scores: Mapping[int, float]) -> float | None:
    """sum k score_k / sum score_k over top-k runs; small is hard, None where every score is 0."""
    total = sum(scores.values())
    return sum(k * score for k, score in scores.items()) / total if total > 0 else None


def order_preference(scores: Mapping[int, float]) -> float:
    """Minus the slope of score against block length (k = 2): positive where shorter blocks are better.

    Raises InvalidValue for fewer than two block lengths.
    """
    if len(scores) < 2:
        raise InvalidValue(f"a slope needs two block lengths, got {sorted(scores)}")
    return -float(np.polyfit(list(scores), list(scores.values()), 1)[0])


def order_correlation(order: Sequence[int]) -> dict[str, float] | None:
    """Kendall's tau-b and Spearman's rho between the pass that committed a position (`order`) and the position.

    1: left to right. Equal passes are ties. None where all positions were committed in one pass, or there is one.
    """
    if len(set(order)) < 2:
        return None
    position = np.arange(len(order))
    return {
        "kendall": float(stats.kendalltau(position, order, variant="b").statistic),
        "spearman": float(stats.spearmanr(position, order).statistic),
    }
