"""Hugging Face directories become engines, or one line says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.native import NativeEngine
from tests.engines import SIZES, VOCAB, close, logits, plain, tiny_hf, tokens

GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def save(model: Any, directory: Path, **kwargs: Any) -> Path:
    model.save_pretrained(directory, **kwargs)
    return directory


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for `.` in a name."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del weights[key]
        else:
            weights[key] = tensor
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_hf("llama", **SIZES)


@pytest.fixture(scope="module")
def tied() -> Any:
    return tiny_hf("qwen2", **SIZES, tie_word_embeddings=True)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_native_directories(which: str, shards: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    save(model, tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    engine = load_engine(tmp_path)
    assert isinstance(engine, NativeEngine)
    assert not engine.training
    assert all(block.weights is not None for block in engine.net.blocks)
    assert not any(p.requires_grad for p in engine.net.parameters())
    assert (engine.net.lm_head.weight is engine.net.model.embed_tokens.weight) == (which == "tied")
    ids = tokens(2, 9)
    close(logits(engine, ids), plain(model, ids))
    close(logits(load_engine(tmp_path, engine="native"), ids), plain(model, ids))
    adapted = load_engine(tmp_path, engine="hf")
    assert isinstance(adapted, HFEngine)
    close(logits(adapted, ids), plain(model, ids))


def test_other_families_take_the_adapter(tmp_path: Path) -> None:
    model = tiny_hf("gpt2", **GPT2)
    engine = load_engine(save(model, tmp_path))
    assert isinstance(engine, HFEngine)
    ids = tokens(1, 9)
    close(logits(engine, ids), plain(model, ids))


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dtypes(family: str, stored: torch.dtype, asked: str, got: torch.dtype, tmp_path: Path) -> None:
    model = tiny_hf(family, **(SIZES if family == "llama" else GPT2)).to(stored)
    engine = load_engine(save(model, tmp_path), dtype=asked)
    assert engine.dtype == got
    assert engine.forward(tokens(1, 2))[0].dtype == got
    if stored == torch.bfloat16 and asked == "float32":  # the stored numbers, computed in float32
        ids = tokens(1, 9)  # (`model.float()` would keep rotary frequencies that `.to(bfloat16)` has rounded)
        exact = type(model).from_pretrained(tmp_path, dtype=torch.float32)
        close(logits(engine, ids), plain(exact, ids))


def test_the_head_may_be_stored_in_place_of_the_embedding(tied: Any, tmp_path: Path) -> None:
    save(tied, tmp_path)
    weight = tied.lm_head.weight.clone()
    edit_weights(tmp_path, model__embed_tokens__weight=None, lm_head__weight=weight)
    ids = tokens(1, 5)
    close(logits(load_engine(tmp_path), ids), plain(tied, ids))


def test_a_tied_head_that_is_stored_twice_must_agree(tied: Any, tmp_path: Path) -> None:
    save(tied, tmp_path)
    edit_weights(tmp_path, lm_head__weight=tied.lm_head.weight.clone())
    ids = tokens(1, 5)
    close(logits(load_engine(tmp_path), ids), plain(tied, ids))
    edit_weights(tmp_path, lm_head__weight=tied.lm_head.weight + 1)
    with pytest.raises(InvalidValue, match="differs from it: set tie_word_embeddings to false"):
        load_engine(tmp_path)


def test_old_checkpoints_with_stored_frequencies(llama: Any, tmp_path: Path) -> None:
    save(llama, tmp_path)
    edit_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    ids = tokens(1, 5)
    close(logits(load_engine(tmp_path), ids), plain(llama, ids))


def test_native_families_need_no_code_of_the_directory(llama: Any, tmp_path: Path) -> None:
    """auto_map beside a native family is not needed and not read."""
    save(llama, tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code was run')")
    for engine in ("native", "hf"):
        ids = tokens(1, 5)
        close(logits(load_engine(tmp_path, engine=engine), ids), plain(llama, ids))


def test_max_length_is_passed_on(llama: Any, tmp_path: Path) -> None:
    save(llama, tmp_path)
    assert load_engine(tmp_path, max_length=50).spec.max_length == 50
    with pytest.raises(InvalidValue, match="max_length is a setting of the native engine"):
        load_engine(tmp_path, engine="hf", max_length=50)


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")


BAD: dict[str, tuple[Any, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "pickle": (_pickle_only, "pickles are never loaded"),
    "truncated": (_truncate, "truncated or damaged"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    "missing": (
        lambda d: edit_weights(d, model__norm__weight=None),
        r"1 tensors missing, 0 unexpected, 0 misshaped \(first missing model.norm.weight\)",
    ),
    "unexpected": (lambda d: edit_weights(d, adapter=torch.ones(1)), r"1 unexpected.*first unexpected adapter"),
    "misshaped": (lambda d: edit_weights(d, model__norm__weight=torch.ones(3)), r"norm.weight is \[3\], not \[32\]"),
    "quantised": (lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), r"quantised weights \(awq\)"),
    "unknown family": (lambda d: edit_config(d, model_type="zeta"), "'zeta', which transformers does not know$"),
    "remote code": (
        lambda d: edit_config(d, model_type="zeta", auto_map={"AutoModelForCausalLM": "zeta.Zeta"}),
        r"Python code of its own \(auto_map\), which is never done",
    ),
    "no causal model": (lambda d: edit_config(d, model_type="clip"), "'clip', which has no causal language model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories(case: str, llama: Any, tmp_path: Path) -> None:
    damage, message = BAD[case]
    damage(save(llama, tmp_path))
    with pytest.raises(InvalidValue, match=message) as caught:
        load_engine(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_adapter_refuses_missing_weights(tmp_path: Path) -> None:
    save(tiny_hf("gpt2", **GPT2), tmp_path)
    edit_weights(tmp_path, transformer__ln_f__bias=None)
    with pytest.raises(InvalidValue, match=r"1 tensors missing or misshaped \(first transformer.ln_f.bias\)"):
        load_engine(tmp_path)


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    save(tiny_hf("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2), tmp_path)
    with pytest.raises(InvalidType, match="MambaForCausalLM"):
        load_engine(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"engine": "nativ"}, "unknown engine 'nativ': choose one of auto, hf, native; did you mean 'native'"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, str], message: str, llama: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=message):
        load_engine(save(llama, tmp_path), **kwargs)


def test_native_is_not_there_for_other_families(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidValue, match="'gpt2'; the native engine has llama, mistral, qwen2, qwen3: use engine='hf'"
    ):
        load_engine(save(tiny_hf("gpt2", **GPT2), tmp_path), engine="native")


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no such directory"):
        load_engine(tmp_path / "nothing")
