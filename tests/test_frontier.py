"""The comparison of commit rules: what it calls not worse, how it compares speeds, how it trains its filters."""

import pytest
import torch

from benchmarks import frontier
from draftsmith.data import segments
from draftsmith.data.parallelbench.sweep import Run
from draftsmith.inference.commit_rules import TopN
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionSettings
from draftsmith.inference.nets.commit_filter import CommitFilter
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig


def made(right: list[bool], passes: list[int]) -> Run:
    n = len(right)
    return Run([[0] * 6] * n, right, passes, [6] * n, [[0] * 6] * n, 1.0)


def test_not_worse_wants_evidence() -> None:
    base = made([True] * 2000, [6] * 2000)
    assert frontier.not_worse(base, base)
    assert frontier.not_worse(made([True] * 1997 + [False] * 3, [3] * 2000), base)  # 0.15 points, at most 0.3
    assert not frontier.not_worse(made([True] * 1990 + [False] * 10, [3] * 2000), base)  # 0.5 points
    few = made([True] * 99 + [False], [3] * 100)
    assert not frontier.not_worse(few, made([True] * 100, [6] * 100))  # one in a hundred may be one in fifty


def test_gain_is_the_ratio_of_pooled_speeds() -> None:
    found = frontier.gain(made([True] * 50, [2, 4] * 25), made([True] * 50, [6] * 50))
    assert found.value == pytest.approx(2.0)
    assert found.low is not None and found.high is not None
    assert found.low < 2.0 < found.high


def tiny() -> MaskedLM:
    torch.manual_seed(0)
    return MaskedLM(MaskedLMConfig(14, 16, 1, 2, 16, 28, mask_id=segments.MASK, eos_id=segments.EOT)).eval()


def test_filters_are_trained_on_the_models_own_traces() -> None:
    found = frontier.train_filters(tiny(), segments.requests(20), 8, 8, steps=10)
    assert list(found) == list(frontier.FILTERS)
    assert all(isinstance(net, CommitFilter) and not net.training for net in found.values())


def test_a_report_of_random_weights() -> None:
    bed = frontier.Bed(
        "tiny",
        tiny(),
        ParallelDiffusionSettings(block_length=8, eot="none"),
        lambda count, part: segments.requests(count, part=part),
        lambda asked, sequential: lambda i, out: out == sequential[i],
        {},
        batch=50,
    )
    report = frontier.measure(bed, 10, 12)
    assert report["sequential"]["score"]["value"] == 1.0  # it is judged by its own sequential answers
    assert report["rules"]["oracle"]["difference"]["value"] == 0.0
    assert report["rules"]["oracle"]["passes"] <= report["sequential"]["passes"] == 24
    assert set(report["rules"]) == {*frontier.HEURISTICS, "oracle"}
    assert report["filter_gain"] is None
    assert frontier.SEQUENTIAL.commit == TopN("confidence", 1)
    assert "tiny: tuned on 10 prompts" in frontier.table(report)
