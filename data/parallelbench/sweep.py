"""Decode prompts under a rule and count what came out: validity, passes, order of commits; then compare settings.

Shape letters: S prompts. A pass is a network pass in which the prompt still had masks. Tokens per pass is pooled: all
tokens of the outputs over all passes.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from draftsmith.data.parallelbench.statistics import binomial_interval, order_correlation
from draftsmith.inference.canvas import CanvasCommit, CanvasRequest
from draftsmith.inference.commit_rules import SCORES, CommitRule, EntropyBound, Factor, Threshold, TopN
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.metrics import Estimate, ratio_estimate
from draftsmith.inference.requests import DecodeResult

TOP = (1, 2, 4, 8, 16, 32)
RULES = (*(f"top_n_{score}" for score in SCORES), "threshold", "factor", "entropy_bound")


class Streams(Protocol):
    """The part of a canvas decoder that is used here."""

    def stream(self, requests: Sequence[CanvasRequest]) -> Generator[CanvasCommit, None, DecodeResult]: ...


@dataclass(frozen=True)
class Setting:
    """One rule at one strength."""

    rule: str
    strength: float
    commit: CommitRule

    @property
    def label(self) -> str:
        return f"{self.rule} {self.strength:g}"


def settings(names: Sequence[str], longest: int) -> list[Setting]:
    """The sweep of each rule: k in {1, 2, 4, ...} up to the first that fills an answer of `longest` tokens, the paper's
    thresholds and factors, and bounds around EB-sampler's. Raises InvalidValue for an unknown rule.
    """
    ks = [k for i, k in enumerate(TOP) if i == 0 or TOP[i - 1] < longest]
    found: list[Setting] = []
    for name in names:
        if name not in RULES:
            raise unknown_choice("rule", name, RULES)
        if name == "threshold":
            found += [Setting(name, g, Threshold(g)) for g in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)]
        elif name == "factor":
            found += [Setting(name, f, Factor(f)) for f in (0.7, 1.0, 1.3, 1.6, 1.9)]
        elif name == "entropy_bound":
            found += [Setting(name, e, EntropyBound(e)) for e in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)]
        else:
            found += [Setting(name, k, TopN(name.removeprefix("top_n_"), k)) for k in ks]
    return found


@dataclass
class Run:
    """What one setting did with S prompts, in their order."""

    output: list[list[int]]
    right: list[bool]
    passes: list[int]
    tokens: list[int]
    order: list[list[int]]  # of each prompt's holes: the pass that committed it, from 0; -1: cut off
    seconds: float

    @property
    def validity(self) -> Estimate:
        """Share of right outputs with Wilson's interval."""
        return Estimate(sum(self.right) / len(self.right), *binomial_interval(sum(self.right), len(self.right)))

    @property
    def tokens_per_pass(self) -> Estimate:
        """Pooled, with a bootstrap interval over prompts."""
        found = ratio_estimate(torch.tensor(self.tokens), torch.tensor(self.passes))
        if found is None:
            raise InvalidValue("tokens per pass of a run without a pass: its prompts have no holes")
        return found

    def order_correlation(self) -> dict[str, float] | None:
        """Mean over the prompts that have one, over the tokens of their outputs (what was cut off is left out)."""
        seen = [
            found
            for order, count in zip(self.order, self.tokens, strict=True)
            if (found := order_correlation(order[:count])) is not None
        ]
        return {name: sum(f[name] for f in seen) / len(seen) for name in seen[0]} if seen else None

    @classmethod
    def joined(cls, parts: Sequence["Run"]) -> "Run":
        """Of all their prompts, in that order. Raises InvalidValue for no part."""
        if not parts:
            raise InvalidValue("no runs to join: give one at least")
        columns = ("output", "right", "passes", "tokens", "order")
        found: dict[str, Any] = {name: [x for part in parts for x in getattr(part, name)] for name in columns}
        return cls(**found, seconds=sum(part.seconds for part in parts))

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": len(self.right),
            "score": vars(self.validity),
            "tokens_per_pass": vars(self.tokens_per_pass),
            "passes": sum(self.passes) / len(self.passes),
            "order": self.order_correlation(),
            "seconds": self.seconds,
        }


def run(
    decoder: Streams,
    requests: Sequence[CanvasRequest],
    judge: Callable[[int, list[int]], bool],  # (number of the prompt, its output) -> right?
    batch: int = 64,
) -> Run:
    """Decode all prompts, `batch` at a time. Raises InvalidValue for no prompt."""
    if not requests:
        raise InvalidValue("a sweep needs prompts: give at least one")
    outputs: list[list[int]] = []
    passes: list[int] = []
    orders: list[list[int]] = []
    begin = time.perf_counter()
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        at = [{position: i for i, position in enumerate(request.holes)} for request in part]
        order = [[-1] * len(request.holes) for request in part]
        count = [0] * len(part)
        stream = decoder.stream(part)
        while True:
            try:
                commit = next(stream)
            except StopIteration as end:
                outputs += end.value.output
                break
            for position in commit.positions:
                order[commit.row][at[commit.row][position]] = count[commit.row]
            count[commit.row] += 1
        passes += count
        orders += order
    seconds = time.perf_counter() - begin
    right = [judge(i, output) for i, output in enumerate(outputs)]
    return Run(outputs, right, passes, [len(output) for output in outputs], orders, seconds)


def difference(run: Run, base: Run, level: float = 0.95) -> Estimate:
    """Validity minus the base's on the same prompts, with its paired normal interval."""
    gap = torch.tensor(run.right, dtype=torch.float64) - torch.tensor(base.right, dtype=torch.float64)
    value = float(gap.mean())
    half = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))) * float(gap.std())
    half /= len(gap) ** 0.5
    return Estimate(value, value - half, value + half)


def best_allowed(runs: Mapping[Any, Run], base: Run, margin: float) -> Any:
    """The key of most tokens per pass among those whose validity is at most `margin` below the base's.

    Falls back to the key of highest validity where none is.
    """
    floor = base.validity.value - margin
    fine = [key for key, found in runs.items() if found.validity.value >= floor]
    if fine:
        return max(fine, key=lambda key: runs[key].tokens_per_pass.value)
    return max(runs, key=lambda key: runs[key].validity.value)
