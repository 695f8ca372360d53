"""How trees grow: DySpec's optimality and monotony, Sequoia's programme, EAGLE-2's beam, and what they learn from."""

import itertools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_calibration import (
    EDGES,
    AcceptanceTable,
    Calibration,
    Calibrator,
    EstimateWarning,
    EstimateWatch,
)
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy, DySpecThresholdPolicy, _Row
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_policies.sequoia import SequoiaPolicy, best_trees, choose_size, guess
from draftsmith.inference.tree_policies.template import Template
from tests.path_tables import PathTables, TableSource, numbers, play


def grow(policy: object, tables: PathTables, rows: int, *, nodes: int, depth: int, greedy: bool = False) -> Tree:
    roots = tables.roots(rows, apart=True)
    u = None if greedy else numbers(rows, 1)
    return policy.grow(  # type: ignore[attr-defined]
        TableSource(tables, roots), torch.zeros(rows, dtype=torch.int64), [nodes] * rows, [depth] * rows, u
    )


class Spy(DySpecPolicy):
    """Keeps the rows of the last growth."""

    rows: list[_Row]

    def grown(self, rows: list[_Row]) -> None:  # type: ignore[override]
        self.rows = rows


class ThresholdSpy(DySpecThresholdPolicy):
    rows: list[_Row]

    def grown(self, rows: list[_Row]) -> None:  # type: ignore[override]
        super().grown(rows)
        self.rows = rows


# DySpec --------------------------------------------------------------------------------------------------------------


def best_sum(tables: PathTables, root: Tensor, nodes: int, depth: int) -> float:
    """Largest sum of values over all trees of `nodes` picked slots, by trying every set that is closed upwards.

    Picking (no drawing): the children of a node are its likeliest tokens in order; a slot (node, rank) needs the slots
    of smaller rank at its node and the node itself.
    """
    slots: list[tuple[float, tuple[int, ...]]] = []  # (value, ranks from the root): the slot's own path

    def below(context: Tensor, value: float, path: tuple[int, ...]) -> None:
        if len(path) == depth:
            return
        law, order = tables.draft(context)[0].sort(descending=True)
        left, reach = 1.0, value
        for rank in range(len(law)):
            slots.append((reach, (*path, rank)))
            share = float(law[rank]) / left
            below(tables.below(context, order[rank]), reach * share, (*path, rank))
            reach *= 1 - share
            left -= float(law[rank])
            if left <= 1e-15:
                break

    below(root, 1.0, ())
    value_of = {path: value for value, path in slots}

    best = 0.0
    frontier = {frozenset[tuple[int, ...]]()}
    for _ in range(nodes):
        larger = set()
        for chosen in frontier:
            for path in value_of:
                ready = (path[-1] == 0 or (*path[:-1], path[-1] - 1) in chosen) and (
                    len(path) == 1 or path[:-1] in chosen
                )
                if path not in chosen and ready:
                    larger.add(chosen | {path})
        frontier = larger
    for chosen in frontier:
        best = max(best, math.fsum(value_of[path] for path in chosen))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_greedy_growth_is_optimal_under_its_estimate(seed: int) -> None:
    """Guarantee 2 of dyspec, against all trees (picked expansion: the slots' values are known)."""
    tables = PathTables(vocab=3, seed=seed)
    policy = Spy(5, 3)
    grow(policy, tables, 2, nodes=5, depth=3, greedy=True)
    for b, row in enumerate(policy.rows):
        root = tables.roots(2, apart=True)[b : b + 1]
        assert math.fsum(row.values) == pytest.approx(best_sum(tables, root, 5, 3), abs=1e-12)


def test_values_never_rise() -> None:
    """Guarantee 3."""
    policy = Spy(24, 6)
    grow(policy, PathTables(seed=2), 20, nodes=24, depth=6)
    for row in policy.rows:
        assert len(row.values) == 24 and row.values[0] == 1.0
        assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(row.values))
        assert 0.0 < row.forecast <= 6.0


def places(tree: Tree, b: int) -> set[tuple[tuple[int, ...], int]]:
    """The nodes of one tree as (ranks from the root, token), whatever their order."""
    parent, tokens = tree.parent[b].tolist(), tree.tokens[b].tolist()
    ranks: list[tuple[int, ...]] = [()]
    seen = [0] * tree.width
    for i in range(1, int(tree.size[b])):
        ranks.append((*ranks[parent[i]], seen[parent[i]]))
        seen[parent[i]] += 1
    return {(ranks[i], tokens[i]) for i in range(1, int(tree.size[b]))}


