"""Traversal verification: exact over tree shapes, and the shipped walk held to the exact one by all its laws."""

import itertools
import random
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from draftsmith.inference import registry
from draftsmith.inference.acceptance import Fault
from draftsmith.inference.block_verification import verify_block
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.traversal_verification import verify_traversal
from draftsmith.inference.tree import Tree
from tests import exact_rules as exact
from tests.fakes import chi_square, markov, near, requests_for, string_law


def height(shape: exact.Shape, v: int = 0) -> int:
    return max((1 + height(shape, c) for c in shape.get(v, [])), default=0)


@pytest.mark.parametrize("replace", [True, False], ids=["with replacement", "without"])
@pytest.mark.parametrize("shape", exact.SHAPES)
def test_lossless_and_never_worse_than_the_token_rule(shape: str, replace: bool) -> None:
    rng = random.Random(5)
    tree, vocab, deep, done = exact.SHAPES[shape], 2, height(exact.SHAPES[shape]), 0
    while done < 2:
        p, q = exact.random_table(rng, vocab, deep), exact.random_table(rng, vocab, deep)
        emitted, length = exact.tree_rule(exact.traversal_rule, tree, p, q, vocab, replace)
        if emitted is None:  # some node has too few tokens to draw two different ones
            continue
        done += 1
        assert exact.completed(emitted, p, vocab, deep + 1) == exact.string_law(p, vocab, deep + 1)
        token, token_length = exact.tree_rule(exact.recursive_rule, tree, p, q, vocab, replace)
        assert exact.completed(token, p, vocab, deep + 1) == exact.string_law(p, vocab, deep + 1)
        assert length >= token_length


def sampled_tree(
    shape: exact.Shape, tokens: dict[int, int], q: exact.Table, rows: int, replace: bool
) -> tuple[Tree, dict[int, tuple[int, ...]]]:
    """The shape with these tokens as a batch of equal rows, and each node's prefix."""
    parent = {c: v for v, children in shape.items() for c in children}
    prefix: dict[int, tuple[int, ...]] = {0: ()}
    for c in sorted(parent):
        prefix[c] = (*prefix[parent[c]], tokens[c])
    nodes = range(len(parent) + 1)
    law = torch.tensor([[float(v) for v in q[prefix[i]]] for i in nodes], dtype=torch.float64)
    tree = Tree.from_rows(
        [[tokens.get(i, 0) for i in nodes]] * rows,
        [[parent.get(i, -1) for i in nodes]] * rows,
        torch.device("cpu"),
        law.expand(rows, -1, -1),
        [list(nodes)] * rows,
    )
    return Tree(**{**vars(tree), "replacement": replace}), prefix


def emitted_law(
    shape: exact.Shape, tokens: dict[int, int], p: exact.Table, q: exact.Table, replace: bool
) -> dict[tuple[int, ...], Fraction]:
    """What the exact rule emits for one draft."""
    want: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)

    def emit(path: tuple[int, ...], law: exact.Law, chance: Fraction) -> None:
        for t in range(3):
            want[*path, t] += chance * law[t]

    exact.traversal_rule(shape, tokens, p, q, replace, emit)
    return want


@pytest.mark.parametrize("replace", [True, False], ids=["with replacement", "without"])
@pytest.mark.parametrize("shape", exact.SHAPES)
def test_the_shipped_walk_follows_the_exact_one(shape: str, replace: bool) -> None:
    """One draft per case, 8000 rows with their own uniforms: what was kept and drawn has the exact rule's law."""
    rng = random.Random(6)
    structure = exact.SHAPES[shape]
    deep, cases = height(structure), 0
    while cases < 2:
        p, q = exact.random_table(rng, 3, deep), exact.random_table(rng, 3, deep)
        drafts = exact.drafts_of(structure, q, replace)
        if not drafts:
            continue
        cases += 1
        tokens = rng.choice(drafts)[0]
        want = emitted_law(structure, tokens, p, q, replace)
        rows = 8000
        tree, prefix = sampled_tree(structure, tokens, q, rows, replace)
        p_nodes = torch.tensor([[float(v) for v in p[prefix[i]]] for i in range(tree.width)], dtype=torch.float64)
        u = torch.rand(rows, tree.width, generator=torch.Generator().manual_seed(cases), dtype=torch.float64)
        got = verify_traversal(tree, lambda nodes, laws=p_nodes: laws[nodes], u)
        assert (got.fault == 0).all()
        cells = sorted(want)
        index = {z: i for i, z in enumerate(cells)}
        seen = [
            index.get((*(int(tree.tokens[0, v]) for v in path[1 : k + 1]), y), len(cells))
            for path, k, y in zip(got.path.tolist(), got.k.tolist(), got.y.tolist(), strict=True)
        ]
        counts = torch.tensor(seen).bincount(minlength=len(cells) + 1)
        law = torch.tensor([*(float(want[z]) for z in cells), 0.0], dtype=torch.float64)
        test = chi_square(counts, law)
        assert test.p_value > 1e-4, f"{shape}, {tokens}: {test}"


