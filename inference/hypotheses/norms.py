"""Norms that are left out, added, or put in another place (sgl-project/sglang #32334: norm_before_fc ignored)."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import FLOOR, Facts, Hypothesis

_EXPLAIN = {
    "norm_before_residual": ("the residual is the normed state", "the residual is the state as it is"),
    "norm_before_fc": ("one norm over all target states before fc", "no norm over all target states before fc"),
    "fc_norm": ("one norm for each target state before fc", "no norm for each target state before fc"),
    "norm_output": ("the next step reads the normed state", "the next step reads the state before the final norm"),
    "hidden_norm": ("the state is normed before attention", "the state is not normed before attention"),
    "final_norm": ("a norm stands before the head", "no norm stands before the head"),
    "final_state_normed": ("the target's last state is read after its norm", "the last state is read before its norm"),
}
# Without the norm before the head every position has a temperature of its own, which makes a healthy but sharp head up
# to 2.3% better (tests/trained_eagles.py, recipes ce and third); a head trained without that norm gains far more.
_MIMIC_FLOOR = 0.05
_CONFIG_KEYS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """Every norm flag toggled alone; a parametric norm uses the checkpoint's weight where it has one, else ones."""
    for name, (on, off) in _EXPLAIN.items():
        if not hasattr(c, name) or (name == "final_state_normed" and facts.target_layers not in c.aux_layers):
            continue
        if getattr(c, "version", 3) == 1 and name != "final_state_normed":
            continue
        value = not getattr(c, name)
        changes = {name: value}
        if value and name in ("norm_before_fc", "fc_norm"):
            changes |= {"norm_before_fc": False, "fc_norm": False, name: True}
        text = str(value).lower()
        fixes = {"draftsmith": f"{name}: {text}", "vLLM": f"{name}: {text}"} if name in _CONFIG_KEYS else {}
        fixes["SGLang"] = f"{name}: {text}" if name == "fc_norm" else "its EAGLE-3 network has no such switch"
        floor = _MIMIC_FLOOR if name == "final_norm" and not value else FLOOR
        title = f"{name} {'on' if value else 'off'}"
        yield Hypothesis("norm flags", title, changes, on if value else off, fixes, floor)
