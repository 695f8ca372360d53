"""What a bench's raw rows say: ratios pair by pair, break-even points, warnings, and the table in plain text."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.forecast import best_g, break_even_batch, break_even_tokens, crossing, speedup
from draftsmith.inference.metrics import median_estimate
from draftsmith.inference.peers import ASSISTED

Row = Mapping[str, Any]
BEST_ROWS = ("speculative_best", "speculative")  # constant length, best by the forecast (the second when they agree)


def break_even(alpha: float, curves: Sequence[CostCurve], training_seconds: float | None) -> dict[str, Any]:
    """The forecast's break-even batch and, where the training time is known, tokens at each batch."""
    batch = break_even_batch(alpha, curves)
    tokens: dict[str, float | None] = {}
    for curve in curves if training_seconds is not None else ():
        gain = speedup(alpha, best_g(alpha, curve), curve)
        per_token = curve.plain_round / curve.batch
        tokens[str(curve.batch)] = break_even_tokens(training_seconds or 0.0, per_token, gain)
    largest = max(curve.batch for curve in curves)
    return {
        "break_even_batch": _batch_json(batch, largest),
        "training_seconds": training_seconds,
        "break_even_tokens": tokens,
    }


def summary(predicted: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The ratios that the issue and the demo quote, per batch; "best" is our speculative row of the highest median."""
    batches = {}
    for block in blocks:
        rows = {row["name"]: row for row in block["rows"] if row["offered"]}
        ours = {name: row for name, row in rows.items() if name.startswith("speculative")}
        generate, assisted = rows.get("hf_generate"), _fastest(rows[n] for n in ASSISTED if n in rows)
        forecast = predicted["batches"].get(str(block["batch"]))
        entry: dict[str, Any] = {
            "plain_vs_transformers_generate": ratio(rows["plain"], generate, seed),
            "forecast_speedup": forecast["speedup"] if forecast else None,
            "forecast_g": forecast["g"] if forecast else None,
            "faster_assisted": assisted["name"] if assisted else None,
            "fastest_speculative": None,
        }
        for name, row in ours.items():
            entry[f"{name}_vs_plain"] = ratio(row, rows["plain"], seed)
            entry[f"{name}_vs_transformers_generate"] = ratio(row, generate, seed)
            entry[f"{name}_vs_transformers_assisted"] = ratio(row, assisted, seed)
        if (best := _fastest(ours.values())) is not None:
            entry["fastest_speculative"] = best["name"]
        batches[str(block["batch"])] = entry
    return {"batches": batches, "break_even_batch": _measured_break_even(blocks)}


def ratio(row: Row, other: Row | None, seed: int = 0) -> dict[str, float | None] | None:
    """Tokens per second of `row` over those of `other`, pair by pair within the repetitions; None without the other."""
    if other is None:
        return None
    pairs = [
        (a / s) / (b / t)
        for a, s, b, t in zip(row["tokens"], row["seconds"], other["tokens"], other["seconds"], strict=True)
    ]
    return dict(vars(median_estimate(torch.tensor(pairs, dtype=torch.float64), seed=seed)))


def warnings(blocks: Sequence[Mapping[str, Any]], repetitions: int, enough: int) -> list[str]:
    """One line each: plain is faster, automatic below plain, greedy outputs differ, too few repetitions."""
    lines = []
    if repetitions < enough:
        lines.append(f"{repetitions} repetitions are too few for a figure to quote: take at least {enough}")
    for block in blocks:
        rows = {row["name"]: row for row in block["rows"] if row["offered"]}
        best = _fastest(row for name, row in rows.items() if name.startswith("speculative"))
        if best is not None and best["speedup_vs_plain"]["value"] < 1.0:
            gain = best["speedup_vs_plain"]["value"]
            lines.append(
                f"plain decoding is faster at batch {block['batch']}: {best['label']} runs at {gain:.2f}x of it; "
                "serve this batch without the draft"
            )
        auto = rows.get("speculative_auto")
        if auto is not None and auto["speedup_vs_plain"]["value"] < 0.97:
            gain = auto["speedup_vs_plain"]["value"]
            lines.append(f"the automatic mode is below 0.97x plain at batch {block['batch']}: {gain:.2f}x")
        for row in rows.values():
            same = row.get("same_as_plain")
            if same and same["first_differences"]:
                gap = max(d["top2_gap"] for d in same["first_differences"])
                lines.append(
                    f"{row['label']} differs from plain on {same['of'] - same['equal']} of {same['of']} greedy outputs "
                    f"at batch {block['batch']}; largest top-2 gap where they part: {gap:.2g}"
                )
    return lines


def text(report: Mapping[str, Any]) -> str:
    """The whole report for a terminal: forecast, one table per batch, break-even points. Warnings are not in it."""
    predicted = report["forecast"]
    lines = [f"Forecast, made before the measurement ({predicted['prompts']}):"]
    if predicted["acceptance"] is None:
        lines.append("  none: no draft was given")
    else:
        seen = predicted["acceptance"]
        lines.append(f"  alpha {_estimate(seen['alpha'])}, tau {_estimate(seen['tau'])} tokens per target call")
        for batch, entry in predicted["batches"].items():
            least = entry["break_even_alpha"]
            needs = "no alpha would gain" if least is None else f"gains from alpha {least:.2f} on"
            lines.append(f"  batch {batch}: {_estimate(entry['speedup'])}x at g = {entry['g']}; {needs}")
        lines.append(f"  break-even batch: {predicted['break_even_batch']['text']}")
        for batch, tokens in predicted["break_even_tokens"].items():
            paid = "never" if tokens is None else f"after {tokens:,.0f} tokens"
            lines.append(
                f"  training the draft ({predicted['training_seconds']:.0f} s) is paid back at batch {batch}: {paid}"
            )
    for batch, rows in predicted.get("rows", {}).items():
        lines += [f"  batch {batch}: {row['speedup']:.2f}x by {name}" for name, row in rows.items()]
    for block in report["batches"]:
        lines += ["", f"Batch {block['batch']} ({block['requests']} requests of {block['distinct_prompts']} prompts):"]
        lines += table(block)
    measured = report["summary"]["break_even_batch"]
    if measured is not None:
        lines += ["", f"Break-even batch, measured: {measured['text']}"]
    return "\n".join(lines)


def table(block: Mapping[str, Any]) -> list[str]:
    head = ("", "tokens/s", "vs plain", "alpha", "tau", "g", "same ids")
    body: list[tuple[str, ...]] = []
    for row in block["rows"]:
        if not row["offered"]:
            body.append((row["label"], row["why"]))
            continue
        seen = row["acceptance"] or {}
        alpha, tau, same = seen.get("alpha"), seen.get("tau"), row.get("same_as_plain")
        body.append(
            (
                row["label"],
                _estimate(row["tokens_per_second"], ".0f"),
                _estimate(row["speedup_vs_plain"], ".2f"),
                f"{alpha['value']:.3f}" if alpha else "",
                f"{tau['value']:.2f}" if tau else "",
                f"{row['mean_draft_length']:.1f}" if row["mean_draft_length"] else "",
                f"{same['equal']}/{same['of']}" if same else "",
            )
        )
    full = [head, *(cells for cells in body if len(cells) == len(head))]
    widths = [max(len(cells[i]) for cells in full) for i in range(len(head))]
    widths[0] = max(len(cells[0]) for cells in body)
    lines = []
    for cells in (head, *body):
        if len(cells) < len(head):
            lines.append(f"  {cells[0]:<{widths[0]}}  {cells[1]}")
        else:
            numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
            lines.append(f"  {cells[0]:<{widths[0]}}  {numbers}".rstrip())
    return lines


def _estimate(value: Mapping[str, float | None] | None, form: str = ".3f") -> str:
    if value is None:
        return "-"
    middle, low, high = value["value"], value["low"], value["high"]
    return f"{middle:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def _fastest(rows: Any) -> Row | None:
    found = sorted(rows, key=lambda row: row["tokens_per_second"]["value"])
    return found[-1] if found else None


def _measured_break_even(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    points = []
    for block in blocks:
        rows = {row["name"]: row for row in block["rows"] if row["offered"]}
        row = next((rows[name] for name in BEST_ROWS if name in rows), None)
        if row is not None:
            points.append((block["batch"], row["speedup_vs_plain"]["value"]))
    if not points:
        return None
    return _batch_json(crossing(sorted(points)), max(batch for batch, _ in points))


def _batch_json(batch: float | None, largest: int) -> dict[str, Any]:
    if batch is None:
        return {"value": None, "text": "none: drafting does not pay at any batch size measured"}
    if math.isinf(batch):
        return {"value": None, "text": f"above {largest}, the largest batch measured"}
    return {"value": batch, "text": f"about {batch:.1f}"}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """A report as a file, whole or not at all: written beside and renamed. Raises InvalidValue where it cannot be."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InvalidValue(f"cannot write {path}: {error.strerror}") from error
