"""Format of the EAGLE authors' code (SafeAILab/EAGLE, `eagle/model/cnets.py` and `cnets1.py`): EAGLE-1/2 and EAGLE-3.

Their loader is not strict: a misnamed tensor is ignored and the one that it should have been stays random, so the
writer checks names and shapes. EAGLE-3 reads fixed states of the target (hidden_states 2, L//2, L-3); the files have no
key for them. EAGLE-1 has no norm before its attention, no final norm and no head (the target's is used).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidType, InvalidValue
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
from draftsmith.inference.nets.eagle_head import EagleConfig

NAME = "eagle"
MIDLAYER, LAYER = "midlayer.", "layers.0."
NEED_TARGET = "the files do not say which states of the target it reads: give the target, whose depth decides"


def default_ids(target_layers: int) -> tuple[int, ...]:
    """What the EAGLE code, speculators, vLLM and SGLang read where ids are absent, as hidden_states indices."""
    return (2, target_layers // 2, target_layers - 3)


def to_midlayer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> those of EAGLE-3's code."""
    return {_swap(name, LAYER, MIDLAYER): tensor for name, tensor in tensors.items()}


def from_midlayer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_midlayer`."""
    return {_swap(name, MIDLAYER, LAYER): tensor for name, tensor in tensors.items()}


def with_map(config: EagleConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With d2t and t2d also where the drafter proposes every id, as this format's readers demand."""
    if "d2t" in tensors:
        return dict(tensors)
    idle = {
        "d2t": torch.zeros(config.vocab_size, dtype=torch.int64),
        "t2d": torch.ones(config.vocab_size, dtype=torch.bool),
    }
    return {**tensors, **idle}


def without_idle_map(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical: no map where it is the identity over the whole vocabulary."""
    idle = {"d2t", "t2d"} <= set(tensors) and bool(tensors["t2d"].all()) and not bool(tensors["d2t"].any())
    return {name: tensor for name, tensor in tensors.items() if not idle or name not in ("d2t", "t2d")}


def plain_problems(config: EagleConfig, reader: str) -> list[str]:
    """Settings that the plain EAGLE-3 network does not have, so that its readers would ignore them in silence."""
    found = [
        f"{name} is on, which {reader} does not read (it computes without): export to speculators instead"
        for name in ("norm_before_residual", "norm_before_fc", "norm_output")
        if getattr(config, name)
    ]
    if config.family != "llama":
        found.append(f"{reader} has Llama layers only, this drafter's is {config.family}")
    return found


def write(record: DrafterRecord, directory: Path, *, target_layers: int | None = None) -> None:
    """Write config.json and model.safetensors. target_layers: to see that EAGLE-3's fixed ids are the drafter's own.

    Raises InvalidValue with every reason why the EAGLE code could not run it, InvalidType for another kind of drafter.
    """
    config, tensors = record.fields, record.tensors
    if not isinstance(config, EagleConfig):
        raise InvalidType("the EAGLE format holds EAGLE drafters only")
    problems = eagle_problems(config, tensors) + plain_problems(config, "the EAGLE code")
    if config.fc_norm:
        problems.append("fc_norm is on, which the EAGLE code does not read: export to speculators or specforge")
    written: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **layer_config(config)}
    written |= {"torch_dtype": dtype_name(tensors.values()), "bias": config.fc_bias}
    if config.version == 3:
        problems += _fixed_ids(config, target_layers)
        if config.fc_bias:
            problems.append("fc has a bias, EAGLE-3's code has none")
        written["draft_vocab_size"] = config.draft_vocab_size
        if config.target_hidden_size != config.hidden_size:
            written["target_hidden_size"] = config.target_hidden_size
    refuse(problems, f"the {NAME} format cannot hold this drafter")
    write_directory(directory, written, to_midlayer(with_map(config, tensors)) if config.version == 3 else tensors)


def read(
    directory: Path, *, target_layers: int | None = None, allow_pickle: bool = False, strict: bool = True
) -> DrafterRecord:
    """Read EAGLE-1, -2 or -3. target_layers: depth of the target, which decides the states that it reads.

    Raises InvalidValue with everything that is wrong with the directory.
    """
    stated, raw = read_config(directory), read_tensors(directory, allow_pickle=allow_pickle)
    three = any(name.startswith(MIDLAYER) for name in raw)
    tensors = without_idle_map(from_midlayer(raw)) if three else dict(raw)
    values, origins = values_of(stated, tensors, 3 if three else 1, str(directory))
    problems: list[str] = []
    if target_layers is None:
        raise InvalidValue(f"{directory}: {NEED_TARGET}")
    values["aux_layers"] = default_ids(target_layers) if three else (target_layers,)
    origins["aux_layers"] = "fixed in the EAGLE code"
    config = make_config(values, problems)
    return finish(config, tensors, NAME, origins, rope_of(stated)[1], problems, str(directory), strict)


def values_of(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int, where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of EagleConfig but aux_layers, their origins) of a config.json of this format and canonical tensors."""
    values = sizes_of(stated, where) | {"family": "llama", "version": version}
    origins = {name: "config.json" for name in values}
    target, draft, fc = None, None, tensors.get("fc.weight")
    if version == 3:
        target, draft = stated.get("target_hidden_size"), stated.get("draft_vocab_size")
        if target is None and fc is not None and fc.shape[1] % 3 == 0:
            target, origins["target_hidden_size"] = fc.shape[1] // 3, "shape of fc.weight"
        if draft is None and "lm_head.weight" in tensors:
            draft, origins["draft_vocab_size"] = tensors["lm_head.weight"].shape[0], "shape of lm_head.weight"
    values["target_hidden_size"] = target or values["hidden_size"]
    values["draft_vocab_size"] = draft or values["vocab_size"]
    values |= {"fc_bias": "fc.bias" in tensors, "own_embedding": EMBEDDING in tensors}
    return values, origins | {"fc_bias": "tensors", "own_embedding": "tensors"}


def _fixed_ids(config: EagleConfig, target_layers: int | None) -> list[str]:
    if target_layers is None:
        return ["the EAGLE code reads fixed layers of the target: give the target, so that they can be compared"]
    fixed = default_ids(target_layers)
    if config.aux_layers == fixed:
        return []
    return [f"it reads hidden states {list(config.aux_layers)}, the EAGLE code always {list(fixed)}"]


def _swap(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
