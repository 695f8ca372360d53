"""Pairs for distilled decoding: Gaussian noise, and the codes to which the flow of an image model's law carries it.

Source: "Distilled Decoding 1" (arXiv 2412.17153), section 3.2: code by code the teacher's law p(q_i | q_<i, class),
with its guidance and filters, is reached from noise e_i by the closed-form velocity over the codebook (DiracMixture).
The whole map, noise [N, D] -> codes [N], is deterministic and has the teacher's law exactly.

No noise is stored: it is a function of (seed, number of the pair, position), drawn by counter.
Shape letters: B batch, N codes of an image, D code width, V codes of the codebook, g codes of a group.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from draftsmith.data.batches import PADDING, CodeBatch
from draftsmith.data.resumable_data import ResumableData
from draftsmith.data.stateful_loader import StatefulLoader
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.flow_matching import DiracMixture
from draftsmith.inference.flow_noise import noise
from draftsmith.inference.image_law import ImageLaw
from draftsmith.inference.load_image import load_tokenizer
from draftsmith.inference.loader import load
from draftsmith.inference.nets.image_ar import ImageAR
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer
from draftsmith.inference.rng import NUM_STREAMS, Stream, key, uniform_from
from draftsmith.inference.sampling import SamplingParams

STEPS = 20  # midpoint steps, 40 evaluations of the field: exact by chi-square (tests)
_HELD_OUT = 1 << 40  # number of the first validation pair
_CLASS = int(Stream.DATA) + 4 * NUM_STREAMS


def classes(seed: int, numbers: Tensor, num_classes: int) -> Tensor:
    """The class of each pair, int64 [B], evenly drawn by counter."""
    u = uniform_from(key(seed, numbers, numbers.device), torch.zeros_like(numbers), torch.tensor(_CLASS))
    return (u * num_classes).long()


@torch.no_grad()
def carry(law: ImageLaw, vectors: Tensor, classes: Tensor, noise: Tensor, *, steps: int = STEPS) -> Tensor:
    """The codes int64 [B, N] to which `noise` [B, N, D] is carried, given classes int64 [B]; vectors: codebook [V, D].

    Raises InvalidState where the flow is not finite, InvalidValue for a law that gives no code any mass.
    """
    progress, made, parts = law.start(classes), 0, []
    for size in law.groups:
        p = law.next(progress)
        field = DiracMixture(vectors, p.flatten(0, 1).log())
        start = noise[:, made : made + size].flatten(0, 1)
        codes = field.codes(start, steps=steps).view(len(classes), size)
        law.advance(progress, codes)
        parts.append(codes)
        made += size
    return torch.cat(parts, 1)


class LivePairs:
    """A MapSource of fresh pairs: pair i is made when it is asked for. For teachers that are cheap beside the student.

    first: number of the first pair (validation lies where no training run gets).
    """

    def __init__(
        self,
        law: ImageLaw,
        vectors: Tensor,
        count: int,
        *,
        first: int = 0,
        seed: int = 0,
        steps: int = STEPS,
        fingerprint: str = "",
    ) -> None:
        self.law, self.vectors, self.count, self.first, self.seed, self.steps = law, vectors, count, first, seed, steps
        self.fingerprint = f"{fingerprint}/live{count}/{first}/{seed}"

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Sequence[int]) -> CodeBatch:
        """The pairs of these numbers; an index PADDING gives codes 0."""
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        numbers = torch.where(chosen == PADDING, PADDING, chosen + self.first)
        label = classes(self.seed, numbers, self.law.model.config.num_classes)
        start = noise(self.seed, numbers, sum(self.law.groups), self.vectors.shape[1])
        codes = carry(self.law, self.vectors, label, start, steps=self.steps)
        return CodeBatch(codes.int(), label, numbers)


@dataclass(frozen=True)
class PairsConfig:
    """Which teacher makes the pairs, and how."""

    teacher: str = ""  # directory of an export of kind image-ar
    tokenizer: str = ""  # directory of the image-tokenizer export whose codes they are
    guidance: float | None = None  # part of the law that is distilled; null: without
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = STEPS  # of the flow
    seed: int = 0  # of noise and classes
    batch_size: int = 256  # per rank
    epoch_pairs: int = 1 << 20  # an epoch; fresh pairs are made as they are asked for
    val_pairs: int = 1024

    def __post_init__(self) -> None:
        for name in ("teacher", "tokenizer"):
            if not getattr(self, name):
                raise InvalidValue(f"pairs.{name} must name the directory of an export")
        for name in ("steps", "batch_size", "epoch_pairs", "val_pairs"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"pairs.{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise InvalidValue(f"pairs.temperature must be above 0, got {self.temperature}")


class FlowPairsDataModule(ResumableData):
    """Fresh pairs (`CodeBatch`) of a teacher, made in the loader; validation pairs never meet training's."""

    def __init__(self, pairs: PairsConfig) -> None:
        """Args: pairs: which teacher makes them, and how."""
        super().__init__()
        self.pairs = pairs if isinstance(pairs, PairsConfig) else PairsConfig(**pairs)

    @cached_property
    def law(self) -> ImageLaw:
        """The teacher's law. Raises InvalidValue where teacher and tokenizer do not belong together."""
        config = self.pairs
        part = load(config.teacher)
        model = part.part
        if not isinstance(model, ImageAR):
            raise InvalidValue(f"pairs.teacher {config.teacher} is of kind {part.kind!r}: give an image-ar export")
        if model.config.tokenizer_hash not in (None, self._tokenizer[1]):
            raise InvalidValue(
                f"pairs.tokenizer {config.tokenizer} is not the one of {config.teacher}: give the one that it has"
            )
        sampling = SamplingParams(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        return ImageLaw(model, sampling, guidance=config.guidance)

    @cached_property
    def _tokenizer(self) -> tuple[ImageTokenizer, str]:
        return load_tokenizer(self.pairs.tokenizer)

    @property
    def vectors(self) -> Tensor:
        """The codebook [V, D] as the tokenizer decodes it."""
        return self._tokenizer[0].vectors.detach()

    @property
    def pairs_made_with(self) -> dict[str, Any]:
        """Everything that decides the map from noise to codes; goes into the student's manifest."""
        kept = ("guidance", "temperature", "top_k", "top_p", "steps", "seed")
        made = {name: getattr(self.pairs, name) for name in kept}
        return {**made, "teacher": target_fingerprint(Path(self.pairs.teacher)), "tokenizer": self._tokenizer[1]}

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.pairs.batch_size

    def data_fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.pairs_made_with, sort_keys=True).encode()).hexdigest()[:16]

    def _train_loader(self) -> StatefulLoader:
        """Pairs in the order of their numbers."""
        return self._loader_of(self.pairs.epoch_pairs, 0, "drop")

    def val_dataloader(self) -> StatefulLoader:
        return self._loader_of(self.pairs.val_pairs, _HELD_OUT, "pad")

    def _loader_of(self, count: int, first: int, last: Literal["drop", "pad"]) -> StatefulLoader:
        rank, world_size = self._ranks()
        config = self.pairs
        source = LivePairs(
            self.law,
            self.vectors,
            count,
            first=first,
            seed=config.seed,
            steps=config.steps,
            fingerprint=self.data_fingerprint(),
        )
        return StatefulLoader(source, config.batch_size, seed=config.seed, last=last, rank=rank, world_size=world_size)
