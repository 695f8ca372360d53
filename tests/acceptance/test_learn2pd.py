"""Acceptance of Learn2PD on the segments model (specs/learn2pd.md, small-scale acceptance).

Traces, filters and decodes go the whole way: `draftsmith trace learn2pd`, `fit`, `export`, `load`, block sampler.
`make acceptance SYSTEM=learn2pd`.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.masked_models import Models, command, make, make_filter
from draftsmith.data import segments
from draftsmith.data.decode_traces import read_traces, trace, whole_answers
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.loader import load
from draftsmith.inference.nets.commit_filter import CommitFilter
from tests.figures import record

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

SLUG, PROMPTS, TRACED = "learn2pd", 200, 900
FILES = (
    *("inference/nets/masked_lm.py", "inference/nets/commit_filter.py", "inference/decoders/parallel_diffusion.py"),
    *("inference/diffusion_*.py", "inference/commit_rules.py", "data/segments.py", "data/decode_traces.py"),
    *("data/trace_data.py", "modules/masked_lm.py", "modules/learn2pd_filter.py", "configs/learn2pd/*.yaml"),
    "configs/masked_lm/segments.yaml",
)
REFERENCE = ("--model.filter.net=reference", "--model.negative_weight=4.0", "--trainer.max_steps=1500")
NETS = {
    "reference net, feature one, negatives x 4": REFERENCE,
    "reference net, feature one, negatives x 1": (*REFERENCE[:1], "--model.negative_weight=1.0", REFERENCE[2]),
    "reference net, feature raw, negatives x 4": (*REFERENCE, "--model.filter.feature=raw"),
    "equivariant net": (),
}
TAUS = (0.9, 0.96, 0.99)


def save(figures: dict[str, Any]) -> None:
    record(SLUG, figures, seeds=[0], files=FILES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The base, and the spec's 900 traced prompts."""
    made = make("segments", tmp_path_factory.mktemp("acceptance") / "runs", filters=False)
    words = ("--segments", str(TRACED), "--block-length", "8", "--batch", "300")
    command(made.run.parent, "trace", "learn2pd", str(made.base), str(made.traces), *words)
    return made


def valid(outputs: list[list[int]]) -> float:
    asked = segments.requests(len(outputs))
    return sum(segments.is_valid(r.tokens[:4], out) for r, out in zip(asked, outputs, strict=True)) / len(outputs)


def decoded(models: Models, net: CommitFilter | None = None, count: int = PROMPTS, **settings: Any) -> dict[str, float]:
    """Validity, mean passes and mean token-passes on test prompts."""
    chosen = ParallelDiffusionSettings(**{"block_length": 8, "eot": "none", **settings})
    result = ParallelDiffusionDecoder(models.net(), chosen, filter=net).decode(models.requests(count, "test"))
    notes = result.notes
    return {
        "validity": valid(result.output),
        "passes": sum(notes["passes"]) / count,
        "token-passes": sum(notes["token_passes"]) / count,
    }


def test_the_oracle(models: Models) -> None:
    """Guarantee 3 on every trace, and the oracle's passes on test prompts."""
    settings = ParallelDiffusionSettings(block_length=8, rule="low_confidence", eot="none")
    asked = models.requests(PROMPTS, "test")
    net = models.net()
    references = whole_answers(ParallelDiffusionDecoder(net, settings), asked)
    traces, written = trace(net, asked, references, 8)
    passes = sum(traces.passes.values()) / PROMPTS
    recorded, _ = read_traces(models.traces)
    save(
        {
            "oracle (EGP): passes": {"value": passes, "need": "<= 6"},
            "oracle (EGP): passes fewer by": {"value": round(24 / passes, 2), "unit": "x"},
            "traces: prompts": len(recorded.passes),
            "traces: records": len(recorded),
        }
    )
    assert written == references and all(n <= 24 for n in traces.passes.values())
    assert all(n <= 24 for n in recorded.passes.values()) and len(recorded.passes) == TRACED
    assert passes <= 6


@pytest.mark.parametrize("name", NETS)
def test_filters(models: Models, name: str, tmp_path: Path) -> None:
    out = tmp_path / "filter"
    seconds = make_filter(models, *NETS[name], run="".join(c if c.isalnum() else "-" for c in name), out=out)
    net = load(out).part
    assert isinstance(net, CommitFilter)
    figures: dict[str, Any] = {f"{name}: training seconds": {"value": round(seconds, 1), "unit": "s", "need": "<= 60"}}
    gains = []
    for tau in TAUS:
        found = decoded(models, net, rule="learned_filter", threshold=tau)
        gain = 24 / found["passes"]
        figures[f"{name}, threshold {tau:g}: validity"] = found["validity"]
        figures[f"{name}, threshold {tau:g}: passes fewer by"] = {"value": round(gain, 2), "unit": "x"}
        if found["validity"] >= 0.98:
            gains.append(gain)
    best = max(gains, default=0.0)
    figures[f"{name}: passes fewer by, at validity >= 0.98"] = {"value": round(best, 2), "unit": "x", "need": ">= 2.5"}
    save(figures)
    assert seconds <= 60
    if "negatives x 4" in name or name == "equivariant net":
        assert best >= 2.5


def test_thresholds_for_comparison(models: Models) -> None:
    figures: dict[str, Any] = {}
    for tau in (0.9, 0.5):
        found = decoded(models, rule="threshold", threshold=tau)
        figures[f"threshold {tau:g}: validity"] = found["validity"]
        figures[f"threshold {tau:g}: passes fewer by"] = {"value": round(24 / found["passes"], 2), "unit": "x"}
    save(figures)


def test_end_of_text(models: Models) -> None:
    """EoTP on the sequential decode of 100 prompts."""
    plain = decoded(models, rule="low_confidence", count=100)
    figures: dict[str, Any] = {"no EoTP: token-passes": plain["token-passes"], "no EoTP: passes": plain["passes"]}
    for mode in ("left_done", "reference", "first_committed"):
        found = decoded(models, rule="low_confidence", count=100, eot=mode)
        saved = 1 - found["token-passes"] / plain["token-passes"]
        bar = {"need": ">= 0.98"} if mode == "left_done" else {}
        figures[f"EoTP {mode}: validity"] = {"value": found["validity"], **bar}
        figures[f"EoTP {mode}: passes"] = found["passes"]
        bar = {"need": ">= 0.4"} if mode == "left_done" else {}
        figures[f"EoTP {mode}: share of token-passes saved"] = {"value": round(saved, 3), **bar}
        if mode == "left_done":
            assert found["validity"] >= 0.98 and saved >= 0.4
    save(figures)
