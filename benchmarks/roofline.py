"""The roofline forecast checked on public GPU benchmark rows, with whole targets left out of the fit.

    python -m benchmarks.roofline ../shared/data/specforge_rows.csv [--png FILE]

The rows are SpecForge's (EAGLE-3 drafters in SGLang). They name no hardware: the dashboard that shows them says H200.
What is known of a target and its draft are the numbers of their published config.json files below, no timing.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.roofline import GPUS, Plan, Sizes, sizes_of, terms
from draftsmith.inference.roofline_fit import (
    Row,
    Score,
    fit_accepted_length_only,
    fit_constant_ratio,
    fit_roofline,
    leave_one_target_out,
)
from draftsmith.trainers.plots import DPI, GREY, INK, MARKS, SERIES

GPU = "h200"
FORECASTS = {
    "roofline": fit_roofline,
    "constant_ratio": fit_constant_ratio,
    "accepted_length_only": fit_accepted_length_only,
}


def _config(layers: int, width: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {**dict(zip(names, (layers, width, heads, kv_heads, vocab), strict=True)), "head_dim": 128, **more}


def _experts(experts: int, chosen: int, inner: int) -> dict[str, int]:
    return {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": inner}


# Facts from the config.json that each target's authors publish with its weights.
TARGETS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B-Instruct": _config(32, 4096, 32, 8, 128256, intermediate_size=14336),
    "Llama-4-Scout-17B-16E-Instruct": _config(
        *(48, 5120, 40, 8, 202048),
        **{"model_type": "llama4", "intermediate_size": 8192, "num_local_experts": 16, "num_experts_per_tok": 1},
    ),
    "Ling-flash-2.0": _config(
        *(32, 4096, 32, 4, 157184),
        **{"intermediate_size": 9216, "first_k_dense_replace": 1, "num_shared_experts": 1, **_experts(256, 8, 1024)},
    ),
    "Qwen3-235B-A22B-Instruct-2507": _config(94, 4096, 64, 4, 151936, **_experts(128, 8, 1536)),
    "Qwen3-Coder-30B-A3B-Instruct": _config(48, 2048, 32, 4, 151936, **_experts(128, 8, 768)),
    "Qwen3-Coder-480B-A35B-Instruct": _config(62, 6144, 96, 8, 151936, **_experts(160, 8, 2560)),
    "Qwen3-Next-80B-A3B-Instruct-FP8": _config(
        *(48, 2048, 16, 2, 151936),
        **{"model_type": "qwen3_next", "quantization_config": {"quant_method": "fp8"}, "full_attention_interval": 4},
        **{"linear_num_key_heads": 16, "linear_key_head_dim": 128},
        **{"linear_num_value_heads": 32, "linear_value_head_dim": 128},
        **{"shared_expert_intermediate_size": 512, **_experts(512, 10, 512)},
    )
    | {"head_dim": 256},
}
# (heads, key and value heads, width of the MLP) of each target's EAGLE-3 draft: one Llama layer of the target's width
# and a head over 32000 tokens. From SpecForge's configs/*-eagle3.json; that of Qwen3-Next was not to be had, and the
# one of the target of the same width, Qwen3-Coder-30B, stands in for it. Two drafts of one target share a config.
DRAFTS: dict[str, tuple[int, int, int]] = {
    "Llama-3.1-8B-Instruct": (32, 8, 14336),
    "Llama-4-Scout-17B-16E-Instruct": (40, 8, 32768),
    "Ling-flash-2.0": (32, 8, 14336),
    "Qwen3-235B-A22B-Instruct-2507": (64, 4, 24576),
    "Qwen3-Coder-30B-A3B-Instruct": (32, 4, 12288),
    "Qwen3-Coder-480B-A35B-Instruct": (96, 8, 16384),
    "Qwen3-Next-80B-A3B-Instruct-FP8": (32, 4, 12288),
}
DRAFT_VOCABULARY = 32000


def draft_sizes(target: str) -> Sizes:
    """Of the EAGLE-3 draft that was trained for `target`."""
    heads, kv_heads, inner = DRAFTS[target]
    config = _config(1, TARGETS[target]["hidden_size"], heads, kv_heads, TARGETS[target]["vocab_size"])
    return sizes_of({**config, "intermediate_size": inner, "draft_vocab_size": DRAFT_VOCABULARY})


def read_rows(path: Path) -> list[Row]:
    """The rows of specforge_rows.csv. Raises InvalidValue for another table, or a target without facts here."""
    gpu = GPUS[GPU]
    sizes = {target: (sizes_of(config), draft_sizes(target)) for target, config in TARGETS.items()}
    rows = []
    try:
        with path.open(newline="") as stream:
            for line in csv.DictReader(stream):
                target = line["target"]
                if target not in sizes:
                    raise unknown_choice("target", target, sizes)
                counts = (int(line[key]) for key in ("batch_size", "steps", "topk", "num_draft_tokens"))
                plan = Plan(*counts)
                measured = float(line["output_throughput"]) / float(line["baseline_throughput"])
                rows.append(Row(target, plan, terms(*sizes[target], plan, gpu), float(line["accept_length"]), measured))
    except (OSError, KeyError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue(f"{path} is not the table of SpecForge's rows: {error!r}") from None
    if not rows:
        raise InvalidValue(f"{path} holds no row")
    return rows


def check(rows: Sequence[Row]) -> dict[str, Score]:
    """Every forecast, each target scored by a fit on the others."""
    return {name: leave_one_target_out(rows, fit) for name, fit in FORECASTS.items()}


def figures(rows: Sequence[Row], scores: dict[str, Score]) -> dict[str, Any]:
    """What is reported: errors of each forecast, overheads fitted on all rows, rows that no cost explains."""
    found: dict[str, Any] = {"rows": len(rows), "rows_above_their_accepted_length": sum(not r.possible for r in rows)}
    for name, score in scores.items():
        low, high = score.interval()
        found[name] = {
            "median_error": {"value": score.median, "low": low, "high": high},
            "error_90th_percentile": score.quantile(0.9),
            "mean_of_target_medians": statistics.mean(score.by_target.values()),
            "median_error_of_target": score.by_target,
        }
    overheads = fit_roofline(rows).overheads.to_json()
    found["roofline"]["median_error_by_plain_least_squares"] = leave_one_target_out(
        rows, partial(fit_roofline, robust=False)
    ).median
    found["roofline"]["parameters"] = len(overheads)
    found["roofline"]["overheads_in_plain_roofline_steps"] = overheads
    return found


def shipped(rows: Sequence[Row]) -> dict[str, Any]:
    """Overheads fitted on all rows, for `draftsmith forecast`."""
    source = (
        f"fitted on {len(rows)} public rows of {len({r.target for r in rows})} targets in SGLang, GPU {GPU.upper()}"
    )
    return {"from": source, "overheads": fit_roofline(rows).overheads.to_json()}


def picture(rows: Sequence[Row], scores: dict[str, Score], path: Path) -> None:
    """Forecast against measured speed-up, one panel a forecast, every target drawn from the fit without it."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    figure.suptitle("Speed-up of SpecForge's rows, each target forecast by a fit on the others", fontsize=11, color=INK)
    most = 1.05 * max(
        max(row.speedup for row in rows), *(max(f) for s in scores.values() for f in s.forecasts.values())
    )
    panels = figure.subplots(1, len(scores), sharey=True)
    for axes, (name, score) in zip(panels, scores.items(), strict=True):
        axes.plot([0, most], [0, most], color=INK, linewidth=1)
        axes.fill_between([0, most], [0, 0.8 * most], [0, 1.2 * most], color=GREY, alpha=0.2, linewidth=0)
        for i, (target, forecasts) in enumerate(sorted(score.forecasts.items())):
            measured = [row.speedup for row in rows if row.target == target]
            colour, mark = (*SERIES, GREY)[i % 7], (*MARKS, "v", "P", "X")[i % 7]
            axes.scatter(measured, forecasts, s=16, color=colour, marker=mark, alpha=0.75, linewidths=0, label=target)
        axes.set_title(f"{name.replace('_', ' ')}: median error {score.median:.1%}", fontsize=10, color=INK)
        axes.set_xlabel("measured speed-up (times plain decoding)")
        axes.set_xlim(0, most)
        axes.set_ylim(0, most)
    panels[0].set_ylabel("forecast speed-up (grey: within 20%)")
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=DPI)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures as JSON. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="specforge_rows.csv")
    parser.add_argument("--save", type=Path, help="also write the fitted overheads, as draftsmith forecast reads them")
    parser.add_argument("--png", type=Path, help="also draw forecast against measured speed-up")
    given = parser.parse_args(argv)
    rows = read_rows(given.rows)
    scores = check(rows)
    print(json.dumps(figures(rows, scores), indent=1))
    if given.save is not None:
        given.save.write_text(json.dumps(shipped(rows), indent=1) + "\n")
    if given.png is not None:
        picture(rows, scores, given.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
