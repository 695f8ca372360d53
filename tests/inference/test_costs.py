"""The cost curve: interpolation, round trip, measuring on engines whose costs are known."""

import json
from pathlib import Path

import pytest

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue

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
