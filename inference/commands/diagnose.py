"""`draftsmith diagnose TARGET DRAFTER`: which wrong coupling makes a drafter accepted too little."""

import ast
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.diagnose import Row, Verdict, diagnose
from draftsmith.inference.diagnose_report import document, page
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.formats.convert import FORMATS
from draftsmith.inference.hypotheses import confirm
from draftsmith.inference.hypotheses.contexts import Contexts, draw, recorded
from draftsmith.inference.hypotheses.served_law import LawFilter
from draftsmith.inference.hypotheses.subjects import load_subject
from draftsmith.inference.hypotheses.template import GIVEN, read_answered, rendered
from draftsmith.inference.loader import LoadedPart, check_role, load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.prompts import PromptLine, read_prompts

LIVE = "draftsmith.live"  # entry points of the training extra: name -> class(), a context manager and a watcher
FRESH = 1 << 20  # row ids of the contexts that confirm


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    target = load(given.target, dtype=given.dtype, device=given.device, verify=not given.no_verify)
    check_role(target, "target")
    if target.part.spec.num_layers < 1:
        raise InvalidState(f"{given.target} shows no hidden states: a diagnosis needs a local target")
    verdict = _diagnose(given, target)
    print(json.dumps(document(verdict), indent=2) if given.json else page(verdict))
    return verdict.exit_code


def _diagnose(given: Any, target: LoadedPart) -> Verdict:
    drafter, served = Path(given.drafter), _filters(given)
    try:
        subject, certain, notes = load_subject(
            target, drafter, format=given.format, allow_pickle=given.allow_pickle, served=served
        )
    except InvalidValue as error:
        if not drafter.is_dir():
            raise
        return Verdict("certain", certain=[str(error)])
    sizes: dict[str, Any] = {
        "law_filter": served[0],
        "seed": given.seed,
        "length": given.length,
        "anchors": given.anchors,
        "steps": given.steps,
    }
    if given.answers is not None:
        if given.prompts is not None:
            raise InvalidValue("--answers brings its own prompts: leave --prompts out")
        contexts, fresh, others = _recorded(given, target, sizes)
    else:
        prompts = _prompts(given.prompts, target, given.samples)
        contexts, others = draw(target, prompts, given.samples, **sizes), prompts[given.samples :] or prompts
        fresh = None
    if not contexts.keep:
        notes.append("the target's states do not fit into memory: they are computed anew for each set of layers")
    with _live(given.json) as watch:
        verdict = diagnose(subject, contexts, expected=given.expected, seed=given.seed, deep=given.deep, watch=watch)
    verdict.notes += notes
    verdict.certain += certain
    if certain and verdict.status == "healthy":
        verdict.status = "certain"
    if verdict.findings or given.confirm:
        if fresh is None:
            fresh = draw(target, others, given.samples, first=FRESH, **sizes)
        verdict.confirmed["fresh"] = confirm.on_fresh_contexts(subject, verdict, fresh, given.seed)
        verdict.confirmed["decoding"] = confirm.by_decoding(subject, verdict, target, others, steps=given.steps)
    if given.write_fixed is not None:
        if not verdict.findings:
            verdict.notes.append("nothing was written: no fault was named")
        else:
            name = confirm.write_fixed(
                subject, verdict, target.path, drafter, given.write_fixed, overwrite=given.overwrite
            )
            verdict.notes.append(f"{given.write_fixed} is the corrected drafter, format {name}")
    return verdict


def _recorded(
    given: Any, target: LoadedPart, sizes: dict[str, Any]
) -> tuple[Contexts, Contexts | None, list[list[int]]]:
    """(contexts of the first answers, of the next ones where there are enough, prompts as given)."""
    bos = getattr(target.tokenizer, "bos_token_id", None)
    if bos is None:
        bos = read_json(target.path / "config.json").get("bos_token_id")
    prompts, answers = rendered(read_answered(given.answers), target.tokenizer, bos)

    def part(first: int, last: int) -> Contexts:
        return recorded(target, {name: ids[first:last] for name, ids in prompts.items()}, answers[first:last], **sizes)

    count = given.samples
    fresh = part(count, 2 * count) if len(answers) >= 2 * count else None
    return part(0, count), fresh, [ids for ids in prompts[GIVEN] if ids]


def _filters(given: Any) -> tuple[LawFilter, LawFilter]:
    """Of the target's law and of the draft's. Raises InvalidValue for numbers that are none."""
    target = (given.top_k, given.top_p)
    draft = tuple(
        own if own is not None else others
        for own, others in zip((given.draft_top_k, given.draft_top_p), target, strict=True)
    )
    for top_k, top_p in (target, draft):
        if top_k < 0 or not 0.0 < top_p <= 1.0:
            raise InvalidValue(f"top-k is at least 0 and top-p above 0 and at most 1, got {top_k} and {top_p}")
    return target, draft


