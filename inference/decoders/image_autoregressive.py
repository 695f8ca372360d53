"""Plain decoding of image codes: group after group from the model's law (LlamaGen: one code, VAR: one scale a step).

Randomness is by counter, (seed, row_id, position): an image does not depend on the batch that it was made in.
Shape letters: B batch, g codes of a group, N codes of an image, V codes of the codebook.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.image_law import ImageLaw
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.rng import Stream, key, sample_categorical, uniform_from

WHOLE = "length"  # why every image ends


@dataclass(frozen=True)
class ImageRequest:
    """Make one image of a class. row_id keys the row's randomness: the same for whichever batch it is made in."""

    class_id: int
    row_id: int = 0
    tag: str = ""


def classes_of(requests: Sequence[ImageRequest], device: torch.device | str = "cpu") -> Tensor:
    """int64 [B]. Raises InvalidValue for no request at all."""
    if not requests:
        raise InvalidValue("no image was asked for: give at least one request")
    return torch.tensor([r.class_id for r in requests], dtype=torch.int64, device=device)


def row_keys(requests: Sequence[ImageRequest], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The rows' keys of randomness, int64 [B, 1]."""
    return key(seed, torch.tensor([r.row_id for r in requests], dtype=torch.int64), device).unsqueeze(1)


def sample_group(law: Tensor, keys: Tensor, first: int) -> Tensor:
    """Codes int64 [B, g] drawn from laws [B, g, V]; `first` is the position of the group's first code."""
    positions = torch.arange(first, first + law.shape[1], device=law.device)
    u = uniform_from(keys, positions.unsqueeze(0), torch.tensor(int(Stream.SAMPLE), device=law.device))
    return sample_categorical(law, u)


class ImageAutoregressiveDecoder:
    """Draws images from an image model's law."""

    def __init__(self, law: ImageLaw, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.law, self.seed, self.device = law, seed, device

    @torch.inference_mode()
    def decode(self, requests: Sequence[ImageRequest]) -> DecodeResult:
        """output: the N codes of each image; one round for each group."""
        begin = time.perf_counter()
        progress = self.law.start(classes_of(requests, self.device))
        keys, rounds, parts, made = row_keys(requests, self.seed, self.device), RoundStats(), [], 0
        for size in self.law.groups:
            start = time.perf_counter()
            codes = sample_group(self.law.next(progress), keys, made)
            self.law.advance(progress, codes)
            parts.append(codes)
            made += size
            spent = time.perf_counter() - start
            for row in range(len(requests)):
                rounds.append(row, 0, 0, size, 0.0, spent)
        output: list[list[int]] = torch.cat(parts, 1).tolist()
        calls = len(self.law.groups)
        notes = {"guided": self.law.guided, "codes_per_call": made / calls}
        seconds = time.perf_counter() - begin
        return DecodeResult(output, rounds, {"target": calls}, seconds, [WHOLE] * len(requests), notes=notes)
