"""ASSD and its baselines: the law, the number of calls, the first draft, streams, bad input."""

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch

from draftsmith.inference import acceptance, registry
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.decoders import any_subset
from draftsmith.inference.decoders.any_subset import AnySubsetSettings
from draftsmith.inference.decoders.any_subset_pairs import draft_pairs, pair_law
from draftsmith.inference.decoders.any_subset_session import UntrainedWarning
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.requests import DecodeResult
from draftsmith.inference.sampling import SamplingParams
from tests.canvases import canvas_of, hole_law, small_net
from tests.fakes import ChiSquare, pool

GREEDY, T1 = SamplingParams(), SamplingParams(temperature=1.0)
SAMPLING = {
    "T=1": T1,
    "T=0.7": SamplingParams(temperature=0.7),
    "top-k 3": SamplingParams(temperature=1.0, top_k=3),
    "top-p 0.8": SamplingParams(temperature=1.0, top_p=0.8),
}
LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("any_subset", {"k": 2}),
    ("any_subset", {"k": 3}),
    ("any_subset", {"k": 3, "cache": False}),
    ("any_subset", {"k": 2, "bonus": True}),
    ("any_subset", {"k": 3, "adaptive": True}),
    ("any_subset", {"k": 3, "draft": "ngram"}),
    ("any_subset", {"k": 2, "draft": "ngram", "bonus": True}),
    ("any_subset_sequential", {}),
]
RAGGED = ("1__2_", "_30_", "2_", "0_1__1", "____12")  # 3, 2, 1, 3 and 4 holes in canvases of 2 to 6 positions
NAMES = registry.names("canvas")


def case_id(case: Any) -> str:
    return " ".join(map(str, (case[0], *(f"{k}={v}" for k, v in case[1].items()))))


@pytest.fixture(scope="module")
def net() -> Any:
    return small_net()


def build(name: str, settings: dict[str, Any], net: Any, sampling: SamplingParams = T1, seed: int = 3) -> Any:
    return registry.build_canvas(name, {"target": net}, sampling=sampling, settings=settings, seed=seed)


def ragged(rows: int, first: int = 0) -> list[CanvasRequest]:
    return [canvas_of(RAGGED[i % len(RAGGED)], 4, first + i) for i in range(rows)]


def law_test(decoder: Any, net: Any, sampling: SamplingParams, rows: int) -> tuple[ChiSquare, DecodeResult]:
    """Fill `rows` rows over the ragged canvases as one batch and test the holes of each canvas."""
    requests = ragged(rows)
    result = decoder.decode(requests)
    tests = [hole_law(net, requests[i], sampling).test(result.output[i :: len(RAGGED)]) for i in range(len(RAGGED))]
    return pool(tests, rows), result


def holes_of(requests: list[CanvasRequest]) -> list[int]:
    return [len(request.holes) for request in requests]


# The law -------------------------------------------------------------------------------------------------------------


def test_the_cases_cover_the_lossless_rows() -> None:
    mine = {n for n in NAMES if n.startswith("any_subset")}
    assert {name for name, _ in LOSSLESS} == {n for n in mine if registry.get(n).lossless}
    assert not registry.get("any_subset_parallel").lossless


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("case", LOSSLESS, ids=case_id)
def test_the_law_is_the_joint(case: tuple[str, dict[str, Any]], sampling: str, net: Any) -> None:
    """Guarantee 3: enumeration against a ragged batch."""
    name, settings = case
    test, result = law_test(build(name, settings, net, SAMPLING[sampling]), net, SAMPLING[sampling], 3000)
    assert test.p_value > 0.001, str(test)
    assert test.detectable_tv < 0.15, str(test)
    if "k" in settings and settings.get("draft") != "ngram":
        assert max(result.rounds.accepted) >= 2


