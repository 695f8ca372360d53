"""A verdict confirmed: S on fresh contexts, tokens per target call by really decoding, and a corrected copy on disk."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.inference import checkpoint, registry
from draftsmith.inference.diagnose import RESAMPLES, TEMPERATURES, Verdict, bootstrap, score
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats import eagle, own, specforge, speculators
from draftsmith.inference.formats.convert import depth_of
from draftsmith.inference.formats.record import DrafterRecord
from draftsmith.inference.hypotheses.base import Subject
from draftsmith.inference.hypotheses.contexts import Contexts
from draftsmith.inference.hypotheses.eagle_head import EagleSubject
from draftsmith.inference.hypotheses.language_model import LMSubject
from draftsmith.inference.hypotheses.subjects import corrected
from draftsmith.inference.loader import LoadedPart
from draftsmith.inference.metrics import summarize
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, load_tensors
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.chain import ChainPolicy

PROMPTS, NEW_TOKENS = 16, 64


def on_fresh_contexts(subject: Subject, verdict: Verdict, fresh: Contexts, seed: int = 0) -> dict[str, Any]:
    """S before and after with 95% intervals, on contexts that chose nothing."""
    both = {"before": subject.couplings, "after": verdict.couplings}
    scored = {name: score(subject, c, fresh.rendered(c.rendering), TEMPERATURES).samples for name, c in both.items()}
    gain = scored["after"] - scored["before"]
    return {
        "contexts": fresh.count,
        **{name: _interval(samples, seed) for name, samples in scored.items()},
        "gain": _interval(gain, seed),
        "resamples": RESAMPLES,
    }


def by_decoding(
    subject: Subject, verdict: Verdict, target: LoadedPart, prompts: Sequence[Sequence[int]], *, steps: int = 5
) -> dict[str, Any]:
    """Tokens per target call before and after, greedy, and whether both texts are the target's own.

    A side that no engine of ours can run (the fault is in how an engine feeds it) is left out, with the reason.
    """
    room = target.part.spec.max_length - NEW_TOKENS - steps - 1
    requests = [
        TokenRequest(list(prompt)[-room:], NEW_TOKENS, row_id=i, stop_ids=target.stop_ids)
        for i, prompt in enumerate(prompts[:PROMPTS])
    ]
    greedy, vocab = SamplingParams(temperature=0.0), target.vocab_size
    plain = registry.build("autoregressive", {"target": target}, sampling=greedy, vocab_size=vocab).decode(requests)
    found: dict[str, Any] = {"prompts": len(requests), "new_tokens": NEW_TOKENS}
    for name, couplings in (("before", subject.couplings), ("after", verdict.couplings)):
        try:
            decoder = _decoder(subject, couplings, target, steps, greedy, vocab)
        except InvalidValue as error:
            found[name] = {"not_run": str(error)}
            continue
        result = decoder.decode(requests)
        tau = summarize(result.rounds).tau
        found[name] = {
            "tau": None if tau is None else [tau.value, tau.low, tau.high],
            "equals_plain_greedy": result.output == plain.output,
        }
    return found


def write_fixed(subject: Subject, verdict: Verdict, target: Path, source: Path, out: Path, *, overwrite: bool) -> str:
    """Write a corrected copy in the format that the drafter had; returns the format.

    A manifest beside the source is not copied: its seal speaks of other numbers.
    Raises InvalidValue for what no file can state, InvalidType for language models (their tensors are what they are).
    """
    if not isinstance(subject, EagleSubject):
        raise InvalidType("--write-fixed writes EAGLE drafters: of a language model, change config.json as shown")
    record = corrected(subject, verdict.couplings)

    def writer(place: Path) -> None:
        if record.format == eagle.NAME:
            eagle.write(record, place, target_layers=depth_of(target))
        elif record.format == specforge.NAME:
            specforge.write(record, place, target_layers=depth_of(target))
        elif record.format == speculators.NAME:
            speculators.write(record, place, verifier=target)
        else:
            own.write(record, place)

    checkpoint.write_export(out, writer, overwrite=overwrite)
    return record.format


def _decoder(
    subject: Subject, couplings: Any, target: LoadedPart, steps: int, sampling: SamplingParams, vocab: int
) -> Any:
    if couplings.rendering != subject.couplings.rendering:
        raise InvalidValue("another rendering is another prompt: decode with it to see what it brings")
    if isinstance(subject, LMSubject):
        if couplings.token_offset or couplings.label_shift or not couplings.final_norm:
            raise InvalidValue("a language model with shifted ids or rows, or without its last norm, is not served")
        engine = NativeEngine(subject._net(couplings).to(target.part.dtype))
        settings = {"draft_length": steps, "fallback": "never"}
        parts = {"target": target, "draft": engine}
        return registry.build("speculative", parts, sampling=sampling, settings=settings, vocab_size=vocab)
    assert isinstance(subject, EagleSubject)
    record = corrected(subject, couplings)
    if record.fields != subject.config or couplings != subject.couplings:
        return _eagle_decoder(record, target, steps, sampling, vocab)
    return _eagle_decoder(subject.record, target, steps, sampling, vocab)


def _eagle_decoder(record: DrafterRecord, target: LoadedPart, steps: int, sampling: SamplingParams, vocab: int) -> Any:
    assert isinstance(record.fields, EagleConfig)
    head = EagleHead(record.fields)
    load_tensors(head, record.tensors, "the drafter")
    head = head.to(target.part.dtype).eval().requires_grad_(False)
    head.fuse()
    drafter = EagleTreeDrafter(head, ChainPolicy(steps), target=target.part)
    return registry.build("tree", {"target": target, "draft": drafter}, sampling=sampling, vocab_size=vocab)


def _interval(samples: Tensor, seed: int) -> list[float]:
    return [float(samples.mean()), bootstrap(samples, 0.025, seed), bootstrap(samples, 0.975, seed)]


def couplings_json(couplings: Any) -> dict[str, Any]:
    """Plain values for a report."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(couplings).items()}
