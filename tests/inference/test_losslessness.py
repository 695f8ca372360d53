"""The losslessness certificate: every registry row that says lossless is held to the target's law, by enumeration.

Rows of the registry are found, not listed: a new decoder is tested here without a change, and for each of them every
draft length schedule and batching mode that its settings know. The target's law of the first three tokens is enumerated
by full forward passes; decoded strings (cut at the stop id) are compared by chi-square, p > 0.001. Each test states,
and asserts, the smallest total variation that it would have noticed with probability 0.9. The negative controls mutate
the shipped code path and must fail the very same test.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference import acceptance, registry
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders import session, speculative
from draftsmith.inference.drafters import model
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.loader import load
from draftsmith.inference.requests import DecodeResult
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import ChiSquare, StringLaw, markov, near, pool, requests_for, string_law
from tests.tiny import add_manifest, write_lm

LENGTH = 3  # tokens of the compared strings; rounds go on behind them, so that drafts are long
MAX_NEW_TOKENS = 7
STOP = 0  # a stop id inside the vocabulary
RAGGED = ((1,), (2, 3), (4, 5, 1), (1, 2, 3, 4), (5, 5, 5, 1, 2))
COSTS = CostCurve.textbook(c=0.25)  # drafting pays for some rows and not for others: the adaptive paths all run

SAMPLING = {
    "T=1": (6, SamplingParams(temperature=1.0)),
    "T=0.7 top-k 20": (24, SamplingParams(temperature=0.7, top_k=20)),
    "top-p 0.8": (6, SamplingParams(temperature=1.0, top_p=0.8)),
    "penalties": (
        6,
        SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    ),
}
GREEDY = SamplingParams()
COUNTED = ("suffix", "suffix_tree", "suffix_hybrid", "aded")  # drafts from counts, made on the host row by row


# fakes whose draft is flat: the watch over DySpec's estimate speaks up, as it should
pytestmark = pytest.mark.filterwarnings("ignore::draftsmith.inference.tree_calibration.EstimateWarning")


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Twenty thousand live rows make each pass of the cyclic garbage collector slow, and there is no cycle to find."""
    gc.disable()
    yield
    gc.enable()


def variants(name: str) -> list[dict[str, Any]]:
    """The settings to test a decoder at: each schedule and each batching mode that it has."""
    fields = {f.name: f for f in dataclasses.fields(registry.get(name).settings_type())}
    if name in COUNTED:
        # their drafts are new; schedules, batching and verification are the chain's and the tree's
        return [{"fallback": "never"} if "fallback" in fields else {"nodes": 6}]
    if "policy" in fields:  # trees
        policies = fields["policy"].metadata["choices"][1:]  # the first one stands for another
        found_trees: list[dict[str, Any]] = [{"policy": policy, "nodes": 6, "depth": 4} for policy in policies]
        found_trees.append({"policy": "dyspec", "nodes": 6, "depth": 4, "stop": "cost"})
        return [*found_trees, {"policy": "fixed", "widths": "3-2", "verification": "traversal"}]
    if "schedule" not in fields:
        return [{}]
    found: list[dict[str, Any]] = []
    for schedule in fields["schedule"].metadata["choices"]:
        try:
            registry.make_settings(name, {"schedule": schedule})
        except InvalidValue:  # the decoder refuses it
            continue
        found.append({"schedule": schedule, "fallback": "auto" if schedule == "cost" else "never"})
    found.append({"schedule": "constant", "fallback": "auto"})
    # the bonus token of a draft of 4 stands behind the compared strings, that of a draft of 2 at their end
    found.append({"schedule": "constant", "fallback": "never", "draft_length": 2})
    modes = fields["batching"].metadata["choices"][1:]
    found += [{"batching": mode, "fallback": "never", "draft_length": 2} for mode in modes]
    if "draft" in registry.get(name).needs and "verification" in fields:
        rules = fields["verification"].metadata["choices"][1:]
        found += [{"verification": rule, "fallback": "never", "schedule": "confidence"} for rule in rules]
    return [{"draft_length": 4} | v for v in found]


LOSSLESS = [name for name in registry.names() if registry.get(name).lossless]
# Drafts from counts are deterministic and verified by the rules of chain and tree, and making them row by row
# takes time: what needs tens of thousands of rows is left to those two. Their law has more rows in their own tests.
DRAWN = [name for name in LOSSLESS if name not in COUNTED]
CASES = [(name, v) for name in LOSSLESS for v in variants(name)]


