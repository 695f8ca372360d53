"""Acceptance of the roofline forecast: public GPU rows, each target forecast by a fit on the others; seconds.

The rows lie beside the repository, not in it; without them there is nothing to check.
"""

from pathlib import Path

import pytest

from benchmarks import roofline
from tests.figures import FIGURES, record

ROWS = Path("../shared/data/specforge_rows.csv")
FILES = ("inference/roofline.py", "inference/roofline_fit.py", "benchmarks/roofline.py")
MOST = 0.2  # median error

pytestmark = pytest.mark.acceptance


@pytest.mark.skipif(not ROWS.is_file(), reason=f"needs SpecForge's rows at {ROWS}")
def test_speedups_of_targets_that_were_left_out() -> None:
    rows = roofline.read_rows(ROWS)
    scores = roofline.check(rows)
    found = roofline.figures(rows, scores)
    found["roofline"]["median_error"]["need"] = f"<= {MOST}"
    record("roofline", found, seeds=[0], files=FILES)
    roofline.picture(rows, scores, FIGURES / "roofline.png")
    assert scores["roofline"].median <= MOST