def generous(u: Any, p_x: Any, q_x: Any) -> Any:
    return u * q_x < p_x * 1.5


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "missing residual": (acceptance, "residual", lambda p, q: p),
    "generous acceptance": (acceptance, "accepts", generous),
    "always accepted": (acceptance, "accepts", lambda u, p, q: torch.ones_like(u, dtype=torch.bool)),
    "verified one rank off": (
        any_subset,
        "verify",
        lambda x, q, p, *rest: acceptance.verify(x, q, torch.cat([p[:, 1:], p[:, -1:]], 1), *rest),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_negative_control_must_fail(mutant: str, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTANTS[mutant]
    monkeypatch.setattr(owner, attribute, broken)
    test, _ = law_test(build("any_subset", {"k": 3}, net), net, T1, 10_000)
    assert test.p_value < 1e-6, str(test)


def test_one_shot_parallel_is_another_law(net: Any) -> None:
    test, result = law_test(build("any_subset_parallel", {}, net), net, T1, 5000)
    assert test.p_value < 1e-6, str(test)
    assert result.nfe == {"target": 1} and set(result.notes["nfe_per_row"]) == {1}


@pytest.mark.parametrize("case", LOSSLESS, ids=case_id)
def test_greedy_is_the_argmax_of_each_conditional(case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    big = small_net(12, seed=4)
    requests = [canvas_of("1__2_____", 12, 0), canvas_of("_30_", 12, 1), canvas_of("20_____53__1", 12, 2)]
    want = build("any_subset_sequential", {"cache": False}, big, GREEDY).decode(requests).output
    together = build(name, settings, big, GREEDY).decode(requests)
    assert together.output == want
    assert [build(name, settings, big, GREEDY).decode([r]).output[0] for r in requests] == want


# Calls, first drafts, statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOSSLESS, ids=case_id)
def test_no_row_needs_more_calls_than_holes(case: tuple[str, dict[str, Any]], net: Any) -> None:
    """Guarantee 2 (theorem 1), and the bookkeeping of a round."""
    name, settings = case
    requests = ragged(400) + [canvas_of("1" + "_" * 20, 4, 1000 + i) for i in range(20)]
    result = build(name, settings, net).decode(requests)
    calls = result.notes["nfe_per_row"]
    assert all(1 <= c <= holes for c, holes in zip(calls, holes_of(requests), strict=True))
    committed = [0] * len(requests)
    for row, n in zip(result.rounds.row, result.rounds.committed, strict=True):
        committed[row] += n
    assert committed == holes_of(requests) == [len(o) for o in result.output]
    assert set(result.stop) == {"length"} and sum(result.nfe.values()) >= max(calls)


def test_the_first_draft_is_always_kept(net: Any) -> None:
    """Guarantee 1 (lemma 1): in every round that verified, and with beta 1 at that place."""
    result = build("any_subset", {"k": 3}, net).decode(ragged(2000))
    verified = [(k, n) for k, n in zip(result.rounds.accepted, result.rounds.drafted, strict=True) if n]
    assert len(verified) > 1000 and min(k for k, _ in verified) >= 1
    assert any(k < n for k, n in verified), "some later draft must have been rejected"


def test_bonus_and_longer_drafts_save_calls(net: Any) -> None:
    requests = [canvas_of("1" + "_" * 20, 4, i) for i in range(50)]

    def calls(**settings: Any) -> float:
        each: list[int] = build("any_subset", settings, net).decode(requests).notes["nfe_per_row"]
        return sum(each) / 50

    assert calls(k=4, bonus=True) <= calls(k=4) < calls(k=2) <= 20


def test_rows_do_not_depend_on_their_batch(net: Any) -> None:
    for name, settings in LOSSLESS:
        decoder = build(name, settings, net)
        requests = ragged(10, 5)
        assert [decoder.decode([r]).output[0] for r in requests] == decoder.decode(requests).output, name


def test_the_cache_changes_nothing(net: Any) -> None:
    requests = ragged(60)
    for settings in ({"k": 3}, {"k": 2, "draft": "ngram"}, {"k": 3, "bonus": True}):
        with_cache = build("any_subset", settings, net).decode(requests)
        without = build("any_subset", settings | {"cache": False}, net).decode(requests)
        assert with_cache.output == without.output
        assert with_cache.notes["nfe_per_row"] == without.notes["nfe_per_row"]


def test_a_network_with_a_sink_fills_a_canvas_of_holes() -> None:
    sunk = small_net(sink=True)
    requests = [canvas_of("___", 4, i) for i in range(5000)]
    for settings in ({"k": 3}, {"k": 2, "draft": "ngram"}):
        result = build("any_subset", settings, sunk).decode(requests)
        test = hole_law(sunk, requests[0], T1).test(result.output)
        assert test.p_value > 0.001 and test.detectable_tv < 0.06, str(test)
        assert max(result.notes["nfe_per_row"]) <= 3


def test_adaptive_k_follows_acceptance() -> None:
    settings = AnySubsetSettings(k=8, adaptive=True)
    assert settings.best_k(0.0) == 2 and settings.best_k(0.99) == 8
    ks = [settings.best_k(alpha / 20) for alpha in range(21)]
    assert ks == sorted(ks)
    # the first is certain, the second is committed whatever its test says
    assert settings.expected_tokens(0.5, 3) == pytest.approx(1 + 1 + 0.5)
    assert AnySubsetSettings(draft="ngram", bonus=True).expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)


def test_a_stop_id_ends_a_row(net: Any) -> None:
    requests = [canvas_of("1_____", 4, i, stop_ids=(2,)) for i in range(50)]
    result = build("any_subset", {"k": 3}, net).decode(requests)
    for output, stop in zip(result.output, result.stop, strict=True):
        assert (stop == "stop_id") == (2 in output) == (len(output) > 0 and output[-1] == 2)
        assert stop == "stop_id" or len(output) == 5
    assert {"stop_id", "length"} <= set(result.stop)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("any_subset")])
