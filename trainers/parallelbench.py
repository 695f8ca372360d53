"""`draftsmith bench EXPORT --suite parallelbench`: quality against tokens per pass for every rule, task by task."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.data.parallelbench import forms, scoring, theory
from draftsmith.data.parallelbench.registry import TASKS, get
from draftsmith.data.parallelbench.statistics import oracle, order_preference, parallelizability
from draftsmith.data.parallelbench.sweep import RULES, Run, Setting, run, settings
from draftsmith.data.parallelbench.tasks import MOST_OUTCOMES, Sample, Task, standard_set
from draftsmith.data.parallelbench.token_form import TokenForm
from draftsmith.inference.bench_report import write_json
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.commit_rules import LearnedFilter, TopN
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.environment import git, machine, versions
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.loader import LoadedPart, check_role, load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.nets.commit_filter import CommitFilter
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.inference.sampling import SamplingParams
from draftsmith.trainers.parallelbench_figure import draw

SCHEMA = 1
FORMS = ("token", "infill", "text")
FILTER_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.96, 0.99)
BLOCKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Question:
    """One sample as the decoder gets it."""

    task: Task
    sample: Sample
    request: CanvasRequest
    read: Callable[[list[int]], scoring.Score]  # the holes' tokens -> its score


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    for path in (given.json, given.png):
        if path is not None and not path.parent.is_dir():
            raise InvalidValue(f"cannot write {path}: there is no folder {path.parent}")
    if given.num_samples < 1 or given.batch < 1:
        raise InvalidValue(f"--num-samples and --batch must be at least 1, got {given.num_samples}, {given.batch}")
    for name in given.tasks or ():
        get(name)
    settings(given.rules, 1)  # an unknown rule is refused before anything is loaded
    grammar = scoring.grammar_backend(given.grammar)
    part = load(given.export, dtype=given.dtype, device=given.device, verify=not given.no_verify)
    check_role(part, "target")
    net = part.part
    if not isinstance(net, MaskedLM):
        raise InvalidValue(f"{given.export} is of kind {part.kind!r}: the suite parallelbench measures a masked-lm")
    maker = _maker(given.form, part, given.max_new_tokens, grammar)
    names = tuple(given.tasks or maker.names)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": "parallelbench",
        "export": {"path": str(part.path), "kind": part.kind, "form": maker.form},
        "settings": {
            "samples": given.num_samples,
            "lengths": given.lengths,
            "temperature": given.temperature,
            "block_length": given.block_length,
            "cache": given.cache,
            "seed": given.seed,
            "batch": given.batch,
            "grammar": given.grammar,
        },
        "environment": {
            "machine": machine(),
            "versions": versions(),
            "commit": git(Path(__file__).parent, "rev-parse", "HEAD"),
        },
        "tasks": {},
    }
    for number, name in enumerate(names):
        if not given.quiet:
            print(f"{100 * number // len(names):3d}%  {name}", file=sys.stderr, flush=True)
        lengths = given.lengths if maker.tasks[name].kind in ("list", "number") else None
        samples = standard_set(maker.tasks[name], given.num_samples, lengths)
        report["tasks"][name] = _measure(given, net, [maker(maker.tasks[name], s, i) for i, s in enumerate(samples)])
    if given.json is not None:
        write_json(given.json, report)
    print(table(report))
    if given.png is not None:
        draw(report, given.png)
    return 0


def _parser() -> CommandParser:
    made = parser(
        "bench EXPORT --suite parallelbench",
        "ParallelBench (docs/parallelbench.md): what each rule of parallel decoding costs in quality, on tasks whose\n"
        "token dependence is known. The table goes to stdout, progress to stderr.",
        """draftsmith bench exports/masked --suite parallelbench --json pbench.json --png pbench.png
        draftsmith bench exports/masked --suite parallelbench --tasks copy shuffle --rules threshold factor""",
    )
    made.add_argument("export", metavar="EXPORT", help="export of kind masked-lm")
    made.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all it knows)")
    made.add_argument("--rules", nargs="+", metavar="RULE", default=list(RULES), help=f"of {', '.join(RULES)}")
    made.add_argument("--filter", metavar="DIR", help="export of a commit filter: adds the rule learned_filter")
    made.add_argument("--num-samples", type=int, default=100, metavar="N", help="of each task (default: %(default)s)")
    made.add_argument("--lengths", nargs="+", type=int, metavar="N", help="items of a list (default: 3 4 5 6)")
    made.add_argument("--form", choices=FORMS, help="default: token where the export speaks it, else text")
    made.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of the text form (default: 32; puzzles, text 64)"
    )
    made.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    made.add_argument("--block-length", type=int, default=0, metavar="N", help="0: one block (default: 0)")
    made.add_argument("--cache", default="none", choices=("none", "prefix", "dual"), help="default: none")
    made.add_argument(
        "--grammar", choices=scoring.GRAMMARS, default="template", help="of sentences (default: template)"
    )
    made.add_argument("--batch", type=int, default=64, metavar="B", help="prompts decoded together (default: 64)")
    made.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    made.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as the weights are stored)")
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    made.add_argument("--no-verify", action="store_true", help="compare file sizes with the manifest, not their hashes")
    made.add_argument("--json", type=Path, metavar="OUT", help="write the report")
    made.add_argument("--png", type=Path, metavar="OUT", help="draw the curves")
    made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return made


class _Maker:
    """Samples as questions to one export, in one form."""

    def __init__(
        self, form: str, tasks: Mapping[str, Task], make: Callable[[Task, Sample, int], Question], names: Sequence[str]
    ) -> None:
        self.form, self.tasks, self._make, self.names = form, tasks, make, tuple(names)

    def __call__(self, task: Task, sample: Sample, number: int) -> Question:
        return self._make(task, sample, number)


def _maker(form: str | None, part: LoadedPart, limit: int | None, grammar: scoring.Grammar | None) -> _Maker:
    tokenizer = part.tokenizer
    if tokenizer is None:
        raise InvalidValue(f"{part.path} has no tokenizer: the suite needs to know what its ids mean")
    token_form = TokenForm.of(tokenizer.get_vocab())
    form = form or ("token" if token_form is not None else "text")
    if form not in FORMS:
        raise unknown_choice("form", form, FORMS)
    if form == "token":
        if token_form is None:
            raise InvalidValue(f"{part.path} does not speak the token form: give --form text or infill")

        def as_tokens(task: Task, sample: Sample, number: int) -> Question:
            request = token_form.request(sample, number)
            return Question(
                task, sample, request, lambda ids: scoring.score_tokens(task, sample, token_form.tokens(ids))
            )

        return _Maker(form, token_form.tasks, as_tokens, tuple(token_form.tasks))
    net = part.part
    assert isinstance(net, MaskedLM)
    mask = net.config.mask_id
    ends = net.config.end_ids

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def as_text(task: Task, sample: Sample, number: int) -> Question:
        prompt = ids(forms.prompt_text(task, sample))
        count = limit or task.max_new_tokens
        holes = range(len(prompt), len(prompt) + count)
        request = CanvasRequest([*prompt, *[mask] * count], holes, row_id=number, stop_ids=ends, tag=task.name)

        def read(found: list[int]) -> scoring.Score:
            text = tokenizer.decode([i for i in found if i not in ends])
            return scoring.score(task, sample, text, grammar)

        return Question(task, sample, request, read)

    def as_infill(task: Task, sample: Sample, number: int) -> Question:
        """Every item has as many holes as the reference's item has tokens: so much the frame gives away."""
        pieces = forms.infill_text(task, sample, "\0").split("\0")
        canvas, holes = ids(forms.prompt_text(task, sample)) + ids(pieces[0]), []
        start = len(canvas) - len(ids(pieces[0]))
        for item, behind in zip(sample.reference, pieces[1:], strict=True):
            size = len(ids(item))
            holes += range(len(canvas), len(canvas) + size)
            canvas += [mask] * size + ids(behind)
        request = CanvasRequest(canvas, holes, row_id=number, tag=task.name)

        def read(found: list[int]) -> scoring.Score:
            return scoring.score(task, sample, tokenizer.decode(request.filled(found)[start:]), grammar)

        return Question(task, sample, request, read)

    framed = [name for name, task in TASKS.items() if task.skeleton]
    return _Maker(form, TASKS, as_infill, framed) if form == "infill" else _Maker(form, TASKS, as_text, list(TASKS))


