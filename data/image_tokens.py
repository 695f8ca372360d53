"""Images as codes for the image models: tokenised once by a frozen tokenizer, and kept.

The cache's name holds what the images and the tokenizer are, so another tokenizer never meets old codes. Unlimited
sources (glyphs) are tokenised batch by batch, unless an epoch is small enough to keep.

Shape letters: B batch, N codes of an image.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.data.batches import PADDING, CodeBatch
from draftsmith.data.images import DEFAULT_IMAGES, AugmentedImages, ImageDataModule, ImagesConfig
from draftsmith.data.stateful_loader import MapSource
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_image import load_tokenizer
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer

_CHUNK = 512  # images that go through the tokenizer at once


@dataclass(frozen=True)
class TokensConfig:
    """Which tokenizer, and where its codes are kept."""

    tokenizer: str = ""  # directory of an export of kind image-tokenizer
    keep_below: int = 200_000  # sources with more images (augmented) are tokenised batch by batch
    cache_dir: str = ""  # empty: $DRAFTSMITH_CACHE, else ~/.cache/draftsmith

    def __post_init__(self) -> None:
        if not self.tokenizer:
            raise InvalidValue("tokens.tokenizer must name the directory of an exported image tokenizer")
        if self.keep_below < 0:
            raise InvalidValue(f"tokens.keep_below must be 0 or more, got {self.keep_below}")


@torch.inference_mode()
def tokenize(tokenizer: ImageTokenizer, source: AugmentedImages, indices: Sequence[int]) -> CodeBatch:
    """The images of these indices as codes; an index PADDING gives codes 0."""
    batch = source.fetch(indices)
    codes = [tokenizer.encode(part) for part in torch.split(batch.scaled, _CHUNK)]
    return CodeBatch(torch.cat(codes).int(), batch.classes, batch.sample_id)


class LiveCodes:
    """A MapSource that tokenises each batch when it is asked for."""

    def __init__(self, tokenizer: ImageTokenizer, source: AugmentedImages, fingerprint: str) -> None:
        self.tokenizer, self.source, self.fingerprint = tokenizer, source, fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Sequence[int]) -> CodeBatch:
        return tokenize(self.tokenizer, self.source, indices)


class KeptCodes:
    """A MapSource over codes that lie in memory: int32 [*, N] and classes int64 [*]."""

    def __init__(self, codes: Tensor, classes: Tensor, fingerprint: str) -> None:
        self.codes, self.classes, self.fingerprint = codes, classes, fingerprint

    def __len__(self) -> int:
        return len(self.codes)

    def fetch(self, indices: Sequence[int]) -> CodeBatch:
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        at = chosen.clamp_min(0)
        return CodeBatch(self.codes[at].int(), self.classes[at], torch.where(chosen == PADDING, PADDING, chosen))


class ImageTokensDataModule(ImageDataModule):
    """`CodeBatch`es: the images of `ImageDataModule` through a tokenizer."""

    def __init__(self, tokens: TokensConfig, images: ImagesConfig = DEFAULT_IMAGES) -> None:
        """Args: tokens: which tokenizer. images: which images, and how they become batches."""
        super().__init__(images)
        self.tokens = tokens if isinstance(tokens, TokensConfig) else TokensConfig(**tokens)

    @cached_property
    def _tokenizer(self) -> tuple[ImageTokenizer, str]:
        return load_tokenizer(self.tokens.tokenizer)

    @property
    def tokenizer(self) -> ImageTokenizer:
        return self._tokenizer[0]

    @property
    def tokenizer_hash(self) -> str:
        return self._tokenizer[1]

    def data_fingerprint(self) -> str:
        """Of images, augmentation and tokenizer."""
        return self.source(0).fingerprint

    def prepare_data(self) -> None:
        """Tokenise what is kept. Nothing to do where it has been done before."""
        for half in (0, 1):
            images = self._source(half)
            path = self._path(images)
            if len(images) >= self.tokens.keep_below or path.is_file():
                continue
            made = [
                tokenize(self.tokenizer, images, range(start, min(start + _CHUNK, len(images))))
                for start in range(0, len(images), _CHUNK)
            ]
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            arrays = {"codes": torch.cat([b.codes for b in made]), "classes": torch.cat([b.classes for b in made])}
            save_file(arrays, temporary)
            temporary.replace(path)

    def source(self, half: int) -> MapSource:
        """Codes of the training (0) or validation (1) images."""
        images = self._source(half)
        name = self._fingerprint(images)
        if len(images) >= self.tokens.keep_below:
            return LiveCodes(self.tokenizer, images, name)
        self.prepare_data()
        arrays = load_file(self._path(images))
        return KeptCodes(arrays["codes"], arrays["classes"], name)

    def _fingerprint(self, images: AugmentedImages) -> str:
        return f"{images.fingerprint}/{self.tokenizer_hash[:16]}"

    def _path(self, images: AugmentedImages) -> Path:
        root = Path(self.tokens.cache_dir or os.environ.get("DRAFTSMITH_CACHE", "") or "~/.cache/draftsmith")
        key = hashlib.sha256(self._fingerprint(images).encode()).hexdigest()[:20]
        return root.expanduser() / f"codes-{key}.safetensors"
