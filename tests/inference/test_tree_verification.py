"""Verification of trees: the fast walk against a slow one that can be read, hand-worked cases, and the law it keeps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draftsmith.inference import acceptance
from draftsmith.inference.acceptance import Fault
from draftsmith.inference.tree import NO_LAW, Tree
from draftsmith.inference.tree_drawing import draw_children, pick_children, slot
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy, DySpecThresholdPolicy
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_policies.sequoia import SequoiaPolicy
from draftsmith.inference.tree_verification import TreeVerdict, verify_tree, verify_tree_greedy
from tests.fakes import ChiSquare, chi_square
from tests.path_tables import PathTables, Round, TableSource, first_pairs, numbers, pair_law, play

CPU = torch.device("cpu")
FLAT = torch.full((6,), 1 / 6)


# The slow reference --------------------------------------------------------------------------------------------------


def inverse(law: list[float], u: float) -> int:
    total, target = 0.0, u * sum(law)
    for token, mass in enumerate(law):
        total += mass
        if total > target:
            return token
    raise AssertionError("u below 1 always falls on a token")


def walk(tree: Tree, b: int, p: Tensor, u: list[float]) -> tuple[list[int], int, int]:
    """Path, next token and tests of one row, sibling after sibling as the papers print it. p: [N, V]."""
    parent, tokens = tree.parent[b].tolist(), tree.tokens[b].tolist()
    children = [[c for c in range(1, int(tree.size[b])) if parent[c] == i] for i in range(tree.width)]
    path, tests = [0], 0
    while True:
        node = path[-1]
        target = p[node].tolist()
        if tree.law is None:
            if children[node]:
                tests += 1
            token = inverse(target, u[node])
            found = [c for c in children[node] if tokens[c] == token]
            if not found:
                return path, token, tests
            path.append(found[0])
            continue
        accepted = None
        q = tree.law[b, max(0, int(tree.law_row[b, node]))].tolist()
        for c in children[node]:
            if sum(q) == 0.0:
                break
            tests += 1
            if u[c] * q[tokens[c]] < target[tokens[c]]:
                accepted = c
                break
            rest = [max(a - d, 0.0) for a, d in zip(target, q, strict=True)]
            target = [x / sum(rest) for x in rest] if sum(rest) > 0 else target
            if not tree.replacement:
                q[tokens[c]] = 0.0
                q = [x / sum(q) for x in q] if sum(q) > 0 else q
        if accepted is None:
            return path, inverse(target, u[0]), tests
        path.append(accepted)


POLICIES = {
    "chain": ChainPolicy(5),
    "fixed": FixedWidthsPolicy([3, 2, 1]),
    "replacement": FixedWidthsPolicy([3, 2, 1], replacement=True),
    "exhausted": FixedWidthsPolicy([5, 4]),  # more children than tokens of the filtered laws
    "sequoia": SequoiaPolicy(9, 4),
    "dyspec": DySpecPolicy(9, 5),
    "threshold": DySpecThresholdPolicy(9, 5),
    "eagle2": Eagle2Policy(9, 3, beam=3),
}


@pytest.mark.parametrize("name", POLICIES)
def test_fast_walk_equals_the_slow_one(name: str) -> None:
    tables, rows = PathTables(vocab=6, noise=0.7, seed=3), 300
    filtered = name == "exhausted"

    class Filtered(PathTables):
        def draft(self, context: Tensor) -> Tensor:
            law = super().draft(context)
            kept = law.masked_fill(law < law.topk(3, -1).values[..., -1:], 0.0)
            return kept / kept.sum(-1, keepdim=True)

    played = play(Filtered(vocab=6, noise=0.7, seed=3) if filtered else tables, POLICIES[name], rows, depth=5)
    tree, verdict = played.tree, played.verdict
    tree.check()
    p = tables.target(played.contexts)
    u = numbers(rows, 2)(torch.arange(tree.width)[None]).tolist()
    longest = 0
    for b in range(rows):
        path, y, tests = walk(tree, b, p[b], u[b])
        k = int(verdict.k[b])
        assert (verdict.path[b, : k + 1].tolist(), int(verdict.y[b]), int(verdict.examined[b])) == (path, y, tests), b
        longest = max(longest, k)
    assert longest >= 2 and not verdict.fault.any() and not verdict.underflow.any()
    # without `fanout` (a tree that does not know it) nothing changes
    again = verify_tree(replace(tree, fanout=None), lambda i: p[torch.arange(rows), i], torch.tensor(u))
    assert torch.equal(again.path, verdict.path) and torch.equal(again.y, verdict.y)


def test_ragged_trees_are_verified_as_if_alone() -> None:
    tables, rows = PathTables(seed=5), 60
    policy = DySpecPolicy(8, 4)
    want, depth = [b % 9 for b in range(rows)], [1 + b % 4 for b in range(rows)]
    roots = tables.roots(rows, apart=True)
    tree = policy.grow(TableSource(tables, roots), torch.zeros(rows).long(), want, depth, numbers(rows, 1))
    tree.check()
    assert (tree.size - 1).tolist() == [min(n, n if n else 0) for n in want] or (
        tree.size - 1 <= torch.tensor(want)
    ).all()
    assert (torch.where(tree.real(), tree.depth, 0).amax(1) <= torch.tensor(depth)).all()
    contexts = tables.contexts(tree, roots)
    u = numbers(rows, 2)(torch.arange(tree.width)[None])
    whole = verify_tree(tree, lambda i: tables.target(contexts[torch.arange(rows), i]), u)
    for b in range(0, rows, 7):
        path, y, _ = walk(tree, b, tables.target(contexts[b]), u[b].tolist())
        assert whole.path[b, : len(path)].tolist() == path and int(whole.y[b]) == y


# Hand-worked ---------------------------------------------------------------------------------------------------------


def two_children(q: list[float], tokens: list[int], **kwargs: bool) -> Tree:
    tree = Tree.from_rows([[9, *tokens]], [[-1, 0, 0]], CPU, torch.tensor([[q]]), [[0, NO_LAW, NO_LAW]])
    return replace(tree, **kwargs)


def verdict_of(tree: Tree, p: list[float], u: list[float]) -> TreeVerdict:
    law = torch.tensor([p])
    return verify_tree(tree, lambda node: law.expand(len(node), -1), torch.tensor([u]).double())


def test_residual_first_then_the_draft_law_loses_the_token() -> None:
    # p 0.2 0.3 0.5, q 0.6 0.3 0.1; x1 = 0 passes iff u < 1/3. Rejected: p' = (0, 0, 1), q' = (0, 3/4, 1/4).
    # x2 = 1 can then never pass; x2 = 2 passes for sure.
    p, q = [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]
    first = verdict_of(two_children(q, [0, 1]), p, [0.5, 0.33, 0.0])
    assert (first.k.item(), first.path.tolist(), first.examined.item()) == (1, [[0, 1]], 1)
    neither = verdict_of(two_children(q, [0, 1]), p, [0.5, 0.34, 0.0])
    assert (neither.k.item(), neither.y.item(), neither.examined.item()) == (0, 2, 2)
    second = verdict_of(two_children(q, [0, 2]), p, [0.5, 0.34, 0.999])
    assert (second.k.item(), second.path.tolist()) == (1, [[0, 2]])
    assert second.beta_sum.item() == pytest.approx(0.6 + 0.25), "1 - TV(p, q), then 1 - TV(p', q')"


def test_with_replacement_the_draft_law_stays() -> None:
    # after the rejection of 0: p' = (0, 0, 1) and still q = (0.6, 0.3, 0.1): 1 - TV = 0.1
    tree = two_children([0.6, 0.3, 0.1], [0, 0], replacement=True)
    verdict = verdict_of(tree, [0.2, 0.3, 0.5], [0.5, 0.34, 0.0])
    assert (verdict.k.item(), verdict.y.item(), verdict.examined.item()) == (0, 2, 2)
    assert verdict.beta_sum.item() == pytest.approx(0.6 + 0.1)


def test_no_residual_is_counted_and_never_nan() -> None:
    # p <= q everywhere up to rounding (both float32 sums fall short of 1 differently), and u above p / q
    p, q = [0.5, 0.4999], [0.5001, 0.4999]
    verdict = verdict_of(two_children(q, [0, 1]), p, [0.3, 0.99999, 0.99999])
    assert verdict.underflow.item() == 1 and verdict.fault.item() == 0
    assert verdict.k.item() == 1 or verdict.y.item() in (0, 1)


def test_faults() -> None:
    nan = float("nan")
    assert verdict_of(two_children([0.6, 0.3, 0.1], [0, 1]), [nan] * 3, [0.5] * 3).fault.item() == Fault.TARGET
    assert verdict_of(two_children([0.6, 0.4, 0.0], [2, 0]), [0.2, 0.3, 0.5], [0.5] * 3).fault.item() == Fault.DRAFT
    deterministic = Tree.from_rows([[1, 0]], [[-1, 0]], CPU)
    assert verdict_of(deterministic, [nan] * 3, [0.5, 0.5]).fault.item() == Fault.TARGET
    broken = verify_tree_greedy(deterministic, lambda node: (node * 0, node < 0))
    assert broken.fault.item() == Fault.TARGET


def test_deterministic_acceptance_is_the_mass_of_the_children() -> None:
    """Guarantee 6: one draw a node; accepted with sum_{children} p."""
    rows = 40_000
    p = PathTables(seed=8).target(torch.ones(1, dtype=torch.int64))
    tree = Tree.from_rows([[0, 1, 3, 5]] * rows, [[-1, 0, 0, 0]] * rows, CPU)
    verdict = verify_tree(tree, lambda node: p.expand(rows, -1), numbers(rows, 2)(torch.arange(4)[None]))
    mass = float(p[0, [1, 3, 5]].sum())
    assert float(verdict.beta_sum.mean()) == pytest.approx(mass)
    error = (mass * (1 - mass) / rows) ** 0.5
    assert abs(float(verdict.k.double().mean()) - mass) < 3 * error


def test_one_draw_is_accepted_with_one_minus_tv() -> None:
    """Guarantee 5."""
    tables, rows = PathTables(seed=9), 40_000
    played = play(tables, ChainPolicy(1), rows, depth=1, apart=False)
    root = tables.roots(1, apart=False)
    beta = float(torch.minimum(tables.target(root), tables.draft(root)).sum())
    rate = float(played.verdict.k.double().mean())
    assert abs(rate - beta) < 3 * (beta * (1 - beta) / rows) ** 0.5
    assert float(played.verdict.beta_sum.mean()) == pytest.approx(beta)


def test_greedy_follows_the_argmax() -> None:
    tree = Tree.from_rows([[0, 4, 5, 6], [0, 4, 5, 6]], [[-1, 0, 0, 2], [-1, 0, 0, 1]], CPU)
    best = {0: 5, 1: 1, 2: 6, 3: 8}

    def choices(node: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([best[int(i)] for i in node]), torch.ones(len(node), dtype=torch.bool)

    verdict = verify_tree_greedy(tree, choices)
    assert verdict.k.tolist() == [2, 1] and verdict.y.tolist() == [8, 6]
    assert verdict.path.tolist() == [[0, 2, 3], [0, 2, 0]]
    assert verdict.examined.tolist() == [2, 1] and verdict.beta_sum.tolist() == [2.0, 1.0]


# Drawing -------------------------------------------------------------------------------------------------------------


def test_children_have_the_law_of_draws_without_replacement() -> None:
    law = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).double()
    rows = 20_000
    u = numbers(rows, 7)(torch.arange(6).view(1, 3, 2))
    found = draw_children(law.expand(rows, -1), u)
    pairs = found.tokens[:, 0] * 5 + found.tokens[:, 1]
    want = torch.tensor([float(law[a] * law[b] / (1 - law[a])) if a != b else 0.0 for a in range(5) for b in range(5)])
    test = chi_square(pairs.bincount(minlength=25), want)
    assert test.p_value > 0.001 and test.detectable_tv < 0.03, str(test)
    shares = law[found.tokens[:, 1]] / (1 - law[found.tokens[:, 0]])
    torch.testing.assert_close(found.share[:, 1], shares)
    later = draw_children(law.expand(rows, -1), u[:, 2:], taken=found.tokens[:, :2])
    assert torch.equal(later.tokens[:, 0], found.tokens[:, 2]), "a chunk drawn later is the same chunk"


def test_nothing_left_to_draw_has_no_share_and_picks_are_the_likeliest() -> None:
    law = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]])
    found = draw_children(law, torch.full((2, 3, 2), 0.5).double())
    assert (found.share[:, 2] == 0).all() and found.share[1, 1] == 0 and (found.tokens < 3).all()
    picked = pick_children(law, 5)
    assert picked.tokens[0, :2].tolist() == [0, 1] and picked.share[0].tolist() == [0.75, 1.0, 0.0, 0.0, 0.0]
    assert len({slot(slot(1, a), b) for a in range(40) for b in range(40)} | {slot(1, a) for a in range(40)}) == 1640


def test_a_large_vocabulary_is_drawn_in_blocks() -> None:
    law = torch.randn(3, 3001, generator=torch.Generator().manual_seed(1)).mul(3).softmax(-1)
    u = numbers(3, 4)(torch.arange(400).view(1, 200, 2))
    found = draw_children(law, u)
    assert all(len(set(row)) == 200 for row in found.tokens.tolist())
    before = law.gather(1, found.tokens).double().cumsum(1)
    left = law.sum(1, dtype=torch.float64, keepdim=True) - torch.nn.functional.pad(before, (1, -1))
    torch.testing.assert_close(found.share, law.gather(1, found.tokens).double() / left, rtol=1e-6, atol=0)


# The law -------------------------------------------------------------------------------------------------------------


def law_test(tables: PathTables, played: Round, seed: int = 0) -> ChiSquare:
    pairs = first_pairs(tables, played, seed)
    return chi_square((pairs[:, 0] * tables.vocab + pairs[:, 1]).bincount(minlength=36), pair_law(tables).flatten())


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "exhausted"])
def test_every_policy_keeps_the_law(name: str) -> None:
    """Guarantee 1 of both specs: the first two tokens of 5000 rounds, by chi-square; the power is stated."""
    tables = PathTables(seed=1)
    test = law_test(tables, play(tables, POLICIES[name], 5000, depth=5, apart=False, seed=3), seed=3)
    assert test.p_value > 0.001, str(test)
    assert test.detectable_tv < 0.06, str(test)


def pruned(tree: Tree) -> Tree:
    """Drawn children with q < 0.15 are dropped after a look at them, as no sampled tree may be."""
    assert tree.law is not None and tree.law_row is not None
    rows = torch.arange(tree.batch).unsqueeze(1)
    whose = tree.law_row.gather(1, tree.parent.clamp_min(0)).clamp_min(0)
    poor = (tree.law[rows, whose, tree.tokens] < 0.15) & (tree.depth > 0)
    keep = tree.real() & ~(tree.ancestors() & poor.unsqueeze(1)).any(2)
    tokens, parent, law_row = [], [], []
    for b in range(tree.batch):
        kept = keep[b].nonzero().squeeze(1).tolist()
        place = {-1: -1} | {old: new for new, old in enumerate(kept)}
        tokens.append(tree.tokens[b, kept].tolist())
        parent.append([place[int(tree.parent[b, i])] for i in kept])
        law_row.append(tree.law_row[b, kept].tolist())
    return Tree.from_rows(tokens, parent, CPU, tree.law, law_row)


def original(tree: Tree) -> Tree:
    return replace(tree, replacement=True)


MUTANTS: dict[str, Callable[[Tree], Tree]] = {"pruned": pruned, "q keeps the token": original}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_negative_control_of_trees(mutant: str) -> None:
    """Guarantee 2 of tree-speculation: the very test above fails."""
    tables = PathTables(seed=1)
    policy = DySpecPolicy(8, 8) if mutant == "pruned" else FixedWidthsPolicy([3, 2])
    played = play(tables, policy, 6000, depth=5, apart=False, seed=3, change=[MUTANTS[mutant]])
    assert law_test(tables, played, seed=3).p_value < 1e-6


@pytest.mark.parametrize(
    "name, broken",
    [
        ("residual", lambda p, q: p),
        ("accepts", lambda u, p, q: u * q < 1.3 * p),
    ],
)
def test_negative_control_of_the_rule(name: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, name, broken)
    tables = PathTables(seed=1)
    played = play(tables, FixedWidthsPolicy([2, 2]), 6000, depth=5, apart=False, seed=3)
    assert law_test(tables, played, seed=3).p_value < 1e-6


def test_order_of_nodes_does_not_matter() -> None:
    """Guarantee 5 of dyspec: depth-first order, the same uniforms, the same verdict."""
    tables, rows = PathTables(seed=4), 80
    policy = DySpecPolicy(10, 5)
    played = play(tables, policy, rows, depth=5)
    tree, u = played.tree, numbers(rows, 2)(torch.arange(played.tree.width)[None])
    assert tree.law_row is not None
    tokens, parent, law_row, orders = [], [], [], []
    for b in range(rows):
        above = tree.parent[b].tolist()
        stack, order = [0], []
        while stack:  # depth first, siblings in the order of drawing
            node = stack.pop()
            order.append(node)
            stack += [c for c in range(len(above) - 1, 0, -1) if above[c] == node]
        place = {old: new for new, old in enumerate(order)}
        tokens.append([int(tree.tokens[b, i]) for i in order])
        parent.append([-1 if i == 0 else place[int(tree.parent[b, i])] for i in order])
        law_row.append([int(tree.law_row[b, i]) for i in order])
        orders.append(order)
    other = Tree.from_rows(tokens, parent, CPU, tree.law, law_row)
    index = torch.tensor(orders)
    contexts = tables.contexts(other, tables.roots(rows, apart=True))
    torch.testing.assert_close(tables.target(contexts), tables.target(played.contexts.gather(1, index)))
    verdict = verify_tree(other, lambda i: tables.target(contexts[torch.arange(rows), i]), u.gather(1, index))
    back = index.gather(1, verdict.path)
    steps = torch.arange(back.shape[1]) <= verdict.k.unsqueeze(1)
    assert torch.equal(verdict.k, played.verdict.k) and torch.equal(verdict.y, played.verdict.y)
    assert torch.equal(torch.where(steps, back, 0), played.verdict.path[:, : back.shape[1]])
