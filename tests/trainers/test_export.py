"""Export: HF-loadable directories with a manifest and a measured seal, or nothing at all."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.inference import checkpoint, load
from draftsmith.inference import manifest as manifests
from draftsmith.inference.couplings import target_fingerprint, tokenizer_identity
from draftsmith.inference.errors import InvalidState, InvalidValue, UserError
from draftsmith.inference.loader import check_pair
from draftsmith.inference.manifest import Manifest, Metric, Seal, SealCheck
from draftsmith.inference.seal import measure, replay
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.trainers import export
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny.lm().train()
    model.config.use_cache = False  # as training leaves it
    return model


@pytest.fixture(scope="module")
def spec(model: Any, tokenizer_dir: Path) -> ExportSpec:
    return ExportSpec(
        "lm",
        model,
        str(tokenizer_dir),
        trained={"max_length": 256},
        metrics={"val/loss": Metric(2.5, "mean cross-entropy per token, in nats")},
        seed=7,
        steps=100,
    )


class Module:
    """What `export_module` needs of a LightningModule."""

    def __init__(self, spec: ExportSpec) -> None:
        self.spec = spec

    def export_spec(self) -> ExportSpec:
        return self.spec


@pytest.fixture(scope="module")
def exported(spec: ExportSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("exports") / "lm"
    return out, export.export_module(Module(spec), out)


@pytest.fixture
def instant_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about the seal: a fresh process takes seconds."""

    def passes(directory: Path, inputs: Path) -> Seal:
        return Seal("0" * 64, 2, 48, 1.0, (SealCheck("float32", "nobody", 0.0, 1e-4),))

    monkeypatch.setattr(export, "run_seal", passes)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def refused(call: Callable[[], object], *said: str, kind: type[Exception] = InvalidValue) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, UserError) and len(str(caught.value).splitlines()) == 1
    for part in said:
        assert part in str(caught.value)


