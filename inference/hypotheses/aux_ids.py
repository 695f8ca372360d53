"""Which states of the target the drafter reads: off by one, in another order, or under another engine's convention.

vllm-project/vllm #50170 (ids missing: 1.2% accepted instead of 58.9%), sgl-project/sglang #25454, #32334.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from draftsmith.inference.formats.eagle import default_ids
from draftsmith.inference.formats.specforge import ids_for_sglang
from draftsmith.inference.hypotheses.base import Facts, Hypothesis


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """All ids by one, reversed, the defaults of EAGLE and of DFlash, and each id by one."""
    if not hasattr(c, "aux_layers"):
        return
    now, depth = tuple(c.aux_layers), facts.target_layers
    tried: list[tuple[str, tuple[int, ...]]] = [
        ("all ids - 1 (ids were outputs of layers)", tuple(i - 1 for i in now)),
        ("all ids + 1 (ids were inputs of layers)", tuple(i + 1 for i in now)),
        ("ids reversed", now[::-1]),
    ]
    if len(now) == 3:
        tried.append(("the EAGLE default 2, L//2, L-3", default_ids(depth)))
    if len(now) > 1:
        tried.append(("DFlash's spread of ids", spread_ids(len(now), depth)))
    for place, i in enumerate(now):
        for step in (-1, 1):
            tried.append((f"id {i} is {i + step}", (*now[:place], i + step, *now[place + 1 :])))
    seen = {now}
    for name, ids in tried:
        if ids not in seen and len(set(ids)) == len(ids) and all(0 <= i <= depth for i in ids):
            seen.add(ids)
            yield hypothesis(name, ids)


def spread_ids(count: int, depth: int) -> tuple[int, ...]:
    """DFlash's formula: outputs of `count` layers, evenly from layer 1 to layer L-3; as hidden_states indices."""
    last = max(1, depth - 3)
    return tuple(1 + round(1 + i * (last - 1) / (count - 1)) for i in range(count))


def hypothesis(name: str, ids: Sequence[int]) -> Hypothesis:
    """That the drafter was trained on these hidden_states indices."""
    sglang = ids_for_sglang(ids)
    return Hypothesis(
        "aux ids",
        name,
        {"aux_layers": tuple(ids)},
        f"the drafter was trained on hidden states {list(ids)} (index into transformers' hidden_states)",
        {
            "vLLM": f"eagle_aux_hidden_state_layer_ids: {list(ids)}",
            "SGLang": f"eagle_config.eagle_aux_hidden_state_layer_ids: {sglang}" if sglang else "cannot be told",
            "draftsmith": f"aux_layers: {list(ids)}",
        },
    )
