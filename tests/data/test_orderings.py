"""What any-subset training hides: bounds, strata, orders; the same whoever shares the batch."""

import math

import pytest
import torch
from torch import Tensor

from draftsmith.data import orderings
from draftsmith.data.orderings import MaskSchedule, Ordering, draw, places
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.orders import check_rank, is_lattice, order_of

N = 12


def drawn(rate: float, lengths: Tensor, order: str = "lattice", seed: int = 0, first: int = 0) -> Ordering:
    size = len(lengths)
    rates = torch.full((size,), rate, dtype=torch.float64)
    return draw(rates, first + torch.arange(size), lengths, N, seed=seed, order=order)


def test_bounds_move_from_start_to_the_final_ones() -> None:
    schedule = MaskSchedule(min_rate=0.6, max_rate=0.8, start=0.2, warmup_steps=10)
    assert schedule.bounds(0) == (0.2, 0.2)
    assert schedule.bounds(5) == pytest.approx((0.4, 0.5))
    assert schedule.bounds(10) == pytest.approx((0.6, 0.8)) == schedule.bounds(10_000)
    assert MaskSchedule(warmup_steps=0).bounds(0) == pytest.approx((0.85, 0.99))


@pytest.mark.parametrize("step", [0, 3, 500])
def test_every_sample_of_a_batch_has_a_stratum_of_its_own(step: int) -> None:
    schedule, total = MaskSchedule(0.5, 0.9, 0.1, 4), 16
    rates = schedule.rates(step, torch.arange(total), total, seed=3)
    low, high = schedule.bounds(step)
    assert rates.dtype == torch.float64 and low <= float(rates.min()) and float(rates.max()) <= high
    if high > low:
        assert ((rates - low) / (high - low) * total).floor().sort().values.tolist() == list(range(total))


def test_no_place_of_a_batch_keeps_a_band_of_rates() -> None:
    schedule = MaskSchedule(0.1, 0.9, 0.1, 0)
    first = torch.stack([schedule.rates(step, torch.arange(8), 8, seed=0) for step in range(400)])
    assert (first.mean(0) - 0.5).abs().max() < 0.05  # a fixed band would be 0.1 wide: means from 0.15 to 0.85


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_and_micro_batches_together_draw_what_one_process_does(world: int) -> None:
    schedule, total = MaskSchedule(0.5, 0.9, 0.1, 0), 16
    whole = schedule.rates(7, torch.arange(total), total, seed=3)
    size = total // world // 2
    at = torch.cat([places(rank, world, size, micro) for micro in range(2) for rank in range(world)])
    assert at.sort().values.tolist() == list(range(total))
    parts = torch.cat(
        [schedule.rates(7, places(r, world, size, micro), total, seed=3) for micro in range(2) for r in range(world)]
    )
    assert torch.equal(parts, whole[at])


@pytest.mark.parametrize("order", orderings.ORDERS)
def test_a_sample_hides_the_share_it_was_given(order: str) -> None:
    found = drawn(0.75, torch.full((6,), N), order)
    assert found.counts.tolist() == [9] * 6 and found.num_visible.tolist() == [3] * 6
    check_rank(found.rank, found.rank < 3)
    assert bool(is_lattice(found.rank, found.num_visible).all()) == (order == "lattice")
    assert torch.equal(found.targets, order_of(found.rank)[:, 3:]) and bool(found.real.all())
    assert len({tuple(row) for row in (found.rank < 3).tolist()}) > 1  # a subset per sample


@pytest.mark.parametrize(("rate", "hidden"), [(0.01, 1), (0.5, 6), (0.5833333333333334, 7), (0.999, 11)])
def test_counts_of_visible_and_hidden_agree(rate: float, hidden: int) -> None:
    found = drawn(rate, torch.tensor([N]))
    assert found.counts.item() == hidden == max(1, math.floor(N * rate))
    assert found.num_visible.item() + hidden == N and found.targets.shape[1] == hidden


def test_padding_is_never_seen_and_never_a_target() -> None:
    lengths = torch.tensor([N, 5, 1, 0])
    found = drawn(0.5, lengths)
    assert found.counts.tolist() == [6, 2, 0, 0] and (found.num_visible >= 1).all()
    assert found.num_visible.tolist()[:2] == [6, 3]
    for row, length in enumerate(lengths.tolist()):
        assert found.rank[row, length:].tolist() == list(range(length, N))
        assert (found.targets[row][found.real[row]] < length).all()
        check_rank(found.rank[row : row + 1], found.rank[row : row + 1] < int(found.num_visible[row]))


def test_subsets_are_uniform() -> None:
    found = draw(torch.full((6000,), 0.5, dtype=torch.float64), torch.arange(6000), torch.full((6000,), 4), 4, seed=0)
    kinds, counts = (found.rank < 2).long().mul(2 ** torch.arange(4)).sum(1).unique(return_counts=True)
    assert len(kinds) == 6  # of 2 in 4
    assert ((counts - 1000.0).square() / 1000).sum() < 20.5  # 99.9% point for 5 degrees of freedom


def test_draws_belong_to_the_sample_not_to_its_batch() -> None:
    lengths = torch.full((8,), N)
    whole, other = drawn(0.5, lengths), drawn(0.5, lengths, seed=1)
    part = drawn(0.5, lengths[:3], first=5)
    assert torch.equal(whole.rank[5:], part.rank) and not torch.equal(whole.rank, other.rank)


def test_the_widest_ordering_is_as_large_as_any() -> None:
    wide, found = orderings.widest(2, N, 0.8), drawn(0.8, torch.full((2,), N))
    for name in ("rank", "num_visible", "targets", "counts"):
        assert getattr(wide, name).shape == getattr(found, name).shape
        assert getattr(wide, name).dtype == getattr(found, name).dtype


@pytest.mark.parametrize(
    "settings",
    [
        {"min_rate": 0.0},
        {"max_rate": 1.0},
        {"min_rate": 0.9, "max_rate": 0.8},
        {"start": 1.0},
        {"warmup_steps": -1},
    ],
)
def test_bad_schedules_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidValue):
        MaskSchedule(**settings)  # type: ignore[arg-type]  # as a config file would


def test_bad_draws_are_refused() -> None:
    rates = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(InvalidValue, match="unknown order"):
        drawn(0.5, torch.tensor([N]), "random")
    with pytest.raises(InvalidValue, match="two positions"):
        draw(rates, torch.tensor([0]), torch.tensor([1]), 1, seed=0)