class TestWhatIsWritten:
    def test_files_and_manifest(self, exported: tuple[Path, Manifest], spec: ExportSpec, tokenizer_dir: Path) -> None:
        out, manifest = exported
        assert names(out.parent) == ["lm"]
        assert manifests.read(out) == manifest
        assert set(manifest.files) == set(names(out)) - {"manifest.json"} >= {"model.safetensors", "tokenizer.json"}
        for name, entry in manifest.files.items():
            assert entry.sha256 == checkpoint.sha256(out / name) and entry.bytes == (out / name).stat().st_size
        identity = tokenizer_identity(tokenizer_dir)
        assert identity is not None
        assert manifest.couplings.tokenizer_hash == identity.hash and manifest.couplings.vocab_size == 300
        assert manifest.couplings.trained == {"max_length": 256} and manifest.metrics == spec.metrics
        assert (manifest.kind, manifest.net, manifest.dtype) == ("lm", "LlamaForCausalLM", "float32")
        assert manifest.config["hidden_size"] == 32
        assert manifest.provenance.steps == 100 and manifest.provenance.seed == 7
        assert "torch" in manifest.provenance.versions and manifest.provenance.git_commit

    def test_seal(self, exported: tuple[Path, Manifest]) -> None:
        seal = exported[1].seal
        assert seal is not None and (seal.rows, seal.tokens) == (2, 48)
        (check,) = seal.checks
        assert check.compute_dtype == "float32" and check.reference == "LlamaForCausalLM as trained"
        # not the very same operations (a cache, other chunks), so a difference is measured, and it is small
        assert 0 < check.max_abs_difference < 1e-4 <= check.tolerance < 1e-2

    def test_weights_are_the_training_modules_and_the_module_is_left_as_it_was(
        self, exported: tuple[Path, Manifest], model: Any
    ) -> None:
        stored = load_file(exported[0] / "model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(stored[name], parameter)
        assert model.training and not model.config.use_cache

    def test_loads_in_transformers(self, exported: tuple[Path, Manifest], model: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(str(exported[0]))
        assert type(loaded) is type(model) and loaded.config.use_cache and loaded.generation_config.eos_token_id == 1
        tokenizer = AutoTokenizer.from_pretrained(str(exported[0]))
        ids = tokenizer("def add", return_tensors="pt")
        out = loaded.generate(**ids, max_new_tokens=5, do_sample=False)
        assert out.shape[1] <= ids["input_ids"].shape[1] + 5

    def test_two_exports_of_the_same_weights_are_the_same_target(
        self, exported: tuple[Path, Manifest], spec: ExportSpec, tmp_path: Path, instant_seal: None
    ) -> None:
        export.write(spec, tmp_path / "again")
        assert target_fingerprint(tmp_path / "again") == target_fingerprint(exported[0])

    def test_tied_embeddings(self, tmp_path: Path) -> None:
        tied = tiny.lm(tie=True)
        export.write(ExportSpec("lm", tied, None), tmp_path / "tied")
        assert load(tmp_path / "tied").tokenizer is None

    def test_low_precision_is_held_twice(self, spec: ExportSpec, model: Any, tmp_path: Path) -> None:
        manifest = export.write(spec, tmp_path / "half", dtype="bfloat16")
        stored = load_file(tmp_path / "half" / "model.safetensors")
        assert all(torch.equal(stored[n], p.to(torch.bfloat16)) for n, p in model.named_parameters())
        assert model.dtype == torch.float32 and manifest.dtype == "bfloat16"
        assert manifest.seal is not None
        low, exact = manifest.seal.checks
        assert (low.compute_dtype, exact.compute_dtype) == ("bfloat16", "float32")
        assert exact.reference.endswith("with the stored weights") and low.reference.endswith("as trained")
        assert exact.max_abs_difference < 1e-4 < low.max_abs_difference < low.tolerance
        part = load(tmp_path / "half")
        assert part.part.dtype == torch.bfloat16


class TestDrafter:
    def test_manifest_states_its_target_and_transformers_can_assist_with_it(
        self, exported: tuple[Path, Manifest], tokenizer_dir: Path, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        target = exported[0]
        net = tiny.lm(seed=5, layers=1, vocab_size=300)
        spec = ExportSpec("drafter", net, str(tokenizer_dir), str(target), decode_defaults={"draft_length": 4})
        manifest = export.write(spec, tmp_path / "draft")
        stated = manifest.couplings.target
        assert stated is not None and stated.fingerprint == target_fingerprint(target) and stated.name == "lm"
        assert check_pair(load(target), load(tmp_path / "draft")) == 300

        big, small = (AutoModelForCausalLM.from_pretrained(str(p)) for p in (target, tmp_path / "draft"))
        tokenizer = AutoTokenizer.from_pretrained(str(target))
        ids = tokenizer("def add(a", return_tensors="pt")
        both = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}  # the heads differ in size (320, 300)
        alone = big.generate(**ids, max_new_tokens=12, do_sample=False)
        assisted = big.generate(**ids, max_new_tokens=12, do_sample=False, assistant_model=small, **both)
        assert torch.equal(alone, assisted)

    def test_without_a_target(self, spec: ExportSpec, tmp_path: Path) -> None:
        drafter = dataclasses.replace(spec, kind="drafter")
        refused(lambda: export.write(drafter, tmp_path / "x"), "name its directory with --target DIR")
        drafter = dataclasses.replace(drafter, target_dir=str(tmp_path / "nowhere"))
        refused(lambda: export.write(drafter, tmp_path / "x"), "no such target directory")

    def test_a_draft_that_its_own_target_would_refuse(self, exported: tuple[Path, Manifest], tmp_path: Path) -> None:
        tiny.write_tokenizer(tmp_path / "other", "zzz yyy zzz yyy " * 9)
        spec = ExportSpec("drafter", tiny.lm(), str(tmp_path / "other"), str(exported[0]))
        refused(lambda: export.write(spec, tmp_path / "x"), "first differing id is 258")
        assert names(tmp_path) == ["other"]


class TestSeal:
    def test_corrupting_a_weight_after_the_training_logits_were_taken_gives_no_export(
        self, spec: ExportSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The negative control: a fault between the training module and the files."""
        broken = dataclasses.replace(spec, model=tiny.lm())
        true_logits = export.reference_logits

        def then_corrupt(model: Any, tokens: torch.Tensor) -> torch.Tensor:
            logits = true_logits(model, tokens)
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
            return logits

        monkeypatch.setattr(export, "reference_logits", then_corrupt)
        refused(
            lambda: export.write(broken, tmp_path / "out"),
            "parity seal: in float32 the export differs from LlamaForCausalLM as trained by",
            "nothing was exported",
            kind=InvalidState,
        )
        assert names(tmp_path) == []

    def test_a_fresh_process_that_cannot_load_it(
        self, spec: ExportSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that is damaged after its hash was taken: the fresh process refuses it, in its own words."""
        true_manifest = export._write_manifest

        def then_damage(manifest: Manifest, directory: Path) -> None:
            true_manifest(manifest, directory)
            with (directory / "model.safetensors").open("r+b") as file:
                file.seek(-3, os.SEEK_END)
                file.write(b"\x7f")

        monkeypatch.setattr(export, "_write_manifest", then_damage)
        refused(
            lambda: export.write(spec, tmp_path / "out"),
            "could not load the export",
            "model.safetensors is damaged",
            kind=InvalidState,
        )
        assert names(tmp_path) == []

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("length", [2, 3, 7, 10, 11, 48])
    def test_replay_is_the_plain_forward_pass(self, family: str, length: int, tmp_path: Path) -> None:
        net: Any = tiny.lm()
        if family == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
            net = GPT2LMHeadModel(config).eval()
        net.save_pretrained(tmp_path)
        tokens = export.seal_tokens(320, length + 2)
        assert tokens.shape == (2, length) and tokens.min() >= 0 and tokens.max() < 320
        logits = export.reference_logits(net, tokens)
        found = replay(load(tmp_path).part, tokens)
        assert (found - logits).abs().max() < 1e-4
        wrong = tokens.clone()
        wrong[0, 0] += 1
        assert (replay(load(tmp_path).part, wrong) - logits).abs().max() > 1e-2

    def test_measure_finds_a_cache_that_keeps_rejected_tokens(
        self, exported: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Break roll-back in the inference package: the seal sees it."""
        from draftsmith.inference.cache import StaticCache

        inputs = tmp_path / "inputs.safetensors"
        export._save(tiny.lm(), torch.float32, tmp_path, inputs)
        assert measure(exported[0], inputs).checks[0].max_abs_difference < 1e-4
        true_truncate = StaticCache.truncate

        def late(self: StaticCache, lengths: list[int]) -> None:
            kept = [min(old, new + 1) for old, new in zip(self.lengths, lengths, strict=True)]
            true_truncate(self, kept)

        monkeypatch.setattr(StaticCache, "truncate", late)
        seal = measure(exported[0], inputs)
        assert seal.checks[0].max_abs_difference > 10 * seal.checks[0].tolerance


class TestNothingIsLeft:
    def test_output_directory_not_empty(self, spec: ExportSpec, tmp_path: Path, instant_seal: None) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("mine")
        refused(lambda: export.write(spec, tmp_path / "out"), "is not empty", "--overwrite")
        assert (tmp_path / "out" / "config.json").read_text() == "mine"
        export.write(spec, tmp_path / "out", overwrite=True)
        assert load(tmp_path / "out").kind == "lm" and names(tmp_path) == ["out"]

    def test_disk_full(
        self, spec: ExportSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant_seal: None
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfile", full)
        refused(lambda: export.write(spec, tmp_path / "out"), "the disk is full", kind=InvalidState)
        assert names(tmp_path) == []

    def test_a_disk_that_is_really_full(self, spec: ExportSpec, tmp_path: Path) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        try:
            refused(lambda: export.write(spec, tmp_path / "out"), "the disk is full", kind=InvalidState)
            assert names(tmp_path) == []
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_stdout_is_ours(self, tmp_path: Path) -> None:
        """DeepSpeed, which accelerate imports while transformers saves, writes its warnings to stdout."""
        program = f"""
            from draftsmith.modules.export_spec import ExportSpec
            from draftsmith.trainers import export
            from tests import tiny
            export.run_seal = lambda directory, inputs: None
            export.write(ExportSpec("lm", tiny.lm(), None), {str(tmp_path / "out")!r})
        """
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        environment.pop("DS_ACCELERATOR", None)  # as other tests of this process may have set it
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def test_killed_before_the_seal(self, tmp_path: Path) -> None:
        """kill -9 when every file is there but the seal: what is left does not load."""
        program = f"""
            import time
            from draftsmith.modules.export_spec import ExportSpec
            from draftsmith.trainers import export
            from tests import tiny
            def wait(directory, inputs):
                print(directory, flush=True)
                time.sleep(60)
            export.run_seal = wait
            export.write(ExportSpec("lm", tiny.lm(), None), {str(tmp_path / "out")!r})
        """
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": str(root)}
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert names(tmp_path) == [left.name] and (left / "manifest.json").is_file()
        refused(lambda: load(left), "did not finish")
        renamed = left.rename(tmp_path / "renamed")  # by someone who means to use it all the same
        refused(lambda: load(renamed), "has no parity seal")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_weights(self, spec: ExportSpec, tmp_path: Path, value: float) -> None:
        net = tiny.lm()
        with torch.no_grad():
            net.model.embed_tokens.weight[319, 0] = value  # a row that the seal's tokens need not touch
        broken = dataclasses.replace(spec, model=net)
        refused(lambda: export.write(broken, tmp_path / "x"), "model.embed_tokens.weight holds NaN or infinity")

    def test_other_bad_input(self, spec: ExportSpec, tmp_path: Path) -> None:
        def write(**changes: Any) -> Callable[[], object]:
            return lambda: export.write(dataclasses.replace(spec, **changes), tmp_path / "x")

        refused(write(kind="filler"), "unknown kind 'filler': choose one of adapter, ")
        refused(write(model=torch.nn.Linear(2, 2)), "from a transformers model or a net of ours, got Linear")
        refused(write(tokenizer_dir=str(tmp_path)), "holds no tokenizer files")
        refused(write(model=tiny.lm(vocab_size=299)), "has 300 ids, the head only 299 rows")
        refused(lambda: export.write(spec, tmp_path / "x", dtype="int8"), "unknown dtype 'int8'")
        assert names(tmp_path) == []
