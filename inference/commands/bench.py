"""`draftsmith bench TARGET`: decoders and their transformers peers side by side; does the draft pay, how much?"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftsmith.inference import bench, bench_report, registry
from draftsmith.inference.bench import BenchSettings, Extra, Parts, Prompt
from draftsmith.inference.bench_report import write_json
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.commands.decode import key_value, with_defaults
from draftsmith.inference.environment import git, machine, versions
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.loader import LoadedPart, check_pair, check_role, load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.peers import TransformersPeers, refit_installed
from draftsmith.inference.prompts import read_prompts
from draftsmith.inference.sampling import SamplingParams

SCHEMA = 1
_FORGETS: dict[str, Any] = {"max_cached_requests": 0}
# The decoders of --decoder. The same prompts come again in every repetition: what a decoder would remember of them from
# call to call is switched off, unless the row sets it.
_EXTRA: dict[str, dict[str, Any]] = {
    "speculative": {},
    "prompt_lookup": {},
    "suffix": _FORGETS,
    "suffix_tree": _FORGETS,
    "suffix_hybrid": _FORGETS,
    "tree": {},
    "aded": {"adapt": "call"},
}
PLOTS = "draftsmith.plots"  # entry points of the training extra: name -> function(report, path)
SUITES = "draftsmith.suites"  # likewise: name -> main(argv), a command of its own behind `bench EXPORT --suite NAME`


def main(argv: list[str]) -> int:
    suite, rest = split_suite(argv)
    if suite is not None:
        return _suite(suite)(rest)
    given = _parser().parse_args(argv)
    settings = BenchSettings(
        max_new_tokens=given.max_new_tokens,
        batches=given.batch,
        temperature=given.temperature,
        g=given.g,
        lookup_tokens=given.lookup_tokens,
        repetitions=given.repetitions,
        seed=given.seed,
    )
    for path in (given.json, given.png):
        if path is not None and not path.parent.is_dir():
            raise InvalidValue(f"cannot write {path}: there is no folder {path.parent}")
    lines = read_prompts(given.prompts)[: given.num_prompts]
    bench.split_prompts([Prompt((0,))] * len(lines))  # too few are refused before anything is loaded
    draw = _plot_function() if given.png is not None else None
    if given.threads is not None:
        _set_threads(given.threads)
    target = _load(given, given.target, "target")
    draft = _load(given, given.draft, "draft") if given.draft is not None else None
    stop_ids = () if given.ignore_eos else target.stop_ids
    extras = tuple(_extra(given, text, target, draft) for text in given.decoder)
    parts = Parts(
        target=target.part,
        draft=draft.part if draft else None,
        vocab_size=check_pair(target, draft, given.allow_mismatch) if draft else target.vocab_size,
        stop_ids=stop_ids,
        training_seconds=draft.manifest.provenance.wall_seconds if draft and draft.manifest else None,
        extras=extras,
    )
    prompts = [Prompt(tuple(line.ids(target.tokenizer)), line.tag) for line in lines]
    peers = None
    if not given.no_peers:
        peers = TransformersPeers(
            target.path,
            draft.path if draft else None,
            dtype=parts.target.dtype,
            device=parts.target.device,
            temperature=settings.temperature,
            g=settings.g,
            lookup_tokens=settings.lookup_tokens,
            stop_ids=stop_ids,
        )
    head = _head(given, settings, parts, target, draft)

    def freeze(predicted: dict[str, Any]) -> None:
        if given.json is not None:
            write_json(given.json, {**head, "state": "forecast", "forecast": predicted})

    report = {**head, "state": "measured"}
    with _Progress(sys.stderr) if not given.quiet else nullcontext() as progress:
        report |= bench.run(parts, prompts, settings, peers=peers, on_forecast=freeze, progress=progress)
    if given.json is not None:
        write_json(given.json, report)
    print(bench_report.text(report))
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if draw is not None:
        draw(report, given.png)
    return 0


def _parser() -> CommandParser:
    made = parser(
        "bench",
        "Time plain, speculative and prompt-lookup decoding beside transformers' own, interleaved in one process,\n"
        "after a forecast from other prompts. The table goes to stdout, progress and warnings to stderr.",
        """draftsmith bench exports/target --draft exports/draft --prompts traffic.jsonl --json bench.json
        draftsmith bench exports/target --draft exports/draft --prompts traffic.jsonl --batch 1,8,16 --png bench.png
        draftsmith bench exports/target --prompts traffic.jsonl --decoder suffix --decoder aded@table,nodes=16
        draftsmith bench exports/target --prompts traffic.jsonl --decoder tree@exports/eagle,policy=eagle2""",
    )
    made.add_argument("target", metavar="TARGET", help="export or Hugging Face directory of the target")
    made.add_argument("--draft", metavar="DIR", help="export or Hugging Face directory of the draft")
    made.add_argument(
        "--suite", metavar="NAME", help="run tasks in place of timings; its options: bench EXPORT --suite NAME --help"
    )
    made.add_argument(
        "--decoder",
        action="append",
        default=[],
        metavar="NAME[@DIR][,KEY=VALUE...]",
        help="a further row: a decoder with its draft (default: that of --draft, where it needs one) and its settings; "
        f"may be repeated. NAME: {', '.join(_EXTRA)}",
    )
    made.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSONL, an object a line with 'prompt' or 'prompt_ids'; two or more",
    )
    made.add_argument("--num-prompts", type=int, metavar="N", help="use only the first N lines of the file")
    made.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per request (default: %(default)s)")
    made.add_argument("--batch", type=_batches, default=(1,), metavar="B[,B...]", help="batch sizes (default: 1)")
    made.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    made.add_argument("--g", type=int, default=5, metavar="N", help="fixed draft length (default: %(default)s)")
    made.add_argument(
        "--lookup-tokens", type=int, default=10, metavar="N", help="proposed by prompt lookup (default: %(default)s)"
    )
    made.add_argument(
        "--repetitions", type=int, default=7, metavar="N", help="at least 7 to quote (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of sampling and of the intervals (default: 0)")
    made.add_argument(
        "--dtype", choices=DTYPES, help="to compute in, for all rows (default: as the weights are stored)"
    )
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch, for all rows (default: torch's)")
    made.add_argument("--engine", default="auto", help="of our rows: auto, native, or hf (adapter over transformers)")
    made.add_argument("--ignore-eos", action="store_true", help="every row decodes exactly --max-new-tokens tokens")
    made.add_argument("--no-peers", action="store_true", help="leave transformers' own decoders out")
    made.add_argument("--no-verify", action="store_true", help="compare file sizes with the manifest, not their hashes")
    made.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="go on with a draft made for another target or tokenizer pipeline, where the output stays exact",
    )
    made.add_argument("--json", type=Path, metavar="OUT", help="write the report, raw timings included")
    made.add_argument("--png", type=Path, metavar="OUT", help="draw the report (needs the training extra)")
    made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return made


def split_suite(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the NAME of --suite NAME or --suite=NAME, the other arguments); (None, argv) without it.

    Raises InvalidValue for --suite without a name.
    """
    for i, word in enumerate(argv):
        option, given, name = word.partition("=")
        if option == "--suite":
            rest = argv[i + 1 :] if given else argv[i + 2 :]
            name = name if given else next(iter(argv[i + 1 :]), "")
            if not name or name.startswith("-"):
                raise InvalidValue("--suite needs a name, for example --suite parallelbench")
            return name, [*argv[:i], *rest]
    return None, argv


