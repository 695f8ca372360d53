"""The manifest of an export: what it is, what it may be used with, where it came from, and how far it was proven.

One file, `manifest.json`, schema-versioned and strictly read: an unknown key, a missing key, a wrong type or another
schema version is an error of one line, never a guess. Kinds are a table (contract 10): a later kind adds one row to
`KINDS` and a function that loads it.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from draftsmith.inference.errors import InvalidValue, unknown_choice

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DTYPES = ("float32", "bfloat16", "float16")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kind:
    """One row of the kinds registry."""

    name: str
    summary: str
    roles: tuple[str, ...]  # roles in a decoder that such an export may play
    couplings: tuple[str, ...]  # fields of `Couplings` that the manifest must state (not null)
    load: str  # "module:function"; function(path, *, engine, dtype, device) -> the part that decoders take
    config: str = "config.json"  # the file of the net's own configuration
    requests: str = "tokens"  # what its decoders take as a target: "tokens" or "canvas" (DecoderEntry.requests)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "lm",
            "a causal language model: a target, or a draft for any target of the same tokenizer",
            ("target", "draft"),
            ("vocab_size",),
            "draftsmith.inference.load_engine:load_engine",
        ),
        Kind(
            "drafter",
            "a draft trained for one target",
            ("draft",),
            ("vocab_size", "target"),
            "draftsmith.inference.load_engine:load_engine",
        ),
        Kind(
            "adapter",
            "a LoRA adapter in the PEFT layout: with the base model that it names, a target",
            ("target",),
            ("vocab_size", "target"),
            "draftsmith.inference.load_adapter:load_adapter",
            config="adapter_config.json",  # with a config.json beside it transformers would look for a whole model
        ),
        Kind(
            "eagle",
            "an EAGLE head: drafts chains and trees from the states of one target",
            ("draft",),
            ("vocab_size", "target", "aux_layers"),
            "draftsmith.inference.load_eagle:load_eagle",
        ),
        Kind(
            "any-subset-lm",
            "an any-subset autoregressive model: fills holes anywhere and scores whole completions",
            ("target",),
            ("vocab_size",),
            "draftsmith.inference.load_any_subset:load_any_subset",
            requests="canvas",
        ),
        Kind(
            "ngram-table",
            "counts of a corpus: a tri-gram table (decoders aded, tree) or a retrieval store (decoder tree)",
            ("draft",),
            ("vocab_size",),
            "draftsmith.inference.load_ngram:load_ngram",
        ),
        Kind(
            "image-tokenizer",
            "images as codes and back: what image models speak",
            ("tokenizer",),
            ("vocab_size",),
            "draftsmith.inference.load_image:load_image_tokenizer",
        ),
        Kind(
            "distilled-decoder",
            "noise to the whole code sequence of an image model, in one pass or two",
            ("target",),
            ("vocab_size",),
            "draftsmith.inference.load_image:load_distilled",
        ),
        Kind(
            "image-ar",
            "an autoregressive model over the codes of an image",
            ("target",),
            ("vocab_size",),
            "draftsmith.inference.load_image:load_image_ar",
        ),
        Kind(
            "masked-lm",
            "a masked diffusion language model: fills the holes of canvases",
            ("target",),
            ("vocab_size",),
            "draftsmith.inference.load_masked:load_masked_lm",
            requests="canvas",
        ),
        Kind(
            "filter",
            "a commit filter (Learn2PD): says which predictions of one masked diffusion model are final",
            ("filter",),
            ("vocab_size", "target"),
            "draftsmith.inference.load_masked:load_filter",
        ),
    )
}


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the export."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class TargetCoupling:
    """The target that a drafter was trained for."""

    fingerprint: str  # couplings.target_fingerprint
    name: str  # for people: the directory's name


@dataclass(frozen=True)
class AuxLayers:
    """Hidden states of the target that a feature drafter reads."""

    layers: tuple[int, ...]
    convention: str  # "after": state after layer i, 0 = the embeddings (Engine.forward's aux_layers)


@dataclass(frozen=True)
class Couplings:
    """What the export may be used with. Tokenizer fields are null only where no tokenizer was exported (ids only)."""

    vocab_size: int  # ids below it mean tokens; the head may be padded above it
    tokenizer_hash: str | None = None
    vocab_map_hash: str | None = None
    target: TargetCoupling | None = None
    aux_layers: AuxLayers | None = None
    trained: dict[str, Any] = field(default_factory=dict)  # ranges seen in training, for example {"max_length": 2048}
    decode_defaults: dict[str, Any] = field(default_factory=dict)  # decoder settings chosen by measurement


@dataclass(frozen=True)
class Provenance:
    """How the weights came to be. Null means unknown, not "default"."""

    command: str
    created: str  # ISO 8601, UTC
    hardware: str
    versions: dict[str, str]
    git_commit: str | None = None
    dirty: bool | None = None  # uncommitted changes at training time
    seed: int | None = None
    steps: int | None = None
    data_fingerprint: str | None = None
    wall_seconds: float | None = None


@dataclass(frozen=True)
class Metric:
    """A figure with its definition, so that nobody compares unlike things."""

    value: float
    definition: str


@dataclass(frozen=True)
class SealCheck:
    """One comparison of the parity seal."""

    compute_dtype: str  # in which the inference package computed
    reference: str  # what computed the other side
    max_abs_difference: float
    tolerance: float


@dataclass(frozen=True)
class Seal:
    """The parity seal (contract 1): the training class against a fresh process that decodes the export with a cache."""

    inputs_sha256: str
    rows: int
    tokens: int  # per row
    logit_scale: float  # largest |logit| of the reference
    checks: tuple[SealCheck, ...]


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`. `seal` is null only while the export is being written; `load` refuses that."""

    kind: str
    net: str  # class name; the architecture of an HF directory
    config: dict[str, Any]  # the net's own configuration
    dtype: str  # of the stored weights
    files: dict[str, FileEntry]  # every file but this one, by path below the directory
    couplings: Couplings
    provenance: Provenance
    metrics: dict[str, Metric] = field(default_factory=dict)
    seal: Seal | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _validate(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def loads(text: str, where: str = MANIFEST_FILE) -> Manifest:
    """Parse and check a manifest. Raises InvalidValue, one line that starts with `where`."""
    try:
        raw = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{where}: not valid JSON ({error}): the export is damaged, export it again") from None
    if not isinstance(raw, dict):
        raise InvalidValue(f"{where}: must be a JSON object, got {type(raw).__name__}")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InvalidValue(
            f"{where}: schema version {version!r}, this draftsmith reads version {SCHEMA_VERSION}: "
            "install the draftsmith that wrote it, or export the run again with this one"
        )
    try:
        manifest = _parse(Manifest, raw, "")
    except InvalidValue as error:
        raise InvalidValue(f"{where}: {error}") from None
    assert isinstance(manifest, Manifest)
    return manifest


def read(directory: Path) -> Manifest | None:
    """The manifest of an export directory, None where there is none. Raises InvalidValue for a damaged one."""
    path = directory / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path}: not UTF-8 text ({error}): the export is damaged, export it again") from None
    return loads(text, str(path))


