"""`draftsmith decode TARGET --prompt TEXT` with a masked diffusion model: a canvas of masks behind the prompt."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from draftsmith.inference import metrics, registry
from draftsmith.inference.canvas import CanvasCommit, CanvasDecoder, CanvasRequest
from draftsmith.inference.detokenize import TextStream
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.load_masked import filter_settings
from draftsmith.inference.loader import LoadedPart, check_role, load
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.inference.prompts import PromptLine
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.sampling import SamplingParams

KIND = "masked-lm"
DECODER = "parallel_diffusion"


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The options of masked diffusion."""
    made.add_argument(
        "--filter", metavar="DIR", help=f"decoder {DECODER}: commit what this Learn2PD filter finds final"
    )


def refuse(given: argparse.Namespace) -> None:
    """Raises InvalidValue for a filter that another decoder was given."""
    if given.filter:
        raise InvalidValue(f"--filter belongs to decoder {DECODER}, which a masked diffusion model has: leave it out")


def run(
    given: argparse.Namespace, name: str, settings: dict[str, Any], prompts: Sequence[PromptLine], length: int
) -> int:
    """Decode the prompts, `length` tokens each; print their texts (or one JSON document) and the figures."""
    if given.ignore_eos:
        raise InvalidValue("--ignore-eos: a canvas is filled whole or up to its end; --set eos=forbid writes no end")
    if given.stop:
        raise InvalidValue("--stop looks at text in order, and canvases are filled in any order: leave it out")
    if length < 1:
        raise InvalidValue(f"--max-new-tokens must be at least 1, got {length}")
    target = _load(given, given.target, "target")
    net: Any = target.part
    if not isinstance(net, MaskedLM):
        raise InvalidType(f"{target.path} is of kind {target.kind!r}: decoder {name!r} needs a masked diffusion model")
    parts: dict[str, Any] = {"target": net}
    if given.filter:
        parts["filter"] = _load(given, given.filter, "filter").part
        found = filter_settings(given.filter, target.path, strict=not given.allow_mismatch)
        best = _known(name, found) | {"rule": "learned_filter"}
        if "filter_threshold" in found:  # chosen on validation traces; the rule reads it as its threshold
            best["threshold"] = found["filter_threshold"]
        settings = best | settings
    if target.manifest is not None:
        settings = _known(name, target.manifest.couplings.decode_defaults) | settings
    sampling = SamplingParams(**{f.name: getattr(given, f.name) for f in fields(SamplingParams)})
    decoder = registry.build_canvas(name, parts, sampling=sampling, settings=settings, seed=given.seed)
    requests = [
        _request(net, line.ids(target.tokenizer), length, number, line.tag) for number, line in enumerate(prompts)
    ]
    results = []
    for start in range(0, len(requests), given.batch):
        batch = requests[start : start + given.batch]
        results.append(decoder.decode(batch) if given.json else _printed(decoder, batch, net, target.tokenizer))
    if given.json:
        print(json.dumps(_document(given, name, sampling, target.tokenizer, requests, results), indent=2))
    print(_figures(name, results), file=sys.stderr)
    return 0


def _load(given: argparse.Namespace, path: str, role: str) -> LoadedPart:
    part = load(path, dtype=given.dtype, device=given.device, engine=given.engine, verify=not given.no_verify)
    check_role(part, role)
    return part


def _known(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Settings of this decoder among those that a manifest found best."""
    known = {setting.name for setting in fields(registry.get(name).settings_type())}
    return {key: value for key, value in found.items() if key in known}


def _request(net: MaskedLM, prompt: list[int], length: int, number: int, tag: str) -> CanvasRequest:
    holes = range(len(prompt), len(prompt) + length)
    return CanvasRequest([*prompt, *[net.config.mask_id] * length], holes, row_id=number, tag=tag)


def _printed(
    decoder: CanvasDecoder, batch: Sequence[CanvasRequest], net: MaskedLM, tokenizer: Any | None
) -> DecodeResult:
    """Decode one batch and print its rows in order, each as far as nothing is masked before it."""
    rows = [_Row(request, net.config.end_ids, tokenizer) for request in batch]
    current = 0
    commits = decoder.stream(batch)
    while True:
        try:
            commit = next(commits)
        except StopIteration as stop:
            result: DecodeResult = stop.value
            return result
        rows[commit.row].add(commit)
        while current < len(rows):
            sys.stdout.write(rows[current].take())
            if not rows[current].ended:
                break
            current += 1
        sys.stdout.flush()


class _Row:
    """The text of one canvas, from its first hole to the first one that is still masked."""

    def __init__(self, request: CanvasRequest, ends: Sequence[int], tokenizer: Any | None) -> None:
        self._holes, self._ends, self._done = list(request.holes), ends, 0
        self._tokens: dict[int, int] = {}
        self._stream = None if tokenizer is None else TextStream(tokenizer, ())
        self._closed = False
        self.ended = False
        self._text = ""

    def add(self, commit: CanvasCommit) -> None:
        self._tokens.update(zip(commit.positions, commit.tokens, strict=True))
        while not self._closed and self._done < len(self._holes) and self._holes[self._done] in self._tokens:
            token = self._tokens[self._holes[self._done]]
            self._text += f"{token} " if self._stream is None else self._stream.push(token)
            self._closed = token in self._ends
            self._done += 1
        if commit.stop is not None:
            self._text += ("" if self._stream is None else self._stream.finish()) + "\n"
            self.ended = True

    def take(self) -> str:
        """What has not been printed yet."""
        text, self._text = self._text, ""
        return text


def _figures(name: str, results: Sequence[DecodeResult]) -> str:
    tokens = sum(len(output) for result in results for output in result.output)
    seconds, calls = sum(r.seconds for r in results), sum(r.nfe["target"] for r in results)
    passes = sum(sum(r.notes["passes"]) for r in results)
    return (
        f"{name}: {tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s, "
        f"{tokens / max(passes, 1):.2f} tokens per pass of a row, {calls} target calls; rule {results[0].notes['rule']}"
    )


def _document(
    given: argparse.Namespace,
    name: str,
    sampling: SamplingParams,
    tokenizer: Any | None,
    requests: Sequence[CanvasRequest],
    results: Sequence[DecodeResult],
) -> dict[str, Any]:
    rounds, rows = RoundStats(), list[dict[str, Any]]()
    for result in results:
        rounds.extend(result.rounds, len(rows))
        for i, output in enumerate(result.output):
            request = requests[len(rows)]
            rows.append(
                {
                    "prompt_ids": list(request.tokens[: request.holes[0]]),
                    "tag": request.tag,
                    "output_ids": output,
                    "text": None if tokenizer is None else tokenizer.decode(output, skip_special_tokens=True),
                    "stop": result.stop[i],
                    "passes": result.notes["passes"][i],
                    "token_passes": result.notes["token_passes"][i],
                }
            )
    seconds = sum(result.seconds for result in results)
    return {
        "target": given.target,
        "filter": given.filter,
        "decoder": name,
        "sampling": asdict(sampling),
        "seed": given.seed,
        "outputs": rows,
        "seconds": seconds,
        "tokens_per_second": sum(len(row["output_ids"]) for row in rows) / max(seconds, 1e-9),
        "nfe": {"target": sum(result.nfe["target"] for result in results)},
        "notes": {"rule": results[0].notes["rule"]},
        "acceptance": metrics.summarize(rounds, seed=given.seed).to_json(),
    }
