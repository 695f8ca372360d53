"""`draftsmith export RUN OUT`: from a real run's own config and checkpoint to a directory that decodes."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from draftsmith.inference import load
from draftsmith.inference import manifest as manifests
from draftsmith.inference.cli import main
from draftsmith.inference.couplings import target_fingerprint, tokenizer_identity
from draftsmith.trainers import runs
from draftsmith.trainers.export import rebuild

pytestmark = pytest.mark.slow  # one real run of draftsmith fit, and four exports with their fresh processes

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240


def config(place: Path, width: int = 16) -> dict[str, Any]:
    arch = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    corpus = {"sources": [str(place / "text")], "dedup": None, "val_fraction": 0.2}
    text = {"tokenizer": "bpe:300", "length": 32, "batch_size": 4, "cache_dir": str(place / "cache")}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1}
    return {
        "seed_everything": 3,
        "trainer": trainer,
        "model": {
            "class_path": "draftsmith.modules.lm.LM",
            "init_args": {"model": {"arch": arch}, "optim": {"lr": 0.03, "warmup_steps": 1}},
        },
        "data": {
            "class_path": "draftsmith.data.text.TextDataModule",
            "init_args": {"corpus": corpus, "text": text},
        },
        "checkpoint": {"every_n_steps": 3},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps that validated twice."""
    place = tmp_path_factory.mktemp("export_run")
    (place / "text").mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(120)]
    for i in range(24):
        (place / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=300)))
    (place / "tiny.yaml").write_text(yaml.safe_dump(config(place)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "draftsmith.inference.cli", "fit", "-c", "tiny.yaml", "--run", "tiny"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "lm"
    assert main(["export", str(run), str(out), "--checkpoint", "last"]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a call that must end with exit code 2 and print nothing else."""
    assert main(["export", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_weights_manifest_and_provenance_are_the_runs(run: Path, exported: Path) -> None:
    last = runs.newest_checkpoint(run)
    assert last is not None
    trained = torch.load(last, weights_only=True)["state_dict"]
    stored = load_file(exported / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, trained[f"net.{name}"]), name
    manifest = manifests.read(exported)
    known = json.loads((run / "provenance.json").read_text())
    assert manifest is not None
    assert manifest.provenance.command == known["command"] and "fit -c tiny.yaml" in known["command"]
    assert (manifest.provenance.steps, manifest.provenance.seed) == (6, 3)
    assert manifest.provenance.data_fingerprint and manifest.provenance.wall_seconds == known["wall_seconds"]
    assert manifest.couplings.vocab_size == 300 and manifest.couplings.trained["max_length"] == 64
    own, kept = tokenizer_identity(exported), tokenizer_identity(run / "tokenizer")
    assert own is not None and kept is not None and own.hash == kept.hash == manifest.couplings.tokenizer_hash
    assert "val/loss" in manifest.metrics and "nats" in manifest.metrics["val/loss"].definition


def test_it_decodes_and_stops_at_the_tokenizers_own_end(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = load(exported)
    assert part.tokenizer is not None and part.stop_ids == (part.tokenizer.eos_token_id,)
    assert main(["decode", str(exported), "--prompt", "abc", "--max-new-tokens", "8"]) == 0
    assert "8 tokens in" in capsys.readouterr().err


def test_prints_the_summary_and_the_seal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the best checkpoint; as a drafter for a target, in another dtype."""
    target = tmp_path / "target"
    assert main(["export", str(run), str(target)]) == 0
    out = capsys.readouterr().out
    assert "lm: a causal language model" in out and "seal" in out and "tolerance" in out
    argv = ["export", str(run), str(tmp_path / "draft"), "--kind", "drafter", "--target", str(target)]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert "drafter: a draft trained for one target" in capsys.readouterr().out
    manifest = manifests.read(tmp_path / "draft")
    assert manifest is not None and manifest.couplings.target is not None and manifest.dtype == "bfloat16"
    assert manifest.couplings.target.fingerprint == target_fingerprint(target)
    best = runs.checkpoint(run, "best")
    assert manifest.provenance.steps == torch.load(best, weights_only=True)["global_step"]


def test_rebuild_takes_the_best_or_else_the_last(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for path in (copy / "checkpoints").glob("best-*"):
        path.unlink()
    assert rebuild(copy).export_spec().steps == 6
    assert rebuild(run, "last").export_spec().steps == 6


class TestRefused:
    def test_a_folder_that_is_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no run in" in fails(capsys, tmp_path / "nowhere", tmp_path / "out")
        assert "no run in" in fails(capsys, "nowhere", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_output_directory_that_is_not_empty(
        self, run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "is not empty" in fails(capsys, run, exported)
        assert load(exported).kind == "lm"

    def test_a_full_disk(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfile", full)
        assert "the disk is full" in fails(capsys, run, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_checkpoints(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert "no such checkpoint" in fails(capsys, run, out, "--checkpoint", tmp_path / "no.ckpt")
        assert "no such checkpoint" in fails(capsys, run, out, "--checkpoint", "bset")
        whole = runs.checkpoint(run, "last").read_bytes()
        (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
        said = fails(capsys, run, out, "--checkpoint", tmp_path / "half.ckpt")
        assert "half.ckpt cannot be exported: its end is missing" in said
        (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
        assert "evil.ckpt cannot be exported" in fails(capsys, run, out, "--checkpoint", tmp_path / "evil.ckpt")
        torch.save({"weights": 1}, tmp_path / "other.ckpt")
        assert "it has no state_dict" in fails(capsys, run, out, "--checkpoint", tmp_path / "other.ckpt")
        assert not out.exists()

    def test_a_checkpoint_of_another_network(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = Path(shutil.copytree(run, tmp_path / "copy"))
        (copy / "config.yaml").write_text(yaml.safe_dump(config(tmp_path, width=32)))
        assert "does not fit the network of" in fails(capsys, copy, tmp_path / "out")

    def test_a_module_that_cannot_be_exported(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = Path(shutil.copytree(run, tmp_path / "copy"))
        model = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
        (copy / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        assert "BoringModel" in fails(capsys, copy, tmp_path / "out") and not (tmp_path / "out").exists()

    def test_a_draft_key_where_there_is_one_part(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "leave --draft out" in fails(capsys, run, tmp_path / "out", "--draft", "code")

    def test_kind_and_target(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert "name its directory with --target DIR" in fails(capsys, run, out, "--kind", "drafter")
        said = fails(capsys, run, out, "--kind", "drafter", "--target", tmp_path / "nowhere")
        assert "no such target directory" in said
        assert "invalid choice: 'filler'" in fails(capsys, run, out, "--kind", "filler")
