"""EAGLE heads under ZeRO-2 on two CPU ranks: the losses of one process, and runs that are killed end as others do.

Rows are packed with documents apart, so the ranks have different numbers of trained rows; EAGLE-1 is trained with
noise. About five minutes: `make acceptance SYSTEM=eagle-zero`.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.trainers.export import rebuild
from tests import kills
from tests.acceptance.test_scale import worst
from tests.figures import record
from tests.tiny import write_lm
from tests.tiny_run import make_place, tiny
from tests.zero_runs import curve, fit, ranks_of, samples, watch, zero

pytestmark = pytest.mark.acceptance

STEPS, BATCH, KILLS = 20, 4, 6
FILES = (
    *("modules/eagle_*.py", "modules/optim.py", "modules/losses/*.py", "inference/nets/eagle_head.py"),
    *("trainers/strategies.py", "trainers/shards.py", "trainers/callbacks/checkpoint.py", "data/stateful_loader.py"),
)
HEADS: dict[str, dict[str, Any]] = {
    "EAGLE-3": {"head": {"draft_vocab_size": 128}, "steps": 3},
    "EAGLE-1 with noise": {"head": {"version": 1}, "steps": 1, "noise": 0.1},
}
EVALUATION = {
    "class_path": "draftsmith.trainers.callbacks.acceptance.AcceptanceEval",
    "init_args": {"requests": 5, "prompt_length": 8, "max_new_tokens": 12, "draft_length": 3, "temperature": 0.0},
}


def eagle(place: Path, **head: Any) -> dict[str, Any]:
    """The tiny config with an EAGLE head on the target in `place`."""
    config = tiny(place, STEPS)
    optim = {"lr": 3e-3, "weight_decay": 0.0, "schedule": "constant"}
    config["model"] = {
        "class_path": "draftsmith.modules.eagle_drafter.EagleDrafter",
        "init_args": {"teacher": {"path": str(place / "target")}, "optim": optim, **head},
    }
    config["data"]["init_args"]["text"] |= {"tokenizer": str(place / "target"), "separate_documents": True}
    config["trainer"]["gradient_clip_val"] = 0.5
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("eagle"), STEPS)
    write_lm(place / "target", seed=1, layers=6, max_length=64)
    for i in range(24):  # short documents, so that their ends fall into the rows
        (place / "text" / f"short{i}.txt").write_text(f"def f{i}(a): return a + {i}\n" * (i % 4 + 1))
    return place


@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_learn_as_one_process_does(place: Path, name: str) -> None:
    (place / "tiny.yaml").write_text(yaml.safe_dump(eagle(place, **HEADS[name])))
    words = {1: ranks_of(1, BATCH), 2: zero(place, 2, 2, BATCH)}
    runs = {ranks: f"{name.split()[0]}-{ranks}" for ranks in words}
    for ranks, run in runs.items():
        fit(place, run, *words[ranks], *watch(place, run, [EVALUATION]))
    assert samples(place, runs[1]) == samples(place, runs[2])
    difference = worst(curve(place, runs[1]), curve(place, runs[2]))
    modules = [rebuild(place / "runs" / run, "last") for run in runs.values()]
    ends = [module.state_dict() for module in modules]
    weights = max(float((ends[0][key].float() - ends[1][key].float()).abs().max()) for key in ends[0])
    taus = [module._meta["metrics"]["val/tau"] for module in modules]
    what = f"{name}, zero2, 2 ranks"
    figures = {
        f"{what}: largest relative difference of the loss over {STEPS} steps": {"value": difference, "need": "<= 1e-4"},
        f"{what}: largest difference of a weight at the end": {"value": weights, "need": "<= 1e-4"},
        f"{what}: val/tau of the last validation equals one process": taus[0] == pytest.approx(taus[1], abs=1e-6),
    }
    record("eagle", figures, seeds=[3], files=FILES)
    assert difference <= 1e-4 and weights <= 1e-4, figures
    assert taus[0] == pytest.approx(taus[1], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_as_uninterrupted_ones(tmp_path: Path, ranks: int) -> None:
    """SIGKILL, SIGTERM and SIGUSR1, half of them into a save; samples and weights to the bit."""
    place = kills.Place(tmp_path / "place", STEPS)
    write_lm(place.path / "target", seed=1, layers=6, max_length=64)
    config = eagle(place.path, steps=3, noise=0.05)
    config["checkpoint"] = {"every_n_steps": 2, "keep": 2, "monitor": None}
    (place.path / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = ranks_of(1, BATCH) if ranks == 1 else zero(place.path, 2, 2, BATCH)
    rng = random.Random(ranks)
    hits = place.survive("killed", words, kills.plan_kills(KILLS, rng), rng)
    place.uninterrupted("whole", words)
    place.check_equal("killed", "whole")
    phases = Counter(hit.phase for hit in hits)
    what = "EAGLE-3, one process" if ranks == 1 else "EAGLE-3, zero2, 2 ranks"
    figures = {
        f"{what}: kills survived, weights and sample ids equal to the bit": len(hits),
        f"{what}: of them inside a save": {"value": phases[kills.SAVE], "need": f">= {KILLS // 3}"},
    }
    record("eagle", figures, seeds=[ranks], files=FILES)
    assert phases[kills.SAVE] >= KILLS // 3, hits
