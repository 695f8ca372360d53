"""Whether the drafter's attention sees only the last tokens, and how many (a window is inherited or forgotten)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.hypotheses.base import Facts, Hypothesis


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """No window, the target's, and the one in use off by one."""
    if not hasattr(c, "windows"):
        return
    now = tuple(c.windows)
    tried: dict[str, tuple[int | None, ...]] = {"no sliding window": (None,) * len(now)}
    if facts.target_window is not None:
        tried["the target's sliding window"] = (facts.target_window,) * len(now)
    for step in (-1, 1):
        moved = tuple(None if window is None else max(1, window + step) for window in now)
        tried[f"sliding window {step:+d}"] = moved
    for name, windows in tried.items():
        if windows != now:
            sizes = sorted({w for w in windows if w is not None})
            text = f"a sliding window of {', '.join(map(str, sizes))}" if sizes else "no sliding window"
            stated = str(sizes[0]) if sizes else "null"
            yield Hypothesis(
                "sliding window",
                name,
                {"windows": windows},
                f"the drafter was trained with {text}",
                {"any engine": f"sliding_window: {stated} in the drafter's config.json (and layer_types to match)"},
            )


def window_of(directory: Path) -> int | None:
    """The sliding window of a model's config.json; None where it has none."""
    config: dict[str, Any] = read_json(directory / "config.json")
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True) and config.get("model_type") != "llama"
    return int(window) if window and used else None