def _suite(name: str) -> Callable[[list[str]], int]:
    """The suite's command; a ModuleNotFoundError names the extra that is missing. Raises InvalidValue if unknown."""
    from importlib.metadata import entry_points

    found = entry_points(group=SUITES)
    if name not in found.names:
        raise unknown_choice("suite", name, found.names)
    made: Callable[[list[str]], int] = found[name].load()
    return made


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"batch sizes are numbers such as 8 or 1,8,16, got {text!r}") from None


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise InvalidValue(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _load(given: argparse.Namespace, path: str, role: str) -> LoadedPart:
    part = load(path, dtype=given.dtype, device=given.device, engine=given.engine, verify=not given.no_verify)
    check_role(part, role)
    return part


def _extra(given: argparse.Namespace, text: str, target: LoadedPart, draft: LoadedPart | None) -> Extra:
    """A row of --decoder: NAME[@DIR][,KEY=VALUE...]."""
    head, *rest = text.split(",")
    name, at, path = head.partition("@")
    if name not in _EXTRA:
        raise unknown_choice("decoder of a further row", name, _EXTRA)
    entry = registry.get(name)
    settings = _EXTRA[name] | dict(key_value(setting, "--decoder") for setting in rest)
    part = None
    if at:
        if "draft" not in (*entry.needs, *entry.optional):
            raise InvalidValue(f"decoder {name!r} takes no draft: write --decoder {name} without @{path}")
        part = _load(given, path, "draft")
    elif "draft" in entry.needs:
        if draft is None:
            raise InvalidValue(f"decoder {name!r} needs a draft: write --decoder {name}@DIR, or add --draft DIR")
        part = draft
    if part is None:
        return Extra(text, name, settings)
    vocab_size = check_pair(target, part, given.allow_mismatch)
    settings = with_defaults(name, target, part, SamplingParams(temperature=given.temperature), settings)
    return Extra(text, name, settings, part.part, vocab_size)


def _plot_function() -> Callable[[dict[str, Any], Path], None] | None:
    """The picture's maker from the training extra; None, after one line on stderr, where that is not installed."""
    from importlib.metadata import entry_points

    for found in entry_points(group=PLOTS, name="bench"):
        try:
            made: Callable[[dict[str, Any], Path], None] = found.load()
        except ImportError:
            break
        return made
    print("no PNG: pictures need the training extra: pip install 'draftsmith[train]'", file=sys.stderr)
    return None


def _head(
    given: argparse.Namespace, settings: BenchSettings, parts: Parts, target: LoadedPart, draft: LoadedPart | None
) -> dict[str, Any]:
    """Everything about the run but its figures."""
    import torch

    def described(part: LoadedPart) -> dict[str, Any]:
        spec = part.part.spec
        return {"path": str(part.path), "kind": part.kind, "engine": type(part.part).__name__, **asdict(spec)}

    return {
        "schema": SCHEMA,
        "target": described(target),
        "draft": described(draft) if draft else None,
        "settings": {
            **asdict(settings),
            "batches": list(settings.batches),
            "prompts": str(given.prompts),
            "dtype": str(parts.target.dtype).removeprefix("torch."),
            "device": str(parts.target.device),
            "threads": torch.get_num_threads(),
            "stop_ids": list(parts.stop_ids),
            "peers": not given.no_peers,
            "confidence_refit_in_defaults_peer": refit_installed(),
        },
        "environment": {
            "machine": machine(),
            "versions": versions(),
            "commit": git(Path(__file__).parent, "rev-parse", "HEAD"),
        },
    }


class _Progress:
    """One line on stderr with the time left: redrawn in place on a terminal, else printed about every ten seconds."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._start: float | None = None
        self._printed = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def __call__(self, share: float, what: str) -> None:
        now = time.monotonic()
        if share <= 0.0:
            self._start = None  # the clock of the time left starts with the measurement
        elif self._start is None:
            self._start = now
            self._first = share
        left = ""
        if self._start is not None and share > self._first:
            seconds = (now - self._start) / (share - self._first) * (1.0 - share)
            left = f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"
        line = f"{100 * share:3.0f}%  {what}{left}"
        if self._live:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        elif now - self._printed > 10.0:
            self._printed = now
            print(line, file=self._stream, flush=True)
