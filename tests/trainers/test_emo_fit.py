"""EMO from the command line: trained, interrupted, resumed, tested on sampled text, exported as an ordinary model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from draftsmith.inference import load
from tests.tiny_run import finish, make_place, start

pytestmark = pytest.mark.slow
EVALUATION = {"samples": 12, "prompt_length": 6, "max_new_tokens": 10, "batch": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("emo"), steps=12)
    config: dict[str, Any] = yaml.safe_load((place / "tiny.yaml").read_text())
    config["model"]["class_path"] = "draftsmith.modules.emo_lm.EMOLM"
    config["model"]["init_args"]["emo"] = {"mode": "emo_anchored", "limit": 5.0, "costs": "head"}
    config["model"]["init_args"]["optim"]["total_steps"] = 12  # a part of the run has the whole run's schedule
    config["trainer"]["callbacks"] = [
        {"class_path": "draftsmith.trainers.callbacks.text_eval.TextEval", "init_args": EVALUATION}
    ]
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    return place


def losses(place: Path, run: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "runs" / run / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_a_resumed_run_keeps_its_costs_and_equals_the_whole_one(place: Path) -> None:
    finish(start(place, "fit", "-c", "tiny.yaml", "--run", "whole"))
    finish(start(place, "fit", "-c", "tiny.yaml", "--run", "parts", "--trainer.max_steps", "5"))
    finish(start(place, "fit", "-c", "tiny.yaml", "--run", "parts"))
    whole, parts = losses(place, "whole"), losses(place, "parts")
    assert whole[11] < whole[0] and parts == pytest.approx(whole, rel=1e-6)


def test_the_run_is_tested_on_sampled_text_and_exported(place: Path) -> None:
    if not (place / "runs" / "whole").is_dir():
        finish(start(place, "fit", "-c", "tiny.yaml", "--run", "whole"))
    out, _ = finish(start(place, "test", "--run", "whole", "--ckpt_path", "last", "--json"))
    figures = json.loads(out.strip().splitlines()[-1])
    for name in ("test/loss", "test/cost", "text/model/mauve", "text/model/distinct_4", "text/human/distinct_4"):
        assert figures[name] >= 0
    finish(start(place, "export", "whole", "out", "--checkpoint", "last"))
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "lm" and manifest["couplings"]["trained"]["emo"]["mode"] == "emo_anchored"
    assert load(place / "out").part is not None
    AutoModelForCausalLM.from_pretrained(place / "out")
