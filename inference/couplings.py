"""What a target and a draft must share, as hashes that a manifest can state, and the check that compares them.

Three identities of a directory: the target fingerprint (its weights), the tokenizer hash (how text becomes ids, and
which ids are special) and the vocabulary map hash (which token an id means). Only the last one decides whether ids may
be exchanged at all.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from draftsmith.inference.checkpoint import read_header, read_json, weight_files
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.manifest import Manifest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Keys of config.json that change with the library or the place, not with the network; dtypes are in the tensor headers.
_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "_attn_implementation_autoset"}
)
_ROLES = ("bos_token", "eos_token", "unk_token")  # the padding token never reaches a law
_BLOCK = 64  # bytes read at one place
_BLOCKS = 64  # places of one tensor: at most 4 KiB of each


class MismatchWarning(UserWarning):
    """A coupling does not hold, and decoding goes on because it stays lossless (`allow_mismatch`)."""


def target_fingerprint(directory: Path) -> str:
    """Hash of a model directory: config, tensor headers, and bytes at fixed places of every tensor; sha256 hexadecimal.

    At most 4 KiB of a tensor are read, so the cost does not grow with the model, and two fine-tunes differ. It does not
    depend on how the tensors are sharded. Limits: a change that avoids every sampled place (one row of a large table)
    is not seen.
    """
    config = {k: v for k, v in read_json(directory / "config.json").items() if k not in _VOLATILE}
    digest = hashlib.sha256(_canonical(config))
    tensors = {name: (path, t) for path in weight_files(directory) for name, t in read_header(path).items()}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {path for path, _ in tensors.values()}}
    try:
        for name, (path, tensor) in sorted(tensors.items()):
            digest.update(_canonical([name, tensor.dtype, tensor.shape]))
            for place in _places(tensor.end - tensor.start):
                digest.update(os.pread(descriptors[path], min(_BLOCK, tensor.end - tensor.start), tensor.start + place))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenizerIdentity:
    """The parts of a tokenizer that couplings compare."""

    pipeline: Mapping[str, Any]  # tokenizer.json without what use of it changes
    roles: Mapping[str, str | None]  # bos, eos, unk

    @cached_property
    def hash(self) -> str:
        """Of everything: vocabulary, merges, normaliser, special tokens and their roles."""
        return hashlib.sha256(_canonical([self.pipeline, self.roles])).hexdigest()

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token, added tokens included."""
        vocab = self.pipeline["model"]["vocab"]
        table = (
            {i: token for token, i in vocab.items()}
            if isinstance(vocab, dict)
            else {i: row[0] for i, row in enumerate(vocab)}
        )
        return table | {int(added["id"]): str(added["content"]) for added in self.pipeline["added_tokens"]}

    @cached_property
    def vocab_map_hash(self) -> str:
        return hashlib.sha256(_canonical(sorted(self.tokens.items()))).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Ids below it mean tokens (the largest id plus one)."""
        return max(self.tokens) + 1


def tokenizer_identity(directory: Path) -> TokenizerIdentity | None:
    """The identity of the tokenizer in `directory`; None when there is none. Raises InvalidValue for a damaged one."""
    pipeline_file = directory / "tokenizer.json"
    if pipeline_file.is_file():
        pipeline = read_json(pipeline_file)
    elif any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        pipeline = _convert(directory)  # an old directory without the one-file form
    else:
        return None
    model = pipeline.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
        raise InvalidValue(f"{pipeline_file} holds no vocabulary: copy the tokenizer files again")
    model = dict(model)
    if isinstance(model.get("merges"), list):  # written as "a b" or as ["a", "b"], depending on the library's version
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    kept = {k: v for k, v in pipeline.items() if k not in ("version", "truncation", "padding")}
    kept |= {
        "model": model,
        "added_tokens": sorted(pipeline.get("added_tokens") or [], key=lambda added: int(added["id"])),
    }
    return TokenizerIdentity(kept, _roles(directory))


@dataclass(frozen=True)
class Side:
    """One of the two parts that a check compares."""

    path: Path
    manifest: Manifest | None
    head_size: int  # rows of the head
    tokenizer: TokenizerIdentity | None

    @property
    def tokenizer_hash(self) -> str | None:
        stated = self.manifest and self.manifest.couplings.tokenizer_hash
        return stated or (self.tokenizer.hash if self.tokenizer else None)

    @property
    def vocab_map_hash(self) -> str | None:
        stated = self.manifest and self.manifest.couplings.vocab_map_hash
        return stated or (self.tokenizer.vocab_map_hash if self.tokenizer else None)

    @property
    def vocab_size(self) -> int:
        """Ids below it mean tokens in this part."""
        if self.manifest is not None:
            return min(self.manifest.couplings.vocab_size, self.head_size)
        return min(self.tokenizer.vocab_size, self.head_size) if self.tokenizer else self.head_size


def shared_vocabulary(target: Side, draft: Side) -> int:
    """The number of ids that mean the same token on both sides. Raises InvalidValue when any id means two things.

    Padded heads over one tokenizer are fine; a mismatch is never let through: the draft's ids would mean other tokens.
    """
    if target.vocab_map_hash is not None and draft.vocab_map_hash is not None:
        if target.vocab_map_hash != draft.vocab_map_hash:
            raise InvalidValue(
                f"draft and target vocabularies differ: {_first_difference(target, draft)}; vocabulary map hashes: "
                f"draft {draft.path} {draft.vocab_map_hash}, target {target.path} {target.vocab_map_hash}; "
                "use a draft trained with the target's tokenizer"
            )
        if target.vocab_size != draft.vocab_size:  # one head does not reach to the end of the tokenizer
            raise InvalidValue(
                f"draft and target vocabularies differ: the head of {_smaller(target, draft)} is too small for the "
                f"tokenizer ({draft.vocab_size} ids in the draft, {target.vocab_size} in the target); use another draft"
            )
    elif not {target.vocab_size, target.head_size} & {draft.vocab_size, draft.head_size}:
        raise InvalidValue(
            f"draft and target vocabularies differ: {draft.vocab_size} ids in {draft.path}, {target.vocab_size} in "
            f"{target.path}, and {_bare(target, draft)} has no tokenizer to compare; put the tokenizer files beside it"
        )
    return min(target.vocab_size, draft.vocab_size)


def lossless_mismatches(target: Side, draft: Side) -> list[str]:
    """Couplings that do not hold though the output stays the target's whatever the draft proposes; a sentence each."""
    found = []
    hashes = (target.tokenizer_hash, draft.tokenizer_hash)
    if (hashes[0] is None) != (hashes[1] is None):
        found.append(
            f"{_bare(target, draft)} has no tokenizer, so nobody can tell whether its ids mean the same tokens"
        )
    elif hashes[0] != hashes[1]:
        found.append(
            f"draft and target tokenizers differ in {_differing_parts(target, draft)} though their ids mean the same "
            f"tokens: tokenizer hash of draft {draft.path} {hashes[1]}, of target {target.path} {hashes[0]}"
        )
    stated = draft.manifest.couplings.target if draft.manifest else None
    if stated is not None:
        fingerprint = target_fingerprint(target.path)
        if fingerprint != stated.fingerprint:
            found.append(
                f"draft {draft.path} was trained for target {stated.name} with fingerprint {stated.fingerprint}, "
                f"but {target.path} has fingerprint {fingerprint}"
            )
    return found


