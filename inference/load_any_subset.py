"""Any-subset models from a directory: exports of ours, and XLNet's published weights (Hugging Face layout).

XLNet's parameters are those of scheme "xlnet" (arXiv:1906.08237; its two streams share them); its segment embeddings
are left out, since a canvas has one segment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.inference import manifest as manifests
from draftsmith.inference import portable
from draftsmith.inference.checkpoint import read_json, weight_files
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM

XLNET_LENGTH = 512  # its positions are relative: this is the length that it was trained at
_XLNET_MASK = "<mask>"
_XLNET_MASK_ID = 6  # in the vocabulary of the published models
_LEFT_OUT = ("r_s_bias", "seg_embed")


def load_any_subset(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> AnySubsetLM:
    """Load a model for decoding, in eval mode; `trained` is what its manifest says of its training.

    Args: dtype: to compute in; "auto": as the weights are stored.
    Raises InvalidValue, one line, for files that are not those of one any-subset model.
    """
    if engine == "hf":
        raise InvalidValue("an any-subset model is served by our own network: leave engine at auto or native")
    directory = Path(path)
    found = manifests.read(directory)
    net = read_net(directory, dtype).to(device)
    net.fuse()
    net.trained = {} if found is None else dict(found.couplings.trained)
    return net


def read_net(path: str | Path, dtype: str = "auto") -> AnySubsetLM:
    """The network of a directory, frozen and in eval mode. Raises as `load_any_subset`."""
    directory = Path(path)
    if dtype not in ("auto", *portable.DTYPES):
        raise unknown_choice("dtype", dtype, ("auto", *portable.DTYPES))
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != "xlnet":
        return portable.read_net(directory, AnySubsetLM, AnySubsetConfig, dtype=dtype)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        tensors |= load_file(file)
    config, tensors = from_xlnet(raw, tensors, _xlnet_mask_id(directory))
    net = AnySubsetLM(config)
    stored = next((tensor.dtype for tensor in tensors.values()), torch.float32)
    portable.fill(net, tensors, f"{directory}, an XLNet")
    return net.to(stored if dtype == "auto" else portable.DTYPES[dtype]).eval().requires_grad_(False)


def from_xlnet(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], mask_id: int
) -> tuple[AnySubsetConfig, dict[str, Tensor]]:
    """Configuration and parameters of our network from those of transformers' XLNetLMHeadModel.

    Raises InvalidValue for variants that are not XLNet's own (one-directional attention, memory-only settings).
    """
    if raw.get("attn_type", "bi") != "bi" or raw.get("bi_data", False):
        raise InvalidValue("only XLNet's own attention is supported: attn_type 'bi', bi_data false")
    config = AnySubsetConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["d_model"],
        num_layers=raw["n_layer"],
        num_heads=raw["n_head"],
        intermediate_size=raw["d_inner"],
        max_length=XLNET_LENGTH,
        mask_id=mask_id,
        dropout=raw.get("dropout", 0.1),
        scheme="xlnet",
        tied=raw.get("tie_word_embeddings", True),
        head_dim=raw.get("d_head"),
        activation=raw.get("ff_activation", "gelu"),
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        clamp_length=raw.get("clamp_len", -1),
    )
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_LEFT_OUT):
            continue
        ours, value = _renamed(name, tensor)
        made[ours] = value
    return config, made


_TOP = {
    "transformer.word_embedding.weight": "embed_tokens.weight",
    "transformer.mask_emb": "query",
    "lm_loss.weight": "lm_head.weight",
    "lm_loss.bias": "lm_head.bias",
}
_INNER = {
    "rel_attn.layer_norm": "attention_norm",
    "ff.layer_norm": "mlp_norm",
    "ff.layer_1": "up_proj",
    "ff.layer_2": "down_proj",
}


def _renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Our name and layout of one of XLNet's tensors. A name that is not known keeps it, and is refused by `fill`."""
    if name == "transformer.mask_emb":
        return _TOP[name], tensor.reshape(-1)
    if name in _TOP:
        return _TOP[name], tensor
    _, _, rest = name.partition("transformer.layer.")
    layer, _, inner = rest.partition(".")
    projection = inner.removeprefix("rel_attn.")
    if inner.startswith("rel_attn.") and projection in ("q", "k", "v", "r", "o"):
        flat = tensor.flatten(1)  # [D, H * d]
        value = flat if projection == "o" else flat.t().contiguous()
        return f"layers.{layer}.attention.{projection}_proj.weight", value
    if projection in ("r_w_bias", "r_r_bias"):
        return f"layers.{layer}.attention.{projection}", tensor
    module, _, leaf = inner.rpartition(".")
    return (f"layers.{layer}.{_INNER[module]}.{leaf}", tensor) if module in _INNER else (name, tensor)


def _xlnet_mask_id(directory: Path) -> int:
    """The id of <mask> by the directory's tokenizer; that of the published vocabulary where there is none."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return _XLNET_MASK_ID
    for token in read_json(file).get("added_tokens") or ():
        if token.get("content") == _XLNET_MASK:
            return int(token["id"])
    return _XLNET_MASK_ID
