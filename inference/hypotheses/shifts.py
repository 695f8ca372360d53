"""Which token goes with which state, and at which position a drafted token stands (vllm-project/vllm #42704)."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis

# (feature_shift, token_shift): row j reads the state of token j + first and token j + 1 + second.
_PAIRS = {
    (0, 0): "state of token t with token t+1, predicting t+2 (EAGLE)",
    (-1, 0): "state of token t-1 with token t+1: states one row late",
    (0, -1): "state of token t with token t itself: tokens one row late",
    (-1, -1): "labels shifted: every row predicts one token further",
}
_STEPS = {
    0: "drafted token k stands k positions further",
    -1: "drafted tokens stand one position early",
    1: "drafted tokens stand one position late",
}


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """Pairings that a decoder could feed (none looks ahead), and the positions of drafted tokens."""
    if hasattr(c, "feature_shift"):
        for (feature, token), text in _PAIRS.items():
            if (feature, token) != (c.feature_shift, c.token_shift):
                yield Hypothesis(
                    "slot shift",
                    text,
                    {"feature_shift": feature, "token_shift": token},
                    f"the drafter was trained on {text}",
                    {"any engine": f"feed the {text}"},
                )
    if hasattr(c, "step_offset"):
        for offset, text in _STEPS.items():
            if offset != c.step_offset:
                yield Hypothesis(
                    "positions",
                    text,
                    {"step_offset": offset},
                    f"in training, {text}",
                    {"any engine": f"positions: {text}"},
                )
    if hasattr(c, "label_shift"):
        for shift in (0, 1):  # a row that predicts its own token would look ahead
            if shift != c.label_shift:
                text = f"row t predicts token t+{1 + shift}"
                yield Hypothesis(
                    "slot shift",
                    text,
                    {"label_shift": shift},
                    f"in training, {text}",
                    {"any engine": "train the draft with the shift of its own library, or read its rows so"},
                )
