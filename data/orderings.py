"""What any-subset training hides: a schedule of mask rates, stratified over the samples, and one order per sample.

Source: "Reviving Any-Subset Autoregressive Models with Principled Parallel Sampling and Speculative Decoding"
(arXiv 2504.20456), training section. Different from its reference code on purpose: strata lie over the samples of the
whole batch (there every GPU keeps a band of rates), every sample has its own subset (there one per batch), and the
number of targets is computed once, the number of visible tokens from it.

Every draw is a function of (seed, sample number): the number of a sample in the run is step * samples per step + its
place in the batch, which does not depend on how many ranks or workers share the batch. So ranks and workers only have
to share the data, which the loaders do, and a resumed run draws what the interrupted one would have.

Shape letters: B batch (of one rank), N positions, K most targets of a sample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.orders import lattice_rank, order_of
from draftsmith.inference.rng import NUM_STREAMS, Stream, key, uniform, uniform_from

ORDERS = ("lattice", "any_permutation")
_ORDER, _RATE, _SHIFT = (int(Stream.DATA) + NUM_STREAMS * use for use in range(3))


@dataclass(frozen=True)
class MaskSchedule:
    """Bounds of the mask rate (share of a sample's tokens that are hidden) over the optimizer steps.

    Raises InvalidValue for rates outside (0, 1) and bounds in the wrong order.
    """

    min_rate: float = 0.85  # final bounds: what the model will be good at
    max_rate: float = 0.99
    start: float = 0.15  # both bounds at step 0
    warmup_steps: int = 5000  # until the final bounds hold; 0: from the start

    def __post_init__(self) -> None:
        if not 0 < self.min_rate <= self.max_rate < 1 or not 0 < self.start < 1:
            raise InvalidValue(
                "mask rates lie strictly between 0 and 1, min_rate at most max_rate; got "
                f"min_rate={self.min_rate}, max_rate={self.max_rate}, start={self.start}"
            )
        if self.warmup_steps < 0:
            raise InvalidValue(f"masking.warmup_steps must be at least 0, got {self.warmup_steps}")

    @classmethod
    def of(cls, spec: "MaskSchedule | Mapping[str, Any]") -> "MaskSchedule":
        """From itself, or from the plain dict that a checkpoint's hyper-parameters hold."""
        return spec if isinstance(spec, MaskSchedule) else cls(**spec)

    @property
    def highest(self) -> float:
        """The largest rate of a run."""
        return max(self.start, self.max_rate)

    def bounds(self, step: int) -> tuple[float, float]:
        """(lowest, highest) rate of an optimizer step."""
        done = 1.0 if self.warmup_steps == 0 else min(1.0, step / self.warmup_steps)
        low = self.start + done * (self.min_rate - self.start)
        return low, self.start + done * (self.max_rate - self.start)

    def rates(self, step: int, places: Tensor, total: int, seed: int) -> Tensor:
        """float64 [B]: the rates of the samples at `places` (int64 [B], each below `total`) of a step's batch.

        The bounds are cut into `total` strata; each sample of the batch draws from another one, uniformly, and from
        step to step the strata move on by a random shift, so that a place in the batch has no rate of its own.
        """
        low, high = self.bounds(step)
        shift = (uniform(seed, step, 0, _SHIFT) * total).long()
        inside = uniform(seed, step * total + places, 0, _RATE)
        return low + (high - low) * ((places + shift) % total + inside) / total


@dataclass(frozen=True)
class Ordering:
    """Who sees whom in one forward of a batch."""

    rank: Tensor  # int64 [B, N]: when each position is decoded; ranks below num_visible are the prompt
    num_visible: Tensor  # int64 [B], m of each sample: 1..N
    targets: Tensor  # int64 [B, K]: positions of ranks m, m+1, ...; where a sample has fewer, any position
    counts: Tensor  # int64 [B]: targets of each sample, the first so many of its row; 0 for a row of padding

    @property
    def real(self) -> Tensor:
        """bool [B, K]: which targets exist."""
        return torch.arange(self.targets.shape[1], device=self.targets.device) < self.counts.unsqueeze(1)


def places(rank: int, world_size: int, batch_size: int, micro: int = 0) -> Tensor:
    """int64 [B]: where the rows of a rank's micro batch stand in the batch of a whole optimizer step.

    Loaders deal the samples of a global batch out in turns, so row j of rank r is sample j * world_size + r of it.
    """
    return (micro * batch_size + torch.arange(batch_size)) * world_size + rank


def draw(
    rates: Tensor,  # float64 [B], on the CPU: the host learns K from them without waiting for the device
    numbers: Tensor,  # int64 [B]: keys of the samples
    lengths: Tensor,  # int64 [B], on the device: tokens before the padding at a row's end; 0: a row of padding
    num_positions: int,
    *,
    seed: int,
    order: str = "lattice",
) -> Ordering:
    """Hide floor(length * rate) tokens of each sample, at least one and never all, chosen uniformly.

    order: "lattice": prompt and targets each in ascending position (one order per subset). "any_permutation": a
    uniform one (N! conditionals to learn). Padding has the last ranks, so nothing sees it, and is no target.
    Raises InvalidValue for an unknown order and fewer than two positions.
    """
    if order not in ORDERS:
        raise unknown_choice("order", order, ORDERS)
    if num_positions < 2:
        raise InvalidValue(f"an ordering needs two positions, one to see and one to predict; got {num_positions}")
    device = lengths.device
    index = torch.arange(num_positions, device=device)
    noise = uniform_from(
        key(seed, numbers.to(device).unsqueeze(1), device), index, torch.full((), _ORDER, device=device)
    )
    noise = torch.where(index < lengths.unsqueeze(1), noise, 2.0 + index)
    hidden = _hidden(lengths.double(), rates.to(device)).long()
    visible_count = (lengths - hidden).clamp_min(1)
    rank = noise.argsort(-1).argsort(-1)
    if order == "lattice":
        rank = lattice_rank(rank < visible_count.unsqueeze(1))
    most = int(_hidden(torch.full((), float(num_positions)).double(), rates.max()))
    at = (visible_count.unsqueeze(1) + torch.arange(most, device=device)).clamp_max(num_positions - 1)
    return Ordering(rank, visible_count, order_of(rank).gather(1, at), hidden)


def _hidden(lengths: Tensor, rates: Tensor) -> Tensor:
    """Whole float64: how many tokens are hidden; 0 of a row that has nothing to see beside its target."""
    return torch.where(lengths >= 2, (lengths * rates).floor().clamp_min(1).minimum(lengths - 1), 0.0)


def widest(batch_size: int, num_positions: int, rate: float, device: str = "meta") -> Ordering:
    """An ordering as large as `rate` allows, by its shapes alone: what planning a step needs."""
    most = max(1, min(num_positions - 1, math.floor(num_positions * rate)))
    sizes = ((batch_size, num_positions), (batch_size,), (batch_size, most), (batch_size,))
    return Ordering(*(torch.zeros(size, dtype=torch.int64, device=device) for size in sizes))