def test_threshold_growth_equals_greedy_growth_down_to_the_same_value() -> None:
    """Guarantee 4: C = value of the last pop; draws are keyed by their place in the tree."""
    tables, rows = PathTables(seed=3), 12
    greedy = Spy(9, 5)
    want = grow(greedy, tables, rows, nodes=9, depth=5)
    for b, row in enumerate(greedy.rows):
        layered = DySpecThresholdPolicy(9, 5, threshold=row.values[-1] * (1 - 1e-9), most=64)
        got = grow(layered, tables, rows, nodes=64, depth=5)
        assert places(got, b) == places(want, b)


def test_a_tree_does_not_depend_on_batch_mates_nor_on_what_is_expanded_early() -> None:
    tables = PathTables(seed=6)
    together = grow(DySpecPolicy(12, 5), tables, 9, nodes=12, depth=5)
    few = grow(DySpecPolicy(12, 5), tables, 2, nodes=12, depth=5)

    class Lazy(DySpecPolicy):
        def _width(self, columns: int) -> int:
            return 1

    lazy = grow(Lazy(12, 5), tables, 9, nodes=12, depth=5)
    for b in range(9):
        assert places(lazy, b) == places(together, b)
        assert b >= 2 or places(few, b) == places(together, b)


def test_growth_takes_no_more_calls_and_columns_than_it_says() -> None:
    for policy in (
        DySpecPolicy(20, 6),
        DySpecThresholdPolicy(20, 6),
        FixedWidthsPolicy([4, 2, 2]),
        Eagle2Policy(20, 4),
    ):
        for rows in (1, 7):
            tables = PathTables(seed=rows)
            source = TableSource(tables, tables.roots(rows, apart=True))
            nodes = policy.nodes
            policy.grow(source, torch.zeros(rows).long(), [nodes] * rows, [6] * rows, numbers(rows, 1))
            assert source.contexts.shape[1] - 1 <= policy.columns(nodes)
    layered = play(PathTables(seed=1), DySpecThresholdPolicy(64, 8), 1, depth=8)
    assert layered.calls <= 8


def test_smaller_values_are_not_drawn() -> None:
    policy = Spy(40, 6, min_value=0.2)
    tree = grow(policy, PathTables(seed=2), 20, nodes=40, depth=6)
    assert all(value >= 0.2 for row in policy.rows for value in row.values)
    assert 1 < float((tree.size - 1).double().mean()) < 40


def test_the_adaptive_threshold_meets_the_budget() -> None:
    tables, sizes = PathTables(seed=2), []
    policy = DySpecThresholdPolicy(12, 8, threshold=0.45, adaptive=True)
    for seed in range(12):
        sizes.append(float((play(tables, policy, 60, depth=8, seed=seed).tree.size - 1).double().mean()))
    assert abs(sizes[-1] - 12) < 2 < abs(sizes[0] - 12)


