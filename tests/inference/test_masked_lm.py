"""The bidirectional network: LLaDA's and Dream's directories against transformers' layers, its cache, ragged rows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.loader import load
from draftsmith.inference.nets.masked_lm import CanvasCache, MaskedLM, MaskedLMConfig

V, MASK, EOS = 40, 38, 37
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
LLADA = {  # our hand-made list of OLMo's names
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def bidirectional(model: Any, ids: Tensor) -> Tensor:
    """transformers' layers with a mask that hides nothing; the mask id's logit is never an answer."""
    batch, length = ids.shape
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=torch.zeros(batch, 1, length, length)).logits
    logits[..., MASK] = float("-inf")
    return logits


def llada(directory: Path, **config: Any) -> Any:
    """A tiny LLaDA directory, and its twin in transformers."""
    torch.manual_seed(1)
    twin = LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            intermediate_size=48,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
        )
    ).eval()
    tensors = {}
    for name, tensor in twin.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, _, leaf = rest.rpartition(".")
            tensors[f"model.transformer.blocks.{layer}.{LLADA[module]}.{leaf}"] = tensor.clone()
        else:
            top = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}[name.rpartition(".")[0]]
            tensors[f"model.transformer.{top}.weight"] = tensor.clone()
    stated = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_heads": 4, "n_kv_heads": 4,
        "n_layers": 2, "mlp_hidden_size": 48, "mlp_ratio": 4, "vocab_size": V, "embedding_size": V,
        "max_sequence_length": 64, "rope": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "block_type": "llama",
        "layer_norm_type": "rms", "activation_type": "silu", "alibi": False, "weight_tying": False,
        "include_bias": False, "include_qkv_bias": False, "mask_token_id": MASK, "eos_token_id": EOS,
        "pad_token_id": EOS, "block_group_size": 1, "multi_query_attention": None,
    }  # fmt: skip
    write(directory, stated | config, tensors)
    return twin


def dream(directory: Path, **config: Any) -> Any:
    """A tiny Dream directory, and its twin in transformers."""
    torch.manual_seed(2)
    twin = Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            intermediate_size=48,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    stated = {
        "model_type": "Dream", "architectures": ["DreamModel"], **SIZES, "intermediate_size": 48,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 1000000.0,
        "rope_scaling": None, "hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False,
        "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS,
    }  # fmt: skip
    write(directory, stated | config, {name: tensor.clone() for name, tensor in twin.state_dict().items()})
    return twin


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, EOS, (batch, length), generator=torch.Generator().manual_seed(3))


def test_llada_directory(tmp_path: Path) -> None:
    """Position i predicts token i; the end ids come from the configuration and the tokenizer."""
    twin = llada(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 36, "content": "<|eot_id|>"}]}))
    part = load(tmp_path)
    net: Any = part.part
    assert part.kind == "masked-lm" and isinstance(net, MaskedLM)
    assert net.config.mask_id == MASK and net.config.end_ids == (EOS, 36) and not net.config.logit_shift
    with torch.no_grad():
        torch.testing.assert_close(net.head(net(ids())), bidirectional(twin, ids()), atol=1e-4, rtol=1e-4)


def test_dream_directory(tmp_path: Path) -> None:
    """Its logits are those of the next position: ours at i are transformers' at i - 1, the first one twice."""
    twin = dream(tmp_path)
    net: Any = load(tmp_path).part
    assert net.config.logit_shift and net.config.end_ids == (EOS,)
    want = bidirectional(twin, ids())
    with torch.no_grad():
        got = net.head(net(ids()))
    torch.testing.assert_close(got[:, 1:], want[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (llada, {"block_type": "sequential"}, "block_type 'sequential' cannot be read"),
        (llada, {"alibi": True}, "alibi True cannot be read"),
        (llada, {"n_layers": 3}, "lacks layers.2"),
        (llada, {"n_layers": 1}, "holds unknown layers.1"),
        (llada, {"d_model": 64}, "must be"),
        (llada, {"eos_token_id": MASK}, "eos_id and mask_id are both"),
        (dream, {"rope_scaling": {"type": "yarn"}}, "scaled rotary positions cannot be read"),
    ],
)
def test_directories_that_are_something_else(tmp_path: Path, make: Any, config: dict[str, Any], message: str) -> None:
    make(tmp_path, **config)
    with pytest.raises(InvalidValue, match=message):
        load(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    llada(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    del stated["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InvalidValue, match="lacks 'mask_token_id'"):
        load(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"positions": "rope"}, {"num_kv_heads": 2}, {"logit_shift": True}], ids=str)
def test_padding_cache_and_fusing_change_nothing(fields: dict[str, Any]) -> None:
    """A short row in a batch equals the row alone; blocks fed over a full pass's cache equal that pass, also after the
    block's columns were spoilt; the fused form equals the trained one.
    """
    torch.manual_seed(0)
    config = MaskedLMConfig(V, 32, 3, 4, 48, max_length=16, mask_id=MASK, **fields)
    net = MaskedLM(config).eval()
    tokens, lengths = ids(), torch.tensor([12, 9])
    trained = net(tokens, lengths)
    net.fuse()
    with torch.inference_mode():
        torch.testing.assert_close(net(tokens, lengths), trained, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(tokens[1:, :9]), trained[1:, :9], atol=1e-5, rtol=1e-5)
        cache = CanvasCache(config, 2, 12, net.dtype, net.device)
        full = net.states(tokens, lengths, cache)
        columns = torch.tensor([[4, 5, 6, 12], [3, 4, 5, 6]])  # of different places; 12 is nobody's
        for held in (*cache.keys, *cache.values):
            held[0, 4:7], held[1, 3:7] = 7.0, 7.0
        fed = torch.cat((tokens, tokens[:, :1]), 1).gather(1, columns)
        block = net.states(fed, lengths, cache, columns)
        torch.testing.assert_close(block[0, :3], full[0, 4:7], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block[1], full[1, 3:7], atol=1e-5, rtol=1e-5)
        one = net.states(fed[1:], lengths[1:], cache, columns[1:], rows=torch.tensor([1]))
        torch.testing.assert_close(one[0], full[1, 3:7], atol=1e-5, rtol=1e-5)
        cache.select(torch.tensor([1]))
        torch.testing.assert_close(net.states(fed[1:], lengths[1:], cache, columns[1:]), one, atol=1e-5, rtol=1e-5)


def test_every_parameter_learns_and_the_mask_is_no_answer() -> None:
    """The mask's logit of -inf leaves gradients finite."""
    net = MaskedLM(MaskedLMConfig(V, 32, 2, 4, 48, max_length=16, mask_id=MASK))
    logits = net.head(net(ids()))
    assert bool((logits[..., MASK] == float("-inf")).all())
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids().flatten()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_a_canvas_beyond_the_networks() -> None:
    net = MaskedLM(MaskedLMConfig(V, 32, 1, 4, 48, max_length=8, mask_id=MASK))
    with pytest.raises(InvalidValue, match="a canvas of 12 positions exceeds this network's 8"):
        net(ids())


def test_conversion_keeps_a_fused_network_right() -> None:
    """`to` replaces the parameters' storage: the fused views must follow."""
    torch.manual_seed(0)
    net = MaskedLM(MaskedLMConfig(V, 32, 2, 4, 48, max_length=16, mask_id=MASK, tied=True)).eval()
    net.fuse()
    twin = MaskedLM(net.config).eval()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        got, want = net.double()(ids()), twin.double()(ids())
        torch.testing.assert_close(got, want)
        net.embed_tokens.weight.zero_()
        assert float(net.head(got)[..., :MASK].abs().max()) == 0.0  # still tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_network_gives_the_same_and_keeps_its_weights_to_itself(tied: bool) -> None:
    """Large matrices are re-laid: with and without autograd, over a cache; what would read them says so."""
    torch.manual_seed(0)
    config = MaskedLMConfig(600, 512, 1, 8, 512, max_length=16, mask_id=599, tied=tied)
    net = MaskedLM(config).eval().requires_grad_(False)
    want = net.head(net(ids()))
    net.pack()
    assert net.packed
    torch.testing.assert_close(net.head(net(ids())), want, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        cache = CanvasCache(config, 2, 12, net.dtype, net.device)
        torch.testing.assert_close(net.head(net.states(ids(), None, cache)), want, atol=1e-4, rtol=1e-4)
    for read in (net.state_dict, net.double, lambda: copy.deepcopy(net)):
        with pytest.raises(InvalidState, match="packed"):
            read()
