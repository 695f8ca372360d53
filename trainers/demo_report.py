"""The demo's figures, all recomputed from its raw records: report.json, report.md, report.png.

Acceptance is the Rao-Blackwell estimate over all examined positions of the requests in question (inference/metrics.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.data import served_log
from draftsmith.data.served_log import Served
from draftsmith.inference.environment import git, machine, versions
from draftsmith.inference.metrics import Summary, summarize
from draftsmith.trainers import runs

if TYPE_CHECKING:
    from draftsmith.trainers.demo import DemoSettings

LABELS = {
    "static": "static draft",
    "online": "online (learns while serving)",
    "offline": "offline (same compute, first domain)",
    "prompt_lookup": "prompt lookup",
}


def write(folder: Path, settings: "DemoSettings", stages: Mapping[str, float]) -> dict[str, Any]:
    """Compute and write the three reports; returns report.json's content. stages: seconds by stage name."""
    from draftsmith.trainers.plots import report_figure

    served = {name: served_log.read(rounds_file(folder, name)) for name in LABELS}
    bench = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    report = figures(served, bench, settings, stages)
    runs.write_json(folder / "report.json", report)
    rows = {r["name"]: r for r in bench["batches"][0]["rows"] if r["offered"]}
    bars = {r["label"].removeprefix("draftsmith "): r["tokens_per_second"] for r in rows.values()}
    report_figure(
        folder / "report.png",
        title=f"draftsmith demo: a draft that learns while it serves (temperature {settings.temperature:g})",
        series={LABELS[name]: [s.alpha for s in served[name]] for name in ("online", "static")},
        domains=[s.tag for s in served["online"]],
        lengths={
            "static": _lengths(served["static"], settings),
            "online": _lengths(served["online"], settings),
        },
        bars=bars,
        peers=sum(bool(r["peer"]) for r in rows.values()),
    )
    (folder / "report.md").write_text(markdown(report, folder), encoding="utf-8")
    return report


def figures(
    served: Mapping[str, Sequence[Served]],
    bench: Mapping[str, Any],
    settings: "DemoSettings",
    stages: Mapping[str, float],
) -> dict[str, Any]:
    """report.json: plain numbers under the names that the issue gives them, intervals and domains beside them."""
    quarters = {name: in_last_quarters(rows, settings) for name, rows in served.items()}
    pooled = {name: _summary([s for part in parts.values() for s in part]) for name, parts in quarters.items()}
    by_domain = {name: {tag: _summary(part) for tag, part in parts.items()} for name, parts in quarters.items()}
    batch = bench["summary"]["batches"]["1"]
    best = batch["fastest_speculative"]
    ratios = {
        "speedup_vs_plain": batch[f"{best}_vs_plain"],
        "speedup_vs_transformers_generate": batch[f"{best}_vs_transformers_generate"],
        "speedup_vs_transformers_assisted": batch[f"{best}_vs_transformers_assisted"],
        "plain_vs_transformers_generate": batch["plain_vs_transformers_generate"],
        "forecast_speedup": batch["forecast_speedup"],
    }
    return {
        **{f"alpha_{name}": _value(summary) for name, summary in pooled.items()},
        "tau": None if pooled["online"].tau is None else pooled["online"].tau.value,
        "tau_static": None if pooled["static"].tau is None else pooled["static"].tau.value,
        **{name: None if estimate is None else estimate["value"] for name, estimate in ratios.items()},
        "seconds_total": sum(stages.values()),
        "definitions": {
            "alpha_*": "mean of sum_v min(p_v, q_v) over the positions examined in the last quarter of each domain",
            "tau": "tokens per target call, bonus included, same requests, served online",
            "speedup_*": f"tokens per second, row {best!r} of bench.json, batch 1, median of pairs",
            "alpha_offline": "a draft distilled offline on the first domain, same compute (with the teacher's passes)",
        },
        "intervals": {
            **{f"alpha_{name}": _interval(summary) for name, summary in pooled.items()},
            **ratios,
        },
        "by_domain": {
            name: {tag: {"alpha": _interval(s), "tau": asdict(s.tau) if s.tau else None} for tag, s in parts.items()}
            for name, parts in by_domain.items()
        },
        "settings": asdict(settings),
        "stages": dict(stages),
        "bench_row": best,
        "environment": {
            "machine": machine(),
            "versions": versions(),
            "commit": git(Path(__file__).parent, "rev-parse", "HEAD"),
        },
    }