def test_the_estimate_is_watched() -> None:
    watch = EstimateWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(199):
            watch.add(2.0, 1, calibrated=False)
    with pytest.warns(EstimateWarning, match="expected 2.00 accepted nodes a round and got 1.00 over 200 rounds"):
        watch.add(2.0, 1, calibrated=False)
    policy = DySpecPolicy(4, 3)
    grow(policy, PathTables(), 3, nodes=4, depth=3)
    policy.observe([2, None, 0])
    assert (policy.watch.rounds, policy.watch.accepted) == (2, 2) and policy.watch.forecast > 0


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_draft_law_that_is_none_is_named_by_its_path(value: float) -> None:
    class Broken(TableSource):
        def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
            return super().expand(tokens, parent) * value

    tables = PathTables(sd=4.0)
    source = Broken(tables, tables.roots(1, apart=True))
    with pytest.raises(InvalidValue, match=r"draft law at the node \[0, \d\] is none"):
        DySpecPolicy(6, 4).grow(source, torch.zeros(1).long(), [6], [4], numbers(1, 1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DySpecPolicy(0, 4), "nodes of a DySpec tree must be at least 1, got 0"),
        (lambda: DySpecPolicy(4, 0), "depth of a DySpec tree must be at least 1, got 0"),
        (lambda: DySpecPolicy(4, 4, min_value=1.0), "min_value"),
        (lambda: DySpecThresholdPolicy(4, 4, threshold=1.0), "threshold C must lie between 0 and 1, got 1.0"),
        (lambda: DySpecThresholdPolicy(4, 4, threshold=0.0), "threshold C"),
        (lambda: DySpecThresholdPolicy(4, 4, most=3), "1 <= budget <= most"),
        (lambda: Eagle2Policy(4, 4, beam=0), "beam of an EAGLE-2 tree"),
        (lambda: FixedWidthsPolicy([]), "widths"),
        (lambda: FixedWidthsPolicy([2, 0]), "widths"),
        (lambda: ChainPolicy(0), "at least one node"),
        (lambda: best_trees((0.0, 0.9, 0.2), 8, 3), "sum to at most 1"),
        (lambda: best_trees((0.1, 0.9), 8, 3), "P\\[0\\] must be 0"),
        (lambda: best_trees((0.0, 0.9), 1, 3), "at least one node below its root"),
        (lambda: best_trees((0.0, 0.5), 8, 3).template(8, 3), "no tree of 8 nodes fits into 3 levels"),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()  # type: ignore[operator]


# Sequoia -------------------------------------------------------------------------------------------------------------


WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3)


def slow_value(p: tuple[float, ...], m: int, depth: int) -> float:
    """The recursion as printed."""

    def t(m: int, level: int, b: int) -> float:
        if b == 0:
            return 1.0 if m == 1 else -math.inf
        if level == 0 or b >= len(p):
            return -math.inf
        return max(
            (t(y, level, b - 1) + p[b] * best(m - y, level - 1) for y in range(1, m)),
            default=-math.inf,
        )

    def best(m: int, level: int) -> float:
        return max(t(m, level, b) for b in range(m))

    return best(m, depth)


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.floats(0.3, 0.99), st.integers(2, 7), st.integers(1, 3))
def test_the_programme_equals_the_recursion(weights: list[float], total: float, size: int, depth: int) -> None:
    p = (0.0, *(total * w / sum(weights) for w in weights))
    trees = best_trees(p, size, depth)
    for m in range(1, size + 1):
        for level in range(1, depth + 1):
            want = slow_value(p, m, level)
            got = float(trees.value[level, m])
            assert got == pytest.approx(want) if math.isfinite(want) else math.isinf(got)


def expected_tokens(shape: Template, p: tuple[float, ...]) -> float:
    """1 + the probability that each node is accepted, along its path."""
    chance = [1.0]
    for i in range(1, shape.nodes + 1):
        chance.append(chance[shape.parent[i]] * p[shape.rank[i] + 1])
    return math.fsum(chance)


def test_the_tree_that_is_built_has_the_value_and_acceptances_simulate_to_it() -> None:
    """Guarantee 6: T = mean emitted tokens, within 3 sigma."""
    p = (0.0, 0.55, 0.2, 0.1, 0.05)
    trees = best_trees(p, 17, 6)
    shape = trees.template(17, 6)
    value = float(trees.value[6, 17])
    assert shape.nodes == 16 and max(shape.depth) <= 6 and expected_tokens(shape, p) == pytest.approx(value)
    generator = torch.Generator().manual_seed(0)
    children = {i: [c for c in range(1, 17) if shape.parent[c] == i] for i in range(17)}
    emitted = []
    for _ in range(4000):
        node, count = 0, 1
        while children[node]:
            u, k = float(torch.rand((), generator=generator)), 0
            while k < len(children[node]) and u >= sum(p[1 : k + 2]):
                k += 1
            if k == len(children[node]):
                break
            node, count = children[node][k], count + 1
        emitted.append(count)
    sample = torch.tensor(emitted).double()
    assert abs(float(sample.mean()) - value) < 3 * float(sample.std()) / len(emitted) ** 0.5


