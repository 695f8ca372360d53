"""`draftsmith forecast TARGET`: what drafting will gain, from sizes alone, and from measured costs where they are."""

import argparse
import importlib.resources
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference import roofline
from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.forecast import expected_tokens, forecast
from draftsmith.inference.metrics import Estimate
from draftsmith.inference.roofline import GPUS, Gpu, Overheads, Plan, Sizes, Terms
from draftsmith.inference.tree_costs import bench_batches, read_curve

LONGEST = 16  # steps that are looked at where none are given
CHECKED_TOKENS = 64  # of a target call: the rows that the overheads were fitted on go no further
OVERHEADS = "roofline_overheads.json"  # beside the package's modules; written by `python -m benchmarks.roofline --save`


@dataclass(frozen=True)
class Row:
    """The roofline's forecast at one batch size."""

    plan: Plan
    accepted_length: float
    terms: Terms
    speedup: float


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    target = sizes(given.target)
    draft = sizes(given.draft) if given.draft is not None else None
    overheads, source = _overheads(given.overheads)
    report = _bench(given.bench) if given.bench is not None else None
    alpha = _alpha(given, report)
    gpu = _gpu(given)
    rows = [_roofline(given, target, draft, gpu, overheads, batch, alpha) for batch in given.batch]
    measured = _measured(given, alpha)
    document = {
        "target": str(given.target),
        "draft": None if given.draft is None else str(given.draft),
        "gpu": {"name": given.gpu, **vars(gpu)},
        "alpha": None if alpha is None else vars(alpha),
        "overheads": {**overheads.to_json(), "from": source},
        "roofline": [
            {**vars(row.plan), "accepted_length": row.accepted_length, **vars(row.terms), "speedup": row.speedup}
            for row in rows
        ],
        "measured": measured,
        "warnings": _warnings(rows),
    }
    print(json.dumps(document, indent=2) if given.json else _page(document, rows, overheads))
    return 0


