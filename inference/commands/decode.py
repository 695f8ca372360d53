"""`draftsmith decode TARGET`: generate text, streamed as it is committed; speed and acceptance go to stderr."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.inference import metrics, registry
from draftsmith.inference.commands import decode_canvas, decode_diffusion
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.detokenize import TextStream
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.loader import LoadedPart, check_pair, check_role, kind_of, load
from draftsmith.inference.manifest import DTYPES, KINDS
from draftsmith.inference.prompts import PromptLine, read_prompts
from draftsmith.inference.requests import Commit, Decoder, DecodeResult, RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from draftsmith.inference.costs import CostCurve

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_MAX_NEW_TOKENS = 128


@dataclass
class Outcome:
    """The results of all batches of one command, rows in the order of the prompts."""

    output: list[list[int]] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    text: list[str] | None = field(default_factory=list)  # None without a tokenizer
    rounds: RoundStats = field(default_factory=RoundStats)
    nfe: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)  # of the last batch

    def add(self, result: DecodeResult) -> None:
        self.rounds.extend(result.rounds, row_offset=len(self.output))
        self.output += result.output
        self.stop += result.stop
        self.text = None if result.text is None or self.text is None else self.text + result.text
        self.nfe = {role: self.nfe.get(role, 0) + result.nfe.get(role, 0) for role in self.nfe | result.nfe}
        self.seconds += result.seconds
        self.notes = result.notes

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.output)) / max(self.seconds, 1e-9)


class Writer:
    """Prints rows in the order of the prompts: the first unfinished one as it grows, the others in their turn."""

    def __init__(self, tokenizer: Any | None, stop_strings: Sequence[str], color: bool) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._color = color

    def run(self, decoder: Decoder, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode one batch and print its text, a line break behind each row."""
        streams = [self._stream() for _ in requests]
        pieces: list[list[str]] = [[] for _ in requests]
        ended: set[int] = set()
        current = 0
        commits = decoder.stream(requests)
        while True:
            try:
                commit = next(commits)
            except StopIteration as stop:
                result: DecodeResult = stop.value
                return result
            pieces[commit.row] += self._pieces(streams[commit.row], commit)
            if commit.stop is not None:
                pieces[commit.row].append(self._finish(streams[commit.row]) + "\n")
                ended.add(commit.row)
            while current < len(requests):
                sys.stdout.write("".join(pieces[current]))
                pieces[current].clear()
                if current not in ended:
                    break
                current += 1
            sys.stdout.flush()

    def _stream(self) -> TextStream | None:
        return None if self._tokenizer is None else TextStream(self._tokenizer, self._stop_strings)

    def _pieces(self, stream: TextStream | None, commit: Commit) -> Iterator[str]:
        for i, token in enumerate(commit.tokens):
            text = f"{token} " if stream is None else stream.push(token)
            accepted = self._color and i < commit.accepted
            yield f"{_GREEN}{text}{_RESET}" if accepted and text else text

    def _finish(self, stream: TextStream | None) -> str:
        return "" if stream is None else stream.finish()


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    entry = registry.get(given.decoder or _default_decoder(given))
    if "draft" in entry.needs and not given.draft:
        raise InvalidValue(f"decoder {entry.name!r} needs a draft: add --draft DIR")
    if given.draft and "draft" not in (*entry.needs, *entry.optional):
        raise InvalidValue(f"decoder {entry.name!r} takes no draft: leave --draft out, or choose another --decoder")
    if given.batch < 1:
        raise InvalidValue(f"--batch must be at least 1, got {given.batch}")
    settings = dict(key_value(text) for text in given.set)
    continues = entry.requests == "tokens" or entry.name == decode_diffusion.DECODER
    if continues == (given.infill is not None):
        raise InvalidValue(
            f"decoder {entry.name!r} "
            + (
                "fills holes: mark them, --infill 'def f(x): [[MASK:12]] return y'"
                if given.infill is None
                else f"continues prompts: --infill takes one of {', '.join(_infilling())}"
            )
        )
    if given.infill is not None:
        return decode_canvas.run(given, entry.name, settings)
    decode_canvas.refuse(given)
    prompts = [PromptLine(given.prompt, None)] if given.prompt is not None else read_prompts(given.prompts)
    if entry.name == decode_diffusion.DECODER:
        return decode_diffusion.run(given, entry.name, settings, prompts, _length(given))
    decode_diffusion.refuse(given)
    sampling = SamplingParams(**{f.name: getattr(given, f.name) for f in fields(SamplingParams)})
    target = _load(given, given.target, "target")
    if not hasattr(target.part, "new_cache") or KINDS[target.kind].requests != "tokens":
        raise InvalidType(
            f"{target.path} is of kind {target.kind!r} and no causal language model: decoder {entry.name!r} cannot "
            "continue a text with it; leave --decoder out"
        )
    requests = [_request(given, target, line, number) for number, line in enumerate(prompts)]
    decoder = _build(given, entry.name, target, sampling, settings, requests)
    writer = Writer(target.tokenizer, given.stop, _wants_color(given.color))
    outcome = Outcome()
    for start in range(0, len(requests), given.batch):
        batch = requests[start : start + given.batch]
        outcome.add(decoder.decode(batch) if given.json else writer.run(decoder, batch))
    summary = metrics.summarize(outcome.rounds, seed=given.seed)
    if given.json:
        print(json.dumps(_document(given, entry.name, sampling, requests, outcome, summary), indent=2))
    print(_figures(entry.name, outcome, summary), file=sys.stderr)
    return 0


