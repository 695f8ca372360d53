"""Plain decoding: transformers' greedy, the sampled law, penalties, and every bad input that decoders refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.drafters.prompt_lookup import PromptLookupDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.registry import make_settings
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests.engines import SIZES, tiny_hf
from tests.fakes import MarkovEngine, markov, near, requests_for, string_law
from tests.tiny import write_tokenizer

T1 = SamplingParams(temperature=1.0)
PROMPTS = ((1,), (2, 3), (4, 5, 1), (7, 2, 3, 4), (5, 5, 5, 1, 2))


def native(model: Any) -> NativeEngine:
    net = CausalLM(CausalLMConfig.from_hf(model.config)).eval()
    net.load_state_dict(model.state_dict())
    return NativeEngine(net)


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.4, "frequency_penalty": 0.2}],
    ids=["plain", "repetition", "presence and frequency"],
)
def test_greedy_equals_transformers_generate(kind: str, settings: dict[str, float]) -> None:
    """Prompts of different length as one ragged batch, against single `generate` calls (eos kept, as there)."""
    model = tiny_hf("llama", 3, **SIZES)
    engine: Engine = native(model) if kind == "native" else HFEngine(model)
    requests = [TokenRequest(list(p), 30, i, stop_ids=(9,)) for i, p in enumerate(PROMPTS)]
    params = SamplingParams(**settings)
    output = AutoregressiveDecoder(engine, sampling=params).decode(requests).output
    for request, got in zip(requests, output, strict=True):
        ids = torch.tensor([request.prompt])
        if "presence_penalty" in settings:  # transformers has no such processor
            want = greedy_with_penalties(engine, request, params)
        else:
            want = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=30,
                eos_token_id=9,
                pad_token_id=0,
                **settings,
            )[0, ids.shape[1] :].tolist()
        assert got == want


def greedy_with_penalties(engine: Engine, request: TokenRequest, params: SamplingParams) -> list[int]:
    """Presence and frequency penalties by their definition, one full pass per token."""
    new: list[int] = []
    while len(new) < request.max_new_tokens and not set(new) & set(request.stop_ids):
        scores = engine.head(engine.forward(torch.tensor([[*request.prompt, *new]]))[0][:, -1])[0].clone()
        for token in set(new):
            scores[token] -= params.presence_penalty + params.frequency_penalty * new.count(token)
        new.append(int(scores.argmax()))
    return new


def test_sampled_law_with_penalties() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3)
    target = markov(6)
    output = AutoregressiveDecoder(target, sampling=params).decode(requests_for([[1, 2]], 20_000, 3)).output
    test = string_law(target, [1, 2], 3, params).test(output, 3)
    assert test.p_value > 0.001 and test.detectable_tv < 0.06, str(test)
    assert string_law(target, [1, 2], 3, T1).test(output, 3).p_value < 1e-6, "control: without the penalties"


def test_rounds_are_single_tokens() -> None:
    target = markov(8)
    result = AutoregressiveDecoder(target).decode(requests_for([[1], [2, 3]], 2, 5))
    assert result.nfe == {"target": 5} and result.rounds.committed == [1] * 10 and result.rounds.drafted == [0] * 10
    assert target.calls == [(2, 2), (2, 1), (2, 1), (2, 1), (2, 1)], "the prompt and the first token share a call"


def test_padded_heads_are_cut_to_the_vocabulary() -> None:
    """Ids behind vocab_size never come out, and the law is that of the first logits."""
    table = torch.zeros(8)
    table[6:] = 20.0
    target = MarkovEngine(table)
    assert set(AutoregressiveDecoder(target).decode(requests_for([[1]], 1, 5)).output[0]) <= {6, 7}
    cut = AutoregressiveDecoder(target, sampling=T1, vocab_size=6).decode(requests_for([[1]], 300, 3)).output
    assert {t for o in cut for t in o} == set(range(6))


# Bad input: one clear line each --------------------------------------------------------------------------------------


def speculative(target: Engine, draft: Engine, **options: Any) -> SpeculativeDecoder:
    settings = SpeculativeSettings(fallback="never", **options.pop("settings", {}))
    return SpeculativeDecoder(target, ModelDrafter(draft), settings=settings, **options)


def test_vocabulary_sizes_differ() -> None:
    with pytest.raises(
        InvalidValue, match=r"vocabularies differ: id 8 exists only in the target .10 .* 8 in the draft"
    ):
        speculative(markov(10, 1), markov(8, 1))
    with pytest.raises(InvalidValue, match="id 8 exists only in the draft"):
        speculative(markov(8, 1), markov(10, 1))


def test_padded_heads_over_one_tokenizer_are_cut() -> None:
    """Target padded to 10, draft to 8, tokenizer of 7: exact over the 7 ids, and no id beyond is ever drawn."""
    target, draft = markov(10, 1), markov(8, 1)
    result = speculative(target, draft, vocab_size=7, sampling=T1).decode(requests_for([[1]], 20_000, 3))
    cut = MarkovEngine(target.table[:7, :7])
    assert string_law(cut, [1], 3, T1).test(result.output, 3).p_value > 0.001
    with pytest.raises(InvalidValue, match="vocab_size must be between 1 and the head's 8, got 9"):
        speculative(target, draft, vocab_size=9)


def test_a_tokenizer_tells_the_shared_size(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t")
    size = len(tokenizer)
    target, draft = markov(size + 9, 1), markov(size + 2, 1)
    result = speculative(target, draft, tokenizer=tokenizer, sampling=SamplingParams(temperature=9.0)).decode(
        requests_for([[1]], 50, 20)
    )
    assert max(t for o in result.output for t in o) < size and result.text is not None


def test_tokenizers_differ(tmp_path: Path) -> None:
    ours = write_tokenizer(tmp_path / "a")
    theirs = write_tokenizer(tmp_path / "b", text="entirely other words, which merge in another order " * 3)
    maps = [{i: t for t, i in x.get_vocab().items()} for x in (ours, theirs)]
    first = next(i for i in range(400) if maps[0].get(i) != maps[1].get(i))
    engine = markov(400, 1)
    with pytest.raises(InvalidValue, match=f"vocabularies differ: id {first} is .* in the target and .* in the draft"):
        SpeculativeDecoder(engine, ModelDrafter(engine, tokenizer=theirs), tokenizer=ours)
    SpeculativeDecoder(engine, ModelDrafter(engine, tokenizer=write_tokenizer(tmp_path / "c")), tokenizer=ours)


def test_draft_law_does_not_match_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample outside the law's support: as when a filter was applied to the law only."""
    from draftsmith.inference.drafters import model

    monkeypatch.setattr(model, "sample_categorical", lambda q, u: q.argmin(-1))
    params = SamplingParams(temperature=1.0, top_k=2)
    with pytest.raises(InvalidValue, match="draft law does not match its samples: request 0, in the draft after pos"):
        speculative(markov(12), markov(12), sampling=params).decode(requests_for([[1, 2]], 1, 9))


