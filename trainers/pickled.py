"""Weights out of a pickle, on request: the one reader of `pytorch_model.bin`, kept out of the inference package.

Found by `inference/formats/files.py` through the entry point group `draftsmith.readers`.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict saved by torch.save. `weights_only`: nothing else is unpickled, no code runs.

    Raises InvalidValue for a file that holds anything but a dictionary of tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InvalidValue(f"{path} holds more than tensors, or is damaged, and is not read: {reason:.150}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InvalidValue(f"{path} holds more than tensors: save the drafter's state dict as safetensors")
    return {str(name): tensor for name, tensor in content.items()}