def test_stream_yields_the_output_and_returns_the_result(name: str, net: Any) -> None:
    requests = [*ragged(5), canvas_of("123", 4)]
    stream = build(name, {}, net).stream(requests)
    filled: list[dict[int, int]] = [{} for _ in requests]
    ended: list[str | None] = [None] * len(requests)
    while True:
        try:
            commit = next(stream)
        except StopIteration as stop:
            result = stop.value
            break
        assert ended[commit.row] is None
        filled[commit.row].update(zip(commit.positions, commit.tokens, strict=True))
        ended[commit.row] = commit.stop
    assert [[row[p] for p in r.holes] for row, r in zip(filled, requests, strict=True)] == result.output
    assert ended == result.stop
    assert result.output[-1] == [] and result.notes["nfe_per_row"][-1] == 0, "m = N: unchanged, no call"
    empty = build(name, {}, net).decode([])
    assert empty.output == [] and set(empty.nfe) == set(result.nfe)


def test_only_full_canvases(net: Any) -> None:
    result = build("any_subset", {}, net).decode([canvas_of("123", 4)])
    assert result.output == [[]] and result.nfe == {"target": 0, "draft": 0} and result.stop == ["length"]


# The n-gram draft ----------------------------------------------------------------------------------------------------


def test_the_pair_law_counts_committed_sites_once() -> None:
    tokens = torch.tensor([[0, 1, 0, 1, 2, 0, 3]])
    committed = torch.tensor([[True, True, True, True, False, True, True]])
    after_0 = pair_law(tokens, committed, torch.tensor([0]), 5, 4)
    assert after_0[0].tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])
    after_2 = pair_law(tokens, committed, torch.tensor([2]), 5, 4)  # begins no committed pair: single tokens
    assert after_2[0].tolist() == pytest.approx([3 / 6, 2 / 6, 0, 1 / 6, 0])
    nothing = pair_law(tokens, torch.zeros_like(committed), torch.tensor([0]), 5, 4)
    assert nothing[0].tolist() == pytest.approx([0.25] * 4 + [0])


def test_a_draft_continues_the_draft_before_it() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 4, 0, 4]])
    committed = tokens != 4
    targets = torch.tensor([[4, 5, 7]])
    q, x = draft_pairs(tokens, committed, targets, 5, 4, None)
    # behind 3 no pair begins: the likeliest single token, 0; behind 0 stands 1; behind the visible 0 stands 1
    assert x.tolist() == [[0, 1, 1]]
    assert q.sum(-1).tolist() == [pytest.approx([1.0, 1.0, 1.0])]


# Orders, warnings, bad input -----------------------------------------------------------------------------------------


