"""The sampling block against transformers' processors, position by position, and its edge cases."""

import itertools

import pytest
import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import PenaltyState, SamplingParams, TokenCounts, argmax, law, nucleus, penalise

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.8, "repetition_penalty": 0.8, "top_k": 10, "top_p": 0.7},
]


def names(settings: dict[str, float]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items())


def hf_law(logits: Tensor, ids: Tensor, settings: dict[str, float]) -> Tensor:
    """The law by transformers' own list of processors, one position at a time. logits: [V], ids: [T] its prefix."""
    from transformers import GenerationConfig, PretrainedConfig
    from transformers.generation.logits_process import LogitsProcessorList
    from transformers.generation.utils import GenerationMixin

    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    mixin = GenerationMixin()
    mixin.config = PretrainedConfig()
    processors: LogitsProcessorList = mixin._get_logits_processor(config)
    return processors(ids[None], logits[None].float())[0].softmax(-1)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # they are told the prompt by `ids`
@pytest.mark.parametrize("settings", SETTINGS, ids=names)
@pytest.mark.parametrize("vocab", [50, 1500])
def test_law_equals_transformers_processors(settings: dict[str, float], vocab: int) -> None:
    prompts, g = [[3, 7, 3], [1, 2, 4, 8, 16]], 4
    logits = torch.randn(2, g + 1, vocab) * 3
    drafted = torch.tensor([[3, 9, 9, 7], [30, 31, 1, 31]])
    params = SamplingParams(**settings)
    state = PenaltyState(prompts, vocab, "cpu")
    state.add([[5, 5], []])
    committed = [[*prompts[0], 5, 5], prompts[1]]
    p = law(logits, params, state.counts(drafted))
    assert p.dtype == torch.float32
    for b, i in itertools.product(range(2), range(g + 1)):
        prefix = torch.tensor([*committed[b], *drafted[b, :i].tolist()])
        want = hf_law(logits[b, i], prefix, settings)
        torch.testing.assert_close(p[b, i], want, rtol=2e-5, atol=1e-7)
        assert torch.equal(p[b, i] > 0, want > 0), "the same tokens survive"


def test_presence_and_frequency_penalties_by_hand() -> None:
    # output so far: 1, 2, 2; prompt: 0 (free). Presence 0.5 once per seen token, frequency 0.25 per occurrence
    logits = torch.zeros(1, 2, 4)
    state = PenaltyState([[0]], 4, "cpu")
    state.add([[1, 2, 2]])
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    got = penalise(logits, params, state.counts(torch.tensor([[3]])))
    assert got[0, 0].tolist() == [0.0, -0.75, -1.0, 0.0]
    assert got[0, 1].tolist() == [0.0, -0.75, -1.0, -0.75]


def test_repetition_penalty_counts_the_prompt_and_is_applied_once() -> None:
    logits = torch.tensor([[[2.0, -2.0, 2.0]]])
    state = PenaltyState([[0, 0, 1]], 3, "cpu")
    got = penalise(logits, SamplingParams(repetition_penalty=2.0), state.counts())
    assert got[0, 0].tolist() == [1.0, -4.0, 2.0]


def test_penalty_state_select_keeps_rows() -> None:
    state = PenaltyState([[0], [1]], 3, "cpu")
    state.add([[2], [2, 2]])
    state.select([1])
    counts = state.counts()
    assert counts.prompt.tolist() == [[[False, True, False]]] and counts.output.tolist() == [[[0.0, 0.0, 2.0]]]


def test_greedy_is_argmax_whatever_the_filters() -> None:
    logits = torch.randn(3, 2, 40)
    params = SamplingParams(temperature=0.0, top_k=5, top_p=0.3, min_p=0.9)
    assert params.greedy
    want = logits.argmax(-1)
    assert torch.equal(argmax(logits, params), want)
    p = law(logits, params)
    assert torch.equal(p.argmax(-1), want) and torch.equal(p.sum(-1), torch.ones(3, 2)) and int((p > 0).sum()) == 6


