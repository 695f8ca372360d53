"""What is measured of an EAGLE rollout, step by step.

Shape letters: B batch, T time, K steps, M trained rows of all steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from draftsmith.modules.losses.chunked_head import HeadStats


@dataclass(frozen=True)
class Unrolled:
    """The trained rows of a batch, all steps one after the other."""

    total: Tensor  # []: sum over steps of decay^k / rows of step k * row losses; the batch's loss
    stats: HeadStats | None
    step: Tensor  # int64 [M]: k of each row
    place: Tensor  # int64 [M]: b * (T - 1) + t
    inside: Tensor  # bool [M]: the target's most likely token is in the draft vocabulary


class StepMeans(Metric):
    """Per step: loss, top-1 accuracy, accuracy where all steps before were right, and sum min(p, q); summed over ranks.

    Rows for conditional accuracy are those that were trained in every step before.
    """

    sums: Tensor  # float64 [K, 6]: rows, loss, hits, alpha, rows after hits, hits after hits

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(steps, 6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, out: Unrolled, places: int) -> None:
        """Args: places: B * (T - 1)."""
        stats = out.stats
        assert stats is not None
        hit = stats.agree & out.inside
        right = torch.ones(places, dtype=torch.bool, device=hit.device)  # rows that were right in every step so far
        for k in range(len(self.sums)):
            rows = out.step == k
            place, hits = out.place[rows], hit[rows]
            after = right[place]
            columns = (torch.ones_like(hits), stats.loss[rows], hits, stats.alpha[rows], after, hits & after)
            self.sums[k] += torch.stack([column.double().sum() for column in columns]).to(self.sums)
            right = torch.zeros_like(right).index_fill_(0, place[hits & after], True)

    def compute(self) -> dict[str, Tensor]:
        rows, loss, hits, alpha, after, after_hits = self.sums.unbind(1)
        some = rows.clamp_min(1)
        accuracy = hits / some
        return {
            "loss": loss / some,
            "accuracy": accuracy,
            "conditional": after_hits / after.clamp_min(1),
            "alpha": alpha / some,
            "tau_simulated": 1 + accuracy.cumprod(0).sum(),
        }


def by_step(values: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """A column of `StepMeans.compute` step by step: torchmetrics hands a single step over without its dimension."""
    return list(values[name].reshape(-1).unbind())
