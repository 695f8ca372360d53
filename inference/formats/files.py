"""Directories of foreign drafters: their tensors and configurations read, and ours written beside a manifest.

Tensors come from safetensors. A pickle (`pytorch_model.bin`) is opened only on request, and by a function outside this
package (entry point group `draftsmith.readers`), which loads weights only: the inference package itself reads none.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.inference.checkpoint import INDEX_FILE, SINGLE_FILE, read_header, read_json, weight_files
from draftsmith.inference.errors import InvalidValue, MissingExtra
from draftsmith.inference.nets.eagle_head import EagleConfig

CONFIG, PICKLE, MEDUSA_FILE = "config.json", "pytorch_model.bin", "medusa_lm_head.safetensors"
READERS = "draftsmith.readers"  # entry points: name -> function(path) -> dict of tensors


def files_of_weights(directory: Path) -> list[Path]:
    """The weight files that a drafter directory holds, whatever their kind; empty where it holds none."""
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file():
        return weight_files(directory)
    return [directory / name for name in (MEDUSA_FILE, PICKLE) if (directory / name).is_file()]


def read_shapes(directory: Path, *, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors; from the headers alone where the file is safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files_of_weights(directory):
        if path.name == PICKLE:
            return {name: tuple(t.shape) for name, t in read_tensors(directory, allow_pickle=allow_pickle).items()}
        shapes |= {name: header.shape for name, header in read_header(path).items()}
    return shapes


def read_tensors(directory: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a drafter directory, as stored. Raises InvalidValue where there are none, or only pickled ones."""
    files = files_of_weights(directory)
    if not files:
        raise InvalidValue(f"{directory} holds no {SINGLE_FILE}, {MEDUSA_FILE} or {PICKLE}: not a drafter")
    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.name == PICKLE:
            return _unpickled(path, allow_pickle)
        read_header(path)  # a truncated file gets its one-line error
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    return tensors


def _unpickled(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise InvalidValue(
            f"{path} is a pickle, which can run code when it is read: get the safetensors form, or, if you trust its "
            "origin, convert it with --allow-pickle (weights only, nothing else is unpickled)"
        )
    found = next(iter(entry_points(group=READERS, name="pickle")), None)
    if found is None:
        raise MissingExtra("reading a pickle needs the training extra: pip install 'draftsmith[train]'")
    tensors: dict[str, Tensor] = found.load()(path)
    return tensors


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a drafter directory. Raises InvalidValue where it is missing or damaged."""
    return read_json(directory / CONFIG)


def write_directory(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = SINGLE_FILE
) -> None:
    """config.json and one safetensors file, into a directory that is there."""
    write_json(directory / CONFIG, config)
    stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(stored, directory / name, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


# What all Llama-shaped configurations share ---------------------------------------------------------------------------


def layer_config(config: EagleConfig) -> dict[str, Any]:
    """The keys that any reader of a Llama-shaped layer looks for, rope in the new form and in the old one.

    transformers 5 writes rope_parameters alone; SGLang and the EAGLE code read rope_theta and rope_scaling.
    """
    f, rope = config, dict(config.rope)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "model_type": f.family,
        "hidden_size": f.hidden_size,
        "intermediate_size": f.intermediate_size,
        "num_attention_heads": f.num_heads,
        "num_key_value_heads": f.num_kv_heads,
        "head_dim": f.head_dim,
        "num_hidden_layers": 1,
        "rms_norm_eps": f.norm_eps,
        "vocab_size": f.vocab_size,
        "max_position_embeddings": f.max_positions,
        "hidden_act": f.activation,
        "attention_bias": f.attention_bias,
        "mlp_bias": f.mlp_bias,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }


def rope_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(rope_parameters, notes) of a configuration in either form; the new form wins where they disagree."""
    old = dict(config.get("rope_scaling") or {})
    kind = old.pop("type", None)
    old = {"rope_type": old.pop("rope_type", kind or "default"), **old}
    theta = config.get("rope_theta")
    new = config.get("rope_parameters")
    if not new:
        return {"rope_theta": 10000.0 if theta is None else float(theta), **old}, []
    rope = {"rope_theta": float(new.get("rope_theta", 10000.0 if theta is None else theta)), **new}
    notes = []
    if theta is not None and float(theta) != rope["rope_theta"]:
        notes.append(f"rope_theta {theta:g} and rope_parameters ({rope['rope_theta']:g}) disagree: the latter is taken")
    return {"rope_type": "default", **rope}, notes


def sizes_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `EagleConfig` that any Llama-shaped configuration states. Raises InvalidValue for missing ones."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing:
        raise InvalidValue(f"{where} lacks {', '.join(missing)}: it does not describe a drafter")
    heads = config["num_attention_heads"]
    rope, _ = rope_of(config)
    return {
        "family": config.get("model_type") or "llama",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "activation": config.get("hidden_act", "silu"),
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "rope": rope,
    }


def dtype_name(tensors: Iterable[Tensor]) -> str:
    """The dtype of the first floating-point tensor, as configurations write it: "bfloat16"."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "float32")
