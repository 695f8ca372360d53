"""`load`: a directory becomes a part of a decoder, or one line says why not. Never a pickle, never remote code."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference import manifest as manifests
from draftsmith.inference.checkpoint import is_unfinished, read_json, refuse_pickles, verify_files
from draftsmith.inference.couplings import (
    MismatchWarning,
    Side,
    TokenizerIdentity,
    lossless_mismatches,
    shared_vocabulary,
    tokenizer_identity,
)
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidType, InvalidValue, unknown_choice

PLAIN_KIND = "lm"  # what a Hugging Face directory without a manifest is taken for


@dataclass(frozen=True)
class LoadedPart:
    """A loaded export or model directory. The tokenizer is read when it is first asked for."""

    path: Path
    kind: str  # a row of manifest.KINDS
    part: Engine
    manifest: manifests.Manifest | None  # None: a plain Hugging Face directory

    @cached_property
    def tokenizer(self) -> Any | None:
        """The transformers tokenizer from the directory's own files; None when it has none."""
        if self.identity is None:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # the tokenizers library raises Exception itself for files that it cannot read; other bugs pass through
            if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | TypeError):
                raise
            reason = " ".join(str(error).split())
            raise InvalidValue(f"{self.path}: its tokenizer cannot be loaded: {reason:.200}") from error

    @cached_property
    def identity(self) -> TokenizerIdentity | None:
        """What couplings compare of the tokenizer."""
        return tokenizer_identity(self.path)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids as transformers' generate takes them: generation_config.json, else config.json."""
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).is_file():
                found = read_json(self.path / name).get("eos_token_id")
                if found is not None:
                    return tuple(int(i) for i in found) if isinstance(found, list) else (int(found),)
        return ()

    @property
    def vocab_size(self) -> int:
        """Ids below it mean tokens; the head may be padded above. Decode over these alone (`registry.build`)."""
        return self.side.vocab_size

    @property
    def side(self) -> Side:
        """This part as couplings see it."""
        return Side(self.path, self.manifest, self.part.spec.vocab_size, self.identity)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    engine: str = "auto",
    verify: bool = True,
    sealing: bool = False,
) -> LoadedPart:
    """Load an export (by the kind in its manifest) or a plain Hugging Face directory (as kind "lm").

    Args:
        dtype: "float32", "bfloat16", "float16"; None computes in the dtype of the stored weights.
        engine: "native", "hf" (adapter over the transformers class), or "auto": native where there is a native net.
        verify: compare the sha256 of every file with the manifest; False compares sizes only. Plain directories have no
            hashes: their headers are checked against the file sizes.
        sealing: for the exporter alone: accept a directory that is still being written and has no parity seal yet.
    Raises InvalidValue or InvalidType (one line) for whatever cannot be loaded safely.
    """
    directory = _directory(Path(path), sealing=sealing)
    if dtype is not None and dtype not in manifests.DTYPES:
        raise unknown_choice("dtype", dtype, manifests.DTYPES)
    _check_device(device)
    manifest = manifests.read(directory)
    if manifest is not None:
        if manifest.seal is None and not sealing:
            raise InvalidValue(f"{directory} has no parity seal: its export did not finish, export the run again")
        verify_files(directory, manifest, hashes=verify)
    kind = manifests.KINDS[manifest.kind if manifest else _plain_kind(directory)]
    if not (directory / kind.config).is_file():
        refuse_pickles(directory)
        raise InvalidValue(
            f"{directory} holds neither {manifests.MANIFEST_FILE} nor {kind.config}: not an export, not a model"
        )
    module, _, function = kind.load.partition(":")
    loader: Callable[..., Engine] = getattr(importlib.import_module(module), function)
    part = loader(directory, engine=engine, dtype=dtype or "auto", device=device)
    return LoadedPart(directory, kind.name, part, manifest)


def kind_of(path: str | Path) -> str:
    """The kind that `load` would make of a directory, without loading it. Raises InvalidValue where there is none."""
    directory = _directory(Path(path), sealing=False)
    manifest = manifests.read(directory)
    return manifest.kind if manifest is not None else _plain_kind(directory)


def check_role(part: LoadedPart, role: str) -> None:
    """Refuse a part in a role that its kind does not play. Raises InvalidType."""
    kind = manifests.KINDS[part.kind]
    if role not in kind.roles:
        raise InvalidType(
            f"{part.path} is of kind {kind.name!r} ({kind.summary}): it can be {' or '.join(kind.roles)}, not {role}"
        )


def check_pair(target: LoadedPart, draft: LoadedPart, allow_mismatch: bool = False) -> int:
    """Check that `draft` may propose tokens for `target`; returns how many ids they share (padded heads are cut there).

    A plain language model couples to tokenizer and vocabulary only; a drafter also to the target that its manifest
    states. allow_mismatch: a broken coupling that leaves the output exact becomes a MismatchWarning; two meanings of
    one id never do.
    Raises InvalidValue or InvalidType, one line that names both hashes and what to do.
    """
    check_role(target, "target")
    check_role(draft, "draft")
    shared = shared_vocabulary(target.side, draft.side)
    for sentence in lossless_mismatches(target.side, draft.side):
        if not allow_mismatch:
            raise InvalidValue(
                f"{sentence}; use a draft made for this target, or go on with --allow-mismatch "
                "(the output stays exact, fewer tokens may be accepted)"
            )
        warnings.warn(
            f"{sentence}; the output stays exact, fewer tokens may be accepted", MismatchWarning, stacklevel=2
        )
    return shared


def _plain_kind(directory: Path) -> str:
    """The kind of a directory without a manifest: an EAGLE head of another engine, an XLNet, or a language model."""
    if not (directory / "config.json").is_file():
        return PLAIN_KIND
    config = read_json(directory / "config.json")
    if config.get("model_type") == "xlnet":
        return "any-subset-lm"
    if config.get("model_type") in ("llada", "Dream"):
        return "masked-lm"
    eagle = "speculators_model_type" in config or isinstance(config.get("eagle"), dict)
    return "eagle" if eagle or any("Eagle3" in str(name) for name in config.get("architectures") or ()) else PLAIN_KIND


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = " ".join(str(error).split())
        raise InvalidValue(f"device {device!r} cannot be used here ({reason:.150}): take cpu") from error


def _directory(path: Path, *, sealing: bool) -> Path:
    if path.is_file():
        if path.suffix in manifests.PICKLE_SUFFIXES:
            raise InvalidValue(f"{path} is a pickle, which can run code when it is read: give a safetensors directory")
        raise InvalidValue(f"{path} is a file: give the directory that holds it")
    if not path.is_dir():
        raise InvalidValue(f"no such directory: {path} (exports and models are loaded from local directories only)")
    if is_unfinished(path) and not sealing:
        raise InvalidValue(f"{path} is an export that did not finish: remove it and export the run again")
    return path
