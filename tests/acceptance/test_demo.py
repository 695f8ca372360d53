"""The demo as a newcomer runs it: its figures against what issue 2 asks of it, and the README's picture.

Alone on the machine, about eight minutes: `make acceptance SYSTEM=demo`.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.figures import record

ROOT = Path(__file__).parents[2]
FILES = ["trainers/demo.py", "trainers/demo_report.py", "configs/demo/target.yaml", "configs/demo/draft.yaml"]
FILES += ["configs/demo/online.yaml", "configs/demo/offline.yaml", "inference/native.py", "inference/bench.py"]
FILES += ["inference/decoders/speculative.py", "data/online_stream.py", "modules/osd_drafter.py"]


@pytest.mark.acceptance
def test_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "draftsmith.inference.cli", "demo", "--run", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    shutil.copyfile(folder / "report.png", ROOT / "docs" / "figures" / "demo.png")
    intervals, need = (
        report["intervals"],
        {
            "plain_vs_transformers_generate": ">= 1.3",
            "speedup_vs_plain": ">= 1.5",
            "speedup_vs_transformers_assisted": ">= 1.8",
        },
    )
    figures = {
        name: {**estimate, **({"need": need[name]} if name in need else {})}
        for name, estimate in intervals.items()
        if estimate is not None
    }
    gain = report["alpha_online"] - report["alpha_static"]
    prose = {name: report["by_domain"][name]["prose"]["alpha"]["value"] for name in ("online", "offline")}
    figures |= {
        "alpha_online_minus_static": {"value": gain, "need": ">= 0.2"},
        "alpha_second_domain_online_minus_offline": {"value": prose["online"] - prose["offline"], "need": ">= 0"},
        "tau_online": {"value": report["tau"]},
        "tau_static": {"value": report["tau_static"]},
        "seconds": {"value": seconds, "unit": "s", "need": "<= 480"},
    }
    record("demo", figures, seeds=[report["settings"]["seed"]], files=FILES)
    assert gain >= 0.2
    assert prose["online"] >= prose["offline"]
    assert report["plain_vs_transformers_generate"] >= 1.3
    assert report["speedup_vs_plain"] >= 1.5
    assert report["speedup_vs_transformers_assisted"] >= 1.8
    assert seconds <= 480
