"""Thirty kills from outside at random times, over one process, DDP and ZeRO-2: nothing that was learned is lost.

Twelve more hit loaders with worker processes: a stream that is packed on the fly, and documents kept apart in a row.
About ten minutes: `make acceptance SYSTEM=resume`.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests import kills
from tests.figures import record
from tests.tiny import write_tokenizer

STEPS = 60
TWO = ("--trainer.devices", "2", "--data.text.batch_size", "2")
RUNS = {
    "single": (),
    "ddp, 2 ranks": (*TWO, "--trainer.strategy", "ddp"),
    "zero2, 2 ranks": (*TWO, "--trainer.strategy", "zero2"),
}
WORKERS = ("--data.text.num_workers", "2")
LOADERS = {
    "a stream, 2 workers": (*WORKERS, "--data.text.streaming", "true", "--data.text.tokenizer", "tokenizer"),
    "documents apart, 2 workers": (*WORKERS, "--data.text.separate_documents", "true"),
}
EACH, EACH_LOADER = 10, 6
FILES = (
    *(f"trainers/{name}.py" for name in ("training", "strategies", "shards", "runs", "callbacks/checkpoint")),
    *("trainers/callbacks/stop_signals.py", "data/stateful_loader.py", "data/text.py", "data/token_stream.py"),
    *("data/token_store.py", "modules/lm.py", "modules/optim.py", "tests/kills.py"),
)

pytestmark = pytest.mark.acceptance


@pytest.mark.parametrize("name", [*RUNS, *LOADERS])
def test_killed_runs_end_as_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    place = kills.Place(tmp_path / "place", STEPS)
    write_tokenizer(tmp_path / "place" / "tokenizer")
    run = name.replace(", ", "-").replace(" ", "-")
    words, count = (RUNS | LOADERS)[name], EACH if name in RUNS else EACH_LOADER
    hits = place.survive(run, words, kills.plan_kills(count, rng), rng)
    place.uninterrupted(f"{run}-whole", words)
    place.check_equal(run, f"{run}-whole")
    phases = Counter(hit.phase for hit in hits)
    figures = {
        f"{name}: kills survived, weights and sample ids equal to the bit": len(hits),
        f"{name}: of them inside a save": {"value": phases[kills.SAVE], "need": f">= {count / 3:.2f}"},
        f"{name}: what was hit": ", ".join(f"{h.signum.name} in {h.phase} at step {h.step}" for h in hits),
    }
    record("resume", figures, seeds=[0], files=FILES)
    assert phases[kills.SAVE] >= count / 3
