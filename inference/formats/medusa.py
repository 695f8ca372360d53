"""Format of the Medusa authors' code (FasterDecoding/Medusa): heads over the target's last state.

Head m is a Sequential of residual blocks x + SiLU(linear(x)) and a linear without bias, so its tensors are
`{m}.{j}.linear.weight`, `{m}.{j}.linear.bias` for block j and `{m}.{layers}.weight`. In the original `[Block] * layers`
repeats ONE block: with several layers their files hold the same numbers under several names.
Shape letters: D width of the target, V vocabulary.
"""

from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats.files import (
    MEDUSA_FILE,
    dtype_name,
    read_config,
    read_tensors,
    write_directory,
)
from draftsmith.inference.formats.record import (
    DrafterRecord,
    MedusaFields,
    refuse,
    shape_problems,
    value_problems,
)

NAME = "medusa"


def medusa_shapes(fields: MedusaFields) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of such heads."""
    width, last = fields.hidden_size, fields.layers
    shapes: dict[str, tuple[int, ...]] = {}
    for m in range(fields.heads):
        for j in range(fields.layers):
            shapes |= {f"{m}.{j}.linear.weight": (width, width), f"{m}.{j}.linear.bias": (width,)}
        shapes[f"{m}.{last}.weight"] = (fields.vocab_size, width)
    return shapes


def write(record: DrafterRecord, directory: Path) -> None:
    """Write config.json and medusa_lm_head.safetensors. Raises InvalidValue with all problems, InvalidType."""
    fields = record.fields
    if not isinstance(fields, MedusaFields):
        raise InvalidType("the medusa format holds Medusa heads only")
    refuse(
        shape_problems(medusa_shapes(fields), record.tensors) + value_problems(record.tensors),
        f"the {NAME} format cannot hold this drafter",
    )
    config: dict[str, Any] = {
        "medusa_num_heads": fields.heads,
        "medusa_num_layers": fields.layers,
        "base_model_name_or_path": fields.base,
        "hidden_size": fields.hidden_size,  # not in the original: it takes them from the base model
        "vocab_size": fields.vocab_size,
        "torch_dtype": dtype_name(record.tensors.values()),
    }
    write_directory(directory, config, record.tensors, MEDUSA_FILE)


def read(directory: Path, *, allow_pickle: bool = False) -> DrafterRecord:
    """Read Medusa heads. Raises InvalidValue with everything that is wrong with the directory."""
    stated, tensors = read_config(directory), read_tensors(directory, allow_pickle=allow_pickle)
    heads, layers = stated.get("medusa_num_heads"), stated.get("medusa_num_layers")
    if not isinstance(heads, int) or not isinstance(layers, int):
        raise InvalidValue(f"{directory}: config.json lacks medusa_num_heads or medusa_num_layers")
    last = tensors.get(f"0.{layers}.weight")
    if last is None or last.dim() != 2:
        raise InvalidValue(f"{directory} has no 0.{layers}.weight: config.json says {layers} residual blocks a head")
    base = str(stated.get("base_model_name_or_path") or "")
    fields = MedusaFields(heads, layers, int(last.shape[1]), int(last.shape[0]), base)
    refuse(shape_problems(medusa_shapes(fields), tensors) + value_problems(tensors), str(directory))
    origins = {"heads": "config.json", "layers": "config.json", "hidden_size": "shape", "vocab_size": "shape"}
    return DrafterRecord(fields, tensors, NAME, origins)
