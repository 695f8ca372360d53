"""The sweep over rules, on an ideal model through the real block sampler: no network is trained here."""

import pytest
import torch

from draftsmith.data.parallelbench import theory
from draftsmith.data.parallelbench.ideal import IdealNet
from draftsmith.data.parallelbench.lists import Copy, ReplaceRandom, Shuffle
from draftsmith.data.parallelbench.sweep import RULES, Run, best_allowed, difference, run, settings
from draftsmith.data.parallelbench.tasks import Task
from draftsmith.data.parallelbench.token_form import TokenForm
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commit_rules import CommitRule, EntropyBound, Factor, Oracle, Threshold, TopN
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import SamplingParams

WORDS = tuple("abcdefgh")
SHUFFLE = Shuffle(WORDS, exclude_identity=False)
REPLACE = ReplaceRandom(WORDS)
COPY = Copy(WORDS)


def decoded(task: Task, rule: CommitRule, n: int = 6, rows: int = 240, temperature: float = 0.0) -> Run:
    """`rows` copies of one sample under a rule; greedy ties are broken by row, through different prompts."""
    form = TokenForm([task])
    samples = [task.sample(seed, n) for seed in range(rows)]
    # the ideal net tells samples apart by their prompts: one list twice would be the same question
    requests: list[CanvasRequest] = []
    known = {}
    kept = []
    for i, sample in enumerate(samples):
        prompt = tuple(form.prompt(sample))
        if prompt not in known:
            known[prompt] = (task, sample)
            kept.append(sample)
            requests.append(form.request(sample, i))
    net = IdealNet(form.vocabulary, known)
    decoder = ParallelDiffusionDecoder(
        net,  # type: ignore[arg-type]  # the interface of a masked LM
        ParallelDiffusionSettings(block_length=0, eot="none"),
        rule=rule,
        sampling=SamplingParams(temperature=temperature),
    )
    return run(decoder, requests, lambda i, ids: task.valid(kept[i], form.tokens(ids)), batch=100)


@pytest.mark.parametrize(
    ("task", "rule", "temperature", "wanted", "tolerance", "passes"),
    [
        (SHUFFLE, TopN("random", 1), 1.0, 1.0, 0.0, 6.0),
        (SHUFFLE, TopN("random", 2), 1.0, 15 / 48, 0.1, 3.0),
        (SHUFFLE, TopN("confidence", 2), 0.0, 15 / 48, 0.1, 3.0),
        (SHUFFLE, TopN("left_to_right", 3), 1.0, theory.shuffle_accuracy(6, 3), 0.06, 2.0),
        (SHUFFLE, TopN("margin", 1), 0.0, 1.0, 0.0, 6.0),
        (SHUFFLE, TopN("entropy", 1), 0.0, 1.0, 0.0, 6.0),
        (SHUFFLE, Threshold(0.6), 0.0, 1.0, 0.0, 6.0),
        (SHUFFLE, Factor(1.0), 0.0, 1.0, 0.0, 6.0),
        (SHUFFLE, EntropyBound(0.1), 0.0, 1.0, 0.0, 6.0),
        (REPLACE, TopN("confidence", 3), 0.0, 0.0, 0.0, 2.0),
        (REPLACE, Threshold(0.80), 0.0, 0.0, 0.0, 1.0),
        (REPLACE, Threshold(0.85), 0.0, 1.0, 0.0, 6.0),
        (COPY, Threshold(0.9), 0.0, 1.0, 0.0, 1.0),
        (COPY, Factor(0.7), 0.0, 1.0, 0.0, 1.0),
        (COPY, EntropyBound(0.01), 0.0, 1.0, 0.0, 1.0),
    ],
)
def test_every_rule_on_an_ideal_model(
    task: Task, rule: CommitRule, temperature: float, wanted: float, tolerance: float, passes: float
) -> None:
    """Spec guarantee 5 through the real decoder: no threshold is good for both shuffle and replace_random."""
    found = decoded(task, rule, temperature=temperature)
    assert abs(found.validity.value - wanted) <= tolerance
    assert sum(found.passes) / len(found.passes) == passes
    assert found.tokens_per_pass.value == pytest.approx(6 / passes)


def test_the_oracle_repeats_the_reference_in_no_more_passes() -> None:
    form = TokenForm([REPLACE])
    samples = [REPLACE.sample(seed, 6) for seed in range(20)]
    net = IdealNet(form.vocabulary, {tuple(form.prompt(s)): (REPLACE, s) for s in samples})
    requests = [form.request(s, i) for i, s in enumerate(samples)]
    plain = ParallelDiffusionSettings(block_length=0, eot="none")

    def outcome(rule: CommitRule) -> Run:
        decoder = ParallelDiffusionDecoder(net, plain, rule=rule)  # type: ignore[arg-type]
        return run(decoder, requests, lambda i, ids: REPLACE.valid(samples[i], form.tokens(ids)))

    base = outcome(TopN("confidence", 1))
    oracle = outcome(Oracle([r.filled(out) for r, out in zip(requests, base.output, strict=True)]))
    assert oracle.output == base.output
    assert all(a <= b for a, b in zip(oracle.passes, base.passes, strict=True))
    assert sum(oracle.passes) < sum(base.passes)


def test_left_to_right_is_seen_in_the_order_of_commits() -> None:
    found = decoded(COPY, TopN("left_to_right", 1), rows=5)
    assert found.order == [list(range(6))] * 5
    assert found.order_correlation() == pytest.approx({"kendall": 1.0, "spearman": 1.0})
    assert decoded(COPY, Threshold(0.5), rows=5).order_correlation() is None


def test_sweeps_stop_at_the_answers_length() -> None:
    assert [s.strength for s in settings(["top_n_confidence"], 6)] == [1, 2, 4, 8]
    assert [s.strength for s in settings(["top_n_random"], 1)] == [1]
    assert {s.rule for s in settings(RULES, 4)} == set(RULES)
    assert settings(["threshold"], 4)[0].label == "threshold 0.5"
    with pytest.raises(InvalidValue, match=r"unknown rule 'thresold'.*did you mean 'threshold'"):
        settings(["thresold"], 4)


def made(right: list[bool], passes: list[int]) -> Run:
    n = len(right)
    return Run([[0] * 4] * n, right, passes, [4] * n, [[0, 1, 2, 3]] * n, 1.0)


def test_the_best_allowed_setting() -> None:
    base = made([True] * 100, [4] * 100)
    fast = made([True] * 99 + [False], [1] * 100)
    faster = made([True] * 90 + [False] * 10, [1] * 50 + [2] * 50)
    assert best_allowed({"a": base, "b": fast, "c": faster}, base, 0.0) == "a"
    assert best_allowed({"a": base, "b": fast, "c": faster}, base, 0.02) == "b"
    assert best_allowed({"b": fast, "c": faster}, base, 0.0) == "b"
    gap = difference(fast, base)
    assert gap.value == pytest.approx(-0.01)
    assert gap.low is not None
    half = 1.959964 * torch.tensor([0.0] * 99 + [-1.0]).std().item() / 10
    assert gap.low == pytest.approx(-0.01 - half, abs=1e-6)
    both = Run.joined([fast, faster])
    assert len(both.right) == len(both.order) == 200
    assert both.seconds == 2.0
    assert both.tokens_per_pass.value == pytest.approx(800 / 250)
    with pytest.raises(InvalidValue, match="needs prompts"):
        run(None, [], lambda i, ids: True)  # type: ignore[arg-type]
