"""EAGLE through `draftsmith fit` in its own processes: train, resume, export, decode; one-line errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from draftsmith.inference import load, registry
from draftsmith.inference.requests import TokenRequest
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.hf_model import HFModel
from draftsmith.trainers import runs
from tests.commands import run, weights
from tests.tiny import write_lm

TEXT = ("--data.corpus.sources", "[text]", "--data.corpus.val_fraction", "0.3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a target where the shipped config looks for it, and a few texts."""
    place = tmp_path_factory.mktemp("eagle")
    write_lm(place / "exports" / "target", seed=1, layers=6, max_length=64)
    (place / "text").mkdir()
    for i in range(12):
        (place / "text" / f"{i}.txt").write_text(f"def add{i}(a, b):\n    return a + b * {i}\n" * 12)
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The shipped debug config on the texts."""
    out, err = run(place, "fit", "-c", "eagle/debug", "--run", "whole", *TEXT)
    assert "val/tau_simulated" in out and "draftsmith export runs/whole OUT" in out
    assert "Traceback" not in err
    return place / "runs" / "whole"


@pytest.fixture(scope="module")
def head(place: Path, whole: Path) -> Path:
    """Its export."""
    out, _ = run(place, "export", "runs/whole", "head")
    assert "vocabulary/covered" in out and "float32: differs by" in out
    return place / "head"


@pytest.mark.slow
def test_a_run_is_exported_and_drafts_for_its_target(place: Path, whole: Path, head: Path) -> None:
    stored = weights(whole)
    assert not any(name.startswith("target") for name in stored)  # the target is no part of the checkpoint
    assert int(stored["net.t2d"].sum()) == 128 == len(stored["net.d2t"])
    target, draft = load(place / "exports" / "target"), load(head)
    assert draft.kind == "eagle" and draft.manifest is not None
    couplings = draft.manifest.couplings
    assert couplings.aux_layers is not None and couplings.aux_layers.layers == (2, 3)
    assert couplings.target is not None and couplings.trained["steps"] == 3
    assert draft.manifest.metrics["vocabulary/covered"].value > 0.99
    assert draft.manifest.metrics["val/tau"].value >= 1.0  # by which the checkpoint was chosen
    requests = [TokenRequest(target.tokenizer.encode(f"def add{i}"), 16) for i in range(3)]
    plain = registry.build("autoregressive", {"target": target}).decode(requests)
    fast = registry.build("tree", {"target": target, "draft": draft}).decode(requests)
    assert plain.output == fast.output and sum(fast.rounds.drafted) > 0
    config = json.loads((head / "config.json").read_text())
    assert config["architectures"] == ["EagleHead"] and config["eagle"]["draft_vocab_size"] == 128


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(place: Path, whole: Path) -> None:
    part = place / "runs" / "part"
    shutil.copytree(whole, part)
    newest = runs.newest_checkpoint(part)
    assert newest is not None and runs.step_of(newest) == 12
    newest.unlink()
    _, err = run(place, "fit", "-c", "eagle/debug", "--run", "part", *TEXT)
    assert "resumes step-00000006.ckpt" in err
    expected, found = weights(whole), weights(part)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_wrong_settings_end_in_one_line(place: Path) -> None:
    _, err = run(place, "fit", "-c", "eagle/debug", "--data.text.length", "63", *TEXT, code=2)
    assert "shorten data.text.length" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_warm_start_holds_the_weights_that_it_starts_from(place: Path, whole: Path, head: Path) -> None:
    module = EagleDrafter(HFModel(path=str(place / "exports" / "target")), init_from=str(head), steps=2)
    module.configure_model()
    assert module.net is not None
    stored = runs.checkpoint(whole, "best")
    expected = torch.load(stored, weights_only=True)["state_dict"]
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
