"""Suffix decoding: the cache's life cycle, drafts in the decoders, the hybrid, settings and corpus files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import registry
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.suffix_cache import SuffixCache, vocabulary_hash
from draftsmith.inference.suffix_tree import Budget
from tests.fakes import MarkovEngine, markov, near, requests_for, string_law

WIDE = Budget(8, 4.0)


def fed(cache: SuffixCache, name: str, prompt: list[int], output: list[int]) -> None:
    cache.start(name, prompt)
    cache.append(name, output)
    cache.stop(name)


def test_outputs_are_shared_prompts_are_not() -> None:
    cache = SuffixCache()
    fed(cache, "a", [1, 2, 3], [7, 8, 9, 4])
    cache.start("b", [7, 8])
    assert cache.speculate("b", WIDE).tokens == [9, 4]
    cache.append("b", [1, 2])
    assert cache.speculate("b", WIDE).tokens == [], "3 followed 1, 2 in a prompt of another request"
    assert list(cache.outputs()) == [[7, 8, 9, 4]]


def test_the_better_of_own_and_shared_text_is_proposed() -> None:
    cache = SuffixCache()
    fed(cache, "a", [0], [5, 6, 1])
    cache.start("b", [5, 6, 2, 5, 6, 2, 5])
    assert cache.speculate("b", WIDE).tokens[:2] == [6, 2], "often seen in its own text"
    cache.start("c", [5])
    assert cache.speculate("c", WIDE).tokens == [6, 1], "its own text says nothing"


def test_isolation_without_a_shared_cache() -> None:
    """Guarantee 6: what others decoded does not move a draft."""

    def drafts(noise: list[int]) -> list[Any]:
        cache = SuffixCache(max_requests=0)
        fed(cache, "other", noise, noise)
        cache.start("mine", [1, 2, 3, 1, 2])
        found = [cache.speculate("mine", WIDE)]
        cache.append("mine", [3, 9, 1])
        return [*found, cache.speculate("mine", WIDE)]

    assert drafts([1, 2, 3, 4, 9, 1, 7]) == drafts([0])


def test_the_oldest_outputs_go_first_and_sessions_are_forgotten() -> None:
    cache = SuffixCache(max_requests=2)
    for i in range(4):
        fed(cache, f"s{i % 2}/{i}", [0], [10 + i, 20 + i])
    assert list(cache.outputs()) == [[12, 22], [13, 23]]
    assert cache.forget("s0/") == 1 and list(cache.outputs()) == [[13, 23]]
    cache.start("s1/9", [1])
    with pytest.raises(InvalidState, match="'s1/9' is running"):
        cache.forget("s1")
    small = SuffixCache(max_bytes=20_000)
    for i in range(50):
        fed(small, str(i), [0], [i * 20 + j for j in range(20)])
        assert small.shared.bytes <= 20_000
    assert 1 <= len(list(small.outputs())) < 50
    with pytest.raises(InvalidValue, match=r"max_cached_mb is 0.019\d*, below one request: 1000 tokens take about"):
        small.check_room(1000)


def test_requests_start_once_and_stop_once() -> None:
    cache = SuffixCache()
    cache.start("a", [1])
    with pytest.raises(InvalidState, match="'a' was started twice"):
        cache.start("a", [1])
    cache.stop("a")
    for call in (lambda: cache.stop("a"), lambda: cache.append("b", [1]), lambda: cache.speculate("a", WIDE)):
        with pytest.raises(InvalidState, match="is not running"):
            call()
    fed(cache, "a", [1], [2, 3])
    cache.start("a", [1])  # a finished id begins anew, its old output forgotten
    assert list(cache.outputs()) == []


def test_corpus_files(tmp_path: Path) -> None:
    cache = SuffixCache()
    fed(cache, "a", [1], [2, 3, 4])
    path = tmp_path / "corpus.jsonl"
    cache.write_corpus(path, "abc")
    warm = SuffixCache()
    warm.read_corpus(path, 10, "abc")
    assert list(warm.outputs()) == [[2, 3, 4]]
    noted = warm.notes()["corpus"]
    assert (noted["sequences"], noted["tokens"]) == (1, 3) and len(noted["sha256"]) == 64
    with pytest.raises(InvalidValue, match="vocabulary abc, the target's is xyz"):
        warm.read_corpus(path, 10, "xyz")
    with pytest.raises(InvalidValue, match=r"line 2: id 4 is outside the vocabulary 0\.\.3"):
        warm.read_corpus(path, 4, "abc")
    for lines, match in (
        (['{"ids": [1]}'], "line 1 must be a header"),
        (['{"kind": "suffix-corpus", "vocabulary": null}', "[1]"], "line 2: must be a JSON object"),
        (['{"kind": "suffix-corpus", "vocabulary": null}', '{"ids": [1, -1]}'], "line 2: id -1"),
        (['{"kind": "suffix-corpus", "vocabulary": null}', '{"ids": "1"}'], "line 2: 'ids' must be a list"),
        (["nonsense"], "line 1: not JSON"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(InvalidValue, match=match):
            warm.read_corpus(path, 10, None)
    with pytest.raises(InvalidValue, match="cannot be read"):
        warm.read_corpus(tmp_path / "missing", 10, None)


# Decoders ------------------------------------------------------------------------------------------------------------


def cycle(vocab: int = 12) -> MarkovEngine:
    """Greedily 0, 1, 2, ..., 0, 1, ...; T=1 is nearly that."""
    table = torch.full((vocab, vocab), -4.0)
    table[torch.arange(vocab), (torch.arange(vocab) + 1) % vocab] = 4.0
    return MarkovEngine(table)


@pytest.mark.parametrize("name", ["suffix", "suffix_tree"])
def test_repetition_is_drafted_and_the_second_request_profits_from_the_first(name: str) -> None:
    decoder = registry.build(name, {"target": cycle()}, settings={"fallback": "never"} if name == "suffix" else {})
    taus, outputs = [], []
    for _ in range(2):
        result = decoder.decode([TokenRequest([3], 10)])
        taus.append(len(result.output[0]) / len(result.rounds))
        outputs.append(result.output[0])
    assert outputs[0] == outputs[1] == [(4 + i) % 12 for i in range(10)]
    assert taus[0] == 1.0 and taus[1] > 2
    noted = result.notes["suffix"]
    assert (noted["cached_requests"], noted["cached_tokens"], noted["max_spec_tokens"]) == (2, 20, 24)
    assert result.notes["rule"] == "greedy" and result.nfe["draft"] == 0


def test_drafts_end_at_stop_ids_and_abandoned_streams_are_stopped() -> None:
    decoder = registry.build("suffix", {"target": cycle()}, settings={"fallback": "never"})
    decoder.decode([TokenRequest([0], 40)])
    result = decoder.decode([TokenRequest([3], 40, stop_ids=(8,))])
    assert result.output == [[4, 5, 6, 7, 8]] and result.stop == ["stop_id"]
    # from 3 the match is a token long: one token; then from 5, of 3 tokens, as many as the stop allows
    assert max(result.rounds.drafted) <= 3
    stream = decoder.stream([TokenRequest([3], 40), TokenRequest([5], 40)])
    next(stream)
    stream.close()
    assert decoder.decode([TokenRequest([3], 4)]).output == [[4, 5, 6, 7]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", ["suffix", "suffix_tree", "suffix_hybrid"])
def test_sampled_law_while_outputs_are_shared(name: str, temperature: float) -> None:
    """Guarantee 1: later batches draft from what earlier ones left behind."""
    target = markov(6, 1, seed=1)
    params = SamplingParams(temperature=temperature)
    parts = {"target": target, "draft": near(target)}
    settings: dict[str, Any] = {"max_spec_factor": 3.0, "min_token_prob": 0.05}
    settings |= {} if name == "suffix_tree" else {"fallback": "never"}
    decoder = registry.build(
        name, {r: parts[r] for r in registry.get(name).needs}, sampling=params, settings=settings, seed=2
    )
    outputs: list[list[int]] = []
    accepted = 0
    for first in range(0, 6000, 1500):
        result = decoder.decode(requests_for(((1,), (2, 3)), 1500, 6, first_row=first))
        outputs += result.output
        accepted += sum(result.rounds.accepted)
    assert accepted > 4000
    for i, prompt in enumerate(((1,), (2, 3))):
        test = string_law(target, prompt, 3, params).test(outputs[i::2], 3)
        assert test.p_value > 1e-3, str(test)


def test_the_hybrid_skips_the_model_where_suffixes_promise_more() -> None:
    target = cycle()
    bad = MarkovEngine(target.table.roll(1, 1))  # always wrong, so its mean falls and suffixes take over
    settings = {"fallback": "never", "max_spec_factor": 2.0, "learned_length": 3}
    decoder = registry.build("suffix_hybrid", {"target": target, "draft": bad}, settings=settings)
    first = decoder.decode([TokenRequest([0], 60)])
    assert first.output[0] == [(1 + i) % 12 for i in range(60)]
    calls = first.nfe["draft"]
    assert 0 < calls < 3 * len(first.rounds), "some rounds were drafted without the model"
    assert max(first.rounds.accepted) > 3, "longer than the model ever drafts"
    sampled = registry.build(
        "suffix_hybrid",
        {"target": target, "draft": target},
        sampling=SamplingParams(temperature=1.0),
        settings={**settings, "verification": "block"},
    )
    batch = sampled.decode([TokenRequest([i], 30, row_id=i) for i in range(6)])
    assert all(len(o) == 30 for o in batch.output) and batch.nfe["draft"] > 0


def test_bad_settings() -> None:
    for settings, match in (
        ({"suffix_depth": 1}, "suffix_depth must be at least 2"),
        ({"max_spec_factor": -1.0}, "max_spec_factor must be at least 0"),
        ({"min_token_prob": 2.0}, "min_token_prob lies between 0 and 1"),
        ({"max_cached_requests": -1}, "max_cached_requests and max_cached_mb must be at least 0"),
        ({"max_cached_mb": -1.0}, "must be at least 0"),
    ):
        for name in ("suffix", "suffix_tree", "suffix_hybrid"):
            with pytest.raises(InvalidValue, match=match):
                registry.make_settings(name, settings)
    with pytest.raises(InvalidValue, match="suffix drafts have no law"):
        registry.make_settings("suffix", {"schedule": "confidence"})
    with pytest.raises(InvalidValue, match="learned_length must be at least 1"):
        registry.make_settings("suffix_hybrid", {"learned_length": 0})
    with pytest.raises(InvalidValue, match="nodes must be at least 1"):
        registry.make_settings("suffix_tree", {"nodes": 0})
    small = registry.build("suffix", {"target": cycle()}, settings={"max_cached_mb": 0.01})
    with pytest.raises(InvalidValue, match="below one request"):
        small.decode([TokenRequest([1], 100)])


def test_a_corpus_warms_the_decoder_and_the_cache_can_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    decoder = registry.build(
        "suffix", {"target": cycle()}, settings={"suffix_corpus_out": str(out), "fallback": "never"}
    )
    decoder.decode([TokenRequest([3], 10)])
    assert json.loads(out.read_text().splitlines()[1]) == {"ids": [(4 + i) % 12 for i in range(10)]}
    warm = registry.build("suffix", {"target": cycle()}, settings={"suffix_corpus": str(out), "fallback": "never"})
    result = warm.decode([TokenRequest([3], 10)])
    assert len(result.rounds) < 8 and result.notes["suffix"]["corpus"]["tokens"] == 10

    class Words:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    one = vocabulary_hash(Words())
    assert one is not None and len(one) == 64 and vocabulary_hash(None) is None