def _first_difference(target: Side, draft: Side) -> str:
    if target.tokenizer is None or draft.tokenizer is None:
        return "their vocabulary map hashes are not the same"
    ours, theirs = target.tokenizer.tokens, draft.tokenizer.tokens
    first = next((i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)), None)
    if first is None:  # a manifest states a hash that its tokenizer files do not have
        return "a manifest states another vocabulary than its tokenizer files hold"
    return (
        f"the first differing id is {first} ({_token(theirs, first)} in the draft, {_token(ours, first)} in the target)"
    )


def _token(tokens: Mapping[int, str], i: int) -> str:
    return repr(tokens[i]) if i in tokens else "no token"


def _differing_parts(target: Side, draft: Side) -> str:
    if target.tokenizer is None or draft.tokenizer is None:
        return "their files"
    a, b = target.tokenizer, draft.tokenizer
    parts = [k for k in sorted(a.pipeline.keys() | b.pipeline.keys()) if a.pipeline.get(k) != b.pipeline.get(k)]
    roles = [
        f"{r} ({b.roles[r]!r} in the draft, {a.roles[r]!r} in the target)" for r in _ROLES if a.roles[r] != b.roles[r]
    ]
    return ", ".join(parts + roles) or "what a manifest states"


def _smaller(target: Side, draft: Side) -> Path:
    return target.path if target.vocab_size < draft.vocab_size else draft.path


def _bare(target: Side, draft: Side) -> Path:
    return draft.path if draft.vocab_map_hash is None else target.path


def _places(size: int) -> list[int]:
    """Byte offsets at which blocks are read: evenly spaced, first and last byte included."""
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    return [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]


def _roles(directory: Path) -> dict[str, str | None]:
    """Which token is bos, eos, unk; older directories keep that in special_tokens_map.json."""
    table: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            table |= {k: v for k, v in read_json(directory / name).items() if k in _ROLES and v is not None}
    return {role: _content(table.get(role)) for role in _ROLES}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _convert(directory: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidValue(
            f"{directory}: its tokenizer has no tokenizer.json form: save it with a fast tokenizer first"
        )
    converted: dict[str, Any] = json.loads(backend.to_str())
    return converted


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
