"""Networks whose large matrices are multiplied by oneDNN, in place or re-laid: the same logits, and what they refuse.

"Large" is set to one number here, so that tiny networks take these paths whole.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets import matrices
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from tests.engines import CHECKS, SIZES, close, logits, plain, tiny_hf, tokens

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied, with biases": ("llama", SIZES | {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral with a window": ("mistral", SIZES | {"sliding_window": 6}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES | {"head_dim": 12}),
}

pytestmark = pytest.mark.skipif(not matrices._ONE_DNN, reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matrices, "LARGE", 1)
    yield


def native(model: Any, pack: bool) -> NativeEngine:
    net = CausalLM(CausalLMConfig.from_hf(model.config))
    net.load_state_dict(model.state_dict())
    net.eval().requires_grad_(False)
    if pack:
        net.pack()
    return NativeEngine(net)


@pytest.mark.parametrize("pack", [False, True], ids=["where they lie", "re-laid"])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, pack: bool) -> None:
    family, fields = CASES[case]
    model = tiny_hf(family, **fields)
    engine = native(model, pack)
    weights = engine.net.blocks[0].weights
    assert weights is not None and isinstance(weights.down, matrices.OneDNN)
    assert weights.down.weight.is_mkldnn == pack
    check: Callable[[Engine, Any], None]
    for check in CHECKS:
        check(engine, model)


@pytest.mark.parametrize("biased", [False, True])
def test_products_equal_linear(biased: bool) -> None:
    """Rows from one to many, a strided input, a residual; 1e-5 of float64."""
    weight, bias = torch.randn(24, 40), torch.randn(24) if biased else None
    for rows in (1, 2, 5, 8, 33):
        x, residual = torch.randn(rows, 2, 40)[:, 1], torch.randn(rows, 24)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for product in (matrices.Dense(weight, bias), matrices.OneDNN(weight, bias), matrices.packed(weight, bias)):
            torch.testing.assert_close(product(x).double(), want, atol=1e-5, rtol=0)
            torch.testing.assert_close(product.plus(residual, x).double(), want + residual, atol=1e-5, rtol=0)


def test_changes_in_place_are_seen_where_they_lie() -> None:
    first, second = tiny_hf("qwen2", **SIZES), tiny_hf("qwen2", seed=5, **SIZES)
    engine = native(first, pack=False)
    with torch.no_grad():
        for name, p in engine.net.named_parameters():
            p.copy_(second.state_dict()[name])
    ids = tokens(1, 8)
    close(logits(engine, ids), plain(second, ids))


@pytest.mark.parametrize(
    "act",
    [
        lambda net: net.state_dict(),
        lambda net: list(net.parameters()),
        lambda net: list(net.named_parameters()),
        lambda net: net.to(torch.bfloat16),
        lambda net: copy.deepcopy(net),
        lambda net: copy.deepcopy(net.blocks[0]),
    ],
)
def test_a_packed_network_is_neither_read_nor_changed(act: Callable[[CausalLM], object]) -> None:
    engine = native(tiny_hf("qwen2", **SIZES), pack=True)
    with pytest.raises(InvalidState, match="load it with frozen=False"):
        act(engine.net)


def test_the_parameters_are_given_up(tmp_path: Path) -> None:
    """One copy of the weights, not two; an unfrozen load keeps them readable."""
    model = tiny_hf("llama", **SIZES)
    model.save_pretrained(tmp_path)
    frozen = load_engine(tmp_path)
    assert isinstance(frozen, NativeEngine) and frozen.net.packed
    assert frozen.net.blocks[0].mlp.up_proj.weight is None
    assert frozen.net.lm_head.weight is None
    free = load_engine(tmp_path, frozen=False)
    assert isinstance(free, NativeEngine) and not free.net.packed
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in free.net.state_dict().items())
    ids = tokens(1, 7)
    close(logits(frozen, ids), plain(model, ids))


def test_other_dtypes_are_left_alone() -> None:
    model = tiny_hf("llama", **SIZES).to(torch.bfloat16)
    net = CausalLM(CausalLMConfig.from_hf(model.config)).to(torch.bfloat16)
    net.load_state_dict(model.state_dict())
    net.eval().pack()
    assert not net.packed
    net.state_dict()


def test_small_matrices_stay_with_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the fixture: at the real limit nothing of a tiny network is packed."""
    monkeypatch.undo()
    engine = native(tiny_hf("llama", **SIZES), pack=True)
    weights = engine.net.blocks[0].weights
    assert weights is not None and isinstance(weights.qkv, matrices.Dense)
    assert not engine.net.packed