def test_greedy_keeps_ties_apart_as_argmax_does_and_applies_penalties() -> None:
    tie = torch.tensor([[[1.0, 3.0, 3.0]]])
    assert argmax(tie, SamplingParams()).item() == 1
    state = PenaltyState([[1]], 3, "cpu")
    assert argmax(tie, SamplingParams(repetition_penalty=1.5), state.counts()).item() == 2


def test_float64_stays_and_half_precision_is_lifted() -> None:
    logits = torch.randn(1, 1, 30, dtype=torch.float64)
    assert law(logits, SamplingParams(temperature=1.0)).dtype == torch.float64
    assert law(logits.bfloat16(), SamplingParams(temperature=1.0)).dtype == torch.float32


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.0}], ids=names)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None], ids=str)
def test_a_broken_position_is_nan_throughout_and_only_that_one(
    settings: dict[str, float], poison: float | None
) -> None:
    logits = torch.randn(1, 3, 50)
    if poison is None:
        logits[0, 1] = float("-inf")
    else:
        logits[0, 1, 7] = poison
    p = law(logits, SamplingParams(**settings), PenaltyState([[1]], 50, "cpu").counts(torch.tensor([[2, 3]])))
    assert p[0, 1].isnan().all() and not p[0, [0, 2]].isnan().any()


def test_masked_tokens_stay_impossible() -> None:
    logits = torch.randn(1, 1, 20)
    logits[..., 3:] = float("-inf")
    for settings in SETTINGS:
        p = law(logits, SamplingParams(**settings), TokenCounts(torch.zeros(1, 1, 20).bool(), torch.zeros(1, 1, 20)))
        assert float(p[..., 3:].sum()) == 0 and torch.isclose(p.sum(), torch.tensor(1.0))


def defined_nucleus(p: Tensor, top_p: float) -> Tensor:
    """The definition, pair by pair: a token stays iff the tokens more likely than it hold less than top_p."""
    above = torch.stack([p[p > value].double().sum() for value in p])
    return above < top_p


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.8, 0.95, 0.999999])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("vocab", [300, 1500], ids=["sorted", "radix"])
def test_nucleus_equals_its_definition(top_p: float, scale: float, vocab: int) -> None:
    for _ in range(5):
        p = (torch.randn(vocab) * scale).softmax(-1)
        assert torch.equal(nucleus(p[None], top_p)[0], defined_nucleus(p, top_p))


@pytest.mark.parametrize("padding", [0, 2000], ids=["sorted", "radix"])
def test_nucleus_keeps_a_whole_tie_group(padding: int) -> None:
    p = torch.tensor([0.4, 0.2, 0.2, 0.2, *[0.0] * padding])
    assert nucleus(p, 0.5)[:4].tolist() == [True, True, True, True] and int(nucleus(p, 0.5).sum()) == 4
    assert nucleus(p, 0.3)[:4].tolist() == [True, False, False, False]


def test_top_k_keeps_ties_like_transformers() -> None:
    p = law(torch.tensor([[[2.0, 1.0, 1.0, 0.0]]]), SamplingParams(temperature=1.0, top_k=2))
    assert (p[0, 0] > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
    ],
)
def test_bad_settings_name_value_and_range(name: str, value: float) -> None:
    with pytest.raises(InvalidValue, match=rf"{name} must be .* got"):
        SamplingParams(**{name: value})


def test_penalties_without_counts_are_an_error() -> None:
    with pytest.raises(InvalidValue, match="counts"):
        law(torch.zeros(1, 1, 3), SamplingParams(temperature=1.0, repetition_penalty=1.2))


def test_laws_over_a_large_vocabulary_sum_to_one() -> None:
    """torch's softmax (2.13, CPU) misses 1 by 2e-4 here, and acceptance with such laws would miss as much."""
    logits = torch.zeros(1, 1, 152_000)
    logits[..., :100] = 8.0
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999)):
        assert abs(float(law(logits, params).double().sum()) - 1) < 1e-6
