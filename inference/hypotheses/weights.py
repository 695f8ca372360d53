"""Weights loaded into each other's place: fused projections cut in another order."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis

_SWAPS = {"gate_up": "gate_proj and up_proj", "k_v": "k_proj and v_proj", "q_k": "q_proj and k_proj"}


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """Each pair of equal shape exchanged, or put back."""
    if not hasattr(c, "swapped"):
        return
    if c.swapped:
        yield Hypothesis(
            "weights",
            f"{_SWAPS[c.swapped]} put back",
            {"swapped": ""},
            f"{_SWAPS[c.swapped]} are exchanged",
            {"any engine": "convert the fused weight again, in the order of its writer"},
        )
        return
    for swap, text in _SWAPS.items():
        if swap == "q_k" and not facts.square_qk:
            continue
        yield Hypothesis(
            "weights",
            f"{text} exchanged",
            {"swapped": swap},
            f"{text} stand in each other's place",
            {"any engine": "convert the fused weight again, in the order of its writer"},
        )
