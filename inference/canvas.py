"""Requests over a canvas: a sequence of fixed length whose holes are filled, in any order and several at once.

What comes out is the `DecodeResult` of every decoder: `output` holds the tokens of the holes, in ascending position.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import DecodeResult


@dataclass(frozen=True)
class CanvasRequest:
    """Fill the holes of one canvas of N positions.

    row_id keys the row's randomness (same seed, row_id and canvas: same output, whoever shares the batch).
    Raises InvalidValue for holes that are not ascending positions of the canvas.
    """

    tokens: Sequence[int]  # N ids; what stands at a hole is ignored by the network's conditionals (usually the mask id)
    holes: Sequence[int]  # positions to fill, strictly ascending
    row_id: int = 0
    stop_ids: tuple[int, ...] = ()  # what stands right of the first of them does not belong to the answer
    tag: str = ""
    rank: Sequence[int] | None = None  # when each position is decoded (any-subset models); None: the lattice's order

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise InvalidValue("empty canvas: give at least one position")
        ordered = all(a < b for a, b in zip(self.holes, self.holes[1:], strict=False))
        if self.holes and not (ordered and self.holes[0] >= 0 and self.holes[-1] < len(self.tokens)):
            raise InvalidValue(
                f"holes must be ascending positions of the canvas of {len(self.tokens)}, got {list(self.holes)[:20]}"
            )

    @classmethod
    def from_mask(cls, tokens: Sequence[int], mask_id: int, *, row_id: int = 0, tag: str = "") -> "CanvasRequest":
        """The holes are where the mask id stands."""
        return cls(tokens, [i for i, token in enumerate(tokens) if token == mask_id], row_id=row_id, tag=tag)

    def filled(self, tokens: Sequence[int]) -> list[int]:
        """The canvas with `tokens` in its holes."""
        done = list(self.tokens)
        for position, token in zip(self.holes, tokens, strict=True):
            done[position] = token
        return done


@dataclass(frozen=True)
class CanvasCommit:
    """Positions that became final in one round (the streaming form of a canvas decoder yields these)."""

    row: int
    positions: list[int]
    tokens: list[int]
    stop: str | None  # set on the row's last commit


class CanvasDecoder(Protocol):
    """A decoding method over canvases; built by `registry.build`."""

    def decode(self, requests: Sequence[CanvasRequest]) -> DecodeResult: ...

    def stream(self, requests: Sequence[CanvasRequest]) -> Generator[CanvasCommit, None, DecodeResult]:
        """Yields commits as they happen; the generator's return value (StopIteration.value) is the result."""
        ...
