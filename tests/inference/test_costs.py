"""The cost curve: interpolation, round trip, measuring on engines whose costs are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference.costs import VERIFY_TOKENS, CostCurve, calibrate, measure
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.drafters.prompt_lookup import PromptLookupDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import MarkovEngine

CURVE = CostCurve(
    batch=4, plain=10.0, draft_step=1.0, verify={1: 10.0, 3: 11.0, 9: 20.0}, overhead=0.5, plain_overhead=0.25,
    draft_fixed=0.75, context=64, repetitions=9, machine={"cpu": "x"},
)  # fmt: skip


def test_verify_is_linear_between_points_and_goes_on_behind_them() -> None:
    assert [CURVE.t_verify(n) for n in (1, 2, 3, 6, 9, 15)] == pytest.approx([10.0, 10.5, 11.0, 15.5, 20.0, 29.0])
    falling = CostCurve(batch=1, plain=1.0, draft_step=0.1, verify={1: 1.0, 2: 0.9})  # noise must not go below zero
    assert falling.t_verify(200) == 0.9
    assert CostCurve.textbook(0.1).t_verify(50) == 1.0
    with pytest.raises(InvalidValue, match="at least one token"):
        CURVE.t_verify(0)


def test_round_seconds_adds_up() -> None:
    assert CURVE.round_seconds(2) == pytest.approx(2 * 1.0 + 0.75 + 11.0 + 0.5)
    assert CURVE.round_seconds(0) == CURVE.plain_round == pytest.approx(10.25)
    assert CURVE.c == pytest.approx(0.1)


def test_json_round_trip(tmp_path: Path) -> None:
    assert CostCurve.from_json(json.loads(json.dumps(CURVE.to_json()))) == CURVE
    CURVE.save(tmp_path / "costs.json")
    assert CostCurve.load(tmp_path / "costs.json") == CURVE


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"batch": 1}', '{"batch":1,"plain":1,"draft_step":1,"verify":{"x":1}}']
)
def test_bad_files_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InvalidValue, match="cost curve") as caught:
        CostCurve.load(tmp_path / "costs.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", [{"plain": 0.0}, {"plain": -1.0}, {"verify": {0: 1.0}}, {"verify": {2: float("nan")}}, {"overhead": -1.0}]
)
def test_impossible_costs_are_refused(bad: dict[str, object]) -> None:
    fields: dict[str, object] = {"batch": 1, "plain": 1.0, "draft_step": 0.1}
    with pytest.raises(InvalidValue, match="seconds above 0"):
        CostCurve(**(fields | bad))


class Machine:
    """A clock that only engines move: what is measured is then known exactly."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedEngine(MarkovEngine):
    """A MarkovEngine whose call on n tokens of B rows takes base + slope * B * n seconds of the machine's clock."""

    machine: Machine
    base: float
    slope: float

    def forward(self, tokens: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert tokens is not None
        self.machine.now += self.base + self.slope * tokens.numel()
        return super().forward(tokens, **kwargs)


def timed(machine: Machine, base: float, slope: float, **kwargs: Any) -> TimedEngine:
    engine = TimedEngine(torch.zeros(11, 11), **kwargs)
    engine.machine, engine.base, engine.slope = machine, base, slope
    return engine


@pytest.mark.parametrize("batch", [1, 3])
def test_measures_known_costs_exactly(batch: int) -> None:
    clock = Machine()
    target, draft = timed(clock, 1.0, 0.01), timed(clock, 0.1, 0.002)
    curve = measure(target, ModelDrafter(draft), batch=batch, context=20, repetitions=3, clock=clock)
    assert curve.batch == batch and curve.context == 20 and curve.repetitions == 3
    assert curve.plain == pytest.approx(1.0 + 0.01 * batch)
    assert curve.verify == pytest.approx({n: 1.0 + 0.01 * batch * n for n in VERIFY_TOKENS})
    assert curve.draft_step == pytest.approx(0.1 + 0.002 * batch)
    assert curve.draft_fixed == pytest.approx(0.0, abs=1e-12)
    assert curve.machine["threads"] == torch.get_num_threads()


def test_medians_ignore_a_slow_moment() -> None:
    clock = Machine()
    target = timed(clock, 1.0, 0.0)
    calls = iter(range(10_000))
    stutter = clock.__class__.__call__

    def hiccup() -> float:
        if next(calls) == 9:  # inside one timed call
            clock.now += 500.0
        return stutter(clock)

    curve = measure(target, None, repetitions=5, context=8, clock=hiccup)
    assert curve.verify == pytest.approx(dict.fromkeys(VERIFY_TOKENS, 1.0))
    assert curve.draft_step == 0.0


def test_a_lookup_draft_costs_no_network_call() -> None:
    clock = Machine()
    curve = measure(timed(clock, 1.0, 0.0), PromptLookupDrafter(), repetitions=2, clock=clock)
    assert curve.draft_step == 0.0 and curve.draft_fixed == 0.0


def test_sampling_drafts_are_measured_too() -> None:
    clock = Machine()
    target, draft = timed(clock, 1.0, 0.0), timed(clock, 0.25, 0.0)
    sampling = SamplingParams(temperature=1.0)
    curve = measure(target, ModelDrafter(draft), sampling=sampling, repetitions=2, clock=clock)
    assert curve.draft_step == pytest.approx(0.25)


def test_context_is_fitted_to_the_positions() -> None:
    clock = Machine()
    assert measure(timed(clock, 1.0, 0.0, max_length=40), None, context=100, repetitions=1, clock=clock).context == 15
    with pytest.raises(InvalidValue, match="10 positions"):
        measure(timed(clock, 1.0, 0.0, max_length=10), None, clock=clock)
    with pytest.raises(InvalidValue, match="start at 1"):
        measure(timed(clock, 1.0, 0.0), None, batch=0, clock=clock)


def rounds_of(g: int, seconds: float, prefill: float = 9.0) -> RoundStats:
    rounds = RoundStats()
    for row in range(2):
        for i in range(4):
            rounds.append(row, g, g, g + 1, float(g), prefill if i == 0 else seconds)
        rounds.append(row, g // 2, 0, 1, 0.0, 77.0)  # a last round cut short by the budget is another g
    return rounds


def test_calibration_splits_what_grows_with_g_from_what_does_not() -> None:
    bare = CostCurve(batch=1, plain=1.0, draft_step=0.1, verify={1: 1.0, 9: 1.8}, draft_fixed=0.05)

    def whole(g: int) -> float:
        return bare.round_seconds(g) + 0.3 + 0.02 * g  # 0.3 a round, 0.02 a token

    curve = calibrate(bare, {0: rounds_of(0, 1.07), 1: rounds_of(1, whole(1)), 8: rounds_of(8, whole(8))})
    assert curve.plain_overhead == pytest.approx(0.07)
    assert curve.draft_step == pytest.approx(0.12)
    assert curve.overhead == pytest.approx(0.3)
    for g in (1, 5, 8):
        assert curve.round_seconds(g) == pytest.approx(whole(g))
    alone = calibrate(bare, {4: rounds_of(4, whole(4))})
    assert alone.draft_step == 0.1 and alone.overhead == pytest.approx(0.38) and alone.plain_overhead == 0.0
    assert calibrate(bare, {}) == bare
    assert calibrate(bare, {2: rounds_of(2, 0.0)}).overhead == 0.0  # never below zero
