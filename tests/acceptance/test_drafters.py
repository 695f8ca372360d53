"""One table of every way of drafting on one trained pair, greedy and at temperature 1, at batch 1 and 8.

The pair is the demo's (`draftsmith demo` runs first where runs/demo is not there: six minutes); an EAGLE-3 head, Medusa
heads, an n-gram table and the calibrations are made beside it (five minutes), and kept in runs/drafters.
Alone on the machine, about twenty minutes in all: `make acceptance SYSTEM=drafters`.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drafters
from tests.figures import DECODING, record

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *DECODING,
    "inference/tree*.py",
    "inference/tree_policies/*.py",
    "benchmarks/drafters.py",
    "inference/bench.py",
)
ASSISTED = ("hf_assisted", "hf_assisted_constant")
WITHIN = 0.15  # of the forecast

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.filterwarnings("ignore::draftsmith.inference.tree_calibration.EstimateWarning"),  # an uncalibrated row
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    demo = ROOT / "runs" / "demo"
    if not (demo / "report.json").is_file():
        subprocess.run([sys.executable, "-m", "draftsmith.inference.cli", "demo"], cwd=ROOT, check=True)
    return drafters.run(demo, ROOT / "runs" / "drafters", drafters.Effort(), each=put)


def rows_of(report: dict[str, Any], temperature: float, batch: int) -> dict[str, dict[str, Any]]:
    (run,) = (r for r in report["runs"] if r["temperature"] == temperature and r["batch"] == batch)
    return {row["name"]: row | {"forecast": run["forecast"].get(row["name"])} for row in run["rows"]}


def tau(row: dict[str, Any]) -> float:
    value: float = row["acceptance"]["tau"]["value"]
    return value


def off(row: dict[str, Any]) -> float:
    """How far the measured speed-up lies from the forecast one, relatively."""
    value: float = row["speedup_vs_plain"]["value"] / row["forecast"]["speedup"] - 1
    return value


def put(run: dict[str, Any]) -> None:
    """Record one temperature and batch."""
    figures: dict[str, Any] = {}
    where = f"{'greedy' if run['temperature'] == 0 else 'T = 1'}, batch {run['batch']}"
    for name, row in rows_of({"runs": [run]}, run["temperature"], run["batch"]).items():
        label = f"{where}, {row['label']}"
        if not row["offered"]:
            continue
        figures[f"{label}: tokens/s"] = {**row["tokens_per_second"], "unit": "1/s"}
        if row["peer"]:
            continue
        figures[f"{label}: tokens per target call"] = row["acceptance"]["tau"]
        if name != "plain":
            figures[f"{label}: over plain"] = row["speedup_vs_plain"]
            figures[f"{label}: measured over forecast, less 1"] = {"value": off(row), "need": f"within {WITHIN}"}
    record("drafters", figures, seeds=[0], files=FILES)


def test_every_row_is_near_its_forecast(report: dict[str, Any]) -> None:
    misses = {
        (run["temperature"], run["batch"], name): round(off(row), 2)
        for run in report["runs"]
        for name, row in rows_of(report, run["temperature"], run["batch"]).items()
        if not row["peer"] and name != "plain" and abs(off(row)) > WITHIN
    }
    assert not misses


@pytest.mark.parametrize("temperature", drafters.TEMPERATURES)
def test_the_best_of_ours(report: dict[str, Any], temperature: float) -> None:
    rows = rows_of(report, temperature, 1)
    chain, ours = rows[drafters.CHAIN], {name: row for name, row in rows.items() if not row["peer"]}
    calls = max(ours, key=lambda name: tau(ours[name]))
    fast = max(ours, key=lambda name: ours[name]["tokens_per_second"]["value"])
    peer = max(rows[name]["tokens_per_second"]["value"] for name in ASSISTED)
    more, faster = tau(ours[calls]) / tau(chain), ours[fast]["tokens_per_second"]["value"] / peer
    what = "greedy" if temperature == 0 else "T = 1"
    figures = {
        f"{what}, batch 1: most tokens per target call over the chain's ({calls})": {"value": more, "need": ">= 1.3"},
        f"{what}, batch 1: fastest over the faster assisted generation ({fast})": {"value": faster, "need": ">= 2.2"},
    }
    record("drafters", figures, seeds=[0], files=FILES)
    assert math.isfinite(more) and more >= 1.3
    assert faster >= 2.2
