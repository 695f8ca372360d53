"""Costs of trees: measured on engines whose costs are known, read from files, and the sizes that follow from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference import registry
from draftsmith.inference.cli import main
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.drafters.medusa import MedusaTreeDrafter
from draftsmith.inference.drafters.ngram import NgramDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.ngram_table import empty_table
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_costs import measure_tree, node_value, read_curve
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy
from draftsmith.inference.tree_settings import TreeSettings, make_policy
from tests import tiny
from tests.fakes import markov, near, requests_for
from tests.inference.test_costs import Machine, timed
from tests.inference.test_eagle import head_for
from tests.inference.test_medusa import random_heads

GREEDY = SamplingParams()
CHEAP = CostCurve(batch=1, plain=1.0, draft_step=0.001, verify={1: 1.0, 33: 1.02})
DEAR = CostCurve(batch=1, plain=1.0, draft_step=0.2, verify={1: 1.0, 33: 9.0})


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0)])
def test_known_costs_are_measured(sampling: SamplingParams) -> None:
    """A target call of n tokens takes 1 + 0.01 B n, a draft call 0.1 + 0.002 B n: a node more is a call more."""
    clock = Machine()
    target, draft = timed(clock, 1.0, 0.01), timed(clock, 0.1, 0.002)
    curve = measure_tree(target, draft, nodes=20, batch=2, context=20, sampling=sampling, repetitions=3, clock=clock)
    assert curve.verify == pytest.approx({n: 1.0 + 0.02 * n for n in (1, 5, 9, 13, 17, 21)})
    assert curve.draft_step == pytest.approx(0.104) and curve.batch == 2
    assert curve.draft_fixed == pytest.approx(0.0, abs=1e-9)
    short = timed(clock, 0.1, 0.0, max_length=15)
    assert measure_tree(target, short, nodes=4, context=20, clock=clock).draft_step == pytest.approx(0.1)
    with pytest.raises(InvalidValue, match="the draft's 9 positions do not hold 9 more tokens"):
        measure_tree(target, timed(clock, 0.1, 0.0, max_length=9), nodes=4, context=20, clock=clock)
    with pytest.raises(InvalidValue, match="a NgramDrafter makes its trees itself"):
        measure_tree(target, NgramDrafter(empty_table(11)), nodes=4, clock=clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_heads_that_read_states_are_timed_behind_a_context(temperature: float) -> None:
    model = tiny.lm(layers=6, vocab_size=40, max_length=64)
    target = HFEngine(model)
    drafters = (
        EagleTreeDrafter(head_for(model), ChainPolicy(3)),
        MedusaTreeDrafter(random_heads(), ChainPolicy(3), target=target),
    )
    for drafter in drafters:
        sampling = SamplingParams(temperature=temperature)
        curve = measure_tree(target, drafter, nodes=6, batch=2, context=12, sampling=sampling, repetitions=2)
        assert curve.draft_fixed > 0 and sorted(curve.verify) == [1, 2, 3, 4, 5, 7]


def test_sizes_follow_from_costs() -> None:
    """By hand: a node costs 0.2 + 8 / 32 of a plain round, so it has to be tested with 0.45."""
    assert node_value(DEAR, 32) == pytest.approx(0.45)
    assert node_value(CostCurve.textbook(3.0), 4) < 1, "drafting never pays; still a probability"
    small, large = (
        make_policy(TreeSettings(policy="sequoia", nodes=32), GREEDY, costs).nodes for costs in (DEAR, CHEAP)
    )
    assert small <= 4 and large >= 28
    for policy in ("auto", "dyspec", "dyspec_threshold"):
        chosen = TreeSettings(policy=policy, nodes=32, stop="cost")
        grown = make_policy(chosen, GREEDY, DEAR)
        assert isinstance(grown, DySpecPolicy) and grown.min_value == pytest.approx(0.45)
        with pytest.raises(InvalidValue, match="stop=cost needs measured costs"):
            make_policy(chosen, GREEDY)
    for bad in ({"policy": "chain"}, {"min_value": 0.1}, {"policy": "dyspec_threshold", "threshold": 0.1}):
        with pytest.raises(InvalidValue, match="leave them at 0"):
            TreeSettings(stop="cost", **bad)
    with pytest.raises(InvalidValue, match="unknown stop"):
        TreeSettings(stop="never")


def test_dear_nodes_make_small_trees() -> None:
    target = markov(8, 1, seed=2)
    parts = {"target": target, "draft": near(target, noise=0.3)}
    drafted = {}
    for name, costs in (("cheap", CHEAP), ("dear", DEAR)):
        settings = {"policy": "dyspec", "nodes": 32, "stop": "cost"}
        decoder = registry.build("tree", parts, sampling=SamplingParams(1.0), settings=settings, costs=costs)
        rounds = decoder.decode(requests_for(((1,), (2, 3)), 20, 20)).rounds
        drafted[name] = sum(rounds.drafted) / len(rounds)
    assert drafted["dear"] < 3 and drafted["cheap"] > 15


def test_curves_from_files(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    DEAR.save(path)
    assert read_curve(path, 1) == DEAR
    report = {"forecast": {"batches": {"1": {"g": 3, "costs": CHEAP.to_json()}}}}
    path.write_text(json.dumps(report))
    assert read_curve(path, 1) == CHEAP
    with pytest.raises(InvalidValue, match="batch sizes 1, none at 8"):
        read_curve(path, 8)
    for text, match in (
        ("[]", "not a cost curve"),
        ("{", "cannot read costs"),
        ('{"forecast": {}}', "not a cost curve"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidValue, match=match):
            read_curve(path, 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = tiny.write_lm(tmp_path_factory.mktemp("costs") / "target")
    return target, Path(shutil.copytree(target, target.parent / "draft"))


class TestCommand:
    def decode(self, capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], *more: Any) -> tuple[Any, str]:
        target, draft = pair
        argv = ("decode", target, "--draft", draft, "--decoder", "tree", "--prompt", "def add(a, b):", *more)
        assert main([*map(str, argv), "--max-new-tokens", "12", "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    def test_sequoia_measures_before_it_decodes(
        self, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        found, err = self.decode(capsys, pair, "--set", "policy=sequoia", "--set", "nodes=12")
        assert "costs, measured: a target call" in err and 1 <= found["notes"]["nodes"] <= 12
        plain, err = self.decode(capsys, pair, "--set", "policy=chain")
        assert "costs" not in err and plain["outputs"][0]["output_ids"] == found["outputs"][0]["output_ids"]

    def test_costs_from_a_file_choose_the_tree(
        self, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        nodes = {}
        for name, curve in (("dear", DEAR), ("cheap", CHEAP)):
            curve.save(tmp_path / name)
            found, err = self.decode(
                capsys, pair, "--set", "policy=sequoia", "--set", "nodes=32", "--costs", tmp_path / name
            )
            assert "measured" not in err
            nodes[name] = found["notes"]["nodes"]
        assert nodes["dear"] <= 4 and nodes["cheap"] >= 28
        assert main(["decode", str(pair[0]), "--prompt", "x", "--costs", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.startswith("error: cannot read costs from")
