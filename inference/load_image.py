"""Exports of kinds "image-tokenizer", "image-ar" and "distilled-decoder" become the nets that they trained as."""

import hashlib
from pathlib import Path

import torch

from draftsmith.inference.checkpoint import sha256, weight_files
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.loader import load
from draftsmith.inference.nets.distilled import DistilledConfig, DistilledDecoder
from draftsmith.inference.nets.image_ar import ImageAR, ImageARConfig
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from draftsmith.inference.portable import read_net


def load_image_tokenizer(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> ImageTokenizer:
    """Raises InvalidValue, one line, for files that are not those of one image tokenizer."""
    _native(engine)
    return read_net(Path(path), ImageTokenizer, ImageTokenizerConfig, dtype=dtype, device=device)


def load_image_ar(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> ImageAR:
    """Raises InvalidValue, one line, for files that are not those of one image model."""
    _native(engine)
    return read_net(Path(path), ImageAR, ImageARConfig, dtype=dtype, device=device)


def load_distilled(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> DistilledDecoder:
    """Raises InvalidValue, one line, for files that are not those of one distilled decoder."""
    _native(engine)
    return read_net(Path(path), DistilledDecoder, DistilledConfig, dtype=dtype, device=device)


def load_tokenizer(directory: str | Path) -> tuple[ImageTokenizer, str]:
    """(the frozen tokenizer, the hash of its weights). Raises InvalidValue for an export of another kind."""
    part = load(directory)
    net = part.part
    if not isinstance(net, ImageTokenizer):
        raise InvalidValue(f"{directory} is of kind {part.kind!r}: give an export of kind 'image-tokenizer'")
    return net, tokenizer_hash(Path(directory))


def tokenizer_hash(directory: Path) -> str:
    """What a model's config and pairs remember of their tokenizer: the sha256 of its weights."""
    return hashlib.sha256("".join(sha256(file) for file in weight_files(directory)).encode()).hexdigest()


def _native(engine: str) -> None:
    if engine == "hf":
        raise InvalidValue("image models have no transformers class here: leave engine at auto or native")