def rounds_file(folder: Path, name: str) -> Path:
    """Where the raw rounds of serving with the draft `name` lie."""
    return folder / "online" / served_log.NAME if name == "online" else folder / "rounds" / f"{name}.jsonl"


def last_quarters(settings: "DemoSettings") -> dict[str, range]:
    """Numbers of the requests in the last quarter of each domain, by its tag."""
    n = settings.requests
    return {tag: range(d * n + n - n // 4, (d + 1) * n) for d, tag in enumerate(settings.domains)}


def in_last_quarters(served: Sequence[Served], settings: "DemoSettings") -> dict[str, list[Served]]:
    """The requests of the last quarter of each domain, by tag."""
    return {tag: [s for s in served if s.number in quarter] for tag, quarter in last_quarters(settings).items()}


def markdown(report: Mapping[str, Any], folder: Path) -> str:
    """report.md, which the command also prints."""
    domains = report["settings"]["domains"]
    lines = [
        "# What the demo measured",
        "",
        f"![report](report.png)  {report['seconds_total']:.0f} s in all. Serving and bench at temperature "
        f"{report['settings']['temperature']:g}; alpha is over the last quarter of each domain's requests.",
        "",
        "| draft | alpha | " + " | ".join(f"alpha, {d}" for d in domains) + " |",
        "|---|---|" + "---|" * len(domains),
    ]
    for name, label in LABELS.items():
        cells = [_cell(report["intervals"][f"alpha_{name}"])]
        cells += [_cell(report["by_domain"][name][d]["alpha"]) for d in domains]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    online = report["by_domain"]["online"][domains[1]]["alpha"]["value"]
    offline = report["by_domain"]["offline"][domains[1]]["alpha"]["value"]
    lines += [
        "",
        f"Learning while serving raised alpha by {report['alpha_online'] - report['alpha_static']:+.3f}; on "
        f"{domains[1]}, which the offline draft never saw, online is {online - offline:+.3f} from it. "
        f"Tokens per target call: {report['tau_static']:.2f} static, {report['tau']:.2f} online.",
        "",
        "| at batch 1 | times |",
        "|---|---|",
    ]
    names = {
        "speedup_vs_plain": "speculative over plain",
        "forecast_speedup": "the same, as forecast beforehand",
        "plain_vs_transformers_generate": "plain over transformers' generate",
        "speedup_vs_transformers_generate": "speculative over transformers' generate",
        "speedup_vs_transformers_assisted": "speculative over the faster of transformers' assisted generations",
    }
    lines += [f"| {label} | {_cell(report['intervals'][key], 2)} |" for key, label in names.items()]
    target, draft = folder / "exports" / "target", folder / "exports" / "draft"
    lines += [
        "",
        "See the runs, decode with the pair, bench it on your own prompts:",
        "",
        f"    tensorboard --logdir {folder}",
        f"    draftsmith decode {target} --draft {draft} --prompt 'def main('",
        f"    draftsmith bench {target} --draft {draft} --prompts {folder / 'prompts.jsonl'}",
        "",
    ]
    return "\n".join(lines)


def _summary(served: Sequence[Served]) -> Summary:
    return summarize(served_log.pooled(served))


def _value(summary: Summary) -> float | None:
    return None if summary.alpha is None else summary.alpha.value


def _interval(summary: Summary) -> dict[str, float | None]:
    return {"value": None, "low": None, "high": None} if summary.alpha is None else asdict(summary.alpha)


def _lengths(served: Sequence[Served], settings: "DemoSettings") -> list[int]:
    """Rounds of the last quarters that accepted 0, 1, ..., g of g drafted tokens."""
    rows = [s for part in in_last_quarters(served, settings).values() for s in part]
    return summarize(served_log.pooled(rows)).histogram.get(settings.g, [0] * (settings.g + 1))


def _cell(estimate: Mapping[str, float | None] | None, digits: int = 3) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{estimate['value']:.{digits}f}{interval}"
