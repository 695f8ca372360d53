"""Masked diffusion and its filter through `draftsmith` in processes of their own: train, export, trace, filter, resume.

The quick path runs in `make test`; two ranks of ZeRO-2 and exact resume are acceptance experiments.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference import load
from draftsmith.inference import manifest as manifests
from draftsmith.inference.couplings import MismatchWarning
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_masked import filter_settings
from draftsmith.inference.nets.commit_filter import CommitFilter
from draftsmith.inference.nets.masked_lm import MaskedLM
from tests.commands import run, weights

SMALL = (
    *("--trainer.max_steps", "60", "--trainer.val_check_interval", "30", "--data.segments.batch_size", "16"),
    *("--data.segments.val_samples", "16", "--model.net.num_layers", "1", "--model.net.hidden_size", "32"),
    *("--checkpoint.every_n_steps", "30", "--model.diffusion.val_draws", "2"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masked")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    """A model of the segments task, trained for a second and exported."""
    out, err = run(place, "fit", "-c", "masked_lm/segments", "--run", "base", *SMALL)
    assert "val/bound" in out and "Traceback" not in err
    out, _ = run(place, "export", "runs/base", "base")
    assert "float32: differs by" in out
    return place / "base"


@pytest.fixture(scope="module")
def traces(place: Path, base: Path) -> Path:
    _, err = run(place, "trace", "learn2pd", "base", "traces", "--segments", "40", "--batch", "16")
    assert "40 prompts" in err
    return place / "traces"


@pytest.fixture(scope="module")
def commit_filter(place: Path, base: Path, traces: Path) -> Path:
    words = ("--trainer.max_steps", "60", "--trainer.check_val_every_n_epoch", "5", "--data.traces.val_fraction", "0.3")
    out, _ = run(place, "fit", "-c", "learn2pd/debug", "--run", "filter", *words, "--data.traces.batch_size", "64")
    assert "val/threshold" in out
    run(place, "export", "runs/filter", "filter")
    return place / "filter"


@pytest.mark.slow
def test_a_model_is_exported_with_what_decoders_need(base: Path) -> None:
    manifest = manifests.read(base)
    assert manifest is not None and manifest.kind == "masked-lm" and manifest.seal is not None
    trained = manifest.couplings.trained
    assert trained["lengths_varied"] is True and trained["max_length"] == 28
    assert manifest.couplings.decode_defaults == {"block_length": 8}
    assert manifest.config["net"]["mask_id"] == 12 and manifest.config["net"]["eos_id"] == 11
    assert set(manifest.metrics) >= {"val/loss", "val/bound"}
    net = load(base).part
    assert isinstance(net, MaskedLM) and not net.training


@pytest.mark.slow
def test_traces_go_on_where_they_were_stopped(place: Path, base: Path, traces: Path) -> None:
    words = ("trace", "learn2pd", "base", "traces", "--segments", "40", "--batch", "16")
    before = sorted(traces.iterdir())
    sorted(traces.glob("*.safetensors"))[1].unlink()
    _, err = run(place, *words)
    assert "16 prompts" in err and "there before" in err
    assert sorted(traces.iterdir()) == before
    _, err = run(place, *words[:-1], "8", code=2)
    assert "has traces with batch 16, now it is 8" in err


@pytest.mark.slow
def test_a_filter_says_what_it_was_made_for(place: Path, base: Path, commit_filter: Path) -> None:
    manifest = manifests.read(commit_filter)
    assert manifest is not None and manifest.kind == "filter" and manifest.seal is not None
    settings = filter_settings(commit_filter, base)
    assert settings["rule"] == "learned_filter" and settings["block_length"] == 8
    assert 0 < settings["filter_threshold"] < 1 and settings["false_accepts"] == 0.01
    other = place / "other-base"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["norm.weight"] += 1.0
    save_file(tensors, other / "model.safetensors")
    with pytest.warns(MismatchWarning, match="was trained for base"):
        filter_settings(commit_filter, other)
    with pytest.raises(InvalidValue, match="was trained for base"):
        filter_settings(commit_filter, other, strict=True)
    with pytest.raises(InvalidValue, match="is no commit filter"):
        filter_settings(base, base)


@pytest.mark.slow
def test_the_filter_decodes(base: Path, commit_filter: Path) -> None:
    from draftsmith.data import segments

    net, judge = load(base).part, load(commit_filter).part
    assert isinstance(net, MaskedLM) and isinstance(judge, CommitFilter)
    asked = segments.requests(6)
    plain = ParallelDiffusionSettings(block_length=8, rule="low_confidence", eot="none")
    never = ParallelDiffusionSettings(block_length=8, rule="learned_filter", threshold=1.0, eot="none")
    one = ParallelDiffusionDecoder(net, plain).decode(asked)
    same = ParallelDiffusionDecoder(net, never, filter=judge).decode(asked)
    assert same.output == one.output and same.notes["passes"] == [24] * 6  # guarantee 2
    often = ParallelDiffusionSettings(block_length=8, rule="learned_filter", threshold=1e-6, eot="none")
    assert ParallelDiffusionDecoder(net, often, filter=judge).decode(asked).notes["passes"] == [3] * 6  # guarantee 4


@pytest.mark.slow
def test_decode_takes_a_filter_with_its_own_settings(place: Path, base: Path, commit_filter: Path) -> None:
    """--filter: rule, threshold and block length are the export's, unless --set says otherwise."""
    from draftsmith.data import segments

    asked = segments.requests(3)
    lines = [json.dumps({"prompt_ids": list(request.tokens[: segments.PROMPT])}) for request in asked]
    (place / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ("decode", "base", "--filter", "filter", "--prompts", "prompts.jsonl", "--max-new-tokens", "24", "--json")
    out, _ = run(place, *words, "--batch", "3")
    document = json.loads(out)
    threshold = filter_settings(commit_filter, base)["filter_threshold"]
    assert (
        document["notes"]["rule"].endswith(f"threshold={threshold:g})") and "LearnedFilter" in document["notes"]["rule"]
    )
    net, judge = load(base).part, load(commit_filter).part
    assert isinstance(net, MaskedLM) and isinstance(judge, CommitFilter)
    settings = ParallelDiffusionSettings(block_length=8, rule="learned_filter", threshold=threshold)
    want = ParallelDiffusionDecoder(net, settings, filter=judge).decode(asked)
    assert [row["output_ids"] for row in document["outputs"]] == want.output
    out, _ = run(place, *words, "--set", "threshold=1", "--set", "eot=none")
    assert [row["passes"] for row in json.loads(out)["outputs"]] == [24] * 3


@pytest.mark.slow
def test_bad_input_is_one_line(place: Path, base: Path, traces: Path) -> None:
    _, err = run(place, "fit", "-c", "learn2pd/debug", "--run", "bad2", "--model.filter.block_length", "4", code=2)
    assert "the traces have blocks of 8, the filter of 4" in err and "Traceback" not in err


@pytest.mark.acceptance
def test_a_network_of_other_ids_is_refused(place: Path) -> None:
    _, err = run(place, "fit", "-c", "masked_lm/segments", "--run", "bad", "--model.net.mask_id", "9", code=2)
    assert "model.net.mask_id is 9, but the data has 12" in err and "Traceback" not in err


@pytest.mark.acceptance
def test_exact_resume(place: Path) -> None:
    """Stopped after 30 of 60 steps and resumed: the weights of the uninterrupted run."""
    run(place, "fit", "-c", "masked_lm/segments", "--run", "whole", *SMALL)
    short = ("--trainer.max_steps", "30", "--model.optim.total_steps", "60")
    run(place, "fit", "-c", "masked_lm/segments", "--run", "part", *SMALL, *short)
    run(place, "fit", "-c", "masked_lm/segments", "--run", "part", *SMALL, "--model.optim.total_steps", "60")
    whole, part = (weights(place / "runs" / name) for name in ("whole", "part"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, part[name]), name


@pytest.mark.acceptance
def test_zero2_on_two_ranks_trains_as_one_process_does(place: Path) -> None:
    """The same global batch on two ranks under DeepSpeed: the same loss, an export with its seal."""
    pytest.importorskip("deepspeed")
    losses = {}
    for name, words in (("one", ()), ("zero", ("--trainer.strategy", "zero2", "--trainer.devices", "2"))):
        rows = "16" if name == "one" else "8"
        run(place, "fit", "-c", "masked_lm/segments", "--run", name, *SMALL, "--data.segments.batch_size", rows, *words)
        run(place, "export", f"runs/{name}", f"{name}-out")
        manifest = json.loads((place / f"{name}-out" / "manifest.json").read_text())
        losses[name] = manifest["metrics"]["val/loss"]["value"]
        assert manifest["seal"]["checks"]
    assert losses["zero"] == pytest.approx(losses["one"], rel=1e-3)
