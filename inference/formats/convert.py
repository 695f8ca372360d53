"""From any drafter format to any other that can hold the same drafter: read, check, write, read back, compare."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference import checkpoint, manifest
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.formats import eagle, hf_assistant, medusa, own, specforge, speculators
from draftsmith.inference.formats.detect import detect
from draftsmith.inference.formats.record import DrafterRecord, LMFields
from draftsmith.inference.nets.eagle_head import EagleConfig

FORMATS: dict[str, str] = {
    own.NAME: "ours: config.json of the net, canonical tensor names, manifest",
    speculators.NAME: "EAGLE-3 for vLLM (speculators 0.9.0)",
    specforge.NAME: "EAGLE-3 for SGLang (SpecForge 0.2.0)",
    eagle.NAME: "EAGLE-1/2/3 of the authors' code",
    medusa.NAME: "Medusa heads of the authors' code",
    hf_assistant.NAME: "a language model for transformers' generate(assistant_model=...)",
}
WRITABLE = tuple(name for name in FORMATS if name != own.NAME)  # ours is written by draftsmith export, with its seal


def read_drafter(
    path: str | Path,
    *,
    target: str | Path | None = None,
    target_layers: int | None = None,
    format: str | None = None,
    allow_pickle: bool = False,
    strict: bool = True,
) -> DrafterRecord:
    """Read a drafter of any format: its configuration and tensors under canonical names, as stored.

    Args: target: directory of the target, or target_layers its depth: several formats leave out which of the target's
    states a drafter reads, and its depth decides. format: a row of FORMATS; None: detected. strict:
    False keeps problems of an EAGLE head that can be computed all the same in the record.
    Raises InvalidValue with everything that is wrong, or with the evidence where the format is not clear.
    """
    directory = Path(path)
    if format is not None and format not in FORMATS:
        raise unknown_choice("drafter format", format, FORMATS)
    name = format or detect(directory, allow_pickle=allow_pickle).format
    depth = target_layers if target is None else depth_of(Path(target))
    if name == own.NAME:
        return own.read(directory, strict=strict)
    if name == medusa.NAME:
        return medusa.read(directory, allow_pickle=allow_pickle)
    if name == hf_assistant.NAME:
        return hf_assistant.read(directory, allow_pickle=allow_pickle)
    reader = {eagle.NAME: eagle.read, specforge.NAME: specforge.read, speculators.NAME: speculators.read}[name]
    record = reader(directory, target_layers=depth, allow_pickle=allow_pickle, strict=strict)
    _check_depth(record, depth, directory)
    return record


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    target: str | Path | None = None,
    format: str | None = None,
    measured: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> DrafterRecord:
    """Write the drafter in `source` as format `to` into the directory `out`, which appears whole or not at all.

    What was written is read back and must be bit-equal. A manifest beside the source goes with it: its couplings and
    its parity seal hold for the same numbers under other names. measured: decoder settings found best; default: the
    manifest's. Raises InvalidValue with every reason why the format cannot hold the drafter.
    """
    if to not in WRITABLE:
        raise unknown_choice("format to write", to, WRITABLE)
    directory = Path(source)
    record = read_drafter(directory, target=target, format=format, allow_pickle=allow_pickle)
    if isinstance(record.fields, LMFields) != (to == hf_assistant.NAME):
        raise InvalidValue(f"{directory} has the format {record.format!r}, which cannot become {to!r}: another network")
    stated = manifest.read(directory)
    best = dict(measured if measured is not None else stated.couplings.decode_defaults if stated else {})

    def writer(place: Path) -> None:
        _write(record, directory, place, to, None if target is None else Path(target), best)
        if stated is not None:
            hashed = replace(stated, files=checkpoint.hash_files(place))
            (place / manifest.MANIFEST_FILE).write_text(hashed.to_json(), encoding="utf-8")
        _read_back(record, place, to, target)

    checkpoint.write_export(Path(out), writer, overwrite=overwrite)
    return record


def depth_of(target: Path) -> int:
    """Number of layers of a target's directory. Raises InvalidValue where config.json does not say."""
    config = checkpoint.read_json(target / "config.json")
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(name), int):
            return int(config[name])
    raise InvalidValue(f"{target}: config.json does not state the number of layers: it is no target")


def _write(
    record: DrafterRecord, source: Path, place: Path, to: str, target: Path | None, best: Mapping[str, Any]
) -> None:
    depth = None if target is None else depth_of(target)
    if to == hf_assistant.NAME:
        hf_assistant.write(source, place, measured=best)
    elif to == medusa.NAME:
        medusa.write(record, place)
    elif to == eagle.NAME:
        eagle.write(record, place, target_layers=depth)
    elif to == specforge.NAME:
        config = {} if target is None else checkpoint.read_json(target / "config.json")
        special = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
        specforge.write(record, place, target_layers=depth, special=special)
    else:
        speculators.write(record, place, verifier=target, speculative_tokens=int(best.get("draft_length", 5)))


def _read_back(record: DrafterRecord, place: Path, to: str, target: str | Path | None) -> None:
    again = read_drafter(place, target=target, format=to)
    same = set(again.tensors) == set(record.tensors) and all(
        again.tensors[name].dtype == tensor.dtype and torch.equal(again.tensors[name], tensor)
        for name, tensor in record.tensors.items()
    )
    if not same or (isinstance(record.fields, EagleConfig) and again.fields != record.fields):
        raise InvalidState(f"what was written as {to!r} does not read back as the same drafter: nothing was written")


def _check_depth(record: DrafterRecord, depth: int | None, directory: Path) -> None:
    if depth is None or not isinstance(record.fields, EagleConfig):
        return
    outside = [i for i in record.fields.aux_layers if not 0 <= i <= depth]
    if outside:
        raise InvalidValue(
            f"{directory} reads hidden states {list(record.fields.aux_layers)}, but the target has {depth} layers: "
            f"{outside} are outside 0..{depth}"
        )