def case_id(case: Any) -> str:
    name, settings = case
    return " ".join(map(str, (name, *settings.values())))


def test_the_table_is_covered() -> None:
    assert {name for name, _ in CASES} == set(LOSSLESS) >= {"autoregressive", "speculative", "prompt_lookup"}
    schedules = {v.get("schedule") for name, v in CASES if name == "speculative"}
    assert schedules >= {"constant", "heuristic", "confidence", "cost"}
    assert {v.get("batching") for name, v in CASES if name == "speculative"} >= {"lockstep"}


Build = Callable[[SamplingParams, int], Any]


def builder(name: str, settings: dict[str, Any], parts: dict[str, Any]) -> Build:
    """A fresh decoder per call: (sampling, seed) -> decoder."""
    wanted = {role: parts[role] for role in registry.get(name).needs}

    def build(sampling: SamplingParams, seed: int) -> Any:
        return registry.build(
            name, wanted, sampling=sampling, settings=settings, seed=seed, costs=COSTS if settings else None
        )

    return build


def group_size(settings: dict[str, Any], rows: int) -> int:
    """Rows decoded as one batch: lockstep needs small batches, or the fewest accepted would always be none."""
    return 5 if settings.get("batching") == "lockstep" else rows


def law_test(
    build: Build,
    laws: Sequence[StringLaw],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    rows: int,
    group: int,
    stop_ids: Sequence[int] = (STOP,),
) -> tuple[ChiSquare, DecodeResult]:
    """Decode `rows` rows over the prompts in turn, in batches of `group`, and test the strings of every prompt."""
    decoder = build(sampling, 11)
    outputs: list[list[int]] = []
    result = None
    for first in range(0, rows, group):
        result = decoder.decode(requests_for(prompts, group, MAX_NEW_TOKENS, stop_ids, first))
        outputs += result.output
    assert result is not None
    tests = [law.test(outputs[i :: len(prompts)], LENGTH) for i, law in enumerate(laws)]
    return pool(tests, len(outputs)), result


@pytest.fixture(scope="module")
def laws() -> Callable[[str], tuple[Any, Any, list[StringLaw]]]:
    """Target, draft and the target's laws over the ragged prompts, by the name of the sampling."""
    made: dict[str, tuple[Any, Any, list[StringLaw]]] = {}

    def get(name: str) -> tuple[Any, Any, list[StringLaw]]:
        if name not in made:
            vocab, params = SAMPLING[name]
            target = markov(vocab, 2 if vocab < 10 else 1, seed=3)
            target.table[..., STOP] -= 1.0  # not every string ends at once
            length_laws = [string_law(target, p, LENGTH, params, (STOP,)) for p in RAGGED]
            made[name] = target, near(target, noise=1.2), length_laws
        return made[name]

    return get


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_sampled_law_on_fakes(case: tuple[str, dict[str, Any]], sampling: str, laws: Any) -> None:
    """Ragged batch over five prompts, with a stop id in the vocabulary."""
    name, settings = case
    target, draft, expected = laws(sampling)
    few = settings.get("batching") == "lockstep" or name in COUNTED or "policy" in settings
    rows = 2000 if few else 10_000
    build = builder(name, settings, {"target": target, "draft": draft})
    test, result = law_test(build, expected, RAGGED, SAMPLING[sampling][1], rows, group_size(settings, rows))
    print(test)
    assert test.p_value > 0.001, str(test)
    assert test.detectable_tv < (0.15 if rows == 2000 else 0.08), str(test)
    if name == "speculative":
        assert max(result.rounds.accepted) >= 2, "the test must exercise long drafts"


def powerful(name: str) -> dict[str, Any]:
    """The settings of the tests with more rows."""
    if name == "tree":
        return {"policy": "dyspec", "nodes": 6, "depth": 4}
    return {} if name == "autoregressive" else {"draft_length": 4, "fallback": "never"}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["T=1", "top-p 0.8"])
