"""The picture of a ParallelBench report: for each task, score against tokens per pass, one line a rule."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from draftsmith.trainers.plots import DPI, INK, LINES, MARKS, SERIES


def draw(report: Mapping[str, Any], path: Path) -> None:
    """report: what `draftsmith bench EXPORT --suite parallelbench` writes with --json. path: .png."""
    tasks = report["tasks"]
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.9), layout="constrained")
    names = list(dict.fromkeys(row["rule"] for task in tasks.values() for row in task["rows"]))
    for place, (name, task) in enumerate(tasks.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        bits = task["correlation_bits"]
        curves(axes, {rule: [row for row in task["rows"] if row["rule"] == rule] for rule in names}, names)
        axes.set_title(f"{name}" + ("" if bits is None else f"  ({bits:.1f} bits)"), fontsize=9, loc="left")
        if place % columns == 0:
            axes.set_ylabel("right answers", fontsize=8)
        axes.set_xlabel("tokens per pass", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    title = f"{Path(report['export']['path']).name}: {report['export']['form']} form"
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path, dpi=DPI)


def curves(axes: Axes, lines: Mapping[str, list[Mapping[str, Any]]], names: list[str]) -> None:
    """A line of points (tokens per pass, score with its interval) for each rule; `names` gives each its colour."""
    for rule, rows in lines.items():
        number = names.index(rule)
        points = sorted(rows, key=lambda row: row["tokens_per_pass"]["value"])
        x = [row["tokens_per_pass"]["value"] for row in points]
        y = [row["score"]["value"] for row in points]
        low = [max(0.0, row["score"]["value"] - row["score"]["low"]) for row in points]
        high = [max(0.0, row["score"]["high"] - row["score"]["value"]) for row in points]
        axes.errorbar(
            x,
            y,
            yerr=[low, high],
            color=SERIES[number % len(SERIES)],
            linestyle=LINES[number // len(SERIES) % len(LINES)],
            marker=MARKS[number % len(MARKS)],
            markersize=3.5,
            linewidth=1.1,
            elinewidth=0.6,
            label=rule,
        )
    axes.set_ylim(-0.04, 1.04)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
