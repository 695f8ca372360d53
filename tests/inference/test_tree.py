"""Token trees: structure, masks, checks, orders; and a pass over a tree equals passes over its paths."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.tree import NO_LAW, Tree, count_blocks, depth_first
from tests.engines import SIZES, plain, tiny_hf, tokens

CPU = torch.device("cpu")
parents = st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(-1), *(st.integers(0, i) for i in range(n)))).map(list)


def above(parent: list[int], node: int) -> list[int]:
    """A node's ancestors, itself included, from the root down."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return path[::-1]


def tree_of(*rows: list[int]) -> Tree:
    return Tree.from_rows([[100 + i for i in range(len(row))] for row in rows], rows, CPU)


@settings(max_examples=60, deadline=None)
@given(st.lists(parents, min_size=1, max_size=3))
def test_structure(rows: list[list[int]]) -> None:
    tree = tree_of(*rows)
    tree.check()
    first, following = tree.kin()
    seen = tree.ancestors()
    assert tree.size.tolist() == [len(row) for row in rows] and tree.width == max(map(len, rows))
    for b, parent in enumerate(rows):
        children: list[list[int]] = [[c for c in range(1, len(parent)) if parent[c] == i] for i in range(len(parent))]
        for i in range(len(parent)):
            assert seen[b, i].nonzero().squeeze(1).tolist() == sorted(above(parent, i))
            assert int(tree.depth[b, i]) == len(above(parent, i)) - 1 <= tree.height
            assert int(first[b, i]) == (children[i][0] if children[i] else -1)
            assert len(children[i]) <= (tree.fanout[int(tree.depth[b, i])] if children[i] else 0)
            siblings = children[parent[i]] if i else []
            later = [c for c in siblings if c > i]
            assert int(following[b, i]) == (later[0] if later else -1)
        assert not seen[b, len(parent) :, 1 : len(parent)].any(), "padding sees no node but the root and itself"


