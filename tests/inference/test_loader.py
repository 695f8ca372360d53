"""`load` and `check_pair`: what loads, and one line for everything that must not."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from draftsmith.inference import load
from draftsmith.inference.checkpoint import sha256
from draftsmith.inference.couplings import MismatchWarning, target_fingerprint, tokenizer_identity
from draftsmith.inference.errors import InvalidType, InvalidValue, UserError
from draftsmith.inference.loader import check_pair
from draftsmith.inference.manifest import MANIFEST_FILE, TargetCoupling
from tests import tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face directory: 300 tokens, a head of 320."""
    return tiny.write_lm(tmp_path_factory.mktemp("loader") / "plain", width=16)


@pytest.fixture(scope="module")
def export(plain: Path) -> Path:
    copy = Path(shutil.copytree(plain, plain.parent / "export"))
    tiny.add_manifest(copy)
    return copy


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def refused(call: Callable[[], object], *said: str, kind: type[Exception] = InvalidValue) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, UserError)  # the CLI's exit code 2
    assert len(str(caught.value).splitlines()) == 1
    for part in said:
        assert part in str(caught.value)


class TestLoad:
    @pytest.mark.parametrize("which", ["plain", "export"])
    def test_logits_are_those_of_the_hf_class(self, which: str, request: pytest.FixtureRequest) -> None:
        from transformers import AutoModelForCausalLM

        path = request.getfixturevalue(which)
        part = load(path)
        assert part.kind == "lm" and (part.manifest is None) == (which == "plain")
        ids = torch.arange(20).unsqueeze(0)
        hidden, _ = part.part.forward(ids)
        logits = AutoModelForCausalLM.from_pretrained(str(path))(ids).logits
        assert (part.part.head(hidden) - logits).abs().max() < 1e-4

    def test_tokenizer_stop_ids_and_paths_as_text(self, export: Path) -> None:
        part = load(str(export))
        assert part.tokenizer is not None and part.tokenizer.decode(part.tokenizer.encode("naïve 😀")) == "naïve 😀"
        assert part.stop_ids == (1,) and part.path == export
        assert part.identity is not None and part.identity.vocab_size == 300

    def test_stop_ids_as_generate_takes_them(self, copy: Path) -> None:
        (copy / MANIFEST_FILE).unlink()
        path = copy / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": [1, 7]}))
        assert load(copy).stop_ids == (1, 7)
        path.write_text("{}")
        assert load(copy).stop_ids == (1,)  # from config.json
        edit(copy / "config.json", eos_token_id=None)
        assert load(copy).stop_ids == ()

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        part = load(tiny.write_lm(tmp_path / "bare", tokenizer=False, width=8))
        assert part.tokenizer is None and part.identity is None

    def test_dtype(self, export: Path) -> None:
        assert load(export).part.dtype == torch.float32
        assert load(export, dtype="bfloat16").part.dtype == torch.bfloat16
        refused(lambda: load(export, dtype="int4"), "unknown dtype 'int4': choose one of bfloat16, float16, float32")

    def test_engine(self, export: Path) -> None:
        assert type(load(export).part).__name__ == "NativeEngine"
        refused(lambda: load(export, engine="natve"), "unknown engine 'natve'", "did you mean 'native'?")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