def test_a_rank_of_ones_own_keeps_the_law(net: Any) -> None:
    request = canvas_of("1__2_", 4, rank=[0, 4, 2, 1, 3])
    rows = [dataclasses.replace(request, row_id=i) for i in range(5000)]
    sequential = build("any_subset_sequential", {"cache": False}, net, seed=8).decode(rows).output
    for settings in ({"k": 3}, {"k": 2, "draft": "ngram"}):
        filled = build("any_subset", settings, net).decode(rows).output
        # two samples: chi-square of a 2 x 64 table, bounded through the pooled law
        a, b = (
            torch.tensor([x * 16 + y * 4 + z for x, y, z in o]).bincount(minlength=64) for o in (filled, sequential)
        )
        keep = a + b >= 10
        statistic = float(((a - b)[keep].double() ** 2 / (a + b)[keep]).sum())
        dof = int(keep.sum()) - 1
        assert statistic < dof + 4 * math.sqrt(2 * dof), (settings, statistic, dof)


def test_untrained_ranges_warn(net: Any) -> None:
    trained = small_net()
    trained.trained = {"mask_rate": [0.5, 0.6], "order": "lattice"}
    decoder = build("any_subset", {}, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.decode([canvas_of("12__1__1_3", 4)])
    with pytest.warns(UntrainedWarning, match="0.90 of the canvas are holes, the model was trained at 0.50 to 0.60"):
        decoder.decode([canvas_of("1_________", 4)])
    with pytest.warns(UntrainedWarning, match="rank is not the lattice's"):
        decoder.decode([canvas_of("1__2", 4, rank=[0, 3, 2, 1])])


BAD: dict[str, tuple[Any, str]] = {
    "not a permutation": (canvas_of("1__2", 4, rank=[0, 2, 2, 1]), "no permutation.*position 1 has rank 2"),
    "prompt not first": (canvas_of("1__2", 4, rank=[0, 1, 2, 3]), "position 1 is a hole and has rank 1"),
    "hole without mask": (CanvasRequest([1, 3, 2], [1]), "position 1 is a hole and holds id 3"),
    "mask in the prompt": (CanvasRequest([1, 4, 4], [2]), "position 1 is no hole and holds the mask"),
    "all holes": (canvas_of("___", 4), "needs one visible token or a BOS"),
    "unknown id": (CanvasRequest([1, 9, 4], [2]), "id 9 at position 1 is outside the vocabulary"),
    "too long": (canvas_of("1" + "_" * 24, 4), "a canvas of 25 positions, the model has 24"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_canvases(case: str, net: Any) -> None:
    request, message = BAD[case]
    with pytest.raises(InvalidValue, match=message):
        build("any_subset", {}, net).decode([canvas_of("1_", 4), request])


def test_bad_settings(net: Any) -> None:
    with pytest.raises(InvalidValue, match=r"k must be at least 2 for self-drafting.*2\(N-m\)-1 calls"):
        build("any_subset", {"k": 1}, net)
    assert build("any_subset", {"k": 1, "draft": "ngram"}, net)
    with pytest.raises(InvalidValue, match="unknown draft 'bigram'"):
        build("any_subset", {"draft": "bigram"}, net)
    with pytest.raises(InvalidValue, match="temperature must be 0"):
        SamplingParams(temperature=-1.0)
    with pytest.raises(InvalidValue, match="penalties"):
        build("any_subset", {}, net, SamplingParams(temperature=1.0, presence_penalty=0.5))
    with pytest.raises(InvalidValue, match="takes canvas requests, and tokens were meant"):
        registry.build("any_subset", {"target": net})
    with pytest.raises(InvalidValue, match="takes tokens requests, and canvas were meant"):
        registry.build_canvas("speculative", {"target": net})


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("any_subset")])
@pytest.mark.parametrize("sampling", [GREEDY, T1], ids=["greedy", "sampled"])
def test_nan_scores_are_named(name: str, sampling: SamplingParams) -> None:
    broken = small_net()
    broken.norm.weight.fill_(float("nan"))
    with pytest.raises(InvalidState, match="scores at position 1 of request 0 are no law"):
        build(name, {}, broken, sampling).decode([canvas_of("1__2_", 4)])


def test_train_mode_is_refused() -> None:
    with pytest.raises(InvalidState, match="train mode"):
        build("any_subset", {}, small_net().train()).decode([canvas_of("1_", 4)])
