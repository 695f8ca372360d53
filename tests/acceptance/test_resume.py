"""Thirty kills from outside at random times, over one process, DDP and ZeRO-2: nothing that was learned is lost.

About ten minutes: `make acceptance SYSTEM=resume`.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests import kills
from tests.figures import record

STEPS = 60
TWO = ("--trainer.devices", "2", "--data.text.batch_size", "2")
RUNS = {
    "single": (),
    "ddp, 2 ranks": (*TWO, "--trainer.strategy", "ddp"),
    "zero2, 2 ranks": (*TWO, "--trainer.strategy", "zero2"),
}
EACH = 10

pytestmark = pytest.mark.acceptance


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_as_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    place = kills.Place(tmp_path / "place", STEPS)
    run = name.replace(", ", "-").replace(" ", "-")
    hits = place.survive(run, RUNS[name], kills.plan_kills(EACH, rng), rng)
    place.uninterrupted(f"{run}-whole", RUNS[name])
    place.check_equal(run, f"{run}-whole")
    phases = Counter(hit.phase for hit in hits)
    figures = {
        f"{name}: kills survived, weights and sample ids equal to the bit": len(hits),
        f"{name}: of them inside a save": {"value": phases[kills.SAVE], "need": f">= {EACH / 3:.2f}"},
        f"{name}: what was hit": ", ".join(f"{h.signum.name} in {h.phase} at step {h.step}" for h in hits),
    }
    record("resume", figures, seeds=[0], files=("trainers/**/*.py", "data/*.py", "modules/lm.py", "modules/optim.py"))
    assert phases[kills.SAVE] >= EACH / 3