def test_size_by_cost() -> None:
    p = guess()
    trees = best_trees(p, 33, 8)
    flat = choose_size(trees, 0.0, lambda m: 1.0, 32, 8)
    assert flat == (33, 8) or float(trees.value[flat[1], flat[0]]) == pytest.approx(float(trees.value[8, 33]))
    steep = choose_size(trees, 0.05, lambda m: 1.0 + 0.2 * m, 32, 8)
    assert steep[0] < 10
    dear = choose_size(trees, 5.0, lambda m: 1.0, 32, 8)
    assert dear[1] == 1
    policy = SequoiaPolicy(32, 8, t_draft=0.05, t_target=lambda m: 1.0 + 0.2 * m)
    assert (policy.nodes + 1, policy.expected) == (steep[0], float(trees.value[steep[1], steep[0]]))
    with pytest.raises(InvalidValue, match="costs must be positive"):
        choose_size(trees, -1.0, lambda m: 1.0, 32, 8)


# EAGLE-2 -------------------------------------------------------------------------------------------------------------


def test_eagle2_offers_the_best_of_all_candidates_with_their_parents() -> None:
    tables, rows = PathTables(seed=7), 15
    tree = grow(Eagle2Policy(10, 4, beam=3), tables, rows, nodes=10, depth=4)
    tree.check()
    assert tree.law is None and (tree.size == 11).all()
    for b in range(rows):
        # the slow way: a beam of 3 on each level, every candidate with its score
        level = [((), 0.0, tables.roots(rows, apart=True)[b : b + 1])]
        pool: list[tuple[float, int, tuple[int, ...]]] = []
        for depth in range(1, 5):
            found = []
            for path, score, context in level:
                law, tokens = tables.draft(context)[0].float().topk(3)
                for p, t in zip(law.tolist(), tokens.tolist(), strict=True):
                    found.append(((*path, t), score + math.log(p), tables.below(context, torch.tensor([t]))))
            pool += [(-score, depth, path) for path, score, _ in found]
            level = sorted(found, key=lambda x: -x[1])[:3]
        want = {path for _, _, path in sorted(pool)[:10]}
        got = set()
        for i in range(1, 11):
            path, node = (), i
            while node:
                path, node = (int(tree.tokens[b, node]), *path), int(tree.parent[b, node])
            got.add(path)
        assert got == want


def test_eagle2_keeps_parents_on_ties_and_offers_nothing_impossible() -> None:
    class Sure(TableSource):
        """One token has all the mass: every score on its path is 0, every other -inf."""

        def root(self) -> Tensor:
            return torch.nn.functional.one_hot(torch.tensor([2]), 6).float()

        def expand(self, tokens: Tensor, parent: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.full_like(tokens, 2), 6).float()

    tables = PathTables()
    source = Sure(tables, tables.roots(1, apart=True))
    tree = Eagle2Policy(12, 4, beam=3).grow(source, torch.zeros(1).long(), [12], [4], None)
    tree.check()
    assert tree.size.item() == 5 and tree.tokens[0, :5].tolist() == [0, 2, 2, 2, 2]
    assert tree.parent[0, :5].tolist() == [-1, 0, 1, 2, 3]


def test_eagle2_ragged() -> None:
    tables = PathTables(seed=7)
    source = TableSource(tables, tables.roots(3, apart=True))
    tree = Eagle2Policy(8, 4, beam=3).grow(source, torch.zeros(3).long(), [8, 3, 0], [4, 1, 2], None)
    tree.check()
    assert tree.size.tolist() == [9, 4, 1] and int(tree.depth[1, :4].max()) == 1


# Templates -----------------------------------------------------------------------------------------------------------


def test_templates_are_level_by_level_and_cut_at_the_end() -> None:
    shape = Template.of([-1, 0, 1, 0, 3, 3])
    assert (
        shape.parent == (-1, 0, 0, 1, 2, 2) and shape.rank == (0, 0, 1, 0, 0, 1) and shape.depth == (0, 1, 1, 2, 2, 2)
    )
    assert shape.cut(3, 9).parent == (-1, 0, 0, 1) and shape.cut(9, 1).nodes == 2
    whole = grow(FixedWidthsPolicy([2, 2]), PathTables(), 4, nodes=6, depth=2)
    part = grow(FixedWidthsPolicy([2, 2]), PathTables(), 4, nodes=4, depth=2)
    assert torch.equal(whole.tokens[:, :5], part.tokens) and part.size.tolist() == [5] * 4
    greedy = grow(FixedWidthsPolicy([2, 2]), PathTables(), 4, nodes=6, depth=2, greedy=True)
    assert greedy.law is None and greedy.share is not None and (greedy.share[:, 1] >= 1 / 6).all()


