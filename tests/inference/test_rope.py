"""Every rotary variant that transformers ships for these families, as frequencies, as tables and in whole networks."""

import math
from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.nets.rope import RopeTable, rope_frequencies
from tests.engines import SIZES, TOLERANCE, chunks_of_random_sizes, close, logits, plain, ragged_rows, tiny_hf, tokens

LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, another base": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all settings": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.7,
    },
    "longrope": {"rope_type": "longrope", "factor": 2.0, **LONG},
    "longrope, attention factor": {"rope_type": "longrope", "factor": 2.0, "attention_factor": 1.4, **LONG},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}


def model_with(rope: dict[str, Any], family: str = "llama") -> Any:
    return tiny_hf(family, **SIZES, head_dim=8, rope_parameters={"rope_theta": 1000.0} | rope)


def native(model: Any, max_length: int | None = None) -> NativeEngine:
    net = CausalLM(CausalLMConfig.from_hf(model.config, max_length))
    net.load_state_dict(model.state_dict())
    return NativeEngine(net.eval().requires_grad_(False))


def test_every_variant_of_transformers_is_tested() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {rope["rope_type"] for rope in VARIANTS.values()} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_agree(variant: str, family: str) -> None:
    model = model_with(VARIANTS[variant], family)
    engine = native(model)
    ids = tokens(2, 60)
    close(logits(engine, ids), plain(model, ids))
    chunks_of_random_sizes(engine, model)
    ragged_rows(engine, model)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("default", "dynamic")])
def test_each_variant_differs_from_plain_positions(variant: str) -> None:
    """Negative control: plain RoPE gives the same weights other logits (dynamic is plain up to its limit)."""
    model = model_with(VARIANTS[variant])
    usual = native(model_with({"rope_type": "default"}))
    ids = tokens(1, 60)
    assert (logits(usual, ids) - plain(model, ids)).abs().max() > 100 * TOLERANCE


def test_longrope_uses_one_set_for_good() -> None:
    """Short set up to the original length; with a larger max_length the long set, as transformers for such texts."""
    model = model_with(VARIANTS["longrope"])
    short, long = native(model), native(model, 128)
    assert (short.spec.max_length, long.spec.max_length) == (64, 128)
    ids = tokens(1, 100)
    close(logits(short, ids[:, :64]), plain(model, ids[:, :64]))
    close(logits(long, ids), plain(model, ids))
    cache = long.new_cache(1, 100)  # in pieces too: the set does not change on the way
    close(torch.cat([logits(long, x, cache=cache) for x in ids.split(25, 1)], 1), plain(model, ids))
    assert (logits(long, ids[:, :64]) - plain(model, ids[:, :64])).abs().max() > 100 * TOLERANCE
    with pytest.raises(InvalidValue, match="positions allow 64"):
        short.new_cache(1, 65)


def test_dynamic_is_refused_where_it_would_change() -> None:
    engine = native(model_with(VARIANTS["dynamic"]))
    engine.new_cache(1, 128)
    with pytest.raises(InvalidValue, match="positions allow 128"):
        engine.new_cache(1, 129)
    with pytest.raises(InvalidValue, match=r"max_length 129 is outside 1\.\.128"):
        native(model_with(VARIANTS["dynamic"]), 129)


def test_older_configurations_are_understood() -> None:
    """rope_theta and rope_scaling outside rope_parameters, as published before transformers 5."""
    old = SIZES | {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = CausalLMConfig.from_hf(old)
    assert (config.rope["rope_type"], config.rope["rope_theta"], config.rope["factor"]) == ("linear", 5000.0, 2.0)


def test_hand_worked_rotation() -> None:
    """d = 4, base 100: frequencies 1 and 0.1; position 3 turns (x0, x2) by 3 and (x1, x3) by 0.3."""
    table = RopeTable(lambda: rope_frequencies({"rope_type": "default", "rope_theta": 100.0}, 4, 16, 16))
    cos, sin = table.upto(4, torch.float32, torch.device("cpu"))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = x * cos[3, 0] + x.roll(2) * sin[3, 0]
    c, s, c2, s2 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    torch.testing.assert_close(got, torch.tensor([c - 3 * s, 2 * c2 - 4 * s2, s + 3 * c, 2 * s2 + 4 * c2]))


def test_table_grows_and_follows_dtype() -> None:
    table = RopeTable(lambda: rope_frequencies({"rope_type": "default", "rope_theta": 100.0}, 4, 9999, 9999))
    cpu = torch.device("cpu")
    small = table.upto(3, torch.float32, cpu)[0]
    assert table.upto(200, torch.float32, cpu)[0] is small
    large = table.upto(1000, torch.float32, cpu)[0]
    assert large.shape[0] >= 1000
    assert torch.equal(large[: small.shape[0]], small)
    half = table.upto(3, torch.bfloat16, cpu)[0]
    assert torch.equal(half[:3], large[:3].to(torch.bfloat16))
    torch.testing.assert_close(table.at(torch.tensor([[5, 0]]), torch.float32)[0][0, 0], large[5, 0])


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 10.0}, "unknown rope_type 'spiral': choose one of default, dynamic"),
        ({"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0, "partial_rotary_factor": 0.5}, "4 of 8 head dim"),
    ],
)
def test_refusals(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        rope_frequencies(rope, 8, 64, 64)
