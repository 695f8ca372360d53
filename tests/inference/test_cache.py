"""The static cache against a model made of Python lists, and its refusals."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidValue

LAYERS, HEADS, DIM, CAPACITY = 2, 2, 3, 12


def make(batch: int, value_dim: int | None = None) -> StaticCache:
    return StaticCache(LAYERS, batch, HEADS, DIM, CAPACITY, torch.float32, "cpu", value_dim=value_dim)


def put(cache: StaticCache, ids: torch.Tensor, joint: bool = False) -> None:
    """Write ids [B, n] into every layer: keys hold id + layer, values the negative, so that a mix-up shows."""
    n = ids.shape[1]
    cache.reserve(n)
    slots = None if cache.even else cache.positions(n)
    for layer in range(LAYERS):
        k = (ids + layer).float()[:, None, :, None].expand(-1, HEADS, -1, DIM)
        v = -k[..., :1].expand(-1, -1, -1, cache.values[0].shape[3])
        if joint:
            cache.write_joint(layer, torch.cat((k, v), 1).transpose(1, 2), slots)
        else:
            keys, values = cache.write(layer, k, v, slots)
            assert keys.shape[2] == values.shape[2] == cache.longest + n
    cache.advance(n)


def rows(cache: StaticCache) -> list[list[int]]:
    """The ids that the cache holds, after checking that heads, widths, layers, keys and values agree."""
    found = []
    for b, length in enumerate(cache.lengths):
        ids = cache.keys[0][b, 0, :length, 0]
        for layer in range(LAYERS):
            assert torch.equal(cache.keys[layer][b, :, :length], (ids + layer)[None, :, None].expand(HEADS, -1, DIM))
            values = cache.values[layer][b, :, :length]
            assert torch.equal(values, -(ids + layer)[None, :, None].expand_as(values))
        found.append([int(i) for i in ids])
    return found


@settings(max_examples=150)
@given(data=st.data(), batch=st.integers(1, 3), value_dim=st.sampled_from([None, 5]))
def test_any_sequence_of_operations_agrees_with_lists(data: st.DataObject, batch: int, value_dim: int | None) -> None:
    cache, model, fresh = make(batch, value_dim), [[] for _ in range(batch)], iter(range(100, 10_000))
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["write", "write", "truncate", "keep", "select", "expand"]))
        if action == "write":
            n = data.draw(st.integers(1, 4))
            if max(map(len, model)) + n > CAPACITY:
                with pytest.raises(InvalidValue, match="is full"):
                    cache.reserve(n)
                continue
            ids = [[next(fresh) for _ in range(n)] for _ in model]
            put(cache, torch.tensor(ids), joint=value_dim is None and data.draw(st.booleans()))
            model = [row + new for row, new in zip(model, ids, strict=True)]
        elif action == "truncate":
            lengths = [data.draw(st.integers(0, len(row))) for row in model]
            cache.truncate(lengths)
            model = [row[:length] for row, length in zip(model, lengths, strict=True)]
        elif action == "keep" and min(map(len, model)) > 0:
            nodes = data.draw(st.integers(1, min(map(len, model))))  # the last `nodes` tokens are a tree
            width = data.draw(st.integers(1, nodes))
            paths = [
                sorted(data.draw(st.sets(st.integers(0, nodes - 1), min_size=width, max_size=width))) for _ in model
            ]
            start = [len(row) - nodes for row in model]
            cache.keep(torch.tensor(paths), start)
            model = [row[:s] + [row[s + i] for i in path] for row, s, path in zip(model, start, paths, strict=True)]
        elif action == "select":
            chosen = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=4))
            cache.select(chosen)
            model = [list(model[i]) for i in chosen]
        elif action == "expand" and len(model) <= 2:
            cache.expand(2)
            model = [list(row) for row in model for _ in range(2)]
        assert cache.lengths == [len(row) for row in model]
        assert cache.batch == len(model)
        assert cache.positions(2).tolist() == [[len(row), len(row) + 1] for row in model]
        assert rows(cache) == model


def test_rollback_moves_no_storage() -> None:
    cache = make(1)
    put(cache, torch.tensor([[7, 8, 9]]))
    before = [k.data_ptr() for k in cache.keys]
    cache.truncate([1])
    assert [k.data_ptr() for k in cache.keys] == before
    put(cache, torch.tensor([[5]]))
    assert rows(cache) == [[7, 5]]


def test_a_copy_of_rows_is_independent() -> None:
    cache = make(1)
    put(cache, torch.tensor([[7]]))
    cache.expand(2)
    cache.keys[0][0] += 1
    assert cache.keys[0][1, 0, 0, 0] == 7


def test_bytes_and_layout() -> None:
    cache = StaticCache(2, 3, [1, 2], [4, 6], 5, torch.bfloat16, "cpu", value_dim=[4, 2])
    assert [tuple(k.shape) for k in cache.keys] == [(3, 1, 5, 4), (3, 2, 5, 6)]
    assert [tuple(v.shape) for v in cache.values] == [(3, 1, 5, 4), (3, 2, 5, 2)]
    assert cache.nbytes() == 2 * (3 * 1 * 5 * (4 + 4) + 3 * 2 * 5 * (6 + 2))


def test_made_under_inference_mode_it_still_can_be_written_outside() -> None:
    with torch.inference_mode():
        cache = make(2)
        put(cache, torch.tensor([[1], [2]]))
        cache.select([1, 0])
    put(cache, torch.tensor([[3], [4]]))
    cache.keep(torch.tensor([[1], [1]]), [0, 0])
    assert rows(cache) == [[3], [4]]


def test_ragged_write_without_slots_is_our_own_mistake() -> None:
    cache = make(2)
    put(cache, torch.tensor([[1, 2], [3, 4]]))
    cache.truncate([2, 1])
    with pytest.raises(AssertionError):
        cache.write(0, torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, DIM))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.truncate([3, 0]), r"cannot truncate rows of \[2, 2\] tokens to \[3, 0\]"),
        (lambda c: c.truncate([1]), "cannot truncate"),
        (lambda c: c.truncate([-1, 0]), "cannot truncate"),
        (lambda c: c.reserve(CAPACITY), "is full"),
        (lambda c: c.select([]), "cannot select"),
        (lambda c: c.select([2]), "cannot select"),
        (lambda c: c.keep(torch.tensor([[0, 1], [0, 1]]), [0, 1]), "cannot keep 2 slots"),
        (lambda c: c.keep(torch.tensor([[0]]), [0, 0]), "one start and path"),
        (lambda c: make(0), "at least one row"),
    ],
)
def test_refusals(act: object, message: str) -> None:
    cache = make(2)
    put(cache, torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(InvalidValue, match=message):
        act(cache)  # type: ignore[operator]  # a lambda of the table
    assert rows(cache) == [[1, 2], [3, 4]]