@pytest.mark.parametrize("name", DRAWN)
def test_sampled_law_with_more_power(name: str, sampling: str, laws: Any) -> None:
    target, draft, expected = laws(sampling)
    settings = powerful(name)
    build = builder(name, settings, {"target": target, "draft": draft})
    test, _ = law_test(build, expected, RAGGED, SAMPLING[sampling][1], 60_000, 60_000)
    assert test.p_value > 0.001, str(test)
    assert test.detectable_tv < 0.03, str(test)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_sampled_law_batch_of_one(name: str, laws: Any) -> None:
    """One request per decode call."""
    target, draft, expected = laws("T=1")
    settings = powerful(name)
    build = builder(name, settings, {"target": target, "draft": draft})
    test, _ = law_test(build, expected[1:2], RAGGED[1:2], SAMPLING["T=1"][1], 3000, 1)
    assert test.p_value > 0.001 and test.detectable_tv < 0.08, str(test)


def greedy_strings(engine: Engine, prompts: Sequence[Sequence[int]], length: int, stop: int) -> list[list[int]]:
    """Greedy decoding by full forward passes."""
    out = []
    for prompt in prompts:
        new: list[int] = []
        while len(new) < length and stop not in new:
            hidden, _ = engine.forward(torch.tensor([[*prompt, *new]]))
            new.append(int(engine.head(hidden[:, -1]).argmax()))
        out.append(new)
    return out


