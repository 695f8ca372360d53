"""Our own form of an EAGLE drafter: `draftsmith export` writes it, with the manifest and the parity seal.

config.json holds `EagleConfig.to_json()` under "eagle"; tensors have their canonical names. `write` makes the same
files without a seal, for a drafter that was corrected (`draftsmith diagnose --write-fixed`).
"""

from pathlib import Path

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats.files import dtype_name, read_config, read_tensors, write_directory
from draftsmith.inference.formats.record import DrafterRecord, eagle_problems, finish, refuse
from draftsmith.inference.nets.eagle_head import EagleConfig

NAME = "draftsmith"


def read(directory: Path, *, strict: bool = True) -> DrafterRecord:
    """Read one. Raises InvalidValue with everything that is wrong with the directory."""
    stated = read_config(directory).get("eagle")
    if not isinstance(stated, dict):
        raise InvalidValue(f"{directory}: config.json has no 'eagle': it is no EAGLE drafter of ours")
    config = EagleConfig.from_json(stated, f"{directory}/config.json")
    tensors = read_tensors(directory)
    return finish(config, tensors, NAME, dict.fromkeys(stated, "config.json"), [], [], str(directory), strict)


def write(record: DrafterRecord, directory: Path) -> None:
    """Write config.json and model.safetensors. Raises InvalidType for another kind of drafter."""
    config = record.fields
    if not isinstance(config, EagleConfig):
        raise InvalidType("our own format of a drafter holds EAGLE heads only")
    refuse(eagle_problems(config, record.tensors), "this drafter cannot be written")
    dtype = dtype_name(record.tensors.values())
    write_directory(
        directory, {"architectures": ["EagleHead"], "dtype": dtype, "eagle": config.to_json()}, record.tensors
    )