# Calibration ---------------------------------------------------------------------------------------------------------


def calibrated(tables: PathTables, rows: int = 1500) -> Calibration:
    calibrator = Calibrator()
    for policy, seed in ((FixedWidthsPolicy([4, 2, 1]), 5), (ChainPolicy(6), 6)):
        played = play(tables, policy, rows, depth=6, seed=seed)
        calibrator(played.tree, played.verdict, range(rows))
    return calibrator.result({"target": "t", "draft": "d", "temperature": 1.0})


def test_calibration_makes_the_forecast_right() -> None:
    """The sum of v times acceptance over the slots forecasts the accepted nodes once the table is measured."""
    tables = PathTables(noise=0.3, seed=2)
    found = calibrated(tables)
    errors = {}
    for name, table in (("raw", None), ("calibrated", found.table)):
        policy = Spy(12, 8, table=table)
        played = play(tables, policy, 1500, depth=8, seed=9)
        forecast = sum(row.forecast for row in policy.rows) / 1500
        errors[name] = abs(forecast / float(played.verdict.k.double().mean()) - 1)
    assert errors["calibrated"] < 0.15 < errors["raw"]


def test_calibration_counts_ranks() -> None:
    tables = PathTables(seed=2)
    found = calibrated(tables)
    played = play(tables, FixedWidthsPolicy([4]), 4000, depth=1, seed=21)
    rates = torch.bincount(played.verdict.path[:, 1][played.verdict.k > 0], minlength=5).double() / 4000
    for k in range(1, 5):
        assert found.sequoia[k] == pytest.approx(float(rates[k]), abs=0.04)
    assert found.sequoia[0] == 0.0 and sum(found.sequoia) <= 1.0 and found.tests > 4000


def test_a_calibration_is_written_and_read(tmp_path: Path) -> None:
    found = calibrated(PathTables(seed=2), 50)
    path = tmp_path / "tree_calibration.json"
    found.save(path)
    assert Calibration.load(path, {"target": "t", "temperature": 1.0}) == found
    with pytest.raises(InvalidValue, match=r"measured with temperature 1\.0, this run has 0\.5"):
        Calibration.load(path, {"temperature": 0.5})
    with pytest.raises(InvalidValue, match="draftsmith calibrate TARGET DRAFT"):
        Calibration.load(tmp_path / "none.json")
    for damage in ({"version": 9}, {"sequoia": [0.2, 0.5]}, {"table": {"acc": [[2.0] * len(EDGES)], "edges": EDGES}}):
        path.write_text(json.dumps(json.loads(json.dumps(vars_of(found))) | damage))
        with pytest.raises(InvalidValue):
            Calibration.load(path)
    path.write_text("{")
    with pytest.raises(InvalidValue, match="is no calibration"):
        Calibration.load(path)


def vars_of(found: Calibration) -> dict[str, object]:
    table = {"acc": found.table.acc, "edges": found.table.edges}
    return {
        "version": 1,
        "table": table,
        "sequoia": found.sequoia,
        "tests": found.tests,
        "fingerprint": dict(found.fingerprint),
    }


def test_tables() -> None:
    table = AcceptanceTable(((0.1, 0.9), (0.2, 0.3)), (0.5, 1.0))
    assert table.acceptance(0, 0.5) == 0.1 and table.acceptance(0, 0.51) == 0.9
    assert table.acceptance(7, 0.2) == 0.2, "missing ranks use the last row"
    for acc, edges in (
        ((), (0.5, 1.0)),
        (((0.1,),), (0.5, 1.0)),
        (((0.1, 1.2),), (0.5, 1.0)),
        (((0.1, 0.2),), (0.6, 0.5)),
    ):
        with pytest.raises(InvalidValue):
            AcceptanceTable(acc, edges)
    with pytest.raises(InvalidValue, match="nothing was drafted"):
        Calibrator().result({})
    played = play(PathTables(), DySpecPolicy(4, 3), 3, depth=3)
    with pytest.raises(InvalidValue, match="use policy 'fixed'"):
        Calibrator()(played.tree, played.verdict, range(3))
