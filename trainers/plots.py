"""Pictures of measurements: the bench's figure, and the panels that the demo's report.png is made of.

Matplotlib's object interface only (no pyplot: no global state, no display). Colours: Okabe and Ito's set, told apart by
readers with any colour vision; every series also differs in line style, marker or position. Axes carry units.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, SKY, PURPLE, RED, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#D55E00",
    "#8C8C8C",
)
SERIES = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D")
INK = "#303030"
CONSTANT_ROWS = ("speculative", "speculative_best")  # the rows that the forecast curve speaks of
DPI = 130

Interval = Mapping[str, float | None]  # {"value": ..., "low": ..., "high": ...}; low and high may be None


def bench_figure(report: Mapping[str, Any], path: Path) -> None:
    """The picture of a `draftsmith bench` report: speed bars per batch, forecast over g, accepted lengths.

    report: what the command writes with --json. path: .png (or any suffix that matplotlib writes).
    """
    batches = [b for b in report["batches"] if any(r["offered"] for r in b["rows"])]
    drafted = {b["batch"]: report["forecast"]["batches"].get(str(b["batch"])) for b in batches}
    drafted = {batch: forecast for batch, forecast in drafted.items() if forecast}
    rows = [sum(r["offered"] for r in b["rows"]) for b in batches]
    figure = Figure(figsize=(13, max(5.2, 1.2 + 0.42 * sum(rows) + 0.7 * len(rows))), layout="constrained")
    title = f"{Path(report['target']['path']).name}"
    if report.get("draft"):
        title += f" with draft {Path(report['draft']['path']).name}"
    settings, place = report["settings"], report["environment"]["machine"]
    figure.suptitle(
        f"{title}: {settings['max_new_tokens']} new tokens, {_temperature(settings['temperature'])}, "
        f"{settings['dtype']}, {settings['threads']} threads of {place['cpu']}",
        fontsize=11,
        color=INK,
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    left = grid[:, 0].subgridspec(len(batches), 1, height_ratios=[n + 1 for n in rows])
    for i, block in enumerate(batches):
        axes = figure.add_subplot(left[i])
        speed_at_batch(axes, block)
        if i == len(batches) - 1:
            axes.set_xlabel("tokens per second (median; line = bootstrap interval)")
    forecast_curves(figure.add_subplot(grid[0, 1]), drafted, batches)
    histogram_panel(figure.add_subplot(grid[1, 1]), batches)
    figure.savefig(path, dpi=DPI)


def speed_at_batch(axes: Axes, block: Mapping[str, Any]) -> None:
    """Tokens per second of every row that was offered at one batch size, as bars with intervals."""
    rows = [row for row in block["rows"] if row["offered"]]
    longest = max(_ends(row["tokens_per_second"])[1] for row in rows)
    for place, row in enumerate(rows):
        speed, ratio = row["tokens_per_second"], row.get("speedup_vs_plain")
        note = f"{_short(speed['value'])}" + (f"  ({ratio['value']:.2f}x plain)" if ratio else "")
        _bar(axes, place, speed, ORANGE if row["peer"] else BLUE, note, longest)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.34 * longest)
    axes.set_title(f"Batch {block['batch']}: draftsmith blue, transformers orange", fontsize=10, loc="left")
    _clean(axes, grid="x")


def forecast_curves(
    axes: Axes, forecasts: Mapping[int, Mapping[str, Any]], batches: Sequence[Mapping[str, Any]]
) -> None:
    """Forecast speed-up over the draft length per batch, with the measured rows on it as markers."""
    axes.set_title("Forecast (line) and measured (marker)", fontsize=10, loc="left")
    axes.axhline(1.0, color=GREY, linewidth=1)
    axes.set_xlabel("draft length g (tokens)")
    axes.set_ylabel("speed-up over plain (x)")
    _clean(axes, grid="y")
    if not forecasts:
        axes.text(0.5, 0.5, "no draft, no forecast", ha="center", va="center", transform=axes.transAxes, color=GREY)
        return
    longest = 1
    for i, (batch, forecast) in enumerate(forecasts.items()):
        colour = SERIES[i % len(SERIES)]
        shown = min(max(16, 2 * forecast["g"]), len(forecast["by_g"]))
        longest = max(longest, shown)
        xs = list(range(1, shown + 1))
        axes.plot(xs, [forecast["by_g"][str(g)] for g in xs], color=colour, linestyle=LINES[i % len(LINES)],
                  label=f"batch {batch}")  # fmt: skip
        rows = next(b["rows"] for b in batches if b["batch"] == batch)
        for row in rows:
            if row["offered"] and row["name"] in CONSTANT_ROWS:
                ratio = row["speedup_vs_plain"]
                low, high = _ends(ratio)
                axes.errorbar(row["mean_draft_length"], ratio["value"], fmt=MARKS[i % len(MARKS)], markersize=6,
                              yerr=[[ratio["value"] - low], [high - ratio["value"]]], capsize=3, color=colour,
                              markeredgecolor="white")  # fmt: skip
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def histogram_panel(axes: Axes, batches: Sequence[Mapping[str, Any]]) -> None:
    """Accepted tokens per round of the fixed-length speculative row at the smallest batch."""
    axes.set_title("Accepted tokens per round (fixed g)", fontsize=10, loc="left")
    axes.set_xlabel("accepted tokens k")
    axes.set_ylabel("share of rounds")
    _clean(axes, grid="y")
    row = next((r for r in batches[0]["rows"] if r["offered"] and r["name"] == "speculative"), None)
    table = row["acceptance"]["histogram"] if row else {}
    if not table:
        axes.text(0.5, 0.5, "nothing was drafted", ha="center", va="center", transform=axes.transAxes, color=GREY)
        return
    counts = table[max(table, key=lambda n: sum(table[n]))]
    _histogram(axes, {f"g = {len(counts) - 1}, batch {batches[0]['batch']}": counts})


def acceptance_over_requests(
    axes: Axes,
    series: Mapping[str, Sequence[float]],  # label -> alpha of each request in order of service; NaN: nothing examined
    domains: Sequence[str],  # the domain tag of each request
    window: int = 16,  # requests in the running mean
) -> None:
    """Acceptance of each draft on the same requests (dots faint, running mean strong), domain switches marked.

    The running mean starts anew at each switch, so that it cannot smear one domain into the next.
    """
    starts = [i for i, tag in enumerate(domains) if i == 0 or tag != domains[i - 1]]
    ends = [*starts[1:], len(domains)]
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if k % 2:
            axes.axvspan(start - 0.5, end - 0.5, color="#F0F0F0", zorder=0)
        if k:
            axes.axvline(start - 0.5, color=GREY, linewidth=1, zorder=1)
        axes.text((start + end - 1) / 2, 1.015, domains[start], ha="center", va="bottom", fontsize=9, color=INK)
    for i, (label, values) in enumerate(series.items()):
        colour = SERIES[i % len(SERIES)]
        axes.plot(range(len(values)), values, ".", color=colour, markersize=3, alpha=0.3, zorder=2)
        for start, end in zip(starts, ends, strict=True):
            mean = _running_mean(values[start:end], window)
            axes.plot(range(start, start + len(mean)), mean, color=colour, linewidth=2, zorder=3,
                      linestyle=LINES[i % len(LINES)], label=label if start == 0 else None)  # fmt: skip
    axes.set_xlim(-0.5, len(domains) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_xlabel("requests served")
    axes.set_ylabel("acceptance probability alpha")
    axes.set_title(f"Acceptance while serving (mean of {window} requests)\n", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    _clean(axes, grid="y")


def accepted_lengths(axes: Axes, counts: Mapping[str, Sequence[int]]) -> None:
    """Accepted tokens per round as grouped bars; counts: label -> number of rounds that accepted 0, 1, ..., g."""
    _histogram(axes, counts)
    axes.set_xlabel("accepted tokens k")
    axes.set_ylabel("share of rounds")
    axes.set_title("Accepted tokens per round", fontsize=10, loc="left")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    _clean(axes, grid="y")


def speed_bars(axes: Axes, bars: Mapping[str, Interval], unit: str = "tokens per second", peers: int = 0) -> None:
    """Horizontal bars with intervals, in the given order; the last `peers` of them in the peers' colour."""
    longest = max(_ends(bar)[1] for bar in bars.values())
    for i, bar in enumerate(bars.values()):
        value = bar["value"]
        assert value is not None
        _bar(axes, i, bar, ORANGE if i >= len(bars) - peers else BLUE, _short(value), longest)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.set_xlabel(f"{unit} (median; line = bootstrap interval)")
    axes.set_title("Speed", fontsize=10, loc="left")
    _clean(axes, grid="x")


