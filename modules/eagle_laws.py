"""Laws of the target of which only the k likeliest tokens were kept, over a head's draft vocabulary.

What was not kept counts as 0, as tokens outside the draft vocabulary do: losses that compare distributions divide by
the sum of the rest, and those that optimise acceptance take it as it is (so alpha is a bound from below).
Shape letters: N positions, M rows, c rows of a chunk, k kept tokens, V vocabulary of the target, Vd of the draft.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.modules.losses.divergence import FullLaw


@dataclass(frozen=True)
class TopLaws:
    """A target of `chunked_head`: as `draft_laws.DraftLaws`, from kept tokens."""

    index: Tensor  # int64 [M]: which of the N positions
    argmax: Tensor  # int64 [N]: the target's most likely token, of all V
    rows: Tensor  # int64 [N, k]: the head's rows of the kept tokens; Vd: outside the draft vocabulary
    logp: Tensor  # float32 [N, k]
    size: int  # Vd

    @classmethod
    def of(cls, ids: Tensor, logp: Tensor, t2d: Tensor | None, size: int) -> "TopLaws":
        """ids: int64 [N, k] of the target, likeliest first. t2d: bool [V], ids that the draft has; None: all."""
        rows = ids
        if t2d is not None:
            rows = torch.where(t2d[ids], t2d.long().cumsum(0)[ids] - 1, size)
        return cls(torch.arange(len(ids), device=ids.device), ids[:, 0], rows, logp, size)

    @property
    def known(self) -> Tensor:
        """bool [N]: some kept token is in the draft vocabulary; of other positions nothing can be learned."""
        return (self.rows < self.size).any(-1)

    def __len__(self) -> int:
        return self.index.shape[0]

    def at(self, index: Tensor) -> "TopLaws":
        """The laws of other positions: int64 [M]."""
        return replace(self, index=index)

    def __getitem__(self, rows: Tensor | slice) -> "TopLaws | FullLaw":  # what chunked_head asks of a target
        index = self.index[rows]
        if isinstance(rows, Tensor):
            return replace(self, index=index)
        empty = self.logp.new_full((len(index), self.size + 1), float("-inf"))  # the last column takes what is outside
        return FullLaw(empty.scatter_(-1, self.rows[index], self.logp[index])[:, : self.size])
