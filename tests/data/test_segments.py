"""The segments task: its samples are valid, unlimited and the same everywhere; loaders resume."""

import math

import pytest
import torch

from draftsmith.data import segments
from draftsmith.data.batches import PADDING
from draftsmith.data.segments import EOT, MASK, PROMPT, SEP, SegmentsConfig, SegmentsDataModule, exact_nll, is_valid
from draftsmith.inference.errors import InvalidValue


def test_every_sample_is_valid_and_as_long_as_its_prompt_says() -> None:
    ids, used = segments.samples(torch.arange(2000), 24, 0)
    assert ids.shape == (2000, PROMPT + 24)
    for row, length in zip(ids.tolist(), used.tolist(), strict=True):
        assert row[PROMPT - 1] == SEP and sum(row[:3]) == length
        assert is_valid(row[:PROMPT], row[PROMPT:]) and set(row[PROMPT + length :]) == {EOT}
    spans = ids[:, :3]
    assert set(spans.unique().tolist()) == {0, 2, 3, 4, 5, 6}
    mean = sum(map(exact_nll, ids.tolist())) / 2000
    assert mean == pytest.approx(2 * math.log(10), rel=0.03)  # one to three segments, two on average


def test_starts_are_uniform_and_independent_of_the_lengths() -> None:
    ids, _ = segments.samples(torch.arange(20000), 24, 1)
    counts = torch.bincount(ids[:, PROMPT], minlength=10).double()
    chi = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("answer", "why"),
    [([1, 2, 4, 5, EOT], "breaks"), ([1, 2, EOT], "short"), ([1, 2, 3, 4, 5, EOT], "long"), ([MASK, 2, EOT], "no")],
)
def test_what_is_not_valid(answer: list[int], why: str) -> None:
    assert not is_valid([4, 0, 0, SEP], answer), why
    assert is_valid([4, 0, 0, SEP], [8, 9, 0, 1, EOT])


def test_parts_never_overlap_and_batches_repeat() -> None:
    data = SegmentsDataModule(SegmentsConfig(batch_size=4, val_samples=6))
    first = next(iter(data.train_dataloader()))
    again = next(iter(data.train_dataloader()))
    assert torch.equal(first.ids, again.ids) and first.ids.shape == (4, 28)
    val = list(data.val_dataloader())
    assert [b.sample_id.tolist() for b in val] == [[0, 1, 2, 3], [4, 5, PADDING, PADDING]]
    assert val[1].length.tolist() == [28, 28, 0, 0]
    assert not torch.equal(val[0].ids, first.ids)
    train = {tuple(r.tokens[:4]) for r in segments.requests(3, part="train")}
    assert train == {tuple(row[:4]) for row in first.ids.tolist()[:3]}
    assert segments.requests(1)[0].tokens[PROMPT:] == [MASK] * 24


def test_a_loader_goes_on_where_it_stood() -> None:
    data = SegmentsDataModule(SegmentsConfig(batch_size=4))
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed)).ids, next(batches).ids)


def test_bad_settings() -> None:
    with pytest.raises(InvalidValue, match="at least 19"):
        SegmentsConfig(answer_length=18)
    with pytest.raises(InvalidValue, match="no part 'x'"):
        segments.requests(1, part="x")
