"""Statistics of speculative decoding: hand-worked rounds, known laws, edge cases."""

import json
import math
import random

import pytest
import torch

from draftsmith.inference import metrics
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats


def rounds_of(*entries: tuple[int, int, int, int, float]) -> RoundStats:
    rounds = RoundStats()
    for row, drafted, accepted, committed, beta in entries:
        rounds.append(row, drafted, accepted, committed, beta, 0.001)
    return rounds


HAND = rounds_of(
    (0, 4, 2, 3, 2.1),  # examined 3 of 4
    (1, 4, 4, 5, 3.6),  # everything accepted: examined 4, not 5
    (0, 4, 0, 1, 0.3),  # examined 1
    (1, 2, 1, 2, 1.0),  # examined 2
    (1, 0, 0, 1, 0.0),  # a plain step: a call, nothing examined
)


def test_hand_worked_numbers() -> None:
    counts = metrics.count(HAND)
    assert counts == metrics.Counts(
        rounds=5, drafted=14, examined=10, accepted=7, committed=12, beta_sum=pytest.approx(7.0)
    )
    assert counts.alpha == pytest.approx(0.7)
    assert counts.accepted_rate == pytest.approx(0.7)
    assert counts.tau == pytest.approx(12 / 5)
    summary = metrics.summarize(HAND)
    assert summary.tau is not None and summary.tau.value == pytest.approx(12 / 5)
    # request 0: 4 tokens in 2 calls; request 1: 8 tokens in 3 calls
    assert summary.tau_per_request is not None
    assert summary.tau_per_request.value == pytest.approx((4 / 2 + 8 / 3) / 2)
    assert metrics.tau_by_request(HAND) == pytest.approx({0: 2.0, 1: 8 / 3})
    assert summary.histogram == {2: [0, 1, 0], 4: [1, 0, 1, 0, 1]}
    # two clusters: sums of betas 2.4 of 4 and 4.6 of 6; residuals -0.4 and +0.4
    assert summary.alpha_standard_error == pytest.approx(math.sqrt(2 / 1 * 2 * 0.4**2) / 10)


def test_counting_positions_behind_the_rejection_would_be_wrong() -> None:
    """Negative control: beta summed over examined positions but divided by drafted ones is another number."""
    counts = metrics.count(HAND)
    assert counts.beta_sum / counts.drafted != pytest.approx(counts.alpha)


def test_counts_add_up_over_ranks() -> None:
    halves = [rounds_of(*zip(*list(vars(HAND).values())[:5], strict=True)) for _ in range(2)]
    both = RoundStats()
    both.extend(halves[0])
    both.extend(halves[1], row_offset=2)
    total = metrics.count(halves[0]) + metrics.count(halves[1])
    assert vars(total) == pytest.approx(vars(metrics.count(both)))
    assert metrics.summarize(both).requests == 4


def test_no_drafted_round_has_no_alpha() -> None:
    summary = metrics.summarize(rounds_of((0, 0, 0, 1, 0.0), (1, 0, 0, 1, 0.0)))
    assert summary.alpha is None and summary.accepted_rate is None and summary.alpha_standard_error is None
    assert summary.tau is not None and summary.tau.value == 1.0
    assert summary.histogram == {}


def test_nothing_at_all() -> None:
    summary = metrics.summarize(RoundStats())
    assert summary.requests == 0 and summary.tau is None and summary.counts.tau is None


def test_one_request_has_no_interval_but_a_standard_error() -> None:
    summary = metrics.summarize(rounds_of((3, 2, 2, 3, 1.5), (3, 2, 0, 1, 0.5)))
    assert summary.alpha is not None and summary.alpha.value == pytest.approx(2.0 / 3)
    assert summary.alpha.low is None and summary.alpha.high is None
    assert summary.alpha_standard_error is not None and summary.alpha_standard_error > 0


@pytest.mark.parametrize("bad", [(0, 2, 3, 4, 1.0), (0, 2, -1, 1, 0.0), (0, 3, 0, 1, 1.5), (0, 0, 0, 1, 0.5)])
def test_impossible_rounds_are_refused(bad: tuple[int, int, int, int, float]) -> None:
    with pytest.raises(InvalidValue, match="impossible round 1"):
        metrics.count(rounds_of((0, 1, 1, 2, 0.5), bad))


def test_split_by_tag() -> None:
    split = metrics.summarize_by_tag(HAND, ["code", "prose"])
    assert list(split) == ["code", "prose"]
    assert split["code"].counts.tau == 2.0 and split["prose"].counts.tau == pytest.approx(8 / 3)
    with pytest.raises(InvalidValue, match="only 1 tags"):
        metrics.summarize_by_tag(HAND, ["code"])


def _simulate(alpha: float, g: int, requests: int, rounds: int, rng: random.Random) -> RoundStats:
    """Context-free acceptance with probability alpha per position."""
    out = RoundStats()
    for row in range(requests):
        for _ in range(rounds):
            k = 0
            while k < g and rng.random() < alpha:
                k += 1
            out.append(row, g, k, k + 1, alpha * min(k + 1, g), 0.001)
    return out


def test_both_estimates_agree_on_context_free_acceptance() -> None:
    out = _simulate(0.7, 5, 40, 50, random.Random(0))
    summary = metrics.summarize(out)
    assert summary.alpha is not None and summary.alpha.value == pytest.approx(0.7)
    assert summary.accepted_rate is not None and summary.accepted_rate.value == pytest.approx(0.7, abs=0.02)
    assert summary.tau is not None
    assert summary.tau.value == pytest.approx((1 - 0.7**6) / 0.3, rel=0.02)


def test_intervals_cover_at_their_level_and_are_seeded() -> None:
    """Coverage of the truth over 200 simulated runs lies near the stated 90 %."""
    truth = (1 - 0.6**4) / 0.4
    rng = random.Random(1)
    hits = 0
    for _ in range(200):
        tau = metrics.summarize(_simulate(0.6, 3, 30, 8, rng), level=0.9, resamples=400).tau
        assert tau is not None and tau.low is not None and tau.high is not None
        hits += tau.low <= truth <= tau.high
    assert 0.83 <= hits / 200 <= 0.96
    sample = _simulate(0.6, 3, 30, 8, rng)
    assert metrics.summarize(sample, seed=5) == metrics.summarize(sample, seed=5)
    assert metrics.summarize(sample, seed=5) != metrics.summarize(sample, seed=6)


def test_median_estimate() -> None:
    est = metrics.median_estimate(torch.tensor([3.0, 1.0, 2.0]))
    assert est.value == 2.0 and est.low is not None and est.high is not None and 1.0 <= est.low <= est.high <= 3.0
    assert metrics.median_estimate(torch.tensor([4.0])) == metrics.Estimate(4.0, None, None)
    with pytest.raises(InvalidValue, match="at least one"):
        metrics.median_estimate(torch.tensor([]))


def test_level_is_checked() -> None:
    with pytest.raises(InvalidValue, match=r"95 % is 0.95"):
        metrics.summarize(HAND, level=95)


def test_json_ready() -> None:
    again = json.loads(json.dumps(metrics.summarize(HAND).to_json()))
    assert again["histogram"]["4"] == [1, 0, 1, 0, 1] and again["alpha"]["value"] == pytest.approx(0.7)
    assert again["counts"]["examined"] == 10
