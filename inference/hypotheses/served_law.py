"""The law that drafts are drawn from, against the one that the target is served with: top-k and top-p of both.

The temperature is no hypothesis: it is chosen anew for each of them (a nuisance, see diagnose.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.hypotheses.base import Facts, Hypothesis

LawFilter = tuple[int, float]  # top-k (0: all) and top-p (1: all)
ALL: LawFilter = (0, 1.0)


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """No filter, and the target's."""
    if not hasattr(c, "law_filter"):
        return
    now = tuple(c.law_filter)
    tried = {"drafts unfiltered": ALL, "drafts filtered as the target's law": facts.target_filter}
    seen = {now}
    for name, (top_k, top_p) in tried.items():
        if (top_k, top_p) in seen:
            continue
        seen.add((top_k, top_p))
        yield Hypothesis(
            "served law",
            name,
            {"law_filter": (top_k, top_p)},
            f"drafts are drawn with top-k {now[0] or 'off'} and top-p {now[1]:g}, which is not the law they are for",
            {"any engine": f"draw drafts with top_k {top_k or 'off'} and top_p {top_p:g}"},
        )


def filtered(logits: Tensor, law_filter: LawFilter) -> Tensor:
    """Logits [..., W] with what top-k and top-p (at temperature 1) leave out at -inf."""
    top_k, top_p = law_filter
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], float("-inf"))
    if top_p < 1.0:
        ordered, at = logits.softmax(-1).sort(-1, descending=True)
        out = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, at, ordered.cumsum(-1) - ordered >= top_p)
        logits = logits.masked_fill(out, float("-inf"))
    return logits