def _parser() -> CommandParser:
    made = parser(
        "diagnose",
        "Try every known wrong coupling between a target and a drafter, and name the one that explains a low "
        "acceptance. Exit code 0: healthy, 1: a fault is named, 2: not explained, or bad input.",
        """draftsmith diagnose models/target downloads/eagle3-head --samples 32
        draftsmith diagnose exports/target exports/draft --prompts prompts.jsonl --write-fixed exports/draft-fixed""",
    )
    made.add_argument("target", metavar="TARGET", help="export or Hugging Face directory of the target")
    made.add_argument("drafter", metavar="DRAFTER", help="directory of an EAGLE drafter or a language model")
    made.add_argument("--samples", type=int, default=32, metavar="N", help="answers of the target (default: 32)")
    made.add_argument(
        "--prompts", metavar="FILE", help="JSONL as draftsmith decode takes (default: docstrings of Python's library)"
    )
    made.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="JSONL with what the target answered in service ('prompt', 'prompt_ids' or 'messages', and 'answer' or "
        "'answer_ids'): chat templates and BOS are tried, too",
    )
    made.add_argument("--length", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    made.add_argument("--anchors", type=int, default=8, metavar="N", help="places of an answer (default: 8)")
    made.add_argument("--steps", type=int, default=5, metavar="K", help="draft length that is scored (default: 5)")
    made.add_argument("--top-k", type=int, default=0, metavar="K", help="that the target is served with; 0: off")
    made.add_argument("--top-p", type=float, default=1.0, metavar="P", help="that the target is served with; 1: off")
    made.add_argument("--draft-top-k", type=int, metavar="K", help="that drafts are drawn with (default: --top-k)")
    made.add_argument("--draft-top-p", type=float, metavar="P", help="that drafts are drawn with (default: --top-p)")
    made.add_argument("--expected", type=float, metavar="S", help="S of the healthy drafter, where it was measured")
    made.add_argument("--deep", action="store_true", help="try every state at every place, and several beginnings")
    made.add_argument("--confirm", action="store_true", help="fresh contexts and real decoding also when healthy")
    made.add_argument("--write-fixed", type=Path, metavar="DIR", help="write a corrected copy, in the same format")
    made.add_argument("--overwrite", action="store_true", help="replace a directory that is already there")
    made.add_argument("--from", dest="format", choices=tuple(FORMATS), help="format of DRAFTER (default: detected)")
    made.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin (weights only)")
    made.add_argument("--seed", type=int, default=0, help="of the contexts (default: 0)")
    made.add_argument("--dtype", choices=DTYPES, help="of the target (default: as its weights are stored)")
    made.add_argument("--device", default="cpu", help="of the target, for example cuda (default: cpu)")
    made.add_argument("--no-verify", action="store_true", help="compare file sizes with the manifest, not their hashes")
    made.add_argument("--json", action="store_true", help="one JSON document instead of a page")
    return made


def _prompts(path: str | None, target: LoadedPart, samples: int) -> list[list[int]]:
    """Prompts as ids, twice as many as samples where there are enough: the second half confirms."""
    if path is not None:
        return [line.ids(target.tokenizer) for line in read_prompts(path)]
    if target.tokenizer is None:
        raise InvalidValue("the target has no tokenizer: give prompts as token ids (--prompts, key 'prompt_ids')")
    return [PromptLine(text, None).ids(target.tokenizer) for text in docstrings(2 * samples)]


def docstrings(count: int) -> list[str]:
    """The first docstrings of Python's own library, real text that is on every machine."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text and len(text) > 80:
            found.append(text[:400])
        if len(found) == count:
            break
    return found


class _Line:
    """Progress as one line on stderr, where the training extra with its live table is missing."""

    def __init__(self) -> None:
        self._began, self._shown = time.monotonic(), 0.0

    def __enter__(self) -> "Callable[[str, int, int, Sequence[Row]], None]":
        return self.watch

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)

    def watch(self, stage: str, done: int, of: int, rows: Sequence[Row]) -> None:
        now = time.monotonic()
        if now - self._shown < 0.2 and done < of:
            return
        self._shown = now
        best = f"; best so far: {rows[0].hypothesis.name} ({rows[0].gain:+.3f})" if rows else ""
        print(f"\r\x1b[K{stage}: {done} of {of}{best}", end="", file=sys.stderr, flush=True)


class _Silent:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _live(silent: bool) -> Any:
    if silent or not sys.stderr.isatty():
        return _Silent()
    found = next(iter(entry_points(group=LIVE, name="diagnose")), None)
    if found is None:
        return _Line()
    try:
        return found.load()()
    except ModuleNotFoundError:  # the slim install lists the table but lacks what draws it
        return _Line()
