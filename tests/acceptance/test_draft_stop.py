"""Acceptance of issue 7: a filter as the stop rule of a draft, beside fixed lengths, confidence and cost.

On the demo's pair (runs/demo, made by `draftsmith demo`), greedy, one request at a time, rules tuned on other prompts
than those that are measured (benchmarks/draft_stop.py). Alone on the machine: `make acceptance SYSTEM=draft_stop`.
"""

from typing import Any

import pytest

from benchmarks import draft_stop
from tests.figures import ROOT, record

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

FILES = (
    *("benchmarks/draft_stop.py", "inference/drafters/filtered.py", "inference/drafters/model.py"),
    *("inference/nets/commit_filter.py", "inference/decoders/speculative.py", "inference/draft_length.py"),
)


def test_a_learned_stop_rule_beside_the_others() -> None:
    demo = ROOT / "runs" / "demo"
    if not (demo / "exports" / "target").is_dir():
        pytest.skip("runs/demo is not there: run draftsmith demo first")
    report = draft_stop.run(demo)
    figures: dict[str, Any] = {
        "chains that the filter learned from": report["chains"],
        "collecting and learning": {"value": round(report["learning seconds"], 1), "unit": "s"},
    }
    for name, row in report["rows"].items():
        figures[f"{name}: tokens/s"] = round(row["tokens/s"], 1)
        figures[f"{name}: tokens per target call"] = round(row["tau"], 3)
        figures[f"{name}: drafted tokens offered a round"] = round(row["drafted"], 3)
    record("draft-stop", figures, seeds=[0], files=FILES)
    assert report["chains"] >= 200
    learned = next(row for name, row in report["rows"].items() if name.startswith("learned"))
    others = {name: row["tokens/s"] for name, row in report["rows"].items() if not name.startswith("learned")}
    best = max(others, key=lambda name: others[name])
    if learned["tokens/s"] <= others[best]:
        pytest.xfail(
            f"the filter makes {learned['tokens/s']:.0f} tokens/s, {best!r} {others[best]:.0f}: on a pair whose target "
            "call takes milliseconds, asking a filter costs more than it spares"
        )