def _measure(given: Any, net: MaskedLM, questions: list[Question]) -> dict[str, Any]:
    """One task's sweep."""
    requests = [question.request for question in questions]
    longest = max(len(request.holes) for request in requests)
    found: dict[tuple[str, float], Run] = {}
    rows = []
    for setting in [*settings(given.rules, longest), *_filter_settings(given)]:
        made = _run(given, net, setting, questions, given.block_length)
        found[setting.rule, setting.strength] = made
        strict, unparsed = _counts(questions, made)
        rows.append(
            {
                "rule": setting.rule,
                "strength": setting.strength,
                **made.to_json(),
                "strict": strict,
                "unparsed": unparsed,
            }
        )
    task = questions[0].task
    careful = [made for (rule, _), made in found.items() if rule == "threshold"]
    best = oracle([m.right for m in careful], [m.passes for m in careful]) if careful else None
    spread = {int(k): m.validity.value for (rule, k), m in found.items() if rule == "top_n_confidence"}
    blocks = [b for b in BLOCKS if all(len(request.holes) % b == 0 for request in requests)]
    pairs = {
        b: _run(given, net, Setting("top_n_confidence", 2, TopN("confidence", 2)), questions, b).validity.value
        for b in (blocks if "top_n_confidence" in given.rules else ())
    }
    return {
        "kind": task.kind,
        "correlation_bits": _bits(questions),
        "rows": rows,
        "oracle_threshold": None if best is None else {"score": best[0], "passes": best[1]},
        "parallelizability": parallelizability(spread) if spread else None,
        "order_preference": order_preference(pairs) if len(pairs) > 1 else None,
    }