class TestRefused:
    @pytest.mark.parametrize("device", ["cuda:99", "warp"])
    def test_a_device_that_is_not_there(self, export: Path, device: str) -> None:
        refused(lambda: load(export, device=device), f"device '{device}' cannot be used here", "take cpu")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        refused(lambda: load(tmp_path / "nowhere"), "no such directory", "local directories only")
        refused(lambda: load("meta-llama/Llama-3.1-8B"), "no such directory: meta-llama/Llama-3.1-8B")

    def test_a_file(self, export: Path, tmp_path: Path) -> None:
        refused(lambda: load(export / "model.safetensors"), "is a file: give the directory")
        for name in ("last.ckpt", "model.pt", "model.pkl", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(b"cos\nsystem\n.")
            refused(lambda: load(tmp_path / name), name, "is a pickle")  # noqa: B023  # called at once

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        refused(lambda: load(tmp_path), "holds neither manifest.json nor config.json")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
    def test_pickled_weights(self, export: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"cos\nsystem\n.")
        refused(lambda: load(tmp_path), name, "pickle")
        shutil.copy(export / "config.json", tmp_path)
        refused(lambda: load(tmp_path), name, "pickle", "safetensors")

    def test_remote_code(self, copy: Path) -> None:
        (copy / MANIFEST_FILE).unlink()
        edit(copy / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})
        (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
        refused(lambda: load(copy), "Python code of its own", "never")
        assert not (copy / "ran").exists()

    def test_manifest_of_another_schema_version(self, copy: Path) -> None:
        edit(copy / MANIFEST_FILE, schema_version=7)
        refused(lambda: load(copy), "schema version 7, this draftsmith reads version 1")

    def test_manifest_of_an_unknown_kind(self, copy: Path) -> None:
        edit(copy / MANIFEST_FILE, kind="filler")
        refused(lambda: load(copy), "unknown manifest kind 'filler': choose one of adapter, ")

    def test_an_export_without_a_seal_loads_only_for_the_seal(self, copy: Path) -> None:
        edit(copy / MANIFEST_FILE, seal=None)
        refused(lambda: load(copy), "no parity seal", "export the run again")
        assert load(copy, sealing=True).kind == "lm"

    def test_an_export_that_did_not_finish(self, copy: Path) -> None:
        left = copy.rename(copy.with_name(".copy.0123abcd.draftsmith.tmp"))
        refused(lambda: load(left), "did not finish")

    @given(st.data())
    @settings(max_examples=30)
    def test_truncated_or_bit_flipped_weights(self, export: Path, data: st.DataObject) -> None:
        path = export / "model.safetensors"
        whole, expected = path.read_bytes(), sha256(path)
        broken = bytearray(whole)
        if data.draw(st.booleans()):
            del broken[data.draw(st.integers(0, len(whole) - 1)) :]
        else:
            broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            path.write_bytes(broken)
            refused(lambda: load(export), str(path), f"expected sha256 {expected}", f"found {sha256(path)}")
        finally:
            path.write_bytes(whole)

    @given(st.data())
    @settings(max_examples=30)
    def test_a_truncated_plain_directory(self, plain: Path, data: st.DataObject) -> None:
        path = plain / "model.safetensors"
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            refused(lambda: load(plain), str(path))
        finally:
            path.write_bytes(whole)

    def test_a_damaged_tokenizer(self, copy: Path) -> None:
        (copy / MANIFEST_FILE).unlink()
        (copy / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
        refused(lambda: load(copy).tokenizer, "its tokenizer cannot be loaded")
        (copy / "tokenizer.json").write_text("{")
        refused(lambda: load(copy).tokenizer, "tokenizer.json is not valid JSON")

    def test_a_shape_that_the_config_does_not_have(self, copy: Path) -> None:
        (copy / MANIFEST_FILE).unlink()
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"] = torch.zeros(3)
        save_file(tensors, copy / "model.safetensors")
        refused(lambda: load(copy), "model.norm.weight is [3], not [16]")


@pytest.fixture(scope="module")
def draft(plain: Path) -> Path:
    """A smaller model over the same tokenizer, with an unpadded head."""
    return tiny.write_lm(plain.parent / "draft", seed=3, vocab_size=300, layers=1, width=8)


class TestCheckPair:
    def as_drafter(self, draft: Path, to: Path, fingerprint: str) -> Path:
        shutil.copytree(draft, to)
        tiny.add_manifest(to, "drafter", target=TargetCoupling(fingerprint, "big"))
        return to

    def test_a_plain_draft_couples_to_tokenizer_and_vocabulary_only(self, export: Path, draft: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_pair(load(export), load(draft)) == 300

    @pytest.mark.parametrize("allow_mismatch", [False, True])
    def test_another_tokenizer(self, export: Path, tmp_path: Path, allow_mismatch: bool) -> None:
        """Two meanings of an id are refused whatever the user says."""
        other = tiny.write_lm(tmp_path / "other", text="zzz yyy zzz yyy " * 9, width=8)
        target, draft = load(export), load(other)
        hashes = [identity.vocab_map_hash for identity in map(tokenizer_identity, (export, other)) if identity]
        refused(
            lambda: check_pair(target, draft, allow_mismatch),
            "draft and target vocabularies differ: the first differing id is 258",
            *hashes,
            "use a draft trained with the target's tokenizer",
        )

    def test_a_drafter_for_another_target(self, export: Path, plain: Path, draft: Path, tmp_path: Path) -> None:
        other = tiny.write_lm(tmp_path / "other", seed=9, width=16)
        drafter = load(self.as_drafter(draft, tmp_path / "drafter", target_fingerprint(plain)))
        assert check_pair(load(export), drafter) == 300  # the export holds the same weights
        stated, found = target_fingerprint(plain), target_fingerprint(other)
        refused(lambda: check_pair(load(other), drafter), stated, found, "--allow-mismatch", "trained for target big")
        with pytest.warns(MismatchWarning, match=found) as warned:
            assert check_pair(load(other), drafter, allow_mismatch=True) == 300
        assert len(warned) == 1 and stated in str(warned[0].message)

    def test_a_tokenizer_that_differs_only_in_its_roles(self, export: Path, draft: Path, tmp_path: Path) -> None:
        changed = load(shutil.copytree(draft, tmp_path / "changed"))
        edit(changed.path / "tokenizer_config.json", eos_token="<|bos|>")
        refused(lambda: check_pair(load(export), changed), "eos_token", "--allow-mismatch")
        with pytest.warns(MismatchWarning, match="eos_token"):
            check_pair(load(export), replace(changed), allow_mismatch=True)

    def test_a_drafter_is_not_a_target(self, export: Path, draft: Path, tmp_path: Path) -> None:
        drafter = load(self.as_drafter(draft, tmp_path / "drafter", "0" * 64))
        refused(lambda: check_pair(drafter, load(export)), "can be draft, not target", kind=InvalidType)

    def test_head_sizes_that_differ_without_a_tokenizer(self, export: Path, tmp_path: Path) -> None:
        bare = tiny.write_lm(tmp_path / "bare", tokenizer=False, vocab_size=64, width=8)
        refused(lambda: check_pair(load(export), load(bare)), "vocabularies differ: 64 ids", "has no tokenizer")


def test_importing_load_and_registry_imports_no_model_library() -> None:
    """The import stays near that of torch itself; transformers alone takes longer."""
    program = (
        "import sys; from draftsmith.inference import load, registry; "
        "assert callable(load) and registry.names(); "
        "print([m for m in ('transformers', 'tokenizers', 'lightning', 'numpy.testing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import draftsmith.inference

    with pytest.raises(AttributeError, match="'lod'"):
        _ = draftsmith.inference.lod