def test_draft_of_nan() -> None:
    broken = markov(12)
    broken.table[:] = float("nan")
    with pytest.raises(InvalidValue, match="draft law does not match its samples"):
        speculative(markov(12), broken, sampling=T1).decode(requests_for([[1, 2]], 1, 9))
    greedy = requests_for([[1, 2]], 1, 9)  # greedily a draft cannot do harm, whatever it says
    assert (
        speculative(markov(12), broken).decode(greedy).output == AutoregressiveDecoder(markov(12)).decode(greedy).output
    )


@pytest.mark.parametrize("sampling", [SamplingParams(), T1], ids=["greedy", "T=1"])
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")])
def test_target_without_a_law(sampling: SamplingParams, poison: float) -> None:
    """The message has the position of the token that could not be drawn: 1, 2, then 3 and 4, then nothing."""
    table = torch.full((6, 6), -20.0)
    for a, b in ((2, 3), (3, 4), (4, 5), (5, 1), (1, 0), (0, 2)):
        table[a, b] = 20.0
    target = MarkovEngine(table.clone())
    target.table[4] = poison
    draft = MarkovEngine(table)
    for decoder in (AutoregressiveDecoder(target, sampling=sampling), speculative(target, draft, sampling=sampling)):
        with pytest.raises(InvalidValue, match="scores at position 4 of request 0 are no law"):
            decoder.decode([TokenRequest([1, 2], 9)])


def test_a_broken_position_behind_a_rejection_is_no_error() -> None:
    """Only positions that were reached count: a draft may lead where the target has no law."""
    table = torch.full((6, 6), -20.0)
    table[:, 1] = 20.0
    target, draft = MarkovEngine(table.clone()), MarkovEngine(torch.full((6, 6), -20.0))
    target.table[4] = float("nan")
    draft.table[:, 4] = 20.0
    for sampling in (SamplingParams(), T1):
        output = speculative(target, draft, sampling=sampling).decode([TokenRequest([1, 2], 5)]).output
        assert output == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize("g", [0, -3])
