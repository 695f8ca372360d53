"""Exports of kinds "masked-lm" and "filter": masked diffusion models, and Learn2PD filters coupled to one of them."""

import warnings
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference import manifest as manifests
from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.couplings import MismatchWarning, target_fingerprint
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats.masked_lm import is_published, read_published
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig, refuse_causal
from draftsmith.inference.portable import read_net


def load_masked_lm(
    path: str | Path,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    frozen: bool = True,
) -> MaskedLM:
    """The network of an export, or of LLaDA's or Dream's published directory, packed for serving.

    frozen: False keeps the weights readable (to copy or train them), at some speed on a CPU.
    Raises InvalidValue, one line, for files that are not those of one, and for a causal network.
    """
    _native(engine)
    directory = Path(path)
    if is_published(read_json(directory / "config.json")):
        net = read_published(directory, dtype).to(device)
    else:
        net = read_net(directory, MaskedLM, MaskedLMConfig, dtype=dtype, device=device)
    refuse_causal(net)
    if frozen:
        net.pack()
    else:
        net.fuse()
    return net


def load_filter(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> CommitFilter:
    """The filter. Raises InvalidValue, one line, for files that are not those of one."""
    _native(engine)
    return read_net(Path(path), CommitFilter, FilterConfig, dtype=dtype, device=device)


def filter_settings(filter_path: str | Path, base_path: str | Path, *, strict: bool = False) -> dict[str, Any]:
    """What a filter's manifest says of how to decode with it: threshold, block length, the base's own settings.

    A filter judges one model: with another base (by fingerprint) a MismatchWarning is given, and InvalidValue raised
    when `strict`. Raises InvalidValue for an export of another kind.
    """
    manifest = manifests.read(Path(filter_path))
    if manifest is None or manifest.kind != "filter" or manifest.couplings.target is None:
        found = "no manifest" if manifest is None else f"kind {manifest.kind!r}"
        raise InvalidValue(f"{filter_path} is no commit filter ({found}): give an export of kind 'filter'")
    stated, found = manifest.couplings.target, target_fingerprint(Path(base_path))
    if stated.fingerprint != found:
        sentence = (
            f"the filter {filter_path} was trained for {stated.name} (fingerprint {stated.fingerprint:.12}), not for "
            f"{base_path} ({found:.12}): its word means little there; train one for this base"
        )
        if strict:
            raise InvalidValue(sentence)
        warnings.warn(sentence, MismatchWarning, stacklevel=2)
    return dict(manifest.couplings.decode_defaults)


def _native(engine: str) -> None:
    if engine == "hf":
        raise InvalidValue("masked models and filters have no transformers class here: leave engine at auto or native")