@pytest.mark.parametrize("noise", [0.0, 0.8], ids=["perfect draft", "noisy draft"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_greedy_equals_plain_on_fakes(case: tuple[str, dict[str, Any]], noise: float) -> None:
    name, settings = case
    target = markov(16, 2, seed=5)
    build = builder(name, settings, {"target": target, "draft": near(target, noise=noise)})
    want = greedy_strings(target, RAGGED, 40, STOP)
    requests = requests_for(RAGGED, len(RAGGED), 40, (STOP,))
    assert build(GREEDY, 0).decode(requests).output == want
    assert [build(GREEDY, 0).decode([r]).output[0] for r in requests] == want, "batch of one"


# Negative controls ---------------------------------------------------------------------------------------------------


def generous(u: Tensor, p_x: Tensor, q_x: Tensor) -> Tensor:
    return u * q_x < p_x * 1.3


def wrong_bonus(x: Tensor, q: Tensor, p: Tensor, *rest: Tensor) -> acceptance.Verdict:
    return acceptance.verify(x, q, torch.cat([p[:, :-1], p[:, -2:-1]], 1), *rest)


def shifted(x: Tensor, q: Tensor, p: Tensor, *rest: Tensor) -> acceptance.Verdict:
    return acceptance.verify(x, q, torch.cat([p[:, 1:], p[:, -1:]], 1), *rest)


def reused_uniforms(self: session.Session, g: int) -> tuple[Tensor, Tensor, Tensor]:
    draft, _, following = ORIGINAL_UNIFORMS(self, g)
    return draft, draft, following


ORIGINAL_UNIFORMS = session.Session.uniforms

MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "missing residual": (acceptance, "residual", lambda p, q: p),
    "absolute residual": (acceptance, "residual", lambda p, q: (p - q).abs()),
    "generous acceptance": (acceptance, "accepts", generous),
    "always accepted": (acceptance, "accepts", lambda u, p, q: torch.ones_like(u, dtype=torch.bool)),
    "q not the sampled law": (model, "sample_categorical", lambda q, u: acceptance.sample_categorical(q.sqrt(), u)),
    "bonus off by one": (speculative, "verify", wrong_bonus),
    "verified one position off": (speculative, "verify", shifted),
    "uniforms of the draft reused": (session.Session, "uniforms", reused_uniforms),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_negative_control_must_fail(mutant: str, laws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTANTS[mutant]
    monkeypatch.setattr(owner, attribute, broken)
    target, draft, expected = laws("T=1")
    build = builder("speculative", {"draft_length": 2, "fallback": "never"}, {"target": target, "draft": draft})
    test, _ = law_test(build, expected, RAGGED, SAMPLING["T=1"][1], 10_000, 10_000)
    assert test.p_value < 1e-6, str(test)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["missing residual", "generous acceptance", "bonus off by one"])
def test_negative_control_of_lockstep_and_of_deterministic_drafts(
    mutant: str, laws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, broken = MUTANTS[mutant]
    monkeypatch.setattr(owner, attribute, broken)
    target, draft, expected = laws("T=1")
    parts = {"target": target, "draft": draft}
    lockstep = {"draft_length": 1, "fallback": "never", "batching": "lockstep"}
    for name, settings, rows in (
        ("speculative", lockstep, 6000),
        ("prompt_lookup", {"draft_length": 1, "fallback": "never"}, 20_000),
    ):
        test, _ = law_test(
            builder(name, settings, parts), expected, RAGGED, SAMPLING["T=1"][1], rows, group_size(settings, rows)
        )
        assert test.p_value < 0.001, f"{name}: {test}"


def test_negative_control_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_too_many(x: Tensor, best: Tensor, n: Tensor, finite: Tensor) -> acceptance.Verdict:
        verdict = acceptance.verify_greedy(x, best, n, finite)
        return dataclasses.replace(verdict, k=torch.minimum(verdict.k + 1, n))

    monkeypatch.setattr(speculative, "verify_greedy", one_too_many)
    target = markov(16, 2, seed=5)
    settings = {"draft_length": 4, "fallback": "never"}
    build = builder("speculative", settings, {"target": target, "draft": near(target)})
    got = build(GREEDY, 0).decode(requests_for(RAGGED, len(RAGGED), 40, (STOP,))).output
    assert got != greedy_strings(target, RAGGED, 40, STOP)


# Real networks, loaded from exported directories ---------------------------------------------------------------------

NETS = {"native": {"engine": "native"}, "hf": {"engine": "hf"}}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Path]]:
    """Directories of a random target and draft over a vocabulary of the given size, with manifests."""
    made: dict[int, tuple[Path, Path]] = {}

    def get(vocab: int) -> tuple[Path, Path]:
        if vocab not in made:
            root = tmp_path_factory.mktemp(f"exports{vocab}")
            for role, layers, width, seed in (("target", 2, 16, 1), ("draft", 1, 8, 2)):
                write_lm(
                    root / role, tokenizer=False, vocab_size=vocab, layers=layers, width=width, seed=seed, max_length=32
                )
                add_manifest(root / role)
            made[vocab] = root / "target", root / "draft"
        return made[vocab]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("engine", NETS)
@pytest.mark.parametrize("sampling", ["T=1", "T=0.7 top-k 20", "top-p 0.8"])
@pytest.mark.parametrize("name", DRAWN)
def test_sampled_law_on_networks(name: str, sampling: str, engine: str, exports: Any) -> None:
    """Exported directories through load -> registry -> decode; the law is enumerated by the loaded engine itself."""
    vocab, params = SAMPLING[sampling]
    target, draft = (load(path, **NETS[engine]) for path in exports(vocab))
    prompts = RAGGED
    expected = [string_law(target.part, p, LENGTH if vocab < 10 else 2, params, (STOP,)) for p in prompts]
    for settings in variants(name):
        if settings.get("schedule") in ("heuristic", "confidence"):
            continue  # as on the fakes; the two batching modes and the adaptive length meet the caches differently
        group = group_size(settings, 1500)
        test, _ = net_law_test(name, settings, {"target": target, "draft": draft}, expected, params, group, vocab)
        assert test.p_value > 0.001, f"{settings}: {test}"
        assert test.detectable_tv < 0.2, f"{settings}: {test}"


def net_law_test(
    name: str,
    settings: dict[str, Any],
    parts: dict[str, Any],
    expected: Sequence[StringLaw],
    params: SamplingParams,
    group: int,
    vocab: int,
) -> tuple[ChiSquare, DecodeResult]:
    rows = 3000 if group > 5 else 1000
    decoder = builder(name, settings, parts)(params, 7)
    outputs: list[list[int]] = []
    for first in range(0, rows, group):
        result = decoder.decode(requests_for(RAGGED, group, MAX_NEW_TOKENS, (STOP,), first))
        outputs += result.output
    length = LENGTH if vocab < 10 else 2
    return pool([law.test(outputs[i::5], length) for i, law in enumerate(expected)], rows), result


@pytest.mark.parametrize("engine", NETS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_greedy_equals_plain_on_networks(case: tuple[str, dict[str, Any]], engine: str, exports: Any) -> None:
    name, settings = case
    target, draft = (load(path, **NETS[engine]) for path in exports(24))
    want = greedy_strings(target.part, RAGGED, 20, STOP)
    requests = requests_for(RAGGED, len(RAGGED), 20, (STOP,))
    build = builder(name, settings, {"target": target, "draft": draft})
    assert build(GREEDY, 0).decode(requests).output == want
    assert [build(GREEDY, 0).decode([r]).output[0] for r in requests[1:3]] == want[1:3]