def sizes(path: Path) -> Sizes:
    """Of a directory's (or a file's) config.json; EAGLE heads of our own form, too. Raises InvalidValue for others."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidValue(f"there is no {file}: give a directory with a config.json, or such a file")
    config = read_json(file)
    own = config.get("eagle")
    if isinstance(own, dict):
        names = {"num_hidden_layers": 1, "num_attention_heads": own.get("num_heads")}
        config = {**config, **own, **names, "num_key_value_heads": own.get("num_kv_heads")}
        if own.get("version") == 1:  # the target's own head, over a layer of one input
            config.pop("draft_vocab_size", None)
    try:
        return roofline.sizes_of(config)
    except InvalidValue as error:
        raise InvalidValue(f"{file}: {error}") from None


def _roofline(
    given: argparse.Namespace,
    target: Sizes,
    draft: Sizes | None,
    gpu: Gpu,
    overheads: Overheads,
    batch: int,
    alpha: Estimate | None,
) -> Row:
    """At the steps that were given, else at those of the largest speed-up."""
    tree = given.topk > 1
    if given.accepted_length is None and (tree or alpha is None):
        raise InvalidValue(
            "sizes do not tell how well a draft guesses: give --accepted-length"
            + (" (of a tree, as --alpha tells it of chains alone)" if tree else ", --alpha or --bench")
        )
    if given.steps is None and given.accepted_length is not None:
        raise InvalidValue("--accepted-length was measured at some draft length: give it, --steps")
    found = []
    for steps in range(1, LONGEST + 1) if given.steps is None else (given.steps,):
        plan = Plan(batch, steps, given.topk, (given.nodes or steps) + 1)
        accepted = given.accepted_length
        if accepted is None:
            assert alpha is not None
            accepted = expected_tokens(alpha.value, steps)
        terms = _terms(target, draft, plan, gpu)
        found.append(Row(plan, accepted, terms, roofline.speedup(accepted, terms, overheads)))
    return max(found, key=lambda row: row.speedup)


def _terms(target: Sizes, draft: Sizes | None, plan: Plan, gpu: Gpu) -> Terms:
    """`roofline.terms`; without a draft network (n-grams, suffixes) drafting takes no call."""
    if draft is not None:
        return roofline.terms(target, draft, plan, gpu)
    plain = roofline.call_seconds(target, plan.batch, gpu)
    return Terms(roofline.call_seconds(target, plan.batch * plan.num_draft_tokens, gpu) / plain, 0.0, 0, 0)


def _measured(given: argparse.Namespace, alpha: Estimate | None) -> list[dict[str, Any]]:
    """The forecast of measured costs at each batch size that has them."""
    path = given.costs or given.bench
    if path is None:
        return []
    if alpha is None:
        raise InvalidValue("measured costs need an acceptance probability beside them: give --alpha or --bench")
    found = []
    for batch in given.batch:
        curve: CostCurve = read_curve(path, batch)
        if curve.batch != batch:
            raise InvalidValue(f"{path} holds costs at batch {curve.batch}, not at {batch}: give --batch {curve.batch}")
        made = forecast(alpha, curve, g=given.steps).to_json()
        found.append({**made, "c": curve.c, "machine": dict(curve.machine)})
    return found


def _overheads(path: Path | None) -> tuple[Overheads, str]:
    """Those given, else those fitted on public GPU rows that the package ships; and where they are from."""
    file = path or Path(str(importlib.resources.files("draftsmith.inference"))) / OVERHEADS
    stated = read_json(file)
    try:
        return Overheads(**stated["overheads"]), str(stated["from"])
    except (KeyError, TypeError) as error:
        raise InvalidValue(
            f"{file} holds no overheads ({error}): write one with 'python -m benchmarks.roofline'"
        ) from None


def _bench(path: Path) -> dict[str, Any]:
    report = read_json(path)
    if bench_batches(report) is None:
        raise InvalidValue(f"{path} is no report of 'draftsmith bench --json' with a draft")
    return report


def _alpha(given: argparse.Namespace, report: dict[str, Any] | None) -> Estimate | None:
    if given.alpha is not None:
        if not 0.0 <= given.alpha <= 1.0:
            raise InvalidValue(f"--alpha is an acceptance probability, between 0 and 1, got {given.alpha}")
        return Estimate(given.alpha, None, None)
    return None if report is None else Estimate(**report["forecast"]["acceptance"]["alpha"])


def _gpu(given: argparse.Namespace) -> Gpu:
    known = GPUS[given.gpu]
    bandwidth = known.bandwidth if given.bandwidth is None else 1e9 * given.bandwidth
    flops = known.flops if given.tflops is None else 1e12 * given.tflops
    if not (0 < bandwidth < math.inf and 0 < flops < math.inf):
        raise InvalidValue(f"--bandwidth and --tflops are above 0, got {given.bandwidth} and {given.tflops}")
    return Gpu(bandwidth, flops)


def _warnings(rows: list[Row]) -> list[str]:
    said = []
    for row in rows:
        tokens = row.plan.batch * row.plan.num_draft_tokens
        if tokens > CHECKED_TOKENS:
            said.append(f"batch {row.plan.batch}: {tokens} tokens a target call, checked up to {CHECKED_TOKENS} only")
        if row.speedup < 1.0:
            said.append(f"batch {row.plan.batch}: plain decoding is faster")
    return said


def _page(document: dict[str, Any], rows: list[Row], overheads: Overheads) -> str:
    lines = []
    for row in rows:
        plan, t = row.plan, row.terms
        shape = (
            f"chain of {plan.steps}" if plan.topk == 1 else f"tree of {plan.num_draft_tokens - 1} in {plan.steps} calls"
        )
        took = roofline.whole_round(t, overheads) / roofline.plain_step(overheads)
        lines.append(
            f"roofline  batch {plan.batch}, {shape}: speed-up {row.speedup:.2f} at {row.accepted_length:.2f} tokens "
            f"per target call; a round takes {took:.2f} plain steps"
        )
        lines.append(
            f"          of sizes alone: target call {t.verify:.2f}, drafting {t.draft:.2f} of a plain step's reading"
        )
    lines.append(f"overheads {document['overheads']['from']}")
    for found in document["measured"]:
        s = found["speedup"]
        around = "" if s["low"] is None else f" [{s['low']:.2f}, {s['high']:.2f}]"
        lines.append(
            f"measured  batch {found['batch']}, chain of {found['g']}: speed-up {s['value']:.2f}{around} at "
            f"{found['tokens_per_call']:.2f} tokens per target call; a draft step takes {found['c']:.3f} plain steps"
        )
    lines += [f"warning   {text}" for text in document["warnings"]]
    return "\n".join(lines)


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"batch sizes are numbers from 1 on, joined by commas, got {text!r}")
    return found


def _parser() -> CommandParser:
    made = parser(
        "forecast",
        "Say what speculative decoding will gain: from the sizes of target and draft (roofline, no timing), and from "
        "measured costs and acceptance where a bench report has them.",
        """draftsmith forecast models/Llama-3.1-8B --draft eagle3-head --alpha 0.75 --batch 1,8 --gpu h100
        draftsmith forecast models/Llama-3.1-8B --draft eagle3-head --accepted-length 3.4 --steps 5 --topk 8 --nodes 31
        draftsmith forecast exports/target --draft exports/draft --bench bench.json""",
    )
    made.add_argument("target", metavar="TARGET", type=Path, help="directory with a config.json, or that file")
    made.add_argument("--draft", metavar="DRAFT", type=Path, help="the same of the draft; none: no network drafts")
    made.add_argument("--alpha", type=float, metavar="P", help="acceptance probability of a drafted token")
    made.add_argument("--accepted-length", type=float, metavar="TAU", help="tokens per target call, bonus included")
    made.add_argument("--steps", type=int, metavar="N", help="draft calls of a round (default: the best of 1 to 16)")
    made.add_argument("--topk", type=int, default=1, metavar="K", help="1: a chain; more: a tree's width (default: 1)")
    made.add_argument(
        "--nodes", type=int, metavar="N", help="drafted tokens that are verified (default: as of a chain)"
    )
    made.add_argument("--batch", type=_batches, default=(1,), metavar="B[,B...]", help="batch sizes (default: 1)")
    made.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="whose rates (default: %(default)s)")
    made.add_argument("--bandwidth", type=float, metavar="GB/S", help="of another device's memory")
    made.add_argument("--tflops", type=float, metavar="X", help="of another device, 16-bit")
    made.add_argument("--overheads", type=Path, metavar="FILE", help="fitted elsewhere (default: on public GPU rows)")
    made.add_argument("--bench", type=Path, metavar="FILE", help="report of draftsmith bench: its costs and acceptance")
    made.add_argument("--costs", type=Path, metavar="FILE", help="a cost curve of its own, with --alpha")
    made.add_argument("--json", action="store_true", help="one JSON document instead of a page")
    return made
