"""The native network, built from published configurations, has exactly the names and shapes of the HF classes.

Everything is on the `meta` device: no weights exist. The configurations are facts about published models, written down
here; the parameter counts are the published ones, so a wrong configuration would not pass unseen.
"""

from typing import Any

import pytest
import torch

from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3},
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        {
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "sliding_window": None,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
    ),
}


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_hf_class(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    count, fields = PUBLISHED[name]
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        net = CausalLM(CausalLMConfig.from_hf(fields))
    ours, theirs = shapes(net), shapes(hf)
    assert sorted(theirs.keys() - ours.keys()) == []
    assert sorted(ours.keys() - theirs.keys()) == []
    assert ours == theirs
    assert sum(p.numel() for p in net.parameters()) == count
    assert ("lm_head.weight" in ours) and (net.lm_head.weight is net.model.embed_tokens.weight) == net.config.tied


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pass_over_the_cache_runs_on_meta(name: str) -> None:
    """Shapes of a prefill, a ragged step and a head, of the true sizes, without a byte of weights."""
    with torch.device("meta"):
        net = CausalLM(CausalLMConfig.from_hf(PUBLISHED[name][1])).to(torch.bfloat16)
    engine = NativeEngine(net.eval())
    cache = engine.new_cache(2, 64)
    hidden, aux = engine.forward(torch.zeros(2, 5, dtype=torch.int64, device="meta"), cache=cache, aux_layers=[0, 2])
    assert hidden.shape == aux[1].shape == (2, 5, engine.spec.hidden_size)
    cache.truncate([5, 3])
    hidden, _ = engine.forward(torch.zeros(2, 1, dtype=torch.int64, device="meta"), cache=cache)
    logits = engine.head(hidden)
    assert (logits.shape, logits.dtype) == ((2, 1, engine.spec.vocab_size), torch.bfloat16)
    assert cache.lengths == [6, 4]


def test_a_wrong_configuration_is_seen() -> None:
    """Negative control: one head fewer and the shapes differ."""
    fields = dict(PUBLISHED["Llama-3.2-1B"][1])
    with torch.device("meta"):
        right = shapes(CausalLM(CausalLMConfig.from_hf(fields)))
        wrong = shapes(CausalLM(CausalLMConfig.from_hf(fields | {"num_key_value_heads": 4})))
    assert right.keys() == wrong.keys()
    assert right != wrong