def test_draft_length_below_one(g: int) -> None:
    with pytest.raises(InvalidValue, match=f"draft_length must be at least 1, got {g}"):
        SpeculativeSettings(draft_length=g)
    with pytest.raises(InvalidValue, match="max_draft_length must be at least 1"):
        SpeculativeSettings(max_draft_length=g)


def test_train_mode() -> None:
    target, draft = markov(12), markov(12)
    target.training = True
    with pytest.raises(InvalidState, match=r"the target is in train mode: call eval\(\)"):
        AutoregressiveDecoder(target).decode(requests_for([[1]], 1, 3))
    target.training, draft.training = False, True
    with pytest.raises(InvalidState, match=r"the draft is in train mode: call eval\(\)"):
        speculative(target, draft).decode(requests_for([[1]], 1, 3))


def test_cache_without_roll_back() -> None:
    from transformers import DynamicCache

    class Growing(MarkovEngine):
        def new_cache(self, batch: int, capacity: int) -> Any:
            return DynamicCache()

    with pytest.raises(InvalidType, match="DynamicCache cannot be rolled back"):
        AutoregressiveDecoder(Growing(torch.zeros(4, 4))).decode(requests_for([[1]], 1, 3))


def test_empty_prompt_and_no_tokens() -> None:
    with pytest.raises(InvalidValue, match="empty prompt"):
        TokenRequest([])
    with pytest.raises(InvalidValue, match="max_new_tokens must be at least 1, got 0"):
        TokenRequest([1], max_new_tokens=0)


def test_right_padding(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.pad_token = "<|bos|>"
    engine = markov(len(tokenizer), 1)
    with pytest.raises(InvalidValue, match=r"request 1: the prompt ends with padding .id 0."):
        AutoregressiveDecoder(engine, tokenizer=tokenizer).decode([TokenRequest([5, 6]), TokenRequest([5, 6, 0, 0])])
    tokenizer.pad_token = tokenizer.eos_token  # then the id may be meant
    AutoregressiveDecoder(engine, tokenizer=tokenizer).decode([TokenRequest([5, 6, 1], 2)])


@pytest.mark.parametrize("wrong", [-1, 12, 500])
def test_prompt_outside_the_vocabulary(wrong: int) -> None:
    with pytest.raises(InvalidValue, match=rf"request 0: prompt id {wrong} is outside the vocabulary 0\.\.11"):
        AutoregressiveDecoder(markov(12)).decode([TokenRequest([3, wrong])])


def test_prompt_that_fills_the_context() -> None:
    target = markov(12)
    target.max_length = 5
    with pytest.raises(InvalidValue, match="a prompt of 5 tokens leaves no room in a context of 5"):
        AutoregressiveDecoder(target).decode([TokenRequest([1] * 5, 1)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "constnat"}, "unknown schedule 'constnat': choose one of .* did you mean 'constant'"),
        ({"fallback": "sometimes"}, "unknown fallback 'sometimes'"),
        ({"batching": "paged"}, "unknown batching 'paged': choose one of lockstep, ragged"),
        ({"lossy_mix": 1.0}, "lossy_mix must be at least 0 .lossless. and below 1, got 1.0"),
        ({"confidence_threshold": 1.5}, "confidence_threshold must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        SpeculativeSettings(**settings)


def test_settings_that_prompt_lookup_cannot_have() -> None:
    for settings in ({"schedule": "confidence"}, {"lossy_mix": 0.1}):
        with pytest.raises(InvalidValue, match="prompt lookup has no draft law"):
            make_settings("prompt_lookup", settings)
        with pytest.raises(InvalidValue, match="prompt lookup has no draft law"):
            SpeculativeDecoder(
                markov(8), PromptLookupDrafter(), settings=SpeculativeSettings(fallback="never", **settings)
            ).decode(requests_for([[1]], 1, 3))
    for low, high in ((0, 3), (4, 3)):
        with pytest.raises(InvalidValue, match="1 <= ngram_min <= ngram_max"):
            PromptLookupDrafter(high, low)


def test_cost_schedule_without_costs() -> None:
    settings = SpeculativeSettings(schedule="cost")
    with pytest.raises(InvalidValue, match="schedule 'cost' needs a cost curve"):
        SpeculativeDecoder(markov(8), ModelDrafter(near(markov(8))), sampling=T1, settings=settings)
