"""The adapter against the transformers models that it serves, and the models that it must refuse."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from tests.engines import CHECKS, SIZES, TOLERANCE, VOCAB, close, logits, plain, tiny_hf, tokens, tree

GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5}),
    "opt, narrow embedding": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gemma2": (
        "gemma2",
        SIZES
        | {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi": ("phi", SIZES | {"partial_rotary_factor": 0.5}),
    "phi3 with a window": ("phi3", SIZES | {"sliding_window": 6, "pad_token_id": 0}),
    "falcon": ("falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral with a window": ("mixtral", SIZES | {"num_local_experts": 4, "sliding_window": 6}),
    "cohere": ("cohere", SIZES | {"logit_scale": 0.25, "pad_token_id": 0}),
    "granite": ("granite", SIZES | {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
    "deepseek_v3, values narrower than keys": ("deepseek_v3", SIZES | LATENT | {"num_key_value_heads": 4}),
    "mpt, no positions": ("mpt", MPT),
    "llama by the adapter": ("llama", SIZES | {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], tuple[HFEngine, Any]]:
    made: dict[str, tuple[HFEngine, Any]] = {}

    def pair(case: str) -> tuple[HFEngine, Any]:
        if case not in made:
            family, fields = CASES[case]
            model = tiny_hf(family, **fields)
            made[case] = HFEngine(model), model
        return made[case]

    return pair


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, pairs: Any) -> None:
    engine, model = pairs(case)
    for check in CHECKS:
        if check is tree and case.startswith("mpt"):
            with pytest.raises(InvalidType, match="takes no tree masks: it takes no positions"):
                check(engine, model)
        else:
            check(engine, model)


def test_values_may_be_narrower_than_keys(pairs: Any) -> None:
    cache = pairs("deepseek_v3, values narrower than keys")[0].new_cache(1, 8)
    assert cache.values[0].shape[3] < cache.keys[0].shape[3]


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "gemma2"])
def test_a_shift_of_one_position_is_far_above_the_tolerance(case: str, pairs: Any) -> None:
    """Negative control of the comparisons above."""
    engine, model = pairs(case)
    ids = tokens(1, 12)
    cache = engine.new_cache(1, 16)
    logits(engine, ids[:, :6], cache=cache)
    got = logits(engine, ids[:, 6:], cache=cache, positions=torch.arange(7, 13).unsqueeze(0))
    assert (got - plain(model, ids)[:, 6:]).abs().max() > 100 * TOLERANCE


def test_spec_and_outputs(pairs: Any) -> None:
    engine, model = pairs("opt, narrow embedding")
    spec = engine.spec
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.num_layers, spec.max_length) == (
        "opt",
        101,
        16,
        3,
        128,
    )
    assert (engine.device.type, engine.dtype) == ("cpu", torch.float32)
    hidden, _ = engine.forward(tokens(1, 3))
    assert not (hidden.is_inference() or hidden.requires_grad)
    assert not model.training


def test_works_under_inference_mode(pairs: Any) -> None:
    engine, model = pairs("gpt2")
    ids = tokens(1, 9)
    with torch.inference_mode():
        cache = engine.new_cache(1, 9)
        got = torch.cat([logits(engine, ids[:, :4], cache=cache), logits(engine, ids[:, 4:], cache=cache)], 1)
    close(got, plain(model, ids))


def test_half_precision_is_admitted(pairs: Any) -> None:
    for case in ("gpt2", "gemma2", "mixtral with a window"):
        family, fields = CASES[case]
        engine = HFEngine(tiny_hf(family, **fields).to(torch.bfloat16))
        assert engine.new_cache(1, 4).keys[0].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: each names the class and the reason


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state space": ("mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}, "'linear_attention'"),
    "hybrid": (
        "qwen3_next",
        SIZES
        | {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "'linear_attention', whose state cannot be rolled back",
    ),
    "recurrent": ("rwkv", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}, "a list, which cannot be rol"),
    "memory of its own": (
        "xlnet",
        {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
        "a tuple, which cannot be rolled back",
    ),
    "no cache at all": (
        "openai-gpt",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "instead of a key/value cache it keeps none",
    ),
    "ALiBi from a 2-d mask": ("bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "it fails"),
    "more than a linear head": ("bert", SIZES | {"is_decoder": True}, "the head on the last hidden state differs"),
    "a window of another name": (
        "gpt_neo",
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 300,
        },
        "window_size=300, a rule that is not known here",
    ),
    "too few positions to prove": ("gpt2", GPT2 | {"n_positions": 8}, "positions end at 8, too short"),
}


@pytest.mark.filterwarnings("ignore")  # transformers' own advice on the odd models
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_served(case: str) -> None:
    family, fields, reason = REFUSED[case]
    model = tiny_hf(family, **fields)
    with pytest.raises(InvalidType, match=reason) as caught:
        HFEngine(model)
    assert type(model).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(InvalidType, match="T5ForConditionalGeneration cannot be served exactly: it is an encoder-dec"):
        HFEngine(model)


def test_a_kernel_without_masks_is_refused() -> None:
    model = tiny_hf("gpt2", **GPT2)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InvalidType, match="takes no masks: load it with attn_implementation='sdpa'"):
        HFEngine(model)


@pytest.mark.parametrize("fault", ["positions", "masks", "roll-back", "logits"])
def test_the_probe_sees_a_disobedient_model(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: models that look right by name but ignore what they are told."""
    model = tiny_hf("gpt2", **GPT2)
    inner, outer = model.base_model.forward, model.forward
    calls = itertools.count()

    def deaf(*args: Any, **kwargs: Any) -> Any:
        if fault == "positions":
            start = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") else 0
            kwargs["position_ids"] = torch.arange(start, start + kwargs["input_ids"].shape[1]).unsqueeze(0)
        if fault == "masks":
            kwargs.pop("attention_mask", None)
        out = inner(*args, **kwargs)
        if fault == "roll-back":  # a state outside the cache
            out.last_hidden_state = out.last_hidden_state + next(calls) * 1e-2
        return out

    deaf.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]  # the adapter looks for position_ids
    if fault == "logits":

        def shifted(*args: Any, **kwargs: Any) -> Any:
            out = outer(*args, **kwargs)
            out.logits = out.logits + out.logits.roll(1, -1) * 1e-2
            return out

        monkeypatch.setattr(model, "forward", shifted)
    else:
        monkeypatch.setattr(model.base_model, "forward", deaf)
    with pytest.raises(InvalidType, match=r"differs from a plain call|fails"):
        HFEngine(model)


