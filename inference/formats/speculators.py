"""Format of the speculators library (0.9.0), which vLLM reads: EAGLE-3, type "eagle3".

Ids of the target's states are hidden_states indices, as ours. EAGLE-1 was dropped from the library: it goes into the
format "eagle" alone. `norm_before_residual` is always written, since its default differs between the readers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats.eagle import LAYER, MIDLAYER, default_ids, from_midlayer
from draftsmith.inference.formats.files import (
    dtype_name,
    layer_config,
    read_config,
    read_tensors,
    rope_of,
    sizes_of,
    write_directory,
)
from draftsmith.inference.formats.record import EMBEDDING, DrafterRecord, eagle_problems, finish, make_config, refuse
from draftsmith.inference.nets.eagle_head import FAMILIES, EagleConfig

NAME = "speculators"
VERSION = "0.9.0"
TYPE = "eagle3"
OTHER_TYPES = ("peagle", "dflash", "dflash2", "dspark", "mtp", "xpress", "eagle", "mlp_speculator", "independent")
IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# What vLLM's reader (configs/speculators/base.py) refuses to do without; dots go into objects, 0 is the first entry.
REQUIRED_BY_VLLM = (
    "speculators_model_type",
    "transformer_layer_config",
    "speculators_config.proposal_methods.0",
    "speculators_config.proposal_methods.0.speculative_tokens",
    "speculators_config.verifier.name_or_path",
)


def write(record: DrafterRecord, directory: Path, *, verifier: Path | None, speculative_tokens: int = 5) -> None:
    """Write config.json and model.safetensors.

    Args: verifier: directory of the target; its architectures and path go into the configuration. speculative_tokens:
    the draft length that vLLM takes as its default; the one measured as best.
    Raises InvalidValue with every reason why vLLM could not run it, InvalidType for another kind of drafter.
    """
    config, tensors = record.fields, record.tensors
    if not isinstance(config, EagleConfig) or config.version != 3:
        raise InvalidType("the speculators format holds EAGLE-3 drafters only: EAGLE-1 goes into the format 'eagle'")
    problems = eagle_problems(config, tensors)
    if config.family not in FAMILIES:
        problems.append(f"layer of model_type {config.family!r}: only {' and '.join(FAMILIES)} are read")
    if config.fc_bias:
        problems.append("fc has a bias, which the speculators network does not have")
    if speculative_tokens < 1:
        problems.append(f"speculative_tokens must be at least 1, got {speculative_tokens}")
    if verifier is None or not (verifier / "config.json").is_file():
        problems.append(f"the verifier {verifier or ''} is no model directory: name the target with --target DIR")
    refuse(problems, f"the {NAME} format cannot hold this drafter")
    assert verifier is not None
    write_directory(directory, _document(config, record, verifier.resolve(), speculative_tokens), tensors)


def read(
    directory: Path, *, target_layers: int | None = None, allow_pickle: bool = False, strict: bool = True
) -> DrafterRecord:
    """Read a speculators directory. target_layers: needed only where the ids are null.

    Raises InvalidValue with everything that is wrong with the directory.
    """
    stated = read_config(directory)
    kind = stated.get("speculators_model_type")
    if kind != TYPE:
        raise InvalidValue(f"{directory} holds a speculator of type {kind!r}: only {TYPE!r} is read here")
    tensors = from_midlayer(read_tensors(directory, allow_pickle=allow_pickle))
    layer = stated.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise InvalidValue(f"{directory}: config.json has no transformer_layer_config: it does not describe a drafter")
    values, problems, notes = sizes_of(layer, str(directory)), [], rope_of(layer)[1]
    origins = {name: "config.json" for name in values}
    if layer.get("num_hidden_layers", 1) != 1:
        problems.append(f"{layer['num_hidden_layers']} layers: an EAGLE-3 drafter here has one")
    for flag in FLAGS:
        values[flag] = bool(stated.get(flag, False))
        origins[flag] = "config.json" if flag in stated else "default of speculators (vLLM's differs)"
    if "norm_before_residual" not in stated:
        notes.append("norm_before_residual is not stated: speculators takes false, vLLM true")
    values["draft_vocab_size"] = stated.get("draft_vocab_size") or values["vocab_size"]
    values["target_hidden_size"] = stated.get("target_hidden_size") or values["hidden_size"]
    values["own_embedding"] = EMBEDDING in tensors
    ids = stated.get(IDS)
    if ids:
        values["aux_layers"], origins["aux_layers"] = tuple(ids), "config.json"
    elif target_layers is not None:
        values["aux_layers"], origins["aux_layers"] = default_ids(target_layers), "default of speculators and vLLM"
    else:
        problems.append("the ids of the states that it reads are null: give the target, whose depth decides")
    config = make_config({"aux_layers": (2, 3, 4)} | values, problems)
    return finish(config, tensors, NAME, origins, notes, problems, str(directory), strict)


def vllm_problems(config: Mapping[str, Any], names: Sequence[str], *, found: bool) -> list[str]:
    """What vLLM would stumble over: its five required keys, and tensor names as its EAGLE-3 class maps them.

    A re-implementation of vllm/transformers_utils/configs/speculators/base.py and models/llama_eagle3.py without vLLM.
    names: of the tensors. found: whether the verifier's path leads somewhere.
    """
    problems = [f"{key} is missing" for key in REQUIRED_BY_VLLM if _lookup(config, key) is None]
    if config.get("speculators_model_type") not in (None, TYPE):
        problems.append(f"speculators_model_type {config['speculators_model_type']!r} is not {TYPE!r}")
    layer = config.get("transformer_layer_config")
    if isinstance(layer, Mapping) and layer.get("model_type", "llama") not in FAMILIES:
        problems.append(f"model_type {layer['model_type']!r} is none of {', '.join(FAMILIES)}")
    aux = config.get(IDS) or [2, 3, 4]
    if isinstance(layer, Mapping) and len(aux) != layer.get("num_aux_hidden_states", 3):
        problems.append(f"{len(aux)} ids, but vLLM makes fc for {layer.get('num_aux_hidden_states', 3)} states")
    if not found:
        problems.append("the verifier's path does not exist")
    known = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", EMBEDDING, "input_norm.weight"}
    for name in names:
        plain = LAYER + name.removeprefix(MIDLAYER) if name.startswith(MIDLAYER) else name
        if plain not in known and not plain.startswith((LAYER, "fc_norm.")):
            problems.append(f"{name} would be skipped in silence")
    return problems


def _document(config: EagleConfig, record: DrafterRecord, verifier: Path, tokens: int) -> dict[str, Any]:
    architectures = read_config(verifier).get("architectures") or ["LlamaForCausalLM"]
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    dtype = dtype_name(record.tensors.values())
    layer = {**layer_config(config), "dtype": dtype}
    if len(config.aux_layers) != 3:
        layer["num_aux_hidden_states"] = len(config.aux_layers)  # else vLLM makes fc for three
    other = config.target_hidden_size != config.hidden_size
    return {
        "speculators_model_type": TYPE,
        "architectures": ["Eagle3DraftModel"],
        "speculators_version": VERSION,
        "dtype": dtype,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size if other else None,
        **{flag: getattr(config, flag) for flag in FLAGS},
        "embed_requires_grad": False,
        IDS: list(config.aux_layers),
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": str(verifier), "architectures": architectures},
        },
        "transformer_layer_config": layer,
    }


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = value[0] if part == "0" and isinstance(value, Sequence) and value else None
    return value
