"""Published masked diffusion models as networks of ours: LLaDA's and Dream's directories.

They are read by their tensor names, and no remote code runs: LLaDA's are OLMo's ("transformer.blocks.0.ff_proj"),
Dream's are Qwen2's, and its logits are those of the next position (`logit_shift`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.inference.checkpoint import read_json, weight_files
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig
from draftsmith.inference.portable import DTYPES, fill


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is LLaDA's or Dream's."""
    return config.get("model_type") in _FAMILIES


@dataclass(frozen=True)
class _Family:
    """How one family's directory is read."""

    config: Callable[[Mapping[str, Any], int | None], MaskedLMConfig]
    name: Callable[[str], str]  # of a tensor, in ours; an unknown one stays as it is and is refused
    end_of_turn: str  # the token that ends an answer of an instruct model


def read_published(directory: Path, dtype: str = "auto") -> MaskedLM:
    """The network of a published directory, in eval mode and frozen; dtype "auto": as the weights are stored.

    Raises InvalidValue, one line, for a directory of another network, or with switches that ours does not have.
    """
    stated = read_json(directory / "config.json")
    family = _FAMILIES.get(str(stated.get("model_type")))
    if family is None:
        raise InvalidValue(
            f"{directory}/config.json describes no masked diffusion model: model_type {stated.get('model_type')!r}, "
            f"known are {', '.join(sorted(_FAMILIES))} and exports of draftsmith"
        )
    try:
        config = family.config(stated, _token_id(directory, family.end_of_turn))
    except KeyError as error:
        raise InvalidValue(f"{directory}/config.json lacks {error}: copy the model directory again") from None
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        tensors |= {family.name(name): tensor for name, tensor in load_file(file).items()}
    if config.tied:
        tensors.setdefault("lm_head.weight", tensors.get("embed_tokens.weight", torch.empty(0)))
    stored = next(iter(tensors.values())).dtype
    net = MaskedLM(config).to(stored if dtype == "auto" else DTYPES[dtype])
    fill(net, tensors, f"{directory}, a masked language model")
    return net.eval().requires_grad_(False)


def _token_id(directory: Path, content: str) -> int | None:
    """The id of an added token by the directory's tokenizer.json; None where there is none."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    for token in read_json(file).get("added_tokens") or ():
        if token.get("content") == content:
            return int(token["id"])
    return None


_LLADA_ONLY: Mapping[str, Any] = {  # what our layers are; a directory that says otherwise is another network
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
}


def _llada_config(stated: Mapping[str, Any], eot_id: int | None) -> MaskedLMConfig:
    for key, allowed in _LLADA_ONLY.items():
        if stated.get(key, allowed) != allowed:
            raise InvalidValue(f"a LLaDA network with {key} {stated[key]!r} cannot be read: only {allowed!r} can")
    if stated.get("include_bias") and stated.get("weight_tying"):
        raise InvalidValue("a LLaDA network with include_bias and weight_tying cannot be read")
    return MaskedLMConfig(
        vocab_size=stated.get("embedding_size") or stated["vocab_size"],
        hidden_size=stated["d_model"],
        num_layers=stated["n_layers"],
        num_heads=stated["n_heads"],
        num_kv_heads=stated.get("n_kv_heads"),
        intermediate_size=stated.get("mlp_hidden_size") or stated["mlp_ratio"] * stated["d_model"],
        max_length=stated["max_sequence_length"],
        mask_id=stated["mask_token_id"],
        eos_id=stated.get("eos_token_id"),
        eot_id=eot_id,
        pad_id=stated.get("pad_token_id"),
        positions="rope",
        rope_theta=stated["rope_theta"],
        norm_eps=stated["rms_norm_eps"],
        activation=stated["activation_type"],
        qkv_bias=bool(stated.get("include_qkv_bias")),
        tied=bool(stated.get("weight_tying")),
    )


_LLADA_LAYER = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",  # act(ff_proj(x)) * up_proj(x)
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_TOP = {"wte": "embed_tokens", "ln_f": "norm", "ff_out": "lm_head"}


def _llada_name(name: str) -> str:
    found = re.fullmatch(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, module, leaf = found.groups()
    if layer is None:
        return f"{_LLADA_TOP[module]}.{leaf}" if module in _LLADA_TOP else name
    return f"layers.{layer}.{_LLADA_LAYER[module]}.{leaf}" if module in _LLADA_LAYER else name


def _dream_config(stated: Mapping[str, Any], eot_id: int | None) -> MaskedLMConfig:
    if stated.get("use_sliding_window") or stated.get("rope_scaling"):
        raise InvalidValue("a Dream network with sliding windows or scaled rotary positions cannot be read")
    return MaskedLMConfig(
        vocab_size=stated["vocab_size"],
        hidden_size=stated["hidden_size"],
        num_layers=stated["num_hidden_layers"],
        num_heads=stated["num_attention_heads"],
        num_kv_heads=stated["num_key_value_heads"],
        intermediate_size=stated["intermediate_size"],
        max_length=stated["max_position_embeddings"],
        mask_id=stated["mask_token_id"],
        eos_id=stated.get("eos_token_id"),
        eot_id=eot_id,
        pad_id=stated.get("pad_token_id"),
        logit_shift=True,
        positions="rope",
        rope_theta=stated["rope_theta"],
        norm_eps=stated["rms_norm_eps"],
        activation=stated["hidden_act"],
        qkv_bias=True,
        tied=bool(stated.get("tie_word_embeddings")),
    )


def _dream_name(name: str) -> str:
    return name.removeprefix("model.")


_FAMILIES = {
    "llada": _Family(_llada_config, _llada_name, "<|eot_id|>"),
    "Dream": _Family(_dream_config, _dream_name, "<|im_end|>"),
}