def _default_decoder(given: argparse.Namespace) -> str:
    if given.infill is not None:
        return "any_subset"
    if kind_of(given.target) == decode_diffusion.KIND:
        return decode_diffusion.DECODER
    return "speculative" if given.draft else "autoregressive"


def _infilling() -> tuple[str, ...]:
    """The decoders that fill marked holes."""
    return tuple(name for name in registry.names("canvas") if name != decode_diffusion.DECODER)


def _length(given: argparse.Namespace) -> int:
    return _MAX_NEW_TOKENS if given.max_new_tokens is None else int(given.max_new_tokens)


def _parser() -> CommandParser:
    made = parser(
        "decode",
        "Generate text with a target and, if given, a draft. Text goes to stdout, speed and acceptance to stderr.",
        """draftsmith decode exports/target --prompt "def add(a, b):"
        draftsmith decode exports/target --draft exports/draft --prompts prompts.jsonl --temperature 0.7 --batch 4
        draftsmith decode exports/diffusion --prompt "def add(a, b):" --set rule=threshold --set cache=dual
        draftsmith decode exports/any-subset --infill "def f(x): [[MASK:12]] return y\"""",
    )
    made.add_argument("target", metavar="TARGET", help="export or Hugging Face directory of the target")
    made.add_argument("--draft", metavar="DIR", help="export or Hugging Face directory of the draft")
    made.add_argument(
        "--decoder",
        metavar="NAME",
        help=f"one of {', '.join(registry.names())}, {decode_diffusion.DECODER} and, with --infill, "
        f"{', '.join(_infilling())} (default: speculative with a draft, any_subset with --infill, "
        f"{decode_diffusion.DECODER} for a masked diffusion model, else autoregressive)",
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    source.add_argument("--prompts", metavar="FILE", help="JSONL, an object a line with 'prompt' or 'prompt_ids'")
    source.add_argument(
        "--infill", metavar="TEXT", help="a text with holes: [[MASK:12]] of 12 tokens, [[MASK:4-12]] of 4 to 12"
    )
    decode_canvas.add_arguments(made)
    decode_diffusion.add_arguments(made)
    made.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default: {_MAX_NEW_TOKENS}")
    made.add_argument("--batch", type=int, default=1, metavar="B", help="prompts decoded together (default: 1)")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    made.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end-of-sequence ids")
    made.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    names = (*registry.names(), *registry.names("canvas"))
    known = sorted({setting.name for name in names for setting in fields(registry.get(name).settings_type())})
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a setting of the decoder; may be repeated: {', '.join(known)}",
    )
    made.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="what calls cost, from 'draftsmith bench --json', for settings that choose by cost (default: measured "
        "before decoding where a tree's size is chosen so)",
    )
    made.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="go on with a draft made for another target or tokenizer pipeline, where the output stays exact",
    )
    for setting in fields(SamplingParams):
        made.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=setting.type if isinstance(setting.type, type) else float,
            default=setting.default,
            metavar="X",
            help=f"{setting.metadata['help'].replace('%', '%%')} (default: {setting.default})",
        )
    made.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as the weights are stored)")
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    made.add_argument("--engine", default="auto", help="auto, native, or hf (adapter over transformers)")
    made.add_argument("--no-verify", action="store_true", help="compare file sizes with the manifest, not their hashes")
    made.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="accepted tokens in green")
    made.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return made


def _load(given: argparse.Namespace, path: str, role: str) -> LoadedPart:
    part = load(path, dtype=given.dtype, device=given.device, engine=given.engine, verify=not given.no_verify)
    check_role(part, role)
    return part


def _build(
    given: argparse.Namespace,
    name: str,
    target: LoadedPart,
    sampling: SamplingParams,
    settings: dict[str, Any],
    requests: Sequence[TokenRequest],
) -> Decoder:
    """The decoder; settings that the draft's manifest found best hold where the user chose none."""
    parts, vocab_size = {"target": target.part}, target.vocab_size
    if given.draft:
        draft = _load(given, given.draft, "draft")
        vocab_size = check_pair(target, draft, given.allow_mismatch)
        parts["draft"] = draft.part
        if draft.manifest is not None:
            known = {setting.name for setting in fields(registry.get(name).settings_type())}
            found_best = draft.manifest.couplings.decode_defaults  # for the decoder that it was measured with
            settings = {key: value for key, value in found_best.items() if key in known} | settings
        settings = _calibrated(name, target, draft, sampling, settings)
    costs = _costs(given, name, parts, sampling, settings, requests)
    return registry.build(
        name,
        parts,
        sampling=sampling,
        settings=settings,
        seed=given.seed,
        tokenizer=target.tokenizer,
        costs=costs,
        vocab_size=vocab_size,
    )


