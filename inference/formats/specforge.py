"""Format of SpecForge (0.2.0), read by SGLang's `LlamaForCausalLMEagle3`: EAGLE-3 with one Llama layer.

SGLang's loader skips unknown tensors and leaves missing ones uninitialised, both silently, so the writer checks all.
Ids of the target's states are its trap. Absent: hidden_states 2, L//2, L-3. Given: the OUTPUT of layer x, which is
hidden_states[x + 1]; since sgl-project/sglang #25454 only when the first id is 1, else hidden_states[x]. So they are
written where every version reads them alike (first state 2) or, elsewhere, as versions since #25454 read them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidType
from draftsmith.inference.formats.eagle import (
    NEED_TARGET,
    default_ids,
    from_midlayer,
    plain_problems,
    to_midlayer,
    values_of,
    with_map,
    without_idle_map,
)
from draftsmith.inference.formats.files import (
    dtype_name,
    layer_config,
    read_config,
    read_tensors,
    rope_of,
    write_directory,
)
from draftsmith.inference.formats.record import EMBEDDING, DrafterRecord, eagle_problems, finish, make_config, refuse
from draftsmith.inference.nets.eagle_head import EagleConfig

NAME = "specforge"
ARCHITECTURE = "LlamaForCausalLMEagle3"
IDS = "eagle_aux_hidden_state_layer_ids"


def ids_for_sglang(layers: Sequence[int]) -> list[int] | None:
    """hidden_states indices -> the ids to write; None where SGLang can be told no such ids."""
    if layers[0] == 2:
        return [i - 1 for i in layers]
    return None if layers[0] == 1 else list(layers)


def ids_from_sglang(ids: Sequence[int]) -> tuple[int, ...]:
    """The inverse: ids of a config.json -> hidden_states indices (rule since #25454)."""
    return tuple(i + 1 for i in ids) if ids[0] == 1 else tuple(ids)


def write(
    record: DrafterRecord,
    directory: Path,
    *,
    target_layers: int | None = None,
    special: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors.

    An embedding of the drafter's own is written as well, as SpecForge's HF-style export does; SGLang puts the target's
    in its place. special: bos_token_id, eos_token_id and pad_token_id of the target.
    Raises InvalidValue with every reason why SGLang could not run it, InvalidType for another kind of drafter.
    """
    config, tensors = record.fields, record.tensors
    if not isinstance(config, EagleConfig) or config.version != 3:
        raise InvalidType("the specforge format holds EAGLE-3 drafters only: EAGLE-1 goes into the format 'eagle'")
    problems = eagle_problems(config, tensors) + plain_problems(config, "SGLang")
    written: dict[str, Any] = {"architectures": [ARCHITECTURE], **layer_config(config)}
    written |= {
        "torch_dtype": dtype_name(tensors.values()),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(special or {}),
    }
    if config.fc_bias:
        written["bias"] = True
    if config.fc_norm:
        written["fc_norm"] = True
    if target_layers is None or config.aux_layers != default_ids(target_layers):
        ids = ids_for_sglang(config.aux_layers)
        if ids is None:
            problems.append(
                f"its first state is hidden_states[1], but SGLang reads ids {list(config.aux_layers)} as one layer up"
            )
        written["eagle_config"] = {"use_aux_hidden_state": True, IDS: ids}
    refuse(problems, f"the {NAME} format cannot hold this drafter")
    write_directory(directory, written, to_midlayer(with_map(config, tensors)))


def read(
    directory: Path, *, target_layers: int | None = None, allow_pickle: bool = False, strict: bool = True
) -> DrafterRecord:
    """Read a SpecForge directory. target_layers: needed only where the files leave the ids out.

    Raises InvalidValue with everything that is wrong with the directory.
    """
    stated = read_config(directory)
    tensors = without_idle_map(from_midlayer(read_tensors(directory, allow_pickle=allow_pickle)))
    values, origins = values_of(stated, tensors, 3, str(directory))
    notes, problems = rope_of(stated)[1], []
    values["fc_norm"] = any(name.startswith("fc_norm.") for name in tensors)
    ids = (stated.get("eagle_config") or {}).get(IDS)
    if stated.get("norm_output", True) is False:
        problems.append("norm_output false (no norm before the head) is not among the networks known here")
    if ids:
        values["aux_layers"], origins["aux_layers"] = ids_from_sglang(ids), "config.json"
        notes.append(f"ids {ids} were read as SGLang does since #25454: hidden_states {list(values['aux_layers'])}")
    elif target_layers is not None:
        values["aux_layers"], origins["aux_layers"] = default_ids(target_layers), "default of SGLang"
    else:
        problems.append(NEED_TARGET)
    config = make_config({"aux_layers": (2, 3, 4)} | values, problems)
    return finish(config, tensors, NAME, origins, notes, problems, str(directory), strict)


def without_embedding(record: DrafterRecord) -> DrafterRecord:
    """The drafter on the target's own embedding: for a target whose embedding is the one that the drafter brings."""
    assert isinstance(record.fields, EagleConfig)
    kept = {name: tensor for name, tensor in record.tensors.items() if name != EMBEDDING}
    return replace(record, fields=replace(record.fields, own_embedding=False), tensors=kept)
