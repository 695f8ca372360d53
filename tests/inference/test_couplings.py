"""Fingerprints, tokenizer hashes and what a pair must share."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from draftsmith.inference import couplings
from draftsmith.inference import manifest as manifests
from draftsmith.inference.couplings import (
    Side,
    TokenizerIdentity,
    lossless_mismatches,
    shared_vocabulary,
    target_fingerprint,
    tokenizer_identity,
)
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.manifest import TargetCoupling
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_lm(tmp_path_factory.mktemp("couplings") / "lm")


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def identity(directory: Path) -> TokenizerIdentity:
    found = tokenizer_identity(directory)
    assert found is not None
    return found


class TestTargetFingerprint:
    def test_the_same_for_a_copy_and_without_what_only_the_library_writes(self, source: Path, model: Path) -> None:
        edit(model / "config.json", lambda c: c.update(transformers_version="9.9", _name_or_path="/x", use_cache=False))
        assert target_fingerprint(model) == target_fingerprint(source)
        assert len(target_fingerprint(model)) == 64

    def test_does_not_depend_on_sharding(self, source: Path, tmp_path: Path) -> None:
        shutil.copy(source / "config.json", tmp_path)
        tensors = load_file(source / "model.safetensors")
        weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert target_fingerprint(tmp_path) == target_fingerprint(source)

    def test_every_tensor_of_a_small_model_counts(self, source: Path, model: Path) -> None:
        """Tensors up to 4 KiB are read whole: one changed element anywhere is another model."""
        tensors = load_file(source / "model.safetensors")
        before = target_fingerprint(source)
        for name, tensor in tensors.items():
            if tensor.numel() * 4 > 4096:
                continue
            changed = tensor.clone()
            changed.view(-1)[tensor.numel() // 2] += 1e-3
            save_file(tensors | {name: changed}, model / "model.safetensors")
            assert target_fingerprint(model) != before, name

    def test_two_fine_tunes_of_a_large_tensor_differ(self, source: Path, model: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        name = "lm_head.weight"  # 40 KiB, sampled
        save_file(tensors | {name: tensors[name] * (1 + 1e-3)}, model / "model.safetensors")
        assert target_fingerprint(model) != target_fingerprint(source)

    @pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4095, 4096, 4097, 10**9 + 7])
    def test_places_cover_the_ends_and_stay_bounded(self, size: int) -> None:
        places = couplings._places(size)
        assert len(places) <= 64 and sorted(set(places)) == places
        if size:
            assert places[0] == 0 and places[-1] < size <= places[-1] + 64
        if size <= 4096:
            assert all(b - a == 64 for a, b in itertools.pairwise(places))

    def test_dtype_name_and_config_count(self, source: Path, model: Path) -> None:
        before = target_fingerprint(source)
        tensors = load_file(source / "model.safetensors")
        save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, model / "model.safetensors")
        half = target_fingerprint(model)
        save_file({n.replace("norm", "mron"): t for n, t in tensors.items()}, model / "model.safetensors")
        renamed = target_fingerprint(model)
        shutil.copy(source / "model.safetensors", model)
        edit(model / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
        assert len({before, half, renamed, target_fingerprint(model)}) == 4


class TestTokenizerIdentity:
    def test_use_and_the_way_of_writing_do_not_change_it(self, source: Path, model: Path) -> None:
        def used(raw: dict[str, Any]) -> None:
            raw["truncation"] = {"max_length": 5, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
            raw["padding"] = {"strategy": "BatchLongest"}
            raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]  # the older form
            raw["model"]["vocab"] = dict(reversed(raw["model"]["vocab"].items()))

        edit(model / "tokenizer.json", used)
        assert identity(model).hash == identity(source).hash

    def test_saved_again_by_transformers(self, source: Path, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(str(source)).save_pretrained(tmp_path)
        assert identity(tmp_path).hash == identity(source).hash

    def test_map_equals_what_transformers_says(self, source: Path) -> None:
        from transformers import AutoTokenizer

        vocab = AutoTokenizer.from_pretrained(str(source)).get_vocab()
        assert identity(source).tokens == {i: token for token, i in vocab.items()}
        assert identity(source).vocab_size == len(vocab) == 300

    def test_roles_belong_to_the_hash_but_not_to_the_map(self, source: Path, model: Path) -> None:
        edit(model / "tokenizer_config.json", lambda c: c.update(eos_token="<|bos|>"))
        assert identity(model).hash != identity(source).hash
        assert identity(model).vocab_map_hash == identity(source).vocab_map_hash
        edit(model / "tokenizer_config.json", lambda c: c.update(eos_token={"content": "<|eos|>"}))
        assert identity(model).hash == identity(source).hash  # an AddedToken written out
        (model / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>"}')
        edit(model / "tokenizer_config.json", lambda c: c.pop("eos_token"))
        assert identity(model).hash == identity(source).hash  # where older versions kept it

    def test_old_directory_without_the_one_file_form(self, source: Path, tmp_path: Path) -> None:
        raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(raw["vocab"]), encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in raw["merges"])])
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        assert identity(tmp_path).tokens.items() >= identity(source).tokens.items()

    def test_none_and_damaged(self, tmp_path: Path) -> None:
        assert tokenizer_identity(tmp_path) is None
        for text in ("{", "{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": 3}}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(InvalidValue) as caught:
                tokenizer_identity(tmp_path)
            assert "tokenizer.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1

    def test_list_vocabularies(self, tmp_path: Path) -> None:
        """Unigram models list [token, score] pairs."""
        (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}')
        assert identity(tmp_path).tokens == {0: "a", 1: "b"}


def made_identity(tokens: dict[int, str], **roles: str | None) -> TokenizerIdentity:
    vocab = {token: i for i, token in tokens.items()}
    return TokenizerIdentity(
        {"model": {"vocab": vocab}, "added_tokens": []},
        {"bos_token": None, "eos_token": None, "unk_token": None} | roles,
    )


def side(name: str, head: int, tokens: dict[int, str] | None = None, **roles: str | None) -> Side:
    return Side(Path(name), None, head, None if tokens is None else made_identity(tokens, **roles))


ABC = {0: "a", 1: "b", 2: "c"}


class TestSharedVocabulary:
    def test_padded_heads_over_one_tokenizer(self) -> None:
        assert shared_vocabulary(side("t", 8, ABC), side("d", 4, ABC)) == 3
        assert shared_vocabulary(side("t", 3, ABC), side("d", 4, ABC)) == 3

    def test_ids_only(self) -> None:
        assert shared_vocabulary(side("t", 8), side("d", 8)) == 8
        assert shared_vocabulary(side("t", 8, ABC), side("d", 8)) == 3  # the bare side's head is as padded
        assert shared_vocabulary(side("t", 3), side("d", 8, ABC)) == 3

    @pytest.mark.parametrize(
        ("theirs", "said"),
        [
            ({0: "a", 1: "x", 2: "c"}, "first differing id is 1 ('x' in the draft, 'b' in the target)"),
            ({0: "a", 1: "b"}, "first differing id is 2 (no token in the draft, 'c' in the target)"),
            (ABC | {3: "d"}, "first differing id is 3 ('d' in the draft, no token in the target)"),
        ],
    )
    def test_the_message_names_the_first_differing_id_both_hashes_and_the_fix(
        self, theirs: dict[int, str], said: str
    ) -> None:
        target, draft = side("big", 8, ABC), side("small", 8, theirs)
        with pytest.raises(ValueError) as caught:
            shared_vocabulary(target, draft)
        message = str(caught.value)
        assert message.startswith("draft and target vocabularies differ: the ") and said in message
        assert f"draft small {made_identity(theirs).vocab_map_hash}" in message
        assert f"target big {made_identity(ABC).vocab_map_hash}" in message
        assert "use a draft trained with the target's tokenizer" in message and len(message.splitlines()) == 1

    def test_sizes_that_differ_with_nothing_to_compare(self) -> None:
        for target, draft in ((side("t", 8), side("d", 9)), (side("t", 8, ABC), side("d", 9))):
            with pytest.raises(InvalidValue, match=r"vocabularies differ: 9 ids in d.*has no tokenizer to compare"):
                shared_vocabulary(target, draft)

    def test_a_head_that_is_too_small_for_the_tokenizer(self) -> None:
        with pytest.raises(InvalidValue, match="the head of d is too small for the tokenizer"):
            shared_vocabulary(side("t", 3, ABC), side("d", 2, ABC))

    @given(
        st.dictionaries(st.integers(0, 20), st.text(max_size=2), min_size=1),
        st.dictionaries(st.integers(0, 20), st.text(max_size=2), min_size=1),
    )
    def test_no_pair_passes_whose_ids_mean_two_things(self, ours: dict[int, str], theirs: dict[int, str]) -> None:
        ours, theirs = ({i: f"{i}{t}" for i, t in m.items()} for m in (ours, theirs))  # tokens are unique
        try:
            shared = shared_vocabulary(side("t", 30, ours), side("d", 40, theirs))
        except InvalidValue:
            assert ours != theirs
        else:
            assert ours == theirs and shared == max(ours) + 1


class TestLosslessMismatches:
    def test_equal_tokenizers_and_plain_models_have_none(self) -> None:
        assert lossless_mismatches(side("t", 8, ABC), side("d", 8, ABC)) == []
        assert lossless_mismatches(side("t", 8), side("d", 8)) == []

    def test_roles_and_pipeline(self) -> None:
        (sentence,) = lossless_mismatches(side("t", 8, ABC, eos_token="a"), side("d", 8, ABC, eos_token="b"))
        assert "differ in eos_token ('b' in the draft, 'a' in the target)" in sentence
        for tokens in ("a", "b"):
            assert made_identity(ABC, eos_token=tokens).hash in sentence

    def test_one_side_without_a_tokenizer(self) -> None:
        (sentence,) = lossless_mismatches(side("t", 3, ABC), side("d", 3))
        assert sentence.startswith("d has no tokenizer")

    def test_target_fingerprint(self, source: Path, model: Path) -> None:
        fingerprint = target_fingerprint(source)
        manifest = tiny.add_manifest(model, "drafter", target=TargetCoupling(fingerprint, "the target"))
        draft = Side(model, manifest, 320, identity(model))
        assert lossless_mismatches(Side(source, None, 320, identity(source)), draft) == []
        other = tiny.write_lm(model.parent / "other", seed=1)
        (sentence,) = lossless_mismatches(Side(other, None, 320, identity(other)), draft)
        assert f"for target the target with fingerprint {fingerprint}" in sentence
        assert f"{other} has fingerprint {target_fingerprint(other)}" in sentence

    def test_the_hash_that_a_manifest_states_is_the_one_that_counts(self, source: Path, model: Path) -> None:
        """A drafter that carries no tokenizer of its own is checked by what its manifest states."""
        for path in model.glob("tokenizer*"):
            path.unlink()
        known = identity(source)
        manifest = tiny.add_manifest(model, tokenizer_hash=known.hash, vocab_map_hash=known.vocab_map_hash)
        assert manifests.read(model) == manifest
        target, draft = Side(source, None, 320, known), Side(model, manifest, 320, None)
        assert lossless_mismatches(target, draft) == []
        stale = tiny.add_manifest(model, tokenizer_hash="0" * 64, vocab_map_hash=known.vocab_map_hash)
        (sentence,) = lossless_mismatches(target, Side(model, stale, 320, None))
        assert "0" * 64 in sentence and known.hash in sentence