def random_laws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)


def test_on_a_chain_it_is_the_block_rule() -> None:
    rows, g, vocab = 500, 4, 5
    p, q = random_laws(rows, g + 1, vocab, seed=0), random_laws(rows, g, vocab, seed=1)
    x = torch.multinomial(q.view(-1, vocab), 1, generator=torch.Generator().manual_seed(2)).view(rows, g)
    u = torch.rand(rows, g + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tree = Tree.from_rows(
        [[0, *row] for row in x.tolist()],
        [[-1, *range(g)]] * rows,
        torch.device("cpu"),
        q,
        [[*range(g), -1]] * rows,
    )
    block = verify_block(x, q, p, torch.full((rows,), g), u[:, 1:], u[:, 0])
    got = verify_traversal(tree, lambda nodes: p[torch.arange(rows), nodes], u)
    assert torch.equal(got.k, block.k) and torch.equal(got.y, block.y)
    assert got.path.tolist() == [[i if i <= k else 0 for i in range(g + 1)] for k in block.k.tolist()]


def test_deterministic_trees_keep_the_law_and_accept_the_mass_of_the_children() -> None:
    rows = 20_000
    p = random_laws(5, 4, seed=4)
    tree = Tree.from_rows([[0, 1, 2, 3, 0]] * rows, [[-1, 0, 0, 1, 1]] * rows, torch.device("cpu"))
    u = torch.rand(rows, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = verify_traversal(tree, lambda nodes: p[nodes], u)
    first = torch.where(got.k > 0, tree.tokens[0, got.path[:, 1]], got.y)
    assert chi_square(first.bincount(minlength=4), p[0]).p_value > 1e-3
    assert float((got.k > 0).double().mean()) == pytest.approx(float(p[0, 1] + p[0, 2]), abs=0.015)
    inner = got.path[:, 1] == 1
    second = torch.where(got.k[inner] > 1, tree.tokens[0, got.path[inner][:, 2]], got.y[inner])
    assert chi_square(second.bincount(minlength=4), p[1]).p_value > 1e-3


def test_ragged_batches_padding_and_faults() -> None:
    q = random_laws(1, 3, seed=6)
    tree = Tree.from_rows(
        [[0, 1, 2], [0, 1], [0]],
        [[-1, 0, 0], [-1, 0], [-1]],
        torch.device("cpu"),
        q.expand(3, 1, 3),
        [[0, -1, -1], [0, -1], [-1]],
    )
    p = random_laws(3, 3, seed=7)
    alone = Tree.from_rows([[0, 1]], [[-1, 0]], torch.device("cpu"), q[None], [[0, -1]])
    for u_ in itertools.product((0.1, 0.9), repeat=3):
        u = torch.tensor([u_]).double().expand(3, 3)
        got = verify_traversal(tree, lambda nodes: p[nodes], u)
        one = verify_traversal(alone, lambda nodes: p[nodes], u[:1, :2])
        assert got.k[2] == 0 and (got.k[1], got.y[1]) == (one.k[0], one.y[0])
        assert got.examined.tolist()[2] == 0 and got.examined[0] >= 1
    nan = p.clone()
    nan[1] = float("nan")
    got = verify_traversal(tree, lambda nodes: nan[nodes], torch.full((3, 3), 0.5).double())
    assert got.fault.tolist()[:2] == [Fault.TARGET] * 2 and got.fault[2] == Fault.NONE
    impossible = torch.tensor([[[0.5, 0.0, 0.5]]]).double()
    bad = Tree.from_rows([[0, 1]], [[-1, 0]], torch.device("cpu"), impossible, [[0, -1]])
    assert verify_traversal(bad, lambda nodes: p[nodes], torch.full((1, 2), 0.5).double()).fault == Fault.DRAFT


# The decoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [False, True])
def test_sampled_law_of_the_tree_decoder_and_more_tokens_than_the_token_rule(replacement: bool) -> None:
    target = markov(6, 2, seed=1)
    params = SamplingParams(temperature=1.0)
    per_call = {}
    for rule in ("traversal", "token"):
        decoder = registry.build(
            "tree",
            {"target": target, "draft": near(target)},
            sampling=params,
            settings={"policy": "fixed", "widths": "2-2-1", "verification": rule, "replacement": replacement},
            seed=5,
        )
        result = decoder.decode(requests_for(((1,), (2, 3)), 10_000, 6))
        assert result.notes["rule"] == rule
        per_call[rule] = sum(result.rounds.committed) / len(result.rounds)
        for i, prompt in enumerate(((1,), (2, 3))):
            test = string_law(target, prompt, 3, params).test(result.output[i::2], 3)
            assert test.p_value > 1e-3, str(test)
    assert per_call["traversal"] > per_call["token"]