def test_long_positions_are_limited_where_frequencies_would_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 40,
    }
    fields = SIZES | {"rope_parameters": rope, "pad_token_id": 0, "original_max_position_embeddings": 40}
    engine = HFEngine(tiny_hf("phi3", **fields))
    assert engine.spec.max_length == 40


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda e: e.forward(torch.tensor([[1, VOCAB]])), f"token id {VOCAB} is outside the vocabulary"),
        (lambda e: e.new_cache(1, 129), "positions allow 128"),
        (lambda e: e.forward(tokens(1, 9), cache=e.new_cache(1, 8)), "is full"),
        (lambda e: e.forward(tokens(1, 2), aux_layers=[-1]), "aux layer -1"),
        (lambda e: e.forward(tokens(1, 2), mask=torch.zeros(1, 1, 2, 3)), "additive and float"),
    ],
)
def test_bad_input(act: Callable[[Engine], object], message: str, pairs: Any) -> None:
    with pytest.raises(InvalidValue, match=message):
        act(pairs("gpt2")[0])


def test_train_mode_is_refused() -> None:
    engine = HFEngine(tiny_hf("gpt2", **GPT2).train())  # probed in eval mode, then left as it was
    assert engine.training
    with pytest.raises(InvalidState, match=r"call eval\(\)"):
        engine.forward(tokens(1, 2))
