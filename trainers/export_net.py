"""Writing a network of our own (`inference.portable`), and what its parity seal is measured against."""

import copy
from pathlib import Path

import torch
from torch import nn

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.portable import INPUT_PREFIX, PortableNet, write_net


@torch.no_grad()
def save(net: nn.Module, dtype: torch.dtype, directory: Path, inputs: Path) -> None:
    """Write the net into `directory`, and the seal's inputs and references into `inputs`.

    The references are the training pass: with the weights as trained, to be met roughly in `dtype`, and with the stored
    weights in float32, to be met tightly. Raises InvalidValue for outputs that are not finite.
    """
    from safetensors.torch import save_file

    name, served = type(net).__name__, str(dtype).removeprefix("torch.")
    net = copy.deepcopy(net).eval()
    assert isinstance(net, PortableNet)
    given = net.seal_inputs()
    references = {served: net.seal_reference(given)}
    said = {served: f"{name} as trained"}
    if not next(net.parameters()).dtype == dtype == torch.float32:
        rounded = copy.deepcopy(net)
        for parameter in rounded.parameters():  # not `.to(dtype)`, which would round buffers that no reader rounds
            parameter.data = parameter.data.to(dtype).float()
        references["float32"] = rounded.seal_reference(given)
        said["float32"] = f"{name} with the stored weights"
    references = {kind: numbers.float().cpu().contiguous() for kind, numbers in references.items()}
    if not all(bool(numbers.isfinite().all()) for numbers in references.values()):
        raise InvalidValue(f"{name}'s outputs are not finite: its weights are broken, export an earlier checkpoint")
    own = {INPUT_PREFIX + key: value.contiguous() for key, value in given.items()}
    save_file({**own, **references}, inputs, metadata=said)
    write_net(net, dtype, directory)
