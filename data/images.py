"""Images with classes, without a download where there is none: scikit-learn's digits, glyphs of the fonts at hand.

`ImagesConfig.source`: "digits" (1797 of 8x8, ten classes), "glyphs" (unlimited, characters rendered from the fonts that
matplotlib ships; validation has fonts that training never sees), a folder with one folder of images a class, or
"hf:NAME" (a Hugging Face data set with an image and a label column).

Shape letters: B batch, C channels, H and W the sides, N images.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from draftsmith.data.batches import PADDING, ImageBatch
from draftsmith.data.resumable_data import ResumableData
from draftsmith.data.stateful_loader import MapSource, StatefulLoader, permutation
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import Stream, uniform

DIGIT_LEVELS = 16  # of a digit's pixel
GLYPHS = "0123456789"
_HELD_OUT = 1 << 40  # first sample of the glyphs that validation draws
_FONTS_OUT = 4  # every fourth font is held out
# Computer Modern's mathematical fonts have other signs where the digits are; the last resort font draws code points.
_NO_FONTS = ("cmex", "cmsy", "cmmi", "LastResort")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how they become batches."""

    source: str = "digits"  # "digits", "glyphs", a folder of class folders, "hf:NAME"
    resolution: int = 8  # H = W; digits have 8
    channels: int = 1  # 1 grey, 3 colours
    shifts: bool = False  # also every image moved by one pixel in the four directions: five times the data
    flips: bool = False  # also every image mirrored
    val_fraction: float = 0.165  # of digits, folders and data sets (1500 of 1797 digits train)
    batch_size: int = 128  # per rank
    epoch_samples: int = 1 << 20  # glyphs: an epoch; a longer run sees them again
    val_samples: int = 512  # glyphs
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution", "batch_size", "epoch_samples", "val_samples"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"images.{name} must be at least 1, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise InvalidValue(f"images.channels must be 1 (grey) or 3 (colours), got {self.channels}")
        if not 0 < self.val_fraction < 1:
            raise InvalidValue(f"images.val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if self.source == "digits" and (self.resolution, self.channels) != (8, 1):
            raise InvalidValue(
                f"digits are 8x8 and grey, got resolution {self.resolution} and {self.channels} channels"
            )


DEFAULT_IMAGES = ImagesConfig()


class Images(Protocol):
    """Images by number, before they are augmented."""

    fingerprint: str
    num_classes: int

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """(uint8 [C, H, W], class) of one image."""
        ...


class ArrayImages:
    """Images that lie in memory: uint8 [N, C, H, W] and classes int64 [N]."""

    def __init__(self, array: NDArray[np.uint8], classes: NDArray[np.int64], num_classes: int) -> None:
        self.array, self.classes, self.num_classes = array, classes, num_classes
        digest = hashlib.sha256(array.tobytes())
        digest.update(classes.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.array)

    def pixels(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.array[index], int(self.classes[index])


class FileImages:
    """Image files, read when they are asked for and brought to one size."""

    def __init__(self, files: Sequence[tuple[Path, int]], num_classes: int, resolution: int, channels: int) -> None:
        self.files, self.num_classes = list(files), num_classes
        self.resolution, self.channels = resolution, channels
        said = "\n".join(f"{path}\t{path.stat().st_size}" for path, _ in self.files)
        self.fingerprint = hashlib.sha256(f"{resolution}/{channels}\n{said}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> tuple[NDArray[np.uint8], int]:
        from PIL import Image, UnidentifiedImageError

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                return _array(image, self.resolution, self.channels), label
        except (UnidentifiedImageError, OSError) as error:
            raise InvalidValue(f"{path} cannot be read as an image ({error}): remove or replace it") from None


class Glyphs:
    """Characters in the fonts that matplotlib ships; image i is a function of (seed, i), without end.

    The class is the character. Font, size, place and a small turn are drawn; `fonts` are those of one half of a split
    by font.
    """

    def __init__(
        self, fonts: Sequence[Path], count: int, first: int, resolution: int, channels: int, seed: int
    ) -> None:
        self.fonts, self.count, self.first = list(fonts), count, first
        self.resolution, self.channels, self.seed = resolution, channels, seed
        self.num_classes = len(GLYPHS)
        names = ",".join(font.name for font in self.fonts)
        self.fingerprint = hashlib.sha256(
            f"{names}/{count}/{first}/{resolution}/{channels}/{seed}".encode()
        ).hexdigest()
        self.fingerprint = self.fingerprint[:16]

    def __len__(self) -> int:
        return self.count

    def pixels(self, index: int) -> tuple[NDArray[np.uint8], int]:
        from PIL import Image, ImageDraw, ImageFont

        u = uniform(self.seed, self.first + index, torch.arange(6), int(Stream.DATA)).tolist()
        label = int(u[0] * len(GLYPHS))
        side = 4 * self.resolution  # drawn large, made small: smooth edges
        size = side * (0.6 + 0.25 * u[2])
        font = ImageFont.truetype(str(self.fonts[int(u[1] * len(self.fonts))]), round(size))
        image = Image.new("L", (side, side), 0)
        at = tuple(side * (0.5 + 0.12 * (v - 0.5)) for v in u[3:5])
        ImageDraw.Draw(image).text(at, GLYPHS[label], fill=255, font=font, anchor="mm")
        turned = image.rotate(20 * (u[5] - 0.5), resample=Image.Resampling.BILINEAR)
        return _array(turned, self.resolution, self.channels), label


def glyph_fonts() -> tuple[list[Path], list[Path]]:
    """(fonts to train on, fonts held out): those of matplotlib that have all of GLYPHS.

    Raises InvalidValue where matplotlib has none.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font

    fonts = []
    for path in sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf")):
        known = FT2Font(str(path)).get_charmap()
        if all(ord(glyph) in known for glyph in GLYPHS) and not path.name.startswith(_NO_FONTS):
            fonts.append(path)
    if len(fonts) < _FONTS_OUT:
        raise InvalidValue(f"matplotlib brings {len(fonts)} fonts with digits here: reinstall it, or give a folder")
    held_out = fonts[::_FONTS_OUT]
    return [font for font in fonts if font not in held_out], held_out


def _array(image: Any, resolution: int, channels: int) -> NDArray[np.uint8]:
    """A PIL image as uint8 [C, H, W]: the middle square, resized."""
    from PIL import Image

    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize(
            (resolution, resolution), Image.Resampling.BOX if side > resolution else Image.Resampling.BICUBIC
        )
    array: NDArray[np.uint8] = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


class AugmentedImages:
    """A MapSource: every image as it is, then its moved and mirrored copies."""

    def __init__(self, images: Images, *, shifts: bool = False, flips: bool = False) -> None:
        self.images = images
        moves = [(0, 0), *([(0, 1), (0, -1), (1, 0), (-1, 0)] if shifts else [])]
        self.copies = [(move, flip) for flip in ((False, True) if flips else (False,)) for move in moves]
        self.fingerprint = f"{images.fingerprint}/{len(self.copies)}{'f' if flips else ''}"

    def __len__(self) -> int:
        return len(self.images) * len(self.copies)

    def fetch(self, indices: Sequence[int]) -> ImageBatch:
        """The batch of these samples; an index PADDING gives an empty image."""
        found = [None if i == PADDING else self._image(i) for i in indices]
        shape = next((image.shape for image, _ in filter(None, found)), None)
        if shape is None:
            shape = self._image(0)[0].shape
        blank = (np.zeros(shape, np.uint8), 0)
        pixels, classes = zip(*((entry or blank) for entry in found), strict=True)
        return ImageBatch(
            torch.from_numpy(np.stack(pixels)),
            torch.tensor(classes, dtype=torch.int64),
            torch.tensor(list(indices), dtype=torch.int64),
        )

    def _image(self, index: int) -> tuple[NDArray[np.uint8], int]:
        copy, number = divmod(index, len(self.images))
        pixels, label = self.images.pixels(number)
        (down, right), flip = self.copies[copy]
        if flip:
            pixels = pixels[..., ::-1]
        if (down, right) != (0, 0):
            moved = np.full_like(pixels, pixels.min())
            height, width = pixels.shape[1:]
            moved[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
                :, max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
            ]
            pixels = moved
        return np.ascontiguousarray(pixels), label


def read_images(config: ImagesConfig) -> tuple[Images, Images]:
    """(training, validation) images. Raises InvalidValue, one line, for a source that has none."""
    if config.source == "glyphs":
        train, held_out = glyph_fonts()
        form: dict[str, int] = {"resolution": config.resolution, "channels": config.channels, "seed": config.seed}
        return (
            Glyphs(train, config.epoch_samples, 0, **form),
            Glyphs(held_out, config.val_samples, _HELD_OUT, **form),
        )
    if config.source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        array = np.rint(digits.images * (255 / DIGIT_LEVELS)).astype(np.uint8)[:, None]
        return _split(
            config, len(array), lambda rows: ArrayImages(array[rows], digits.target[rows].astype(np.int64), 10)
        )
    if config.source.startswith("hf:"):
        return _read_data_set(config)
    return _read_folder(config)


def _split(config: ImagesConfig, count: int, take: Any) -> tuple[Images, Images]:
    order = permutation(count, config.seed, 0)
    train = count - math.floor(count * config.val_fraction + 0.5)
    if not 0 < train < count:
        raise InvalidValue(f"{count} images of {config.source} cannot be split at val_fraction {config.val_fraction}")
    return take(np.sort(order[:train])), take(np.sort(order[train:]))


def _read_folder(config: ImagesConfig) -> tuple[Images, Images]:
    folder = Path(config.source)
    if not folder.is_dir():
        raise InvalidValue(
            f"images.source {config.source!r} is no folder: give digits, glyphs, a folder of class folders, or hf:NAME"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise InvalidValue(f"{folder} has no folder with images ({', '.join(SUFFIXES)}): make one folder a class")
    size, channels = config.resolution, config.channels
    return _split(config, len(files), lambda rows: FileImages([files[i] for i in rows], len(names), size, channels))


def _read_data_set(config: ImagesConfig) -> tuple[Images, Images]:
    from datasets import load_dataset

    rows = load_dataset(config.source.removeprefix("hf:"), split="train")
    columns = {name: type(feature).__name__ for name, feature in rows.features.items()}
    image = next((name for name, kind in columns.items() if kind == "Image"), None)
    label = next((name for name, kind in columns.items() if kind == "ClassLabel"), None)
    if image is None or label is None:
        raise InvalidValue(f"{config.source} has no image column with a class label, but {columns}")
    array = np.stack([_array(row[image], config.resolution, config.channels) for row in rows])
    classes = np.array(rows[label], dtype=np.int64)
    count = len(rows.features[label].names)
    return _split(config, len(array), lambda chosen: ArrayImages(array[chosen], classes[chosen], count))


class ImageDataModule(ResumableData):
    """`ImageBatch`es of an `ImagesConfig`."""

    def __init__(self, images: ImagesConfig = DEFAULT_IMAGES) -> None:
        """Args: images: which images, and how they become batches."""
        super().__init__()
        self.images = images

    @cached_property
    def split(self) -> tuple[Images, Images]:
        """(training, validation) images, not augmented."""
        return read_images(self.images)

    @property
    def num_classes(self) -> int:
        return self.split[0].num_classes

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.images.batch_size

    def data_fingerprint(self) -> str:
        """Of the training images, augmentation included."""
        return self._source(0).fingerprint

    def source(self, half: int) -> MapSource:
        """What the loaders read of the training (0) or validation (1) images."""
        return self._source(half)

    def _source(self, half: int) -> AugmentedImages:
        config = self.images
        return AugmentedImages(self.split[half], shifts=config.shifts and half == 0, flips=config.flips and half == 0)

    def _train_loader(self) -> StatefulLoader:
        return self._loader_of(0)

    def val_dataloader(self) -> StatefulLoader:
        """Every validation image once, in order; the last batch is filled with empty images (sample_id -1)."""
        return self._loader_of(1)

    def test_dataloader(self) -> StatefulLoader:
        return self.val_dataloader()

    def _loader_of(self, half: int) -> StatefulLoader:
        rank, world_size = self._ranks()
        config = self.images
        return StatefulLoader(
            self.source(half),
            config.batch_size,
            seed=config.seed,
            shuffle=half == 0,
            last="drop" if half == 0 else "pad",
            num_workers=config.num_workers,
            rank=rank,
            world_size=world_size,
        )