@settings(max_examples=40, deadline=None)
@given(st.lists(parents, min_size=1, max_size=3), st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_mask_shows_the_text_the_ancestors_and_the_node_itself(rows: list[list[int]], lengths: list[int]) -> None:
    tree, lengths = tree_of(*rows), lengths[: len(rows)]
    mask = tree.mask(lengths, torch.float32)
    assert mask.shape == (len(rows), 1, tree.width, max(lengths) + tree.width)
    positions = tree.positions(lengths)
    for b, parent in enumerate(rows):
        for i in range(len(parent)):
            want = [*range(lengths[b]), *(lengths[b] + j for j in sorted(above(parent, i)))]
            assert (mask[b, 0, i] == 0).nonzero().squeeze(1).tolist() == want
            assert int(positions[b, i]) == lengths[b] + len(above(parent, i)) - 1


@settings(max_examples=60, deadline=None)
@given(parents, st.integers(1, 5))
def test_depth_first_order_and_blocks(parent: list[int], block: int) -> None:
    order = depth_first(parent)
    assert sorted(order) == list(range(len(parent))) and order[0] == 0
    place = {old: new for new, old in enumerate(order)}
    assert all(place[parent[i]] < place[i] for i in range(1, len(parent)))
    renamed = [-1 if parent[old] < 0 else place[parent[old]] for old in order]
    for tree in (tree_of(parent), tree_of(renamed)):
        seen = tree.ancestors()
        n = seen.shape[-1]
        tiles = {(i // block, j // block) for i in range(n) for j in range(n) if seen[0, i, j]}
        assert count_blocks(seen, block).tolist() == [len(tiles)]
    for child in range(1, len(parent)):  # a node's subtree stands together
        inside = [place[i] for i in range(len(parent)) if child in above(parent, i)]
        assert max(inside) - min(inside) == len(inside) - 1


def test_depth_first_needs_fewer_blocks_than_a_shuffled_tree() -> None:
    generator = torch.Generator().manual_seed(0)
    parent = [-1] + [int(torch.randint(max(0, i - 40), i, (), generator=generator)) for i in range(1, 256)]
    order = depth_first(parent)
    place = {old: new for new, old in enumerate(order)}
    ordered = [-1 if parent[old] < 0 else place[parent[old]] for old in order]
    before, after = (int(count_blocks(tree_of(p).ancestors(), 32)[0]) for p in (parent, ordered))
    assert after < before
    with pytest.raises(InvalidValue, match="at least one row"):
        count_blocks(tree_of(parent).ancestors(), 0)


@pytest.mark.parametrize(
    "parent, node", [([-1, 1], 1), ([0, 0], 0), ([-1, -1], 1), ([-1, 0, 2, 1], 2), ([-1, 0, -2], 2), ([-1, 3, 1, 2], 1)]
)
def test_a_tree_that_is_none(parent: list[int], node: int) -> None:
    message = f"tree not topological at node {node} of row 0"
    with pytest.raises(InvalidValue, match=message):
        tree_of(parent)
    shape = torch.tensor([parent])
    depth = torch.tensor([[0, *[1] * (len(parent) - 1)]])
    with pytest.raises(InvalidValue, match="tree not topological"):
        Tree(shape, shape, depth, torch.tensor([len(parent)]), 1).check()


def test_a_wrong_depth_is_found() -> None:
    tree = Tree(torch.zeros(1, 3).long(), torch.tensor([[-1, 0, 1]]), torch.tensor([[0, 1, 1]]), torch.tensor([3]), 2)
    with pytest.raises(InvalidValue, match="node 2 of row 0"):
        tree.check()


LAW = torch.tensor([[[0.5, 0.3, 0.2, 0.0]]])


def sampled(law: Tensor, tokens_: list[int], law_row: list[int] | None = None) -> Tree:
    rows = [0] + [NO_LAW] * (len(tokens_) - 1) if law_row is None else law_row
    return Tree.from_rows([tokens_], [[-1] + [0] * (len(tokens_) - 1)], CPU, law, [rows])


@pytest.mark.parametrize(
    "tree, message",
    [
        (sampled(LAW * 1.01, [1, 0]), "at node 0 of row 0 is none: it sums to 1.01"),
        (sampled(LAW - torch.tensor([0.0, 0.0, 0.25, -0.25]), [1, 0]), "negative entry"),
        (sampled(LAW * float("nan"), [1, 0]), "or a NaN"),
        (sampled(LAW, [1, 3]), "node 1 of row 0 is an impossible draw: token 3"),
        (sampled(LAW, [1, 0, 3]), "node 2 of row 0 is an impossible draw: token 3"),
        (sampled(LAW, [1, 0], [NO_LAW, NO_LAW]), "node 0 of row 0 has children but no law"),
    ],
)
def test_laws_that_are_none(tree: Tree, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        tree.check()


def test_a_child_behind_an_exhausted_law_is_no_error() -> None:
    sampled(torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), [1, 0, 1, 3]).check()


@pytest.fixture(scope="module")
def nets() -> tuple[Any, NativeEngine]:
    model = tiny_hf("llama", **SIZES)
    net = CausalLM(CausalLMConfig.from_hf(model.config)).eval()
    net.load_state_dict(model.state_dict())
    return model, NativeEngine(net)


def test_tree_pass_equals_passes_over_its_paths_also_after_compaction(nets: tuple[Any, NativeEngine]) -> None:
    """Guarantee 4 of tree-speculation, on ragged rows and ragged trees."""
    model, engine = nets
    rows = [[-1, 0, 0, 1, 1, 2, 3, 6], [-1, 0, 1, 2, 3], [-1, 0, 0, 0]]
    texts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 2)]
    ids = [[7, *tokens(1, len(row) - 1, seed=40 + i)[0].tolist()] for i, row in enumerate(rows)]
    tree = Tree.from_rows(ids, rows, CPU)
    cache = engine.new_cache(3, 40)
    padded = torch.tensor([t + [1] * (9 - len(t)) for t in texts])
    engine.forward(padded, cache=cache)
    lengths = [len(t) for t in texts]
    cache.truncate(lengths)
    hidden, _ = engine.forward(
        tree.tokens, cache=cache, positions=tree.positions(lengths), mask=tree.mask(lengths, engine.dtype)
    )
    logits = engine.head(hidden)
    for b, parent in enumerate(rows):
        for i in range(len(parent)):
            path = [*texts[b], *(ids[b][j] for j in above(parent, i))]
            want = plain(model, torch.tensor([path]))[0, -1]
            assert float((logits[b, i] - want).abs().max()) < 1e-5, (b, i)
    paths = torch.tensor([[0, 1, 3, 6], [0, 1, 2, 3], [0, 2, 0, 0]])
    cache.keep(paths, lengths)
    cache.truncate([lengths[0] + 4, lengths[1] + 4, lengths[2] + 2])
    after = engine.head(engine.forward(torch.tensor([[3], [4], [5]]), cache=cache)[0])
    for b, (kept, last) in enumerate(zip(([0, 1, 3, 6], [0, 1, 2, 3], [0, 2]), (3, 4, 5), strict=True)):
        want = plain(model, torch.tensor([[*texts[b], *(ids[b][j] for j in kept), last]]))[0, -1]
        assert float((after[b, 0] - want).abs().max()) < 1e-5, b


def test_a_cache_is_widened_only_while_empty(nets: tuple[Any, NativeEngine]) -> None:
    _, engine = nets
    cache = engine.new_cache(2, 4)
    cache.widen(200)  # more slots than the network has positions
    assert cache.capacity == 200 and cache.keys[0].shape[2] == 200
    cache.widen(3)
    assert cache.capacity == 200
    engine.forward(tokens(2, 2), cache=cache)
    with pytest.raises(InvalidState, match="only an empty cache"):
        cache.widen(300)
