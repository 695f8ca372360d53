"""How rows of the draft's head become ids of the target: offsets, ids, or none."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis

KINDS = {
    "offset": "d2t holds offsets: target id = row + d2t[row] (EAGLE-3)",
    "absolute": "d2t holds target ids",
    "identity": "rows are target ids (no map)",
    "t2d": "rows are the ids marked in t2d, in order",
}


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """Every reading of the map but the one in use; whole vocabularies have no map."""
    if hasattr(c, "token_offset"):
        for offset in (-1, 0, 1):
            if offset != c.token_offset:
                text = f"draft id = target id {offset:+d}" if offset else "draft ids are target ids"
                yield Hypothesis(
                    "vocabulary map",
                    text,
                    {"token_offset": offset},
                    f"the draft was trained on ids where {text}",
                    {"any engine": "use the tokenizer that the draft was trained with"},
                )
    if not hasattr(c, "map") or not facts.has_map:
        return
    for kind, text in KINDS.items():
        if kind != c.map:
            yield Hypothesis(
                "vocabulary map",
                text,
                {"map": kind},
                text,
                {"any engine": "store d2t as offsets and t2d to match (draftsmith diagnose --write-fixed does it)"},
            )