def _validate(m: Manifest) -> None:
    if m.kind not in KINDS:
        raise unknown_choice("manifest kind", m.kind, KINDS)
    if m.schema_version != SCHEMA_VERSION:
        raise InvalidValue(f"schema_version must be {SCHEMA_VERSION}, got {m.schema_version}")
    if m.dtype not in DTYPES:
        raise unknown_choice("dtype", m.dtype, DTYPES)
    for name, entry in m.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or name.startswith("/") or name == MANIFEST_FILE:
            raise InvalidValue(f"files: {name!r} is not a plain path below the export directory")
        if name.endswith(PICKLE_SUFFIXES):
            raise InvalidValue(f"files: {name!r} is a pickle, which can run code; exports hold safetensors only")
        if not _SHA256.fullmatch(entry.sha256) or entry.bytes < 0:
            raise InvalidValue(f"files.{name}: wants 64 hexadecimal digits and a size >= 0, got {entry}")
    couplings = m.couplings
    missing = [name for name in KINDS[m.kind].couplings if getattr(couplings, name) is None]
    if missing:
        raise InvalidValue(f"couplings: kind {m.kind!r} must state {', '.join(missing)}")
    if couplings.vocab_size < 1:
        raise InvalidValue(f"couplings.vocab_size must be at least 1, got {couplings.vocab_size}")
    if (couplings.tokenizer_hash is None) != (couplings.vocab_map_hash is None):
        raise InvalidValue("couplings: tokenizer_hash and vocab_map_hash are stated together or not at all")
    if couplings.tokenizer_hash is None and any(name.startswith("tokenizer") for name in m.files):
        raise InvalidValue("couplings: the export carries a tokenizer but does not state tokenizer_hash")
    if m.seal is not None:
        if not m.seal.checks:
            raise InvalidValue("seal: holds no comparison")
        for check in m.seal.checks:
            if not check.max_abs_difference <= check.tolerance:
                raise InvalidValue(
                    f"seal: difference {check.max_abs_difference:g} is over its tolerance {check.tolerance:g}"
                )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result


def _parse(kind: Any, value: object, where: str) -> Any:
    """Build `kind` (dataclass, tuple[X, ...], dict[str, X], X | None, scalar or Any) from plain JSON, strictly."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        inner = next(a for a in args if a is not NoneType)
        return None if value is None else _parse(inner, value, where)
    if origin is tuple:
        items = _expect(value, list, where)
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        entries = _expect(value, dict, where)
        return {name: _parse(args[1], item, _join(where, name)) for name, item in entries.items()}
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, _expect(value, dict, where), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):  # 1e999 parses as infinity
        raise InvalidValue(f"{where} must be a finite number, got {value}")
    return _expect(value, kind, where)


def _parse_dataclass(kind: Any, raw: dict[str, Any], where: str) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(raw) - names)
    if unknown:
        error = unknown_choice("key", _join(where, unknown[0]), [_join(where, name) for name in names])
        raise InvalidValue(f"{error}")
    missing = sorted(names - set(raw))
    if missing:
        raise InvalidValue(f"missing key {_join(where, missing[0])!r}")
    hints = get_type_hints(kind)
    return kind(**{name: _parse(hints[name], item, _join(where, name)) for name, item in raw.items()})


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def _expect(value: object, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidValue(f"{where} must be {_NAMES[kind]}, got {value!r:.60}")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
