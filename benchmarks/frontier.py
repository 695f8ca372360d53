"""The frontier of commit rules: validity against tokens per pass, rules tuned on some prompts and judged on others.

    python -m benchmarks.frontier segments --json frontier.json --png frontier.png

The model is fixed beforehand (benchmarks/masked_models.py; `parallelbench` is configs/masked_lm/parallelbench.yaml).
Each rule takes, on validation prompts, its fastest strength that is valid no less often than one token a pass; the
judge sees test prompts alone. "Not worse" there: the lower end of the one-sided 95 % interval of the paired difference
is above -0.5 points. Tokens per pass of two rules are compared by a bootstrap over prompts.
Models: segments (runs of digits), parallelbench (fourteen tasks in token form), code (the standard library: an answer
is right when it is, token for token, what one token a pass gives).
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.masked_models import ROOT, command, make, training_prompts
from draftsmith.data import segments
from draftsmith.data.decode_traces import Traces, TraceSamples, trace, whole_answers
from draftsmith.data.parallelbench.registry import with_names
from draftsmith.data.parallelbench.sweep import Run, Setting, best_allowed, difference, run
from draftsmith.data.parallelbench.token_data import LEARNABLE, TokenFormConfig, drawn
from draftsmith.data.parallelbench.token_form import TokenForm
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commit_rules import EntropyBound, Factor, LearnedFilter, Oracle, Threshold, TopN
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.loader import load
from draftsmith.inference.metrics import Estimate
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.modules.learn2pd_filter import Learn2PDFilter

MARGIN = 0.005
HEURISTICS = ("threshold", "factor", "entropy_bound", "top_n", "margin")
FILTERS = ("filter, reference net", "filter, equivariant net")
VALIDATION, TEST = 1 << 52, 1 << 53  # first samples of parallelbench: no training run and no standard set gets there
TRACED = 1 << 51
BLOCK = 12  # longest answer of the tasks in token form
CODE_ANSWER = 32


@dataclass(frozen=True)
class Bed:
    """A fixed model with its prompts."""

    name: str
    net: MaskedLM
    decode: ParallelDiffusionSettings
    requests: Callable[[int, str], list[CanvasRequest]]  # (count, "val" or "test")
    judge: Callable[[list[CanvasRequest], list[list[int]]], Callable[[int, list[int]], bool]]  # (asked, sequential)
    filters: Mapping[str, CommitFilter]
    batch: int = 200

    def run(self, setting: Setting, asked: list[CanvasRequest], right: Callable[[int, list[int]], bool]) -> Run:
        return run(ParallelDiffusionDecoder(self.net, self.decode, rule=setting.commit), asked, right, self.batch)


def grid(bed: Bed) -> list[Setting]:
    """What is tried on validation prompts."""
    made = [Setting("threshold", x, Threshold(x)) for x in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)]
    made += [Setting("factor", x, Factor(x)) for x in (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)]
    made += [Setting("entropy_bound", x, EntropyBound(x)) for x in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.8, 2.5)]
    made += [Setting("top_n", k, TopN("confidence", k)) for k in (1, 2, 3, 4)]
    made += [Setting("margin", k, TopN("margin", k)) for k in (1, 2, 3, 4)]
    for name, net in bed.filters.items():
        made += [
            Setting(name, x, LearnedFilter(net, x)) for x in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
        ]
    return made


SEQUENTIAL = Setting("one a pass", 1, TopN("confidence", 1))


def measure(bed: Bed, tuned_on: int, judged_on: int) -> dict[str, Any]:
    """The whole frontier of one model; JSON-ready."""
    torch.set_num_threads(1)
    asked = bed.requests(tuned_on, "val")
    right = bed.judge(asked, bed.run(SEQUENTIAL, asked, lambda i, out: True).output)
    base = bed.run(SEQUENTIAL, asked, right)
    tried = {(s.rule, s.strength): s for s in grid(bed)}
    found = {key: bed.run(setting, asked, right) for key, setting in tried.items()}
    rules = list(dict.fromkeys(rule for rule, _ in tried))
    chosen = {
        rule: best_allowed({key: made for key, made in found.items() if key[0] == rule}, base, 0.0) for rule in rules
    }
    frontier = {rule: [{"strength": k[1], **found[k].to_json()} for k in found if k[0] == rule] for rule in rules}

    asked = bed.requests(judged_on, "test")
    first = bed.run(SEQUENTIAL, asked, lambda i, out: True)
    right = bed.judge(asked, first.output)
    base = bed.run(SEQUENTIAL, asked, right)
    judged: dict[str, Run] = {rule: bed.run(tried[key], asked, right) for rule, key in chosen.items()}
    judged["oracle"] = oracle_run(bed, asked, right)
    rows = {
        rule: {
            "strength": chosen[rule][1] if rule in chosen else None,
            **made.to_json(),
            "difference": vars(difference(made, base, 0.90)),  # its lower end is that of a one-sided 95 % interval
            "not_worse": not_worse(made, base),
        }
        for rule, made in judged.items()
    }
    eligible = [rule for rule in rules if rows[rule]["not_worse"]]
    heuristics = [rule for rule in eligible if rule in HEURISTICS]
    best = max(eligible, key=lambda rule: judged[rule].tokens_per_pass.value, default=None)
    plain = max(heuristics, key=lambda rule: judged[rule].tokens_per_pass.value, default=None)
    learned = max(
        (rule for rule in eligible if rule in FILTERS),
        key=lambda rule: judged[rule].tokens_per_pass.value,
        default=None,
    )
    return {
        "model": bed.name,
        "tuned_on": tuned_on,
        "judged_on": len(asked),
        "sequential": base.to_json(),
        "rules": rows,
        "validation": frontier,
        "best": best,
        "best_heuristic": plain,
        "best_filter": learned,
        "filter_gain": None if None in (plain, learned) else vars(gain(judged[str(learned)], judged[str(plain)])),
        "oracle_gain": None if plain is None else vars(gain(judged["oracle"], judged[plain])),
    }


def oracle_run(bed: Bed, asked: list[CanvasRequest], right: Callable[[int, list[int]], bool]) -> Run:
    """Commits what equals the answer of one token a pass; the rule knows rows by their place in one decode call."""
    settings = ParallelDiffusionSettings(block_length=bed.decode.block_length, eot="none")
    plain = ParallelDiffusionDecoder(bed.net, settings, rule=SEQUENTIAL.commit)
    parts = []
    for start in range(0, len(asked), bed.batch):
        some = asked[start : start + bed.batch]
        canvases = [request.filled(answer) for request, answer in zip(some, whole_answers(plain, some), strict=True)]
        parts.append(bed.run(Setting("oracle", 0, Oracle(canvases)), some, partial(_shifted, right, start)))
    return Run.joined(parts)


def _shifted(right: Callable[[int, list[int]], bool], start: int, i: int, output: list[int]) -> bool:
    return right(start + i, output)


def not_worse(made: Run, base: Run) -> bool:
    low = difference(made, base, 0.90).low
    return low is not None and low > -MARGIN


def gain(fast: Run, slow: Run, resamples: int = 2000) -> Estimate:
    """Ratio of tokens per pass with a paired bootstrap over prompts."""
    columns = torch.tensor([fast.tokens, fast.passes, slow.tokens, slow.passes], dtype=torch.float64)
    draw = torch.randint(columns.shape[1], (resamples, columns.shape[1]), generator=torch.Generator().manual_seed(0))
    drawn_sums = columns[:, draw].sum(-1)
    ratios = (drawn_sums[0] / drawn_sums[1]) / (drawn_sums[2] / drawn_sums[3])
    a, b, c, d = columns.sum(1).tolist()
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate((a / b) / (c / d), low, high)


# --- the models ---


def segments_bed(place: Path = ROOT / "runs") -> Bed:
    models = make("segments", place, filters=False)
    net = models.net()

    def judge(asked: list[CanvasRequest], _: list[list[int]]) -> Callable[[int, list[int]], bool]:
        return lambda i, out: segments.is_valid(asked[i].tokens[: segments.PROMPT], out)

    asked = segments.requests(3000, start=1 << 30, part="train")  # far behind what a training run sees
    settings = ParallelDiffusionSettings(block_length=8, eot="left_done")
    return Bed("segments", net, settings, models.requests, judge, train_filters(net, asked, 8, 8))


def code_bed(place: Path = ROOT / "runs") -> Bed:
    """Answers of one block, so that thousands of prompts are decoded in minutes."""
    models = make("code", place, filters=False)
    net = models.net()
    mask, end = net.config.mask_id, net.config.end_ids

    def requests(count: int, part: str) -> list[CanvasRequest]:
        asked = models.requests(count, part)
        return [canvas(r.tokens[: r.holes[0]], r.row_id) for r in asked]

    def canvas(prompt: Sequence[int], number: int) -> CanvasRequest:
        holes = range(len(prompt), len(prompt) + CODE_ANSWER)
        return CanvasRequest([*prompt, *[mask] * CODE_ANSWER], holes, row_id=number, stop_ids=end)

    def judge(_: list[CanvasRequest], sequential: list[list[int]]) -> Callable[[int, list[int]], bool]:
        return lambda i, out: out == sequential[i]

    traced = [canvas(prompt, number) for number, prompt in enumerate(training_prompts())]
    settings = ParallelDiffusionSettings(block_length=CODE_ANSWER, eot="left_done")
    filters = train_filters(net, traced, CODE_ANSWER, CODE_ANSWER)
    return Bed("code", net, settings, requests, judge, filters, batch=64)


def parallelbench_bed(place: Path = ROOT / "runs") -> Bed:
    folder = place / "masked-parallelbench"
    export = folder / "exports" / "base"
    if not export.is_dir():
        command(place, "fit", "-c", "masked_lm/parallelbench", "--run", folder.name)
        command(place, "export", str(folder), str(export))
    net = load(export).part
    assert isinstance(net, MaskedLM)
    form = TokenForm(with_names(LEARNABLE, TokenFormConfig().words))

    def requests(count: int, part: str) -> list[CanvasRequest]:
        start = {"val": VALIDATION, "test": TEST, "traced": TRACED}[part]
        return [form.request(drawn(form, start + i), start + i) for i in range(count)]

    def judge(asked: list[CanvasRequest], _: list[list[int]]) -> Callable[[int, list[int]], bool]:
        samples = [drawn(form, request.row_id) for request in asked]
        return lambda i, out: form.tasks[samples[i].task].valid(samples[i], form.tokens(out))

    settings = ParallelDiffusionSettings(block_length=0, eot="none")
    filters = train_filters(net, requests(3000, "traced"), 0, BLOCK)
    return Bed("parallelbench", net, settings, requests, judge, filters)


def train_filters(
    net: MaskedLM, asked: Sequence[CanvasRequest], block_length: int, widest: int, steps: int = 2000
) -> dict[str, CommitFilter]:
    """Both nets on traces of these prompts: the oracle's passes, and as many that explore (see decode_traces.trace).

    block_length: the decoder's (0: one block); widest: of the traces. The weights of least loss on the prompts that are
    left for validation are kept.
    """
    plain = ParallelDiffusionDecoder(
        net, ParallelDiffusionSettings(block_length=block_length, eot="none"), rule=SEQUENTIAL.commit
    )
    parts: list[Traces] = []
    for start in range(0, len(asked), 200):
        some = list(asked[start : start + 200])
        answers = whole_answers(plain, some)
        parts += [trace(net, some, answers, widest, explored)[0] for explored in range(2)]
    traces = Traces.joined(parts)
    learn, check = (TraceSamples(traces, validation=v, val_fraction=0.15, seed=0) for v in (False, True))
    held = check.fetch(range(len(check)))
    made = {}
    for name, config, weight in zip(
        FILTERS,
        (FilterConfig(widest, net="reference"), FilterConfig(widest, hidden=64, window=4)),
        (4.0, 8.0),
        strict=True,
    ):
        torch.manual_seed(0)
        module = Learn2PDFilter(config, negative_weight=weight)
        module.configure_model()
        assert module.net is not None
        optimizer = torch.optim.AdamW(module.net.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, kept = float("inf"), {}
        for step in range(steps):
            total, share, _ = module.loss(learn.fetch(torch.randint(len(learn), (512,)).tolist()))
            optimizer.zero_grad()
            (total / share).backward()
            optimizer.step()
            schedule.step()
            if step % (steps // 10) == steps // 10 - 1:
                with torch.no_grad():
                    total, share, _ = module.loss(held)
                if (loss := (total / share).item()) < best:
                    best, kept = loss, {key: value.clone() for key, value in module.net.state_dict().items()}
        module.net.load_state_dict(kept)
        made[name] = module.net.eval()
    return made


BEDS: dict[str, Callable[[], Bed]] = {"segments": segments_bed, "parallelbench": parallelbench_bed, "code": code_bed}


def draw(reports: Mapping[str, Any], path: Path) -> None:
    """One panel a model: validation frontier of every rule as lines, the judged points as rings."""
    from matplotlib.figure import Figure

    from draftsmith.trainers.parallelbench_figure import curves

    figure = Figure(figsize=(5.6 * len(reports), 4.6), layout="constrained")
    for place, (name, report) in enumerate(reports.items()):
        axes = figure.add_subplot(1, len(reports), place + 1)
        rules = list(report["validation"])
        curves(axes, report["validation"], rules)
        points = [row for row in report["rules"].values()]
        axes.plot(
            [row["tokens_per_pass"]["value"] for row in points],
            [row["score"]["value"] for row in points],
            "o",
            mfc="none",
            mec="black",
            markersize=8,
            label="chosen, on test prompts",
        )
        ceiling = report["rules"]["oracle"]["tokens_per_pass"]["value"]
        axes.axvline(ceiling, color="grey", linewidth=0.8, linestyle=":", label="oracle")
        axes.set_title(f"{name}: {report['judged_on']} test prompts", fontsize=10, loc="left")
        axes.set_xlabel("tokens per pass")
        axes.set_ylabel("valid answers")
        lowest = min(row["score"]["value"] for row in points)
        axes.set_ylim(max(0.0, lowest - 0.25), 1.01)
        axes.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=130)


def table(report: Mapping[str, Any]) -> str:
    plain = report["sequential"]
    lines = [
        f"{report['model']}: tuned on {report['tuned_on']} prompts, judged on {report['judged_on']}; one a pass: "
        f"validity {plain['score']['value']:.4f}, {plain['tokens_per_pass']['value']:.3f} tokens per pass"
    ]
    for rule, row in report["rules"].items():
        gap = row["difference"]
        lines.append(
            f"  {rule:<24} {row['strength'] if row['strength'] is not None else '':<6} "
            f"{row['tokens_per_pass']['value']:.3f} tokens/pass, validity {row['score']['value']:.4f} "
            f"({100 * gap['value']:+.2f} points, at least {100 * gap['low']:+.2f})"
            + ("" if row["not_worse"] else "  worse")
        )
    lines.append(f"  best: {report['best']}; filter over heuristic: {report['filter_gain']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=tuple(BEDS))
    parser.add_argument("--tune", type=int, default=800, help="validation prompts (default: 800)")
    parser.add_argument("--judge", type=int, default=2400, help="test prompts (default: 2400)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args(argv)
    reports = {}
    for name in given.models:
        reports[name] = measure(BEDS[name](), given.tune, given.judge)
        print(table(reports[name]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if given.png is not None:
        draw(reports, given.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
