"""What a chain drafter is to the speculative decoder.

A `Drafter` is built once and holds what is heavy (a network). `start` makes a `DraftSession` for one decode call, which
holds what belongs to its rows (a cache, an n-gram index).
Shape letters: B batch, g draft length, V vocabulary. q draft law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, device

from draftsmith.inference.sampling import PenaltyState, SamplingParams


@dataclass(frozen=True)
class DraftTask:
    """What a session needs to know of the call it drafts for."""

    rows: int
    capacity: int  # longest row, prompt and output, plus one draft
    longest: int  # longest draft that will be asked for
    vocab_size: int  # ids that may be proposed: 0..vocab_size-1
    sampling: SamplingParams  # the target's; a drafter may have its own
    device: device  # where the proposal must lie
    want_law: bool  # keep q even when the draft is deterministic (lossy_mix)
    confidence: float | None  # stop offering after a token less likely than this; None: offer all


@dataclass(frozen=True)
class Proposal:
    """The drafts of one round."""

    tokens: Tensor  # int64 [B, g]; only the first n of a row are offered
    n: Tensor | None  # int64 [B] on the device; None: as many as were wanted
    law: Tensor | None  # [B, g, V], exactly the laws the tokens were sampled from; None: deterministic


class DraftSession(Protocol):
    """The drafting side of one decode call."""

    calls: int  # network calls so far

    def room(self, length: int) -> int:
        """The longest draft that can follow `length` committed tokens: a draft's context may be the shorter one."""
        ...

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        """Draft max(want) tokens for every row; no host synchronisation.

        Args: tokens: [B] committed tokens, prompt included. want: [B] how many will be offered. u: float64 [B, g]
        uniforms, None when greedy. Returns None when no row has anything to offer.
        """
        ...

    def commit(self, lengths: Sequence[int]) -> None:
        """The rows now have `lengths` committed tokens: forget the rejected drafts."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        ...


class Drafter(Protocol):
    """Proposes tokens for a target to verify."""

    @property
    def vocab_size(self) -> int | None:
        """Rows of its head; None when it only repeats tokens it was shown."""
        ...

    @property
    def tokenizer(self) -> Any | None:
        """Compared with the target's when both are known."""
        ...

    def start(self, task: DraftTask) -> DraftSession: ...
