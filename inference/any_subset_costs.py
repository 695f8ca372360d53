"""What a pass of an any-subset model costs by its rows, and what self-drafting gains over one token a call.

Calls alone are no speed-up: a sequential call computes two rows (the last token and one query), a drafting one k + 1, a
verifying one 2(k - 1). Measured seconds of each take the place of the count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftsmith.inference.decoders.any_subset import AnySubsetSettings
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM


@dataclass(frozen=True)
class CanvasCosts:
    """Median seconds of the passes with a cache, batch 1, half way through the holes."""

    sequential: float
    draft: dict[int, float]  # by k
    verify: dict[int, float]

    def ratio(self, alpha: float, k: int) -> float:
        """Forecast: seconds of ASSD per token over those of sequential decoding.

        alpha: acceptance of the drafts behind the first one, each alike and independent.
        """
        round_seconds = self.draft[k] + self.verify[k]
        return round_seconds / AnySubsetSettings(k=k).expected_tokens(alpha, k) / self.sequential

    def best_k(self, alpha: float) -> int:
        """The k of the smallest ratio."""
        return min(self.draft, key=lambda k: self.ratio(alpha, k))


@torch.inference_mode()
def measure_costs(net: AnySubsetLM, length: int, visible: int, ks: Sequence[int], repetitions: int = 15) -> CanvasCosts:
    """Time the passes over a canvas of `length` positions of which `visible` are the prompt.

    Raises InvalidValue for k < 2 and for a canvas without room for them.
    """
    n = visible + (length - visible) // 2
    if not ks or min(ks) < 2 or not 0 < visible <= n or n + max(ks) > length:
        raise InvalidValue(f"k must be 2 or more and fit half of {length - visible} holes, got {list(ks)}")
    order = torch.arange(length, device=net.device).unsqueeze(0)
    prompt = torch.tensor([visible], device=net.device)
    tokens = torch.full((1, n + max(ks)), (net.config.mask_id + 1) % net.config.vocab_size, device=net.device)
    cache = net.new_cache(order, max(ks))

    def passed(first: int, count: int, queries: int, draft: bool) -> Callable[[], object]:
        """A pass that feeds `count` ranks from `first` on and asks for `queries` ranks."""
        start = first + count if draft or queries == 1 else first + 1
        ranks = torch.arange(start, start + queries, device=net.device).unsqueeze(0)
        limit = ranks[:, :1].expand_as(ranks) if draft else ranks
        return lambda: net.head(net.extend(cache, tokens[:, :count], [first], prompt, ranks, limit))

    passed(0, n, 1, True)()
    jobs = {("sequential", 1): passed(n - 1, 1, 1, True)}
    jobs |= {("draft", k): passed(n - 1, 1, k, True) for k in ks}
    jobs |= {("verify", k): passed(n, k - 1, k - 1, False) for k in ks}
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in jobs}
    for _ in range(repetitions + 1):  # in turn, so that a slow moment of the machine meets them all; the first warms up
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if net.device.type == "cuda":
                torch.cuda.synchronize(net.device)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return CanvasCosts(
        median["sequential", 1], {k: median["draft", k] for k in ks}, {k: median["verify", k] for k in ks}
    )
