"""One table of every way of drafting on one trained pair, greedy and at temperature 1, at batch 1 and 8.

The pair is the demo's (`draftsmith demo` runs first where runs/demo is not there: six minutes); an EAGLE-3 head, Medusa
heads, an n-gram table and the calibrations are made beside it (five minutes), and kept in runs/drafters.
Alone on the machine, about twenty minutes in all: `make acceptance SYSTEM=drafters`. Each part of the table is a test
of its own that keeps what it measured (runs/drafters/parts, for this state of the code), so a run that was interrupted
goes on, and `-k "part and greedy-8"` makes one part alone; the tests behind them read all parts.
"""

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import drafters, vllm_rows
from draftsmith.inference import bench_report
from draftsmith.inference.formats import convert
from draftsmith.inference.metrics import ratio_estimate
from tests.figures import DECODING, record
from tests.vllm_server import PYTHON

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *DECODING,
    "inference/tree*.py",
    "inference/block_verification.py",
    "inference/suffix*.py",
    "inference/tree_policies/*.py",
    "benchmarks/drafters.py",
    "inference/bench.py",
)
VLLM_FILES = ("inference/formats/*.py", "benchmarks/vllm_rows.py")
ASSISTED = ("hf_assisted", "hf_assisted_constant")
WITHIN = 0.15  # of the forecast

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.filterwarnings("ignore::draftsmith.inference.tree_calibration.EstimateWarning"),  # an uncalibrated row
]


def name_of(part: drafters.Part) -> str:
    text = "" if part.text == "stdlib" else f"{part.text}-"
    return f"{text}{'greedy' if part.temperature == 0 else 'T1'}-{part.batch}"


@pytest.fixture(scope="module")
def table() -> drafters.Table:
    demo = ROOT / "runs" / "demo"
    if not (demo / "report.json").is_file():
        subprocess.run([sys.executable, "-m", "draftsmith.inference.cli", "demo"], cwd=ROOT, check=True)
    files = sorted(path for pattern in FILES for path in ROOT.glob(pattern))
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return drafters.Table(demo, ROOT / "runs" / "drafters", drafters.Effort(), stamp)


def rows_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row | {"forecast": run["forecast"].get(row["name"])} for row in run["rows"]}


def tau(row: dict[str, Any]) -> float:
    value: float = row["acceptance"]["tau"]["value"]
    return value


def off(row: dict[str, Any]) -> float:
    """How far the measured speed-up lies from the forecast one, relatively."""
    value: float = row["speedup_vs_plain"]["value"] / row["forecast"]["speedup"] - 1
    return value


@pytest.mark.parametrize("part", drafters.PARTS, ids=name_of)
def test_part(table: drafters.Table, part: drafters.Part) -> None:
    """Measure one temperature and batch, and record it; every row is near its forecast."""
    if part not in table.parts:
        pytest.skip(f"no {drafters.GSM8K}: the rows on GSM8K's questions are left out")
    rows = rows_of(table.run(part))
    figures: dict[str, Any] = {}
    for name, row in rows.items():
        label = f"{part.label}, {row['label']}"
        figures[f"{label}: tokens/s"] = {**row["tokens_per_second"], "unit": "1/s"}
        if row["peer"]:
            continue
        figures[f"{label}: tokens per target call"] = row["acceptance"]["tau"]
        if name != "plain":
            figures[f"{label}: over plain"] = row["speedup_vs_plain"]
            figures[f"{label}: measured over forecast, less 1"] = {"value": off(row), "need": f"within {WITHIN}"}
    record("drafters", figures, seeds=[0], files=FILES)
    misses = {n: round(off(r), 2) for n, r in rows.items() if not r["peer"] and n != "plain" and abs(off(r)) > WITHIN}
    assert not misses


@pytest.mark.parametrize("temperature", drafters.TEMPERATURES)
def test_the_best_of_ours(table: drafters.Table, temperature: float) -> None:
    part = drafters.Part(temperature, 1)
    rows = rows_of(table.run(part))
    chain, ours = rows[drafters.CHAIN], {name: row for name, row in rows.items() if not row["peer"]}
    calls = max(ours, key=lambda name: tau(ours[name]))
    fast = max(ours, key=lambda name: ours[name]["tokens_per_second"]["value"])
    peer = max((rows[name] for name in ASSISTED), key=lambda row: row["tokens_per_second"]["value"])
    more, faster = tau(ours[calls]) / tau(chain), bench_report.ratio(ours[fast], peer)
    assert faster is not None and faster["value"] is not None
    what = part.label
    figures = {
        f"{what}: most tokens per target call over the chain's": {"value": more, "need": ">= 1.3"},
        f"{what}: most tokens per target call, by": ours[calls]["label"],
        f"{what}: fastest over the faster assisted generation": {**faster, "need": ">= 2.2"},
        f"{what}: fastest of ours": ours[fast]["label"],
    }
    record("drafters", figures, seeds=[0], files=FILES)
    assert math.isfinite(more) and more >= 1.3
    if temperature > 0 and faster["value"] < 2.2:  # 3.4 tokens a round, which takes two plain ones
        pytest.xfail(
            f"at temperature 1 the fastest of ours is {faster['value']:.2f} times assisted generation, not 2.2"
        )
    assert faster["value"] >= 2.2


@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed: make vllm-test puts it into .venv-vllm")
@pytest.mark.parametrize("way", ["plain", "EAGLE-3 export, g = 5", "LM draft, g = 5", "n-gram lookup"])
def test_vllm_rows(table: drafters.Table, way: str) -> None:
    """Rows of vLLM on this machine, in its own process; what it cannot serve is recorded with its reason."""
    export = table.place / "eagle-vllm"
    if not export.is_dir():
        convert(table.place / "eagle", export, "speculators", target=table.target)
    speculative = {
        "plain": None,
        "EAGLE-3 export, g = 5": {"method": "eagle3", "model": str(export), "num_speculative_tokens": 5},
        "LM draft, g = 5": {"method": "draft_model", "model": str(table.draft), "num_speculative_tokens": 5},
        "n-gram lookup": {"method": "ngram", "num_speculative_tokens": 10, "prompt_lookup_max": 3},
    }[way]
    measured = [prompt.ids for prompt in table.prompts(drafters.Part(0.0, 1))[1]]
    prompts = [measured[r :: table.effort.repetitions] for r in range(table.effort.repetitions)]
    runs = [(temperature, batch) for temperature in drafters.TEMPERATURES for batch in drafters.BATCHES]
    found = vllm_rows.time_rows(PYTHON, table.target, speculative, prompts, table.effort.tokens, runs)
    figures: dict[str, Any] = {}
    if "why" in found:
        record("drafters", {f"vLLM {way}: not served": found["why"]}, seeds=[0], files=VLLM_FILES)
        pytest.skip(f"vLLM does not serve this pair so: {found['why']}")
    for temperature, batch in runs:
        row = found[f"{temperature:g}-{batch}"]
        rate = ratio_estimate(torch.tensor(row["tokens"]), torch.tensor(row["seconds"]))
        assert rate is not None
        assert min(row["tokens"]) == max(vllm_rows.FEW, batch) * table.effort.tokens
        label = drafters.Part(temperature, batch).label
        figures[f"{label}, vLLM {way}: tokens/s"] = {**vars(rate), "unit": "1/s"}
    record("drafters", figures, seeds=[0], files=VLLM_FILES)
