"""The forecast: the spec's test vector, closed forms, where speculation stops paying, and simulated rounds."""

import json
import math
import random

import pytest

from draftsmith.inference import forecast as fc
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.metrics import Estimate


@pytest.mark.parametrize(("c", "g"), [(0.01, 7), (0.02, 6), (0.05, 4), (0.1, 3)])
def test_best_draft_length_of_the_spec(c: float, g: int) -> None:
    assert fc.best_g(0.6, CostCurve.textbook(c)) == g


def test_expected_tokens_closed_form_and_ends() -> None:
    for alpha in (0.1, 0.5, 0.9):
        for g in (1, 4, 9):
            assert fc.expected_tokens(alpha, g) == pytest.approx((1 - alpha ** (g + 1)) / (1 - alpha))
    assert fc.expected_tokens(1.0, 5) == 6
    assert fc.expected_tokens(0.0, 5) == 1
    assert fc.expected_tokens(0.3, 0) == 1


def test_expected_tokens_against_simulated_rounds() -> None:
    rng = random.Random(0)
    total = 0
    for _ in range(40_000):
        k = 0
        while k < 5 and rng.random() < 0.724:
            k += 1
        total += k + 1
    assert total / 40_000 == pytest.approx(fc.expected_tokens(0.724, 5), rel=0.01)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.8])
def test_gain_iff_alpha_above_c(alpha: float) -> None:
    """Corollary 3.9: a gain exists iff alpha > c, and it is at least (1 + alpha) / (1 + c)."""
    for c in (alpha - 0.01, alpha + 0.01):
        costs = CostCurve.textbook(c)
        best = fc.speedup(alpha, fc.best_g(alpha, costs), costs)
        assert (best > 1.0) == fc.gain_possible(alpha, c)
        assert best >= (1 + alpha) / (1 + c) - 1e-12
    assert fc.break_even_alpha(CostCurve.textbook(alpha)) == pytest.approx(alpha, abs=1e-5)


def test_speedup_uses_every_measured_cost() -> None:
    """Hand-worked: 3 * 1 + 2 (fixed) + verify of 4 tokens 14 + overhead 1 = 20 against a plain round of 10 + 2."""
    costs = CostCurve(
        batch=1, plain=10, draft_step=1, verify={1: 10, 4: 14}, overhead=1, plain_overhead=2, draft_fixed=2
    )
    tokens = 1 + 0.5 + 0.25 + 0.125
    assert fc.speedup(0.5, 3, costs) == pytest.approx(tokens * 12 / 20)
    assert fc.speedup(0.5, 0, costs) == 1.0


def test_a_dear_verification_ends_the_gain() -> None:
    cheap = CostCurve(batch=1, plain=1.0, draft_step=0.05, verify={1: 1.0, 65: 1.0})
    dear = CostCurve(batch=16, plain=1.0, draft_step=0.05, verify={1: 1.0, 65: 65.0})
    assert fc.speedup(0.9, fc.best_g(0.9, cheap), cheap) > 3
    assert fc.best_g(0.9, dear) == 1  # every drafted token costs a full step
    assert fc.speedup(0.9, 1, dear) < 1
    assert fc.break_even_alpha(dear) is None  # (1 + alpha) / 2.05 stays below 1


def test_arithmetic_factor() -> None:
    assert fc.arithmetic_factor(0.6, 4, 0.05) == pytest.approx((1 - 0.6) * (4 * 0.05 + 5) / (1 - 0.6**5))
    assert fc.arithmetic_factor(1.0, 4, 0.0) == 1.0


def test_break_even_batch() -> None:
    def curve(batch: int, slope: float) -> CostCurve:
        return CostCurve(batch=batch, plain=1.0, draft_step=0.1, verify={1: 1.0, 2: 1.0 + slope})

    free, heavy, hopeless = curve(1, 0.0), curve(4, 0.6), curve(16, 2.0)
    alpha = 0.7
    gain_4 = 1.7 / 1.7  # g = 1 at batch 4: (1 + 0.7) / (0.1 + 1.6)
    assert fc.speedup(alpha, 1, heavy) == pytest.approx(gain_4)
    assert fc.break_even_batch(alpha, [hopeless, free]) == pytest.approx(
        16 ** ((fc.speedup(alpha, fc.best_g(alpha, free), free) - 1) / _drop(alpha, free, hopeless))
    )
    assert fc.break_even_batch(alpha, [free]) == math.inf
    assert fc.break_even_batch(alpha, [hopeless]) is None
    assert fc.crossing([(1, 2.0), (8, 0.5)]) == pytest.approx(4.0)  # two thirds of the way in log(batch): 8^(2/3)
    with pytest.raises(InvalidValue, match="no cost curve"):
        fc.break_even_batch(alpha, [])


def _drop(alpha: float, first: CostCurve, last: CostCurve) -> float:
    return fc.speedup(alpha, fc.best_g(alpha, first), first) - fc.speedup(alpha, fc.best_g(alpha, last), last)


def test_break_even_tokens() -> None:
    # at 2x, each 10 ms token saves 5 ms: 100 s of training are back after 20,000 tokens
    assert fc.break_even_tokens(100.0, 0.010, 2.0) == pytest.approx(20_000)
    assert fc.break_even_tokens(100.0, 0.010, 1.0) is None
    assert fc.break_even_tokens(0.0, 0.010, 1.5) == 0
    with pytest.raises(InvalidValue, match="positive"):
        fc.break_even_tokens(-1.0, 0.01, 2.0)


def test_interval_is_carried_over_and_json_ready() -> None:
    costs = CostCurve.textbook(0.05, batch=8)
    out = fc.forecast(Estimate(0.6, 0.5, 0.7), costs)
    assert out.g == 4 and out.batch == 8
    assert out.speedup == Estimate(*(fc.speedup(a, 4, costs) for a in (0.6, 0.5, 0.7)))
    assert fc.forecast(Estimate(0.6, None, None), costs).speedup.low is None
    assert fc.forecast(Estimate(0.6, None, None), costs, g=2).g == 2
    data = json.loads(json.dumps(out.to_json()))
    assert data["by_g"]["4"] == pytest.approx(out.speedup.value) and data["alpha"]["high"] == 0.7


def test_bad_input() -> None:
    costs = CostCurve.textbook(0.1)
    with pytest.raises(InvalidValue, match=r"between 0 and 1, got 1\.2"):
        fc.speedup(1.2, 3, costs)
    with pytest.raises(InvalidValue, match="not negative"):
        fc.expected_tokens(0.5, -1)
    with pytest.raises(InvalidValue, match="at least 1 token"):
        fc.best_g(0.5, costs, g_max=0)
