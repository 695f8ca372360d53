"""The pictures show what the numbers say: bar lengths, interval ends, means that do not cross a domain switch."""

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.forecast import forecast
from draftsmith.inference.metrics import Estimate
from draftsmith.trainers import plots


def row(name: str, speed: float, *, peer: bool = False, g: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "label": f"label of {name}",
        "offered": True,
        "peer": peer,
        "tokens_per_second": {"value": speed, "low": 0.9 * speed, "high": 1.1 * speed},
        "speedup_vs_plain": {"value": speed / 100, "low": None, "high": None},
        "mean_draft_length": g,
        "acceptance": {"histogram": {"3": [4, 3, 2, 1]}} if g else None,
    }


def bench_report() -> dict[str, Any]:
    blocks = []
    for batch in (1, 8):
        rows = [row("plain", 100.0), row("speculative", 150.0, g=3.0), row("hf_generate", 70.0, peer=True)]
        missing = {"name": "hf_assisted", "label": "x", "offered": False, "peer": True, "why": "not offered at batch 8"}
        blocks.append({"batch": batch, "rows": [*rows, missing]})
    costs = CostCurve(batch=1, plain=1.0, draft_step=0.1, verify={1: 1.0, 9: 2.0})
    return {
        "target": {"path": "runs/target"},
        "draft": {"path": "runs/draft"},
        "settings": {"max_new_tokens": 64, "temperature": 0.0, "dtype": "float32", "threads": 2},
        "environment": {"machine": {"cpu": "a processor", "cores": 2}},
        "forecast": {"batches": {"1": forecast(Estimate(0.7, 0.6, 0.8), costs).to_json(), "8": None}},
        "batches": blocks,
    }


def written(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_bench_figure(tmp_path: Path) -> None:
    plots.bench_figure(bench_report(), tmp_path / "bench.png")
    assert written(tmp_path / "bench.png")


def test_bench_figure_without_a_draft(tmp_path: Path) -> None:
    report = bench_report()
    report["draft"], report["forecast"]["batches"] = None, {}
    for block in report["batches"]:
        block["rows"] = [r for r in block["rows"] if r["name"] != "speculative"]
    plots.bench_figure(report, tmp_path / "bench.png")
    assert written(tmp_path / "bench.png")


def test_bars_have_the_lengths_of_the_speeds_and_leave_out_what_was_not_offered() -> None:
    axes = Figure().subplots()
    plots.speed_at_batch(axes, bench_report()["batches"][0])
    assert [bar.get_width() for bar in axes.patches] == [100.0, 150.0, 70.0]
    assert [tick.get_text() for tick in axes.get_yticklabels()][1] == "label of speculative"
    assert list(axes.lines[1].get_xdata()) == pytest.approx([135.0, 165.0])


def test_running_mean_starts_anew_at_a_switch_and_skips_nan() -> None:
    axes = Figure().subplots()
    values = [1.0, 1.0, math.nan, 1.0, 0.0, 0.0]
    plots.acceptance_over_requests(axes, {"online": values}, ["code"] * 4 + ["prose"] * 2, window=3)
    means = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 2]
    assert means == [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0]]  # one mean over both would give 2/3, 1/3 after the switch
    assert [text.get_text() for text in axes.texts] == ["code", "prose"]


def test_histogram_shares_sum_to_one_per_series() -> None:
    axes = Figure().subplots()
    plots.accepted_lengths(axes, {"before": [6, 2, 2], "after": [1, 1, 8]})
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([0.6, 0.2, 0.2, 0.1, 0.1, 0.8])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["before (mean 0.60)", "after (mean 1.70)"]


def test_report_figure(tmp_path: Path) -> None:
    plots.report_figure(
        tmp_path / "report.png",
        title="a demo",
        series={"online": [0.4, 0.6, 0.2, 0.5], "static": [0.4, 0.4, math.nan, 0.3]},
        domains=["code", "code", "prose", "prose"],
        lengths={"before": [3, 1], "after": [1, 3]},
        bars={"plain": {"value": 10.0, "low": 9.0, "high": 11.0}, "peer": {"value": 7.0, "low": None, "high": None}},
        peers=1,
    )
    assert written(tmp_path / "report.png")