def report_figure(
    path: Path,
    *,
    title: str,
    series: Mapping[str, Sequence[float]],
    domains: Sequence[str],
    lengths: Mapping[str, Sequence[int]],
    bars: Mapping[str, Interval],
    peers: int = 0,
    window: int = 16,
) -> None:
    """The demo's picture: acceptance over requests on top, accepted lengths and speed bars below; see the panels."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    acceptance_over_requests(figure.add_subplot(grid[0, :]), series, domains, window)
    accepted_lengths(figure.add_subplot(grid[1, 0]), lengths)
    speed_bars(figure.add_subplot(grid[1, 1]), bars, peers=peers)
    figure.savefig(path, dpi=DPI)


def _bar(axes: Axes, place: float, bar: Interval, colour: str, note: str, longest: float) -> None:
    low, high = _ends(bar)
    axes.barh(place, bar["value"] or 0.0, color=colour, height=0.74)
    axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
    axes.text(high + 0.012 * longest, place, note, va="center", fontsize=8.5, color=INK)


def _histogram(axes: Axes, counts: Mapping[str, Sequence[int]]) -> None:
    width = 0.8 / len(counts)
    for i, (label, row) in enumerate(counts.items()):
        total = max(sum(row), 1)
        xs = [k - 0.4 + width * (i + 0.5) for k in range(len(row))]
        axes.bar(xs, [n / total for n in row], width=0.94 * width, color=SERIES[i % len(SERIES)],
                 label=f"{label} (mean {sum(k * n for k, n in enumerate(row)) / total:.2f})")  # fmt: skip
    axes.set_xticks(range(max(len(row) for row in counts.values())))
    axes.legend(frameon=False, fontsize=9)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values that are numbers, at every index; shorter at the start."""
    out = []
    for i in range(len(values)):
        seen = [v for v in values[max(0, i + 1 - window) : i + 1] if not math.isnan(v)]
        out.append(sum(seen) / len(seen) if seen else math.nan)
    return out


def _ends(estimate: Interval) -> tuple[float, float]:
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    assert value is not None
    return (value if low is None else low, value if high is None else high)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _temperature(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.grid(axis=grid, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
