"""Decoders by name: what each needs, whether it keeps the target's law, its settings. Drives the CLI, docs and tests.

Nothing is imported before it is asked for, so that `draftsmith --help` and this table stay cheap.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from draftsmith.inference.errors import InvalidType, InvalidValue, unknown_choice

if TYPE_CHECKING:
    from draftsmith.inference.canvas import CanvasDecoder
    from draftsmith.inference.costs import CostCurve
    from draftsmith.inference.requests import Decoder, Recorder
    from draftsmith.inference.sampling import SamplingParams


@dataclass(frozen=True)
class DecoderEntry:
    """One row of the table."""

    name: str
    summary: str
    lossless: bool  # with its default settings the output has the target's law (greedy: the target's own tokens)
    needs: tuple[str, ...]  # roles of the parts it is built from; the first is the target
    settings: str  # dotted path of a frozen dataclass
    build: str  # dotted path of a function: see `build` below
    lossy_settings: tuple[str, ...] = ()  # settings that give losslessness up when they are not at their default
    optional: tuple[str, ...] = ()  # roles of parts that it takes where they are given
    requests: str = "tokens"  # what it decodes: "tokens" (TokenRequest) or "canvas" (CanvasRequest)

    def settings_type(self) -> type[Any]:
        """The settings' dataclass; every field carries its help text in `metadata["help"]`."""
        found: type[Any] = _load(self.settings)
        return found

    def is_lossless(self, settings: Any) -> bool:
        """Whether the output keeps the target's law with these settings."""
        defaults = {f.name: f.default for f in dataclasses.fields(settings)}
        return self.lossless and all(getattr(settings, name) == defaults[name] for name in self.lossy_settings)


_DECODERS = "draftsmith.inference.decoders"

_ENTRIES = (
    DecoderEntry(
        name="autoregressive",
        summary="plain decoding: one target call per token",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.autoregressive.AutoregressiveSettings",
        build=f"{_DECODERS}.autoregressive.build",
    ),
    DecoderEntry(
        name="speculative",
        summary="a smaller model drafts a chain of tokens, one target call verifies them",
        lossless=True,
        needs=("target", "draft"),
        settings=f"{_DECODERS}.speculative.SpeculativeSettings",
        build=f"{_DECODERS}.speculative.build",
        lossy_settings=("lossy_mix",),
    ),
    DecoderEntry(
        name="prompt_lookup",
        summary="drafts are copied from what followed the same n-gram earlier in the text; no second model",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.speculative.PromptLookupSettings",
        build=f"{_DECODERS}.speculative.build_prompt_lookup",
    ),
    DecoderEntry(
        name="suffix",
        summary="drafts are the likeliest continuation of the longest suffix seen in this text or in earlier outputs",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.suffix.SuffixSettings",
        build=f"{_DECODERS}.suffix.build_suffix",
    ),
    DecoderEntry(
        name="suffix_tree",
        summary="suffix drafts with several continuations at once, verified as a tree",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.suffix.SuffixTreeSettings",
        build=f"{_DECODERS}.suffix.build_suffix_tree",
    ),
    DecoderEntry(
        name="suffix_hybrid",
        summary="suffix drafts where they promise more than a smaller model brings, else the model's",
        lossless=True,
        needs=("target", "draft"),
        settings=f"{_DECODERS}.suffix.HybridSettings",
        build=f"{_DECODERS}.suffix.build_hybrid",
        lossy_settings=("lossy_mix",),
    ),
    DecoderEntry(
        name="tree",
        summary="a draft offers a tree of continuations, one target call verifies all of its paths",
        lossless=True,
        needs=("target", "draft"),
        settings="draftsmith.inference.tree_settings.TreeSettings",
        build=f"{_DECODERS}.tree.build",
        lossy_settings=("lossy_typical",),
    ),
    DecoderEntry(
        name="aded",
        summary="a tri-gram table drafts trees and learns from what the target says; no second model",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.aded.AdedSettings",
        build=f"{_DECODERS}.aded.build",
        optional=("draft",),
    ),
    DecoderEntry(
        name="any_subset",
        summary="an any-subset model drafts several holes of a canvas and verifies them itself",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.any_subset.AnySubsetSettings",
        build=f"{_DECODERS}.any_subset.build",
        requests="canvas",
    ),
    DecoderEntry(
        name="any_subset_sequential",
        summary="one hole of a canvas a call, along the order: the baseline",
        lossless=True,
        needs=("target",),
        settings=f"{_DECODERS}.any_subset.PlainCanvasSettings",
        build=f"{_DECODERS}.any_subset.build_sequential",
        requests="canvas",
    ),
    DecoderEntry(
        name="any_subset_parallel",
        summary="all holes of a canvas at once, each from the prompt alone: one call, not the joint law",
        lossless=False,
        needs=("target",),
        settings=f"{_DECODERS}.any_subset.PlainCanvasSettings",
        build=f"{_DECODERS}.any_subset.build_parallel",
        requests="canvas",
    ),
    DecoderEntry(
        name="parallel_diffusion",
        summary="a masked diffusion model fills blocks from left to right, several tokens a pass by a rule of choice",
        lossless=False,
        needs=("target",),
        settings=f"{_DECODERS}.parallel_diffusion.ParallelDiffusionSettings",
        build=f"{_DECODERS}.parallel_diffusion.build",
        optional=("filter",),
        requests="canvas",
    ),
)

