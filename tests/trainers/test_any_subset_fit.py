"""Any-subset models through `draftsmith fit` in its own processes: train, resume, export, fill; one-line errors."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import load, registry
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.modules.any_subset_lm import AnySubset
from draftsmith.trainers import runs
from draftsmith.trainers.export import export_module
from tests.commands import run, weights

DATA = ("--data.corpus.sources", "[text]", "--data.corpus.val_fraction", "0.3", "--data.corpus.dedup", "null")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a few texts."""
    place = tmp_path_factory.mktemp("any-subset")
    (place / "text").mkdir()
    for i in range(24):
        body = "".join(f"def add{i}{j}(a, b):\n    return a + b * {j}\n" for j in range(70))
        (place / "text" / f"{i}.txt").write_text(body)
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The shipped debug config on the texts."""
    out, err = run(place, "fit", "-c", "any_subset/debug", "--run", "whole", *DATA)
    assert "val/loss" in out and "draftsmith export runs/whole OUT" in out and "Traceback" not in err
    return place / "runs" / "whole"


@pytest.fixture(scope="module")
def exported(place: Path, whole: Path) -> Path:
    """Its export."""
    out, _ = run(place, "export", "runs/whole", "filler")
    assert "any-subset-lm" in out and "float32: differs by" in out
    return place / "filler"


def test_an_export_fills_holes_and_says_what_it_was_trained_on(exported: Path) -> None:
    part = load(exported)
    assert part.kind == "any-subset-lm" and part.manifest is not None and part.manifest.seal is not None
    couplings = part.manifest.couplings
    assert couplings.trained["order"] == "lattice" and couplings.trained["mask_rate"] == [0.05, 0.95]
    assert couplings.trained["max_length"] == 64 and couplings.tokenizer_hash is not None
    assert part.manifest.provenance.steps in (20, 40) and "val/loss" in part.manifest.metrics
    mask = couplings.trained["mask_id"]
    tokens = part.tokenizer.encode("def add(a, b):\n    return a")  # type: ignore[union-attr]  # it has one
    request = CanvasRequest.from_mask([*tokens[:6], mask, mask, mask, *tokens[6:]], mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the rate lies inside the trained range
        decoder = registry.build_canvas("any_subset", {"target": part}, sampling=SamplingParams(temperature=1.0))
        result = decoder.decode([request])
    assert len(result.output[0]) == 3 and mask not in result.output[0]
    assert sum(result.nfe.values()) <= 3
    almost = CanvasRequest([tokens[0], *[mask] * 19], range(1, 20), row_id=1)  # all but one
    with pytest.warns(UserWarning, match=r"0\.05 to 0\.50"):
        part.part.trained["mask_rate"] = [0.05, 0.5]  # type: ignore[attr-defined]  # an AnySubsetLM
        decoder.decode([almost])


def test_a_resumed_run_ends_with_the_same_weights(place: Path, whole: Path) -> None:
    part = place / "runs" / "part"
    shutil.copytree(whole, part)
    newest = runs.newest_checkpoint(part)
    assert newest is not None and runs.step_of(newest) == 40
    newest.unlink()
    _, err = run(place, "fit", "-c", "any_subset/debug", "--run", "part", *DATA)
    assert "resumes step-00000020.ckpt" in err
    expected, found = weights(whole), weights(part)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_warm_start_holds_the_weights_that_it_starts_from(exported: Path) -> None:
    module = AnySubset(init_from=str(exported))
    module.configure_model()
    assert module.net is not None and all(p.requires_grad for p in module.net.parameters())
    expected: Any = load(exported).part
    stored = expected.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.net.state_dict().items())


def test_xlnet_weights_are_a_start(tmp_path: Path) -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    XLNetLMHeadModel(XLNetConfig(**sizes)).save_pretrained(tmp_path / "xlnet")
    module = AnySubset(init_from=str(tmp_path / "xlnet"))
    module.configure_model()
    assert module.net is not None and module.net.config.scheme == "xlnet" and module.net.training
    manifest = export_module(module, tmp_path / "export")
    assert manifest.kind == "any-subset-lm" and manifest.seal is not None
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["net"]["scheme"] == "xlnet" and config["net"]["mask_id"] == 6


def test_wrong_settings_end_in_one_line(place: Path, whole: Path) -> None:
    _, err = run(place, "fit", "-c", "any_subset/debug", "--data.text.length", "65", *DATA, code=2)
    assert "shorten data.text.length" in err and "Traceback" not in err
