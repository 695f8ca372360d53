"""`draftsmith decode TARGET --infill TEXT`: fill the marked holes of a text with an any-subset model."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from draftsmith.inference import metrics, registry
from draftsmith.inference.any_subset_infill import COMPARE, Infilling, infill
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.loader import LoadedPart, check_role, load
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.requests import DecodeResult, RoundStats
from draftsmith.inference.sampling import SamplingParams


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The options of --infill."""
    made.add_argument("--samples", type=int, metavar="N", help="--infill: candidates per length of holes (default: 1)")
    made.add_argument(
        "--compare",
        choices=COMPARE,
        help="--infill: which candidate is best. mean: log p per token of the holes (default), sum: their log p, which "
        "favours short ones",
    )


def refuse(given: argparse.Namespace) -> None:
    """Raises InvalidValue for options of --infill without it."""
    for name in ("samples", "compare"):
        if getattr(given, name) is not None:
            raise InvalidValue(f"--{name} belongs to --infill: leave it out, or give a text with marked holes")


def run(given: argparse.Namespace, name: str, settings: dict[str, Any]) -> int:
    """Fill, print the best candidate (or all of them as JSON), and the figures."""
    for option in ("max_new_tokens", "stop", "ignore_eos"):
        if getattr(given, option):
            raise InvalidValue(f"--{option.replace('_', '-')} belongs to --prompt: a hole's mark says its length")
    target = load(given.target, dtype=given.dtype, device=given.device, engine=given.engine, verify=not given.no_verify)
    check_role(target, "target")
    net: Any = target.part
    if not isinstance(net, AnySubsetLM):
        raise InvalidType(f"{target.path} is of kind {target.kind!r}: --infill needs an any-subset model")
    if target.tokenizer is None:
        raise InvalidValue(f"{target.path} has no tokenizer, which --infill needs: fill ids from Python instead")
    sampling = SamplingParams(**{f.name: getattr(given, f.name) for f in fields(SamplingParams)})
    decoder = registry.build_canvas(
        name, {"target": net}, sampling=sampling, settings=_with_defaults(target, name, settings), seed=given.seed
    )
    found, results = infill(
        decoder,
        net,
        target.tokenizer,
        given.infill,
        samples=1 if given.samples is None else given.samples,
        compare=given.compare or COMPARE[0],
        batch=given.batch,
    )
    rounds = RoundStats()
    for result in results:
        rounds.extend(result.rounds, len(set(rounds.row)))
    if given.json:
        print(json.dumps(_document(given, name, sampling, found, results, rounds), indent=2))
    else:
        print(found[0].text)
    print(_figures(name, found, results), file=sys.stderr)
    return 0


def _with_defaults(target: LoadedPart, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that the manifest found best hold where the user chose none."""
    if target.manifest is None:
        return settings
    known = {setting.name for setting in fields(registry.get(name).settings_type())}
    best = target.manifest.couplings.decode_defaults
    return {key: value for key, value in best.items() if key in known} | settings


def _figures(name: str, found: Sequence[Infilling], results: Sequence[DecodeResult]) -> str:
    best = found[0]
    tokens, seconds = sum(len(one.tokens) for one in found), sum(result.seconds for result in results)
    calls = sum(one.calls for one in found)
    return (
        f"{name}: best of {len(found)} with holes of {', '.join(map(str, best.lengths))} tokens, log p "
        f"{best.score.total:.2f} ({best.score.mean:.2f} per token); {tokens} tokens in {seconds:.2f} s, "
        f"{calls / tokens:.2f} calls per token"
    )


def _document(
    given: argparse.Namespace,
    name: str,
    sampling: SamplingParams,
    found: Sequence[Infilling],
    results: Sequence[DecodeResult],
    rounds: RoundStats,
) -> dict[str, Any]:
    candidates = [
        {
            "text": one.text,
            "fills": one.fills,
            "lengths": one.lengths,
            "output_ids": one.tokens,
            "log_prob": one.score.total,
            "log_prob_per_token": one.score.mean,
            "calls": one.calls,
        }
        for one in found
    ]
    return {
        "target": given.target,
        "decoder": name,
        "sampling": asdict(sampling),
        "seed": given.seed,
        "compare": given.compare or COMPARE[0],
        "candidates": candidates,
        "seconds": sum(result.seconds for result in results),
        "nfe": {role: sum(result.nfe[role] for result in results) for role in results[0].nfe},
        "acceptance": metrics.summarize(rounds, seed=given.seed).to_json(),
    }