def _run(given: Any, net: MaskedLM, setting: Setting, questions: list[Question], block_length: int) -> Run:
    requests = [question.request for question in questions]
    ends = all(request.stop_ids for request in requests)
    decoder = ParallelDiffusionDecoder(
        net,
        ParallelDiffusionSettings(block_length=block_length, cache=given.cache, eot="left_done" if ends else "none"),
        rule=setting.commit,
        sampling=SamplingParams(temperature=given.temperature),
        seed=given.seed,
    )
    return run(decoder, requests, lambda i, ids: questions[i].read(ids).lenient, given.batch)


def _counts(questions: list[Question], made: Run) -> tuple[float, int]:
    scores = [question.read(ids) for question, ids in zip(questions, made.output, strict=True)]
    return sum(s.strict for s in scores) / len(scores), sum(s.unparsed for s in scores)


def _filter_settings(given: Any) -> list[Setting]:
    if given.filter is None:
        return []
    part = load(given.filter, device=given.device, verify=not given.no_verify)
    check_role(part, "filter")
    net: Any = part.part
    if not isinstance(net, CommitFilter):
        raise InvalidValue(f"{given.filter} is of kind {part.kind!r}: --filter takes a commit filter")
    return [Setting("learned_filter", t, LearnedFilter(net, t)) for t in FILTER_THRESHOLDS]


def _bits(questions: list[Question]) -> float | None:
    """Mean total correlation over the samples; None where the answers are too many to list and no form is known."""
    total = 0.0
    for question in questions:
        task, sample = question.task, question.sample
        if task.name in theory.CLOSED_FORMS:
            n = len(sample.reference) if task.name == "domino" else len(sample.items)
            total += theory.closed_form(task.name, n)
        elif task.num_outcomes(sample) <= MOST_OUTCOMES:
            total += theory.total_correlation(task, sample)
        else:
            return None
    return total / len(questions)


def table(report: Mapping[str, Any]) -> str:
    """Per task: the best score of each rule, and its most tokens per pass within two points of it."""
    lines = []
    for name, task in report["tasks"].items():
        bits = task["correlation_bits"]
        lines.append(f"{name}  ({'?' if bits is None else format(bits, '.2f')} bits of dependence)")
        for rule in dict.fromkeys(row["rule"] for row in task["rows"]):
            rows = [row for row in task["rows"] if row["rule"] == rule]
            cells = [
                f"{row['strength']:g}: {100 * row['score']['value']:.0f}% at {row['tokens_per_pass']['value']:.2f}"
                for row in rows
            ]
            lines.append(f"  {rule:<22} " + "   ".join(cells))
        best = task["oracle_threshold"]
        if best is not None:
            lines.append(f"  best threshold of each sample: {100 * best['score']:.0f}% in {best['passes']:.2f} passes")
        for label, key in (("parallelizability", "parallelizability"), ("order preference", "order_preference")):
            if task[key] is not None:
                lines.append(f"  {label} {task[key]:.3f}")
    lines.append("")
    lines.append("strength: score at tokens per pass; scores are of few samples, intervals are in the JSON")
    return "\n".join(lines)
