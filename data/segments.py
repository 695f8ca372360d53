"""The task "segments": a few runs of digits whose starts are free and whose other digits follow.

A prompt holds three lengths (2..6; 0: absent) and SEP; the answer has for each length a random digit and its
successors modulo 10, then EOT up to the canvas. Its exact negative log-likelihood is (segments) * ln 10, and a decoder
that commits two digits of one segment at once breaks it. Unlimited: sample i is a function of (seed, i).
Shape letters: B batch, L canvas (prompt and answer).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from draftsmith.data.batches import PADDING, CanvasBatch
from draftsmith.data.stateful_loader import StatefulLoader
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import Stream, uniform

SEP, EOT, MASK, PAD = 10, 11, 12, 13
VOCAB = 14
SEGMENTS, SHORTEST, LONGEST = 3, 2, 6
PROMPT = SEGMENTS + 1
MOST = SEGMENTS * LONGEST  # tokens of the longest answer
_TEST, _VALIDATION = 1 << 41, 1 << 40  # first sample of these sets: no training run gets there


@dataclass(frozen=True)
class SegmentsConfig:
    """How the task becomes batches."""

    answer_length: int = 24  # G: EOT fills what the segments leave
    batch_size: int = 64  # per rank
    epoch_samples: int = 1 << 20  # an epoch; a longer run sees them again
    val_samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answer_length <= MOST:
            raise InvalidValue(
                f"segments.answer_length must be at least {MOST + 1} (three segments of {LONGEST} and EOT), got "
                f"{self.answer_length}"
            )
        for name in ("batch_size", "epoch_samples", "val_samples"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"segments.{name} must be at least 1, got {getattr(self, name)}")


DEFAULT_SEGMENTS = SegmentsConfig()


def samples(index: Tensor, answer_length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, 4 + answer_length], answer tokens before the first EOT int64 [B]) of samples `index` [B]."""
    draw = uniform(seed, index.unsqueeze(1), torch.arange(2 * SEGMENTS + 1), int(Stream.DATA))  # [B, 7]
    present = torch.arange(SEGMENTS) < 1 + (draw[:, -1:] * SEGMENTS).long()
    span = SHORTEST + (draw[:, :SEGMENTS] * (LONGEST - SHORTEST + 1)).long()
    span = torch.where(present, span, 0)
    first = (draw[:, SEGMENTS : 2 * SEGMENTS] * 10).long()
    end = span.cumsum(1)
    place = torch.arange(answer_length).expand(len(index), -1).contiguous()
    segment = torch.searchsorted(end, place, right=True)  # SEGMENTS: behind the last one
    inside = segment.clamp_max(SEGMENTS - 1)
    digit = (first.gather(1, inside) + place - (end - span).gather(1, inside)) % 10
    answer = torch.where(segment < SEGMENTS, digit, EOT)
    separator = torch.full((len(index), 1), SEP)
    return torch.cat((span, separator, answer), 1), end[:, -1]


def is_valid(prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether an answer (with or without its EOTs) has just the segments that the prompt asks for."""
    digits = list(answer[: answer.index(EOT)] if EOT in answer else answer)
    at = 0
    for span in prompt[:SEGMENTS]:
        run = digits[at : at + span]
        if len(run) != span or any(not 0 <= d < 10 for d in run):
            return False
        if any((b - a) % 10 != 1 for a, b in itertools.pairwise(run)):
            return False
        at += span
    return at == len(digits)


def exact_nll(prompt: Sequence[int]) -> float:
    """Nats of any answer to a prompt under the task's own law."""
    return sum(span > 0 for span in prompt[:SEGMENTS]) * math.log(10)


def first_of(part: str) -> int:
    """The first sample of "train", "val" or "test". Raises InvalidValue for another part."""
    found = {"train": 0, "val": _VALIDATION, "test": _TEST}.get(part)
    if found is None:
        raise InvalidValue(f"no part {part!r} of the segments task: train, val or test")
    return found


def requests(
    count: int, *, answer_length: int = 24, seed: int = 0, start: int = 0, part: str = "test"
) -> list[CanvasRequest]:
    """`count` prompts with an empty canvas, from sample `start` of a part ("train", "val", "test") that never overlap.

    Raises InvalidValue for another part.
    """
    first = first_of(part)
    ids, _ = samples(torch.arange(first + start, first + start + count), answer_length, seed)
    blank = [MASK] * answer_length
    holes = range(PROMPT, PROMPT + answer_length)
    return [
        CanvasRequest([*row[:PROMPT], *blank], holes, row_id=start + i, stop_ids=(EOT,), tag="segments")
        for i, row in enumerate(ids.tolist())
    ]


class SegmentSamples:
    """A stretch of the task's samples, as loaders read it."""

    def __init__(self, size: int, answer_length: int, seed: int, first: int = 0) -> None:
        self.size, self.answer_length, self.seed, self.first = size, answer_length, seed, first
        self.fingerprint = f"segments/{answer_length}/{seed}/{first}"

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Sequence[int]) -> CanvasBatch:
        """The batch of these samples; an index PADDING gives a row of length 0."""
        index = torch.tensor(list(indices), dtype=torch.int64)
        real = index != PADDING
        ids, used = samples(index.clamp_min(0) + self.first, self.answer_length, self.seed)
        prompt = torch.full_like(index, PROMPT)
        least = torch.where(real, PROMPT + used + 1, 0)
        length = torch.where(real, PROMPT + self.answer_length, 0)
        return CanvasBatch(ids, torch.where(real, prompt, 0), least, length, index)


class SegmentsDataModule(LightningDataModule):
    """Training and validation batches (`CanvasBatch`) of the segments task."""

    def __init__(self, segments: SegmentsConfig = DEFAULT_SEGMENTS) -> None:
        super().__init__()
        self.segments = segments

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.segments.batch_size

    @property
    def vocab_size(self) -> int:
        """Digits and the four special ids."""
        return VOCAB

    @property
    def special_ids(self) -> dict[str, int]:
        """What a network for this task must agree with."""
        return {"mask_id": MASK, "eos_id": EOT, "pad_id": PAD}

    def data_fingerprint(self) -> str:
        return self._part(self.segments.epoch_samples, 0).fingerprint

    def summary(self) -> str:
        """One line."""
        return f"segments task, answers of {self.segments.answer_length}, unlimited samples, vocabulary {VOCAB}"

    def _part(self, size: int, first: int) -> SegmentSamples:
        return SegmentSamples(size, self.segments.answer_length, self.segments.seed, first)

    def train_dataloader(self) -> StatefulLoader:
        """Batches in order: the samples are independent as they come."""
        return StatefulLoader(
            self._part(self.segments.epoch_samples, 0), self.segments.batch_size, seed=self.segments.seed
        )

    def val_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._part(self.segments.val_samples, _VALIDATION), self.segments.batch_size, last="pad")

    def test_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._part(self.segments.val_samples, _TEST), self.segments.batch_size, last="pad")