def _costs(
    given: argparse.Namespace,
    name: str,
    parts: Mapping[str, Any],
    sampling: SamplingParams,
    settings: dict[str, Any],
    requests: Sequence[TokenRequest],
) -> "CostCurve | None":
    """Costs from --costs; else measured now, at the requests' median length, where a tree's size is chosen by them."""
    from draftsmith.inference.tree_costs import measure_tree, read_curve

    if given.costs is not None:
        return read_curve(given.costs, given.batch)
    if name != "tree":
        return None
    chosen = registry.make_settings(name, settings)
    if chosen.policy != "sequoia" and chosen.stop != "cost":
        return None
    lengths = sorted(len(request.prompt) for request in requests)
    context = max(1, lengths[len(lengths) // 2] + given.max_new_tokens // 2)
    found = measure_tree(
        parts["target"], parts["draft"], nodes=chosen.nodes, batch=given.batch, context=context, sampling=sampling
    )
    print(
        f"costs, measured: a target call {1e3 * found.plain:.3g} ms, on {chosen.nodes + 1} tokens "
        f"{1e3 * found.t_verify(chosen.nodes + 1):.3g} ms, a draft step {1e3 * found.draft_step:.3g} ms",
        file=sys.stderr,
    )
    return found


def with_defaults(
    name: str, target: LoadedPart, draft: LoadedPart, sampling: SamplingParams, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings with what the draft's manifest found best and the calibration beside it, where none was chosen."""
    if draft.manifest is not None:
        known = {setting.name for setting in fields(registry.get(name).settings_type())}
        found_best = draft.manifest.couplings.decode_defaults  # for the decoder that it was measured with
        settings = {key: value for key, value in found_best.items() if key in known} | settings
    return _calibrated(name, target, draft, sampling, settings)


def _calibrated(
    name: str, target: LoadedPart, draft: LoadedPart, sampling: SamplingParams, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings with the tree calibration that lies beside the draft, where it fits and none was named.

    Raises InvalidValue when a named one was measured on other networks.
    """
    if name != "tree":
        return settings
    from draftsmith.inference.couplings import target_fingerprint
    from draftsmith.inference.tree_calibration import CALIBRATION_FILE, Calibration
    from draftsmith.inference.tree_settings import conditions

    path = Path(settings.get("calibration") or draft.path / CALIBRATION_FILE)
    if not settings.get("calibration") and not path.is_file():
        return settings
    measured = {"target": target_fingerprint(target.path), "draft": target_fingerprint(draft.path)}
    if settings.get("calibration"):
        Calibration.load(path, measured)
        return settings
    try:
        Calibration.load(path, measured | conditions(registry.make_settings(name, settings), sampling))
    except InvalidValue as error:
        print(f"not used: {error}", file=sys.stderr)
        return settings
    return settings | {"calibration": str(path)}


def _request(given: argparse.Namespace, target: LoadedPart, line: PromptLine, number: int) -> TokenRequest:
    return TokenRequest(
        line.ids(target.tokenizer),
        max_new_tokens=_length(given),
        row_id=number,  # rows sample apart, whatever batch they are in
        stop_ids=() if given.ignore_eos else target.stop_ids,
        stop_strings=tuple(given.stop),
        tag=line.tag,
    )


def key_value(text: str, option: str = "--set") -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON (5, 0.3, true, null), else text. Raises InvalidValue, naming the option."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidValue(f"{option} wants KEY=VALUE, got {text!r}: for example {option} draft_length=5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _wants_color(choice: str) -> bool:
    return choice == "always" or (choice == "auto" and sys.stdout.isatty())


def _figures(name: str, outcome: Outcome, summary: metrics.Summary) -> str:
    """One line: speed, acceptance, network calls."""
    said = [
        f"{sum(map(len, outcome.output))} tokens in {outcome.seconds:.2f} s",
        f"{outcome.tokens_per_second:.1f} tokens/s",
    ]
    if summary.alpha is not None:  # something was drafted
        said += [f"alpha {summary.alpha}", f"tau {summary.tau} tokens per target call"]
    said += [f"{calls} {role} calls" for role, calls in sorted(outcome.nfe.items(), reverse=True)]
    return f"{name}: {', '.join(said)}"


def _document(
    given: argparse.Namespace,
    name: str,
    sampling: SamplingParams,
    requests: Sequence[TokenRequest],
    outcome: Outcome,
    summary: metrics.Summary,
) -> dict[str, Any]:
    rows = [
        {
            "prompt_ids": list(request.prompt),
            "tag": request.tag,
            "output_ids": outcome.output[i],
            "text": outcome.text[i] if outcome.text is not None else None,
            "stop": outcome.stop[i],
        }
        for i, request in enumerate(requests)
    ]
    return {
        "target": given.target,
        "draft": given.draft,
        "decoder": name,
        "sampling": asdict(sampling),
        "seed": given.seed,
        "outputs": rows,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "nfe": outcome.nfe,
        "notes": outcome.notes,
        "acceptance": summary.to_json(),
    }
