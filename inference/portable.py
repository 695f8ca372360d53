"""Networks of our own as exports: config.json, safetensors, and the replay that their parity seal compares.

A net that trains as the very class that is served (contract 1) offers five things and needs no writer, loader or seal
of its own; see `PortableNet`. A kind's `load` function in manifest.KINDS calls `read_net` with its two classes.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftsmith.inference import checkpoint
from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.config_json import read_config

INPUT_PREFIX = "input."  # of the seal's inputs among the arrays of its file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@runtime_checkable
class PortableNet(Protocol):
    """What an `nn.Module` of ours offers to be exported as it is."""

    WHAT: ClassVar[str]  # for people: "an any-subset model"
    config: Any  # a frozen dataclass of plain values: everything that decides the network's function

    @property
    def spec(self) -> EngineSpec:
        """Its sizes; vocab_size is the number of ids that it knows."""
        ...

    def seal_inputs(self) -> dict[str, Tensor]:
        """Fixed inputs, the same for the same sizes on every machine (rng.uniform); the first axis is the batch."""
        ...

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the training pass makes of them."""
        ...

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same numbers along the path that decoders use: with its cache, in steps, rolled back."""
        ...


Net = TypeVar("Net", bound=nn.Module)


def write_net(net: nn.Module, dtype: torch.dtype, directory: Path) -> None:
    """config.json and model.safetensors of a PortableNet, floating-point tensors stored as `dtype`."""
    assert isinstance(net, PortableNet)
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # a tied matrix is stored once
            seen.add(id(tensor))
            value = tensor.detach().cpu()
            stored[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
    save_file(stored, directory / checkpoint.SINGLE_FILE)
    config = {
        "architectures": [type(net).__name__],
        "vocab_size": net.spec.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "net": dataclasses.asdict(net.config),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_net(
    directory: Path, net: type[Net], config: type[Any], *, dtype: str = "auto", device: torch.device | str = "cpu"
) -> Net:
    """The net of an export directory, in eval mode and frozen, every tensor by its name.

    Args: dtype: to compute in; "auto": as the weights are stored.
    Raises InvalidValue, one line, for a configuration or tensors that are not those of such a net.
    """
    stated = checkpoint.read_json(directory / "config.json")
    where = f"{directory}/config.json"
    if not isinstance(stated.get("net"), dict):
        raise InvalidValue(f"{where} describes no network of ours (key 'net'): export the run again")
    what = getattr(net, "WHAT", net.__name__)
    made = net(read_config(config, stated["net"], what, where))
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.weight_files(directory):
        tensors |= load_file(file)
    fill(made, tensors, f"{directory}, {what}")
    wanted = DTYPES[str(stated.get("dtype", "float32")) if dtype == "auto" else dtype]
    made = made.to(device=device, dtype=wanted).eval().requires_grad_(False)
    fuse = getattr(made, "fuse", None)
    if callable(fuse):
        fuse()
    return made


def fill(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load `tensors` into `net`, every one by its name; of tied ones one name is enough.

    Raises InvalidValue that names what is missing, unknown or misshapen.
    """
    places = net.state_dict(keep_vars=True)
    given = {id(places[name]) for name in tensors if name in places}
    lacking = [name for name, place in places.items() if id(place) not in given]
    for fault, names in (("lacks", lacking), ("holds unknown", sorted(set(tensors) - set(places)))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InvalidValue(f"{where}: {fault} {', '.join(names[:3])}{more}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise InvalidValue(f"{where}: {name} is {list(tensor.shape)}, must be {list(places[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