_TABLE = {entry.name: entry for entry in _ENTRIES}


def names(requests: str = "tokens") -> tuple[str, ...]:
    """The names of the decoders of one kind of requests ("tokens" or "canvas"), in the order of the table."""
    return tuple(name for name, entry in _TABLE.items() if entry.requests == requests)


def get(name: str) -> DecoderEntry:
    """A row of the table. Raises InvalidValue with the choices for an unknown name."""
    if name not in _TABLE:
        raise unknown_choice("decoder", name, _TABLE)
    return _TABLE[name]


def make_settings(name: str, settings: Mapping[str, Any] | object | None = None) -> Any:
    """A decoder's settings from a mapping (unknown names are errors), from an instance, or its defaults."""
    kind = get(name).settings_type()
    if settings is None:
        return kind()
    if isinstance(settings, kind):
        return settings
    if not isinstance(settings, Mapping):
        raise InvalidType(f"settings of decoder {name!r} must be a mapping or a {kind.__name__}, got {settings!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            if not known:
                raise InvalidValue(f"decoder {name!r} has no settings, got {key!r}")
            raise unknown_choice(f"setting of decoder {name!r}", key, known)
    wanted = get_type_hints(kind)
    for key, value in settings.items():
        allowed = (int, float) if wanted[key] is float else (wanted[key],)
        if type(value) not in allowed:  # by type and not isinstance: true is no number here
            raise InvalidValue(f"{key} of decoder {name!r} must be of type {wanted[key].__name__}, got {value!r}")
    return kind(**settings)


def build(
    name: str,
    parts: Mapping[str, Any],
    *,
    sampling: "SamplingParams | None" = None,
    settings: Mapping[str, Any] | object | None = None,
    seed: int = 0,
    tokenizer: Any | None = None,
    recorder: "Recorder | None" = None,
    costs: "CostCurve | None" = None,
    vocab_size: int | None = None,
) -> "Decoder":
    """Build a decoder from its parts by role (engines; a loaded part stands for its engine).

    Args: settings: the decoder's own dataclass or a mapping. costs: used by the decoders that choose by cost.
    vocab_size: ids that all parts share, where their heads are padded differently.
    Raises InvalidValue for an unknown name or setting, a missing or superfluous part, and a decoder of canvases.
    """
    entry, ready = _checked(name, parts, "tokens")
    decoder: Decoder = _load(entry.build)(
        ready,
        sampling=sampling,
        settings=make_settings(name, settings),
        seed=seed,
        tokenizer=tokenizer,
        recorder=recorder,
        costs=costs,
        vocab_size=vocab_size,
    )
    return decoder


def build_canvas(
    name: str,
    parts: Mapping[str, Any],
    *,
    sampling: "SamplingParams | None" = None,
    settings: Mapping[str, Any] | object | None = None,
    seed: int = 0,
) -> "CanvasDecoder":
    """Build a decoder of canvases; arguments and errors as of `build`."""
    entry, ready = _checked(name, parts, "canvas")
    decoder: CanvasDecoder = _load(entry.build)(
        ready, sampling=sampling, settings=make_settings(name, settings), seed=seed
    )
    return decoder


def _checked(name: str, parts: Mapping[str, Any], requests: str) -> tuple[DecoderEntry, dict[str, Any]]:
    """The row and its parts, unwrapped."""
    entry = get(name)
    if entry.requests != requests:
        raise InvalidValue(
            f"decoder {name!r} takes {entry.requests} requests, and {requests} were meant: choose one of "
            f"{', '.join(names(requests))}"
        )
    for role in entry.needs:
        if role not in parts:
            raise InvalidValue(
                f"decoder {name!r} needs a part in the role {role!r} (it takes {', '.join(entry.needs)})"
            )
    for role in parts:
        if role not in (*entry.needs, *entry.optional):
            raise InvalidValue(
                f"decoder {name!r} takes no part in the role {role!r} (it takes {', '.join(entry.needs)})"
            )
    return entry, {role: getattr(part, "part", part) for role, part in parts.items()}


def _load(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
