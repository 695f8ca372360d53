"""Every batch that crosses from a loader to a training step.

Batches carry integers only (contract 12): DeepSpeed's bf16 casts float inputs. A batch is a dataclass, but not a frozen
one: Lightning's `apply_to_collection`, through which DeepSpeed and half precision run every batch, refuses frozen
dataclasses (`A frozen dataclass was passed`). Treat a batch as immutable all the same. Moving to a device goes through
`to`, which Lightning prefers to its own recursion.

Shape letters: B batch, T time.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.laws import TeacherLaw

PADDING = -1  # `document` at padded positions, `sample_id` of rows that only fill the last batch


class Batch:
    """Base of all batch dataclasses: moves its tensors together; other fields stay as they are."""

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`; the transfer does not wait where the tensors are pinned."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)  # type: ignore[arg-type]  # only dataclasses derive from Batch
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]  # as above


def check_field(owner: str, name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Check one field of a batch. Raises InvalidType for a wrong dtype, InvalidValue for a wrong shape."""
    if value.dtype != dtype:
        raise InvalidType(f"{owner}.{name} must be {dtype}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise InvalidValue(f"{owner}.{name} must have shape {list(shape)}, got {list(value.shape)}")


@dataclass(eq=False)
class TokenBatch(Batch):
    """Packed tokens for next-token losses.

    Padding stands at the end of a row only: document = -1, loss_mask = 0, any id. A row that only fills the last batch
    up (sample_id = -1) is padding throughout, so a batch may carry no label: divide by the label count clamped to 1.
    """

    ids: Tensor  # int64 [B, T]
    loss_mask: Tensor  # int8 [B, T]; 1: token t is a label, predicted by the network's row t - 1. Always 0 at t = 0
    document: (
        Tensor  # int32 [B, T]; number of the document within the row, from 0; all 0 where documents are not kept apart
    )
    sample_id: Tensor  # int64 [B]; the sample's index in its data set (map-style) or in the stream
    separate: bool = False  # True: attention must not cross documents, and positions restart (`positions`, `visible`)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2:
            raise InvalidValue(f"TokenBatch.ids must have shape [B, T], got {list(self.ids.shape)}")
        batch, time = self.ids.shape
        check_field("TokenBatch", "ids", self.ids, torch.int64, (batch, time))
        check_field("TokenBatch", "loss_mask", self.loss_mask, torch.int8, (batch, time))
        check_field("TokenBatch", "document", self.document, torch.int32, (batch, time))
        check_field("TokenBatch", "sample_id", self.sample_id, torch.int64, (batch,))

    def positions(self) -> Tensor:
        """int64 [B, T]: 0, 1, 2, ... restarting where `document` changes."""
        index = torch.arange(self.document.shape[1], device=self.document.device).expand_as(self.document)
        starts = torch.ones_like(self.document, dtype=torch.bool)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return index - torch.where(starts, index, 0).cummax(1).values

    def visible(self) -> Tensor:
        """bool [B, 1, T, T]: query t sees key s; s <= t, both of one document (padding sees padding, never nothing)."""
        same = self.document.unsqueeze(2) == self.document.unsqueeze(1)
        return same.tril().unsqueeze(1)


@dataclass(eq=False)
class OnlineBatch(Batch):
    """One online update of one draft (OSD): recorded contexts, and the target's laws at M positions of them.

    Log-probabilities travel as the bit patterns of their float32 (`law` gives them back). More letters: R records,
    M positions, K stored tokens. A batch without positions (M = 0) is what a rank with nothing to add contributes.
    """

    contexts: Tensor  # int64 [R, T], padded on the right with 0
    lengths: Tensor  # int64 [R], 1..T
    row: Tensor  # int64 [M]: the record of each position
    position: Tensor  # int64 [M], 1..lengths[row] - 1: the law is that of the token AT this index (network row - 1)
    law_ids: Tensor  # int64 [M, K]
    logprob_bits: Tensor  # int32 [M, K]
    tail_bits: Tensor  # int32 [M]
    requests: Tensor  # int64 [R]: the stream's running numbers
    draft: int = 0  # which draft learns from this
    temperature: float = 1.0  # of the laws
    processed: bool = False  # are the laws those after top-k/top-p/penalties?
    step: int = 0  # the same records come `steps` times, once per gradient step
    steps: int = 1

    def __post_init__(self) -> None:
        if self.contexts.ndim != 2 or self.law_ids.ndim != 2:
            shapes = list(self.contexts.shape), list(self.law_ids.shape)
            raise InvalidValue(f"OnlineBatch wants contexts [R, T] and law_ids [M, K], got {shapes[0]} and {shapes[1]}")
        (m, k), records = self.law_ids.shape, self.lengths.shape[0]
        check_field("OnlineBatch", "contexts", self.contexts, torch.int64, tuple(self.contexts.shape))
        check_field("OnlineBatch", "lengths", self.lengths, torch.int64, (self.contexts.shape[0],))
        check_field("OnlineBatch", "row", self.row, torch.int64, (m,))
        check_field("OnlineBatch", "position", self.position, torch.int64, (m,))
        check_field("OnlineBatch", "law_ids", self.law_ids, torch.int64, (m, k))
        check_field("OnlineBatch", "logprob_bits", self.logprob_bits, torch.int32, (m, k))
        check_field("OnlineBatch", "tail_bits", self.tail_bits, torch.int32, (m,))
        if self.requests.shape[0] not in (records, 0):
            raise InvalidValue(f"OnlineBatch has {records} records and {self.requests.shape[0]} request numbers")

    def law(self) -> TeacherLaw:
        """The target's laws at the M positions."""
        return TeacherLaw(
            self.law_ids,
            self.logprob_bits.view(torch.float32),
            self.tail_bits.view(torch.float32),
            self.temperature,
            self.processed,
        )

    def labels(self) -> Tensor:
        """int64 [M]: the tokens that were committed at the positions."""
        return self.contexts[self.row, self.position]

    def within(self, limit: int | None) -> "OnlineBatch":
        """The batch cut to contexts of `limit` tokens: a draft of so many positions never drafts behind them."""
        if limit is None or self.contexts.shape[1] <= limit:
            return self
        keep = self.position < limit
        return replace(
            self,
            contexts=self.contexts[:, :limit],
            lengths=self.lengths.clamp_max(limit),
            **{name: getattr(self, name)[keep] for name in ("row", "position", "law_ids", "logprob_bits", "tail_bits")},
        )


@dataclass(eq=False)
class CanvasBatch(Batch):
    """Canvases for masked diffusion: which positions are masked is drawn in the step.

    A row is [prompt | what may be masked | padding]; cut anywhere from `least` on it is still a whole sample. A row
    that only fills the last batch up (sample_id = -1) has length 0.
    """

    ids: Tensor  # int64 [B, L]
    prompt: Tensor  # int64 [B]; leading positions that are never masked
    least: Tensor  # int64 [B]; prompt < least <= length: the shortest length to which the row may be cut
    length: Tensor  # int64 [B]; positions before the padding
    sample_id: Tensor  # int64 [B]; the sample's index in its data set

    def __post_init__(self) -> None:
        if self.ids.ndim != 2:
            raise InvalidValue(f"CanvasBatch.ids must have shape [B, L], got {list(self.ids.shape)}")
        rows = self.ids.shape[0]
        check_field("CanvasBatch", "ids", self.ids, torch.int64, tuple(self.ids.shape))
        for name in ("prompt", "least", "length", "sample_id"):
            check_field("CanvasBatch", name, getattr(self, name), torch.int64, (rows,))


@dataclass(eq=False)
class TraceBatch(Batch):
    """Passes of masked diffusion with what became of their predictions, for commit filters (Learn2PD).

    Confidences, entropies and margins travel as the bit patterns of their float16 (`halves` gives them back). W: block.
    """

    confidence: Tensor  # int16 [B, W]
    entropy: Tensor  # int16 [B, W]
    margin: Tensor  # int16 [B, W]
    predicted: Tensor  # int32 [B, W]
    masked: Tensor  # uint8 [B, W]; 1: takes part in the loss
    label: Tensor  # uint8 [B, W]; 1: the prediction was final
    before_confidence: Tensor  # int16 [B, W]; of the pass before in the same block
    before_predicted: Tensor  # int32 [B, W]
    before_masked: Tensor  # uint8 [B, W]
    follows: Tensor  # uint8 [B]; 1: there is such a pass
    sample_id: Tensor  # int64 [B]; the record's index, PADDING in rows that only fill the last batch

    def __post_init__(self) -> None:
        shape = tuple(self.masked.shape)
        if len(shape) != 2:
            raise InvalidValue(f"TraceBatch.masked must have shape [B, W], got {list(shape)}")
        for name in ("confidence", "entropy", "margin", "before_confidence"):
            check_field("TraceBatch", name, getattr(self, name), torch.int16, shape)
        for name in ("predicted", "before_predicted"):
            check_field("TraceBatch", name, getattr(self, name), torch.int32, shape)
        for name in ("masked", "label", "before_masked"):
            check_field("TraceBatch", name, getattr(self, name), torch.uint8, shape)
        check_field("TraceBatch", "follows", self.follows, torch.uint8, shape[:1])
        check_field("TraceBatch", "sample_id", self.sample_id, torch.int64, shape[:1])

    @staticmethod
    def halves(bits: Tensor) -> Tensor:
        """float32 of float16 bit patterns."""
        return bits.view(torch.float16).float()


@dataclass(eq=False)
class ImageBatch(Batch):
    """Images with classes."""

    pixels: Tensor  # uint8 [B, C, H, W]
    classes: Tensor  # int64 [B]
    sample_id: Tensor  # int64 [B]; -1: a row that only fills the last batch

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4:
            raise InvalidValue(f"ImageBatch.pixels must have shape [B, C, H, W], got {list(self.pixels.shape)}")
        check_field("ImageBatch", "pixels", self.pixels, torch.uint8, tuple(self.pixels.shape))
        for name in ("classes", "sample_id"):
            check_field("ImageBatch", name, getattr(self, name), torch.int64, (self.pixels.shape[0],))

    @property
    def scaled(self) -> Tensor:
        """The pixels as the nets read them: float32 [B, C, H, W] in [-1, 1]."""
        return self.pixels.float() / 127.5 - 1.0


@dataclass(eq=False)
class CodeBatch(Batch):
    """Images as codes, with classes; of pairs also the key of the noise that the flow carried to them."""

    codes: Tensor  # int32 [B, N]
    classes: Tensor  # int64 [B]
    sample_id: Tensor  # int64 [B]; -1: a row that only fills the last batch. Of pairs: the number that keys their noise

    def __post_init__(self) -> None:
        if self.codes.ndim != 2:
            raise InvalidValue(f"CodeBatch.codes must have shape [B, N], got {list(self.codes.shape)}")
        check_field("CodeBatch", "codes", self.codes, torch.int32, tuple(self.codes.shape))
        for name in ("classes", "sample_id"):
            check_field("CodeBatch", name, getattr(self, name), torch.int64, (self.codes.shape[0],))
