"""In which dtype the target's states reach the drafter (float16 overflows on large states)."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    if not hasattr(c, "features"):
        return
    for dtype in ("float32", "bfloat16", "float16"):
        if dtype != c.features:
            yield Hypothesis(
                "dtype",
                f"target states in {dtype}",
                {"features": dtype},
                f"the drafter expects the target's states in {dtype}",
                {"any engine": f"keep the target's states in {dtype}"},
            )
