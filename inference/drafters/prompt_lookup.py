"""Drafts copied from the row's own text: whatever followed the last time the current n-gram occurred.

The idea is transformers' prompt lookup decoding (5.23, `PromptLookupCandidateGenerator`), which takes the earliest
occurrence; here the latest one is taken, found in an index that grows with the text instead of a scan per round, and a
copy that reaches the end of the text goes on with what it copied (so loops are drafted at full length).
Shape letters: B batch, g draft length.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from draftsmith.inference.drafters.base import DraftTask, Proposal
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.sampling import PenaltyState


class PromptLookupDrafter:
    """A deterministic draft without a network; it pays where the output repeats the prompt or itself."""

    vocab_size: int | None = None
    tokenizer: Any | None = None

    def __init__(self, ngram_max: int = 3, ngram_min: int = 1) -> None:
        if not 1 <= ngram_min <= ngram_max:
            raise InvalidValue(
                f"n-gram lengths must satisfy 1 <= ngram_min <= ngram_max, got {ngram_min} and {ngram_max}"
            )
        self._orders = range(ngram_max, ngram_min - 1, -1)

    def start(self, task: DraftTask) -> "PromptLookupSession":
        if task.confidence is not None or task.want_law:
            raise InvalidValue("prompt lookup has no draft law: schedule 'confidence' and lossy_mix need one")
        return PromptLookupSession(self._orders, task)


class PromptLookupSession:
    """The n-gram index of every row of one decode call."""

    def __init__(self, orders: range, task: DraftTask) -> None:
        self.calls = 0
        self._orders = orders
        self._task = task
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(task.rows)]  # n-gram -> where it continues
        self._indexed = [0] * task.rows  # continuations below this index are in

    def room(self, length: int) -> int:
        return self._task.longest

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        drafts = [self.find(b, t, n) if n else [] for b, (t, n) in enumerate(zip(tokens, want, strict=True))]
        g = max(len(d) for d in drafts)
        if g == 0:
            return None
        padded = [[*d, *[0] * (g - len(d))] for d in drafts]
        both = host_tensor([[len(d), *row] for d, row in zip(drafts, padded, strict=True)], self._task.device)
        return Proposal(both[:, 1:], both[:, 0], None)

    def find(self, row: int, tokens: Sequence[int], want: int) -> list[int]:
        """Up to `want` tokens to follow `tokens`; the longest n-gram that occurred before decides."""
        after = self._after[row]
        for end in range(max(1, self._indexed[row]), len(tokens)):  # a continuation starts at `end`
            for n in self._orders:
                if n <= end:
                    after[tuple(tokens[end - n : end])] = end
        self._indexed[row] = len(tokens)
        for n in self._orders:
            start = after.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + i % period] for i in range(want)]
        return []

    def commit(self, lengths: Sequence[int]) -> None:
        """Nothing to forget: only committed tokens are indexed."""

    def select(self, rows: Sequence[int]) -> None:
        self._after = [self._after[r] for r in rows]
        self._indexed = [self._indexed[r] for r in rows]
