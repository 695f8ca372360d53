"""Rotary positions: base, scaling and pairing (sgl-project/SpecForge #270: rope_theta unused)."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis, same_value

BASES = (1e4, 1e5, 5e5, 1e6, 1e7)


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """The target's settings, the usual bases, no scaling, and a part of each head, and pairs of neighbours
    instead of halves."""
    if not hasattr(c, "rope"):
        return
    now = dict(c.rope)
    tried: list[tuple[str, dict[str, Any]]] = [("the target's rotary settings", dict(facts.target_rope))]
    tried += [(f"rope_theta {base:g}", {**now, "rope_theta": base}) for base in BASES]
    if now["rope_type"] != "default":
        tried.append(("no rope scaling", {"rope_type": "default", "rope_theta": now["rope_theta"]}))
    for name, rope in tried:
        if not same_value(rope, now):
            yield Hypothesis(
                "RoPE",
                name,
                {"rope": rope},
                f"the drafter was trained with {rope}",
                {
                    "vLLM": f"transformer_layer_config.rope_parameters: {rope}",
                    "SGLang": f"rope_theta: {rope['rope_theta']:g} at the top level, and rope_scaling",
                    "draftsmith": f"rope: {rope}",
                },
            )
    if hasattr(c, "rotary_share"):
        stated = {float(rope.get("partial_rotary_factor", 1.0)) for rope in (now, facts.target_rope)}
        for share in sorted({1.0, 0.5, 0.25, *stated} - {c.rotary_share}):
            yield Hypothesis(
                "RoPE",
                f"{share:g} of each head is turned",
                {"rotary_share": share},
                f"in training, {share:g} of each head's dimensions were turned (partial_rotary_factor)",
                {"any engine": f"partial_rotary_factor: {share:g} in the drafter's rope_parameters"},
            )
    if facts.half_head:
        pairing = "interleaved (neighbours)" if not c.interleaved else "halves"
        yield Hypothesis(
            "RoPE",
            f"pairing: {pairing}",
            {"interleaved": not c.interleaved},
            f"the drafter's rotary pairs are {pairing}",
            {"any engine": "permute the rows of q_proj and k_proj (draftsmith diagnose --write-fixed does it)"},
        )
