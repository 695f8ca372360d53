"""Exports of kind "ngram-table": tri-gram tables and retrieval stores as safetensors with a manifest.

Written whole or not at all; the seal re-reads the files and compares lookups with the arrays that were built.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from draftsmith.inference import checkpoint
from draftsmith.inference.couplings import TokenizerIdentity
from draftsmith.inference.drafters.ngram import NgramDrafter
from draftsmith.inference.drafters.rest import RestDrafter, RestStore
from draftsmith.inference.environment import machine, versions
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.manifest import MANIFEST_FILE, Couplings, Manifest, Provenance, Seal, SealCheck
from draftsmith.inference.ngram_table import NgramTable

KIND = "ngram-table"
TABLE, STORE = "NgramTable", "RestStore"  # the manifest's `net`
_VERSION = 1
_SEAL_KEYS = 10_000


def write_ngram(
    part: NgramTable | RestStore,
    out: Path,
    *,
    tokenizer: TokenizerIdentity | None,
    command: str,
    description: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write, seal and publish; `out` appears whole or not at all.

    tokenizer: identity of the target's tokenizer, None where there is none (ids only). description: of the corpus.
    Raises InvalidValue for a destination that must not be touched, InvalidState when the disk is full or what is read
    back is not what was written.
    """
    is_table = isinstance(part, NgramTable)
    config: dict[str, Any] = {"vocab_size": part.vocab_size, "version": _VERSION, "net": TABLE if is_table else STORE}
    if isinstance(part, NgramTable):
        config |= {"k": part.k, "corpus": {**part.description, **(description or {})}}
        arrays = {"keys": part.keys, "offsets": part.offsets, "tokens": part.tokens, "weights": part.weights}
    else:
        config |= {"span": part.span, "corpus": dict(description or {})}
        arrays = {"text": part.text, "suffixes": part.suffixes}
    made: list[Manifest] = []

    def writer(directory: Path) -> None:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, directory / checkpoint.SINGLE_FILE)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            kind=KIND,
            net=config["net"],
            config=config,
            dtype="float32",
            files=checkpoint.hash_files(directory),
            couplings=Couplings(
                vocab_size=part.vocab_size,
                tokenizer_hash=tokenizer.hash if tokenizer else None,
                vocab_map_hash=tokenizer.vocab_map_hash if tokenizer else None,
            ),
            provenance=Provenance(
                command=command,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                hardware=machine()["cpu"],
                versions=versions(),
            ),
            seal=_seal(part, directory),
        )
        (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        made.append(manifest)

    checkpoint.write_export(out, writer, overwrite=overwrite)
    return made[0]


def load_ngram(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> NgramDrafter | RestDrafter:
    """A tree drafter over the table or store; counts have no engine, dtype or device.

    Raises InvalidValue, one line, for files that are not those of one table or store.
    """
    part = read_ngram(Path(path))
    return NgramDrafter(part) if isinstance(part, NgramTable) else RestDrafter(part)


def read_ngram(directory: Path) -> NgramTable | RestStore:
    """The arrays of an export directory; those of a store are memory-mapped. Raises as `load_ngram`."""
    config = checkpoint.read_json(directory / "config.json")
    if config.get("version") != _VERSION:
        raise InvalidValue(
            f"{directory}: n-gram table version {config.get('version')!r}, this draftsmith reads version {_VERSION}: "
            "build it again"
        )
    file = directory / checkpoint.SINGLE_FILE
    try:
        if config.get("net") == TABLE:
            a = _read(file, ("keys", "offsets", "tokens", "weights"))
            return NgramTable(
                config["vocab_size"], config["k"], a["keys"], a["offsets"], a["tokens"], a["weights"], config["corpus"]
            )
        if config.get("net") == STORE:
            header = checkpoint.read_header(file)
            text = np.memmap(file, np.int32, "r", header["text"].start, header["text"].shape)
            suffixes = np.memmap(file, np.int64, "r", header["suffixes"].start, header["suffixes"].shape)
            return RestStore(config["vocab_size"], text, suffixes, config["span"])
    except KeyError as error:
        raise InvalidValue(f"{directory}: {error} is missing: the export is damaged, build it again") from None
    except InvalidValue as error:
        raise InvalidValue(f"{directory}: {error}") from None
    raise unknown_choice(f"net in {directory / 'config.json'}", config.get("net"), (TABLE, STORE))


def _read(file: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    checkpoint.read_header(file)
    with safe_open(file, framework="numpy") as opened:
        missing = [name for name in names if name not in opened.keys()]  # noqa: SIM118  # not a mapping
        if missing:
            raise KeyError(missing[0])
        return {name: opened.get_tensor(name) for name in names}


def _seal(part: NgramTable | RestStore, directory: Path) -> Seal:
    """Lookups of the files against those of the arrays. Raises InvalidState when they differ at all."""
    again = read_ngram(directory)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, part.vocab_size, (_SEAL_KEYS, 2))
    worst = 0.0
    if isinstance(part, NgramTable) and isinstance(again, NgramTable):
        if len(part):
            known = rng.integers(0, len(part), _SEAL_KEYS // 2)
            pairs[: len(known)] = part.keys[known]
        for a, b in pairs.tolist():
            (tokens, weights), (found, values) = part.row(a, b), again.row(a, b)
            if tokens != found:
                raise InvalidState(f"the table read back differs from the one built at key ({a}, {b})")
            worst = max([worst, *(abs(x - y) for x, y in zip(weights, values, strict=True))])
    elif isinstance(part, RestStore) and isinstance(again, RestStore):
        for pair in pairs[: _SEAL_KEYS // 10].tolist():
            if part.find(pair) != again.find(pair):
                raise InvalidState(f"the store read back differs from the one built at {pair}")
    check = SealCheck("float32", "the arrays that were built", worst, 0.0)
    inputs = hashlib.sha256(pairs.tobytes()).hexdigest()
    return Seal(inputs_sha256=inputs, rows=len(pairs), tokens=2, logit_scale=1.0, checks=(check,))
