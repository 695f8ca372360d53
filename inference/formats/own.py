"""Our own form of an EAGLE drafter: `draftsmith export` writes it, with the manifest and the parity seal.

config.json holds `EagleConfig.to_json()` under "eagle"; tensors have their canonical names.
"""

from pathlib import Path

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats.files import read_config, read_tensors
from draftsmith.inference.formats.record import DrafterRecord, eagle_problems, refuse
from draftsmith.inference.nets.eagle_head import EagleConfig

NAME = "draftsmith"


def read(directory: Path) -> DrafterRecord:
    """Read one. Raises InvalidValue with everything that is wrong with the directory."""
    stated = read_config(directory).get("eagle")
    if not isinstance(stated, dict):
        raise InvalidValue(f"{directory}: config.json has no 'eagle': it is no EAGLE drafter of ours")
    config = EagleConfig.from_json(stated, f"{directory}/config.json")
    tensors = read_tensors(directory)
    refuse(eagle_problems(config, tensors), str(directory))
    return DrafterRecord(config, tensors, NAME, {name: "config.json" for name in stated})
