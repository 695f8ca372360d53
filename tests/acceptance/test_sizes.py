"""The speed table over sizes and batches with a draft of set acceptance, and peak memory, against what issue 2 asks.

Alone on the machine, about half an hour: `make acceptance SYSTEM=sizes` (ARGS="-k 11M" for one size).
"""

from pathlib import Path

import pytest

from benchmarks import memory, sizes
from draftsmith.inference.bench import BenchSettings
from tests.figures import DECODING, record

FILES = (*DECODING, "inference/bench.py", "inference/peers.py", "benchmarks/sizes.py")
SETTINGS = BenchSettings(max_new_tokens=64, batches=(1, 8, 16), g=5)

pytestmark = pytest.mark.acceptance


@pytest.mark.parametrize("size", ["11M", "50M", "150M"])
def test_speed(size: str, tmp_path: Path) -> None:
    made = sizes.run_size(size, tmp_path, [0.8, 0.0], SETTINGS, prompts=4, tell=print)
    figures, automatic = {}, []
    for table in made["tables"]:
        for block in table["batches"]:
            rows = {row["name"]: row for row in block["rows"] if row["offered"]}
            where = f"{size}, alpha {table['alpha']}, batch {block['batch']}"
            for name, row in rows.items():
                if name != "plain":
                    need = {"need": ">= 0.97"} if name == "speculative_auto" else {}
                    figures[f"{where}: {row['label']} / plain"] = {**row["speedup_vs_plain"], **need}
            automatic.append(rows["speculative_auto"]["speedup_vs_plain"]["value"])
        for name, parts in table["milliseconds_per_round"].items():
            for part, value in parts.items():
                figures[f"{size}, alpha {table['alpha']}: {name}, {part}"] = {"value": value, "unit": "ms per round"}
        crossing = table["summary"]["break_even_batch"]
        if crossing is not None:
            figures[f"{size}, alpha {table['alpha']}: break-even batch"] = crossing["text"]
    record("sizes", figures, seeds=[SETTINGS.seed], files=FILES)
    assert min(automatic) >= 0.97


def test_memory(tmp_path: Path) -> None:
    """Peak of speculative over plain decoding, beyond what the draft owns, as a share of it."""
    target, draft = sizes.write_models(tmp_path, "50M")
    figures = {}
    for batch in (1, 8):
        found = memory.compare(target, draft, batch=batch, prompt=64, new=64, g=5)
        figures[f"50M, batch {batch}: extra peak / the draft's weights and caches"] = {
            "value": found["extra_over_owned"],
            "need": "<= 1.05",
        }
    record("memory", figures, seeds=[0], files=(*DECODING, "benchmarks/memory.py"))
    assert max(figure["value"] for figure in figures.values()) <= 1.05
