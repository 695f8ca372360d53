"""Kind "adapter": a LoRA adapter in the PEFT layout becomes an engine, by adding it into the weights of its base model.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), eq. 3: W + (alpha / r) B A. Needs no
peft. The base is found by adapter_config.json, or beside the export under its name, and taken only when it has the
fingerprint that the manifest states.
Shape letters: I, O inputs and outputs of a linear map, r rank.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from draftsmith.inference import manifest as manifests
from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.native import NativeEngine

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # how PEFT names the parameters of the wrapped model
_UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def load_adapter(path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: str = "cpu") -> Engine:
    """The base model with the adapter added in; dtype "auto" is the base's.

    Raises InvalidValue for a base that is not there or is another one than the adapter was trained on, and for
    adapters that are more than A and B matrices of linear maps.
    """
    directory = Path(path)
    settings = read_json(directory / SETTINGS_FILE)
    strange = [name for name in _UNKNOWN if settings.get(name)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or strange:
        raise InvalidValue(
            f"{directory / SETTINGS_FILE}: only plain LoRA is known here ({', '.join(strange)}): use peft"
        )
    part = load_engine(base_of(directory, settings), engine=engine, dtype=dtype, device=device, frozen=False)
    net: nn.Module = part.net if isinstance(part, NativeEngine) else part.model  # type: ignore[attr-defined]  # HFEngine
    scale = float(settings["lora_alpha"]) / int(settings["r"])
    for name, a, b in _pairs(directory / WEIGHTS_FILE):
        _add(net, name, (b.float() @ a.float()) * scale, directory)
    if isinstance(part, NativeEngine):
        part.net.pack()
    return part


def base_of(directory: Path, settings: Mapping[str, Any]) -> Path:
    """The directory of the base model. Raises InvalidValue when it is not there, or not the one of the manifest."""
    manifest = manifests.read(directory)
    stated = manifest.couplings.target if manifest else None
    if stated is None:
        raise InvalidValue(f"{directory} states no base model: it is no export of draftsmith, load it with peft")
    places = (Path(str(settings.get("base_model_name_or_path"))), directory.absolute().parent / stated.name)
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise InvalidValue(
            f"{directory} is an adapter for {stated.name}, which is neither at {places[0]} nor at {places[1]}: put it "
            "there, or export the run again without --adapter"
        )
    found = target_fingerprint(base)
    if found != stated.fingerprint:
        raise InvalidValue(
            f"{directory} is an adapter for {stated.name} with fingerprint {stated.fingerprint}, but {base} has "
            f"fingerprint {found}: give the base model that it was trained on"
        )
    return base


def _pairs(path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name of a linear map, A [r, I], B [O, r]) of every adapted map."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = set(file.keys())
        for name in sorted(names):
            if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise InvalidValue(f"{path}: {name} is no A or B matrix of a linear map: load it with peft")
            if name.endswith(".lora_A.weight"):
                other = name.replace(".lora_A.weight", ".lora_B.weight")
                if other not in names:
                    raise InvalidValue(f"{path}: {other} is missing: export the run again")
                plain = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                yield plain, file.get_tensor(name), file.get_tensor(other)


@torch.no_grad()
def _add(net: nn.Module, name: str, change: Tensor, directory: Path) -> None:
    """weight += change [O, I], summed in float32."""
    try:
        module = net.get_submodule(name)
        weight = dict(module.named_parameters(recurse=False))["weight"]
    except (AttributeError, KeyError) as error:
        raise InvalidValue(f"{directory}: the base model has no linear map {name}") from error
    if type(module).__name__ == "Conv1D":  # GPT-2 holds its maps transposed
        change = change.T
    if weight.shape != change.shape:
        raise InvalidValue(f"{directory}: {name} is {list(weight.shape)} in the base, {list(change.shape)} here")
    weight.copy_(weight.float() + change.to(weight.device))
