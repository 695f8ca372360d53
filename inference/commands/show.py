"""`draftsmith show EXPORT`: what an export is, what it may be used with, where it came from, how far it was proven."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from draftsmith.inference import checkpoint, manifest
from draftsmith.inference.commands._args import parser
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.manifest import KINDS, Couplings, Manifest, Provenance, Seal

_HEXADECIMAL = 12  # digits of a hash that people compare by eye; --json has all


def summary(path: Path, found: Manifest) -> str:
    """The manifest for people: one aligned line a fact."""
    weights = sum(entry.bytes for name, entry in found.files.items() if name.endswith(".safetensors"))
    rows: list[tuple[str, str]] = [
        ("export", str(path)),
        ("kind", f"{found.kind}: {KINDS[found.kind].summary}"),
        ("net", f"{found.net}, {found.dtype}, {_size(weights)} of weights, {len(found.files)} files"),
        *_couplings(found.couplings),
        *_provenance(found.provenance),
        *_metrics(found),
        *_seal(found.seal),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def main(argv: list[str]) -> int:
    made = parser(
        "show",
        "Describe an export: kind, couplings, provenance, metrics, parity seal. Checks the files against their hashes.",
        "draftsmith show exports/my-draft\ndraftsmith show exports/my-draft --json | jq .metrics",
    )
    made.add_argument("export", metavar="EXPORT", type=Path, help="directory with a manifest.json")
    made.add_argument("--json", action="store_true", help="print the manifest as it is stored")
    made.add_argument("--no-verify", action="store_true", help="compare file sizes only, not their hashes")
    given = made.parse_args(argv)
    if not given.export.is_dir():
        raise InvalidValue(f"no such directory: {given.export}")
    found = manifest.read(given.export)
    if found is None:
        raise InvalidValue(f"{given.export} has no {manifest.MANIFEST_FILE}: it is a plain directory, not an export")
    checkpoint.verify_files(given.export, found, hashes=not given.no_verify)
    print(json.dumps(dataclasses.asdict(found), indent=2) if given.json else summary(given.export, found))
    return 0


def _couplings(c: Couplings) -> Iterator[tuple[str, str]]:
    if c.tokenizer_hash is None or c.vocab_map_hash is None:
        yield "tokenizer", f"none: {c.vocab_size} bare ids"
    else:
        hashes = f"tokenizer {_short(c.tokenizer_hash)}, vocabulary map {_short(c.vocab_map_hash)}"
        yield "tokenizer", f"{c.vocab_size} ids, {hashes}"
    if c.target is not None:
        yield "target", f"{c.target.name}, fingerprint {_short(c.target.fingerprint)}"
    if c.aux_layers is not None:
        yield "reads", f"hidden states of layers {list(c.aux_layers.layers)} ({c.aux_layers.convention})"
    if c.trained:
        yield "trained", _pairs(c.trained)
    if c.decode_defaults:
        yield "defaults", _pairs(c.decode_defaults)


def _provenance(p: Provenance) -> Iterator[tuple[str, str]]:
    yield "command", p.command
    dirty = " with uncommitted changes" if p.dirty else ""
    yield "made", f"{p.created} at commit {p.git_commit or 'unknown'}{dirty} on {p.hardware}"
    known = {"steps": p.steps, "seed": p.seed, "data": p.data_fingerprint, "seconds": p.wall_seconds}
    if any(value is not None for value in known.values()):
        yield "training", _pairs({k: v for k, v in known.items() if v is not None})
    yield "versions", _pairs(p.versions)


def _metrics(found: Manifest) -> Iterator[tuple[str, str]]:
    for name, metric in found.metrics.items():
        yield name, f"{metric.value:.4g}  ({metric.definition})"


def _seal(seal: Seal | None) -> Iterator[tuple[str, str]]:
    if seal is None:
        yield "seal", "none: this export did not finish"
        return
    for check in seal.checks:
        yield (
            "seal",
            f"{check.compute_dtype}: differs by {check.max_abs_difference:.2g} from {check.reference}, tolerance "
            f"{check.tolerance:.2g} ({seal.rows} x {seal.tokens} tokens, logits up to {seal.logit_scale:.3g})",
        )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _short(digest: str) -> str:
    return digest[:_HEXADECIMAL]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
