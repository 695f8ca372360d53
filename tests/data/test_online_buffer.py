"""The buffer between serving and learning: order, due times, replay, held-out window, what is written to disk."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from draftsmith.data.batches import OnlineBatch
from draftsmith.data.online_buffer import BufferSettings, OnlineBuffer, collate, pack, unpack
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.laws import Record, TeacherLaw


def record(number: int, length: int = 6, positions: Sequence[int] = (3, 5), vocab: int = 7, tag: str = "") -> Record:
    """A record whose laws are a function of its number and positions."""
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(len(positions), vocab, generator=generator)
    return Record(
        ids=torch.randint(vocab, (length,), generator=generator),
        positions=torch.tensor(positions, dtype=torch.int64),
        law=TeacherLaw.from_logits(logits, 4),
        tag=tag,
        request=number,
        alpha=0.5,
        examined=len(positions),
    )


def fill(buffer: OnlineBuffer, numbers: Sequence[int]) -> None:
    for number in numbers:
        buffer.add(record(number), now=number)


def same(a: Record, b: Record) -> bool:
    return (
        torch.equal(a.ids, b.ids)
        and torch.equal(a.positions, b.positions)
        and torch.equal(a.law.ids, b.law.ids)
        and torch.equal(a.law.logprobs, b.law.logprobs)
        and torch.equal(a.law.tail_logmass, b.law.tail_logmass)
        and (a.tag, a.request, a.examined, a.draft_version) == (b.tag, b.request, b.examined, b.draft_version)
        and (a.alpha == b.alpha or (math.isnan(a.alpha) and math.isnan(b.alpha)))
        and (a.law.temperature, a.law.processed) == (b.law.temperature, b.law.processed)
    )


def test_take_gives_everything_in_order_and_empties() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=3))
    fill(buffer, [0, 1])
    assert not buffer.due(2)
    fill(buffer, [2])
    assert buffer.due(3)
    assert [r.request for r in buffer.take()] == [0, 1, 2]
    assert len(buffer) == 0 and not buffer.due(3)
    assert buffer.counts.used == 3


def test_an_old_record_makes_an_update_due() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=8, max_age=10))
    buffer.add(record(0), now=5)
    assert not buffer.due(14)
    assert buffer.due(15)
    assert not OnlineBuffer(BufferSettings(interval=8)).due(10**9)  # empty and without a limit


def test_records_without_positions_are_skipped_and_counted() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=1))
    buffer.add(record(0, positions=()), now=0)
    assert (len(buffer), buffer.counts.skipped, buffer.counts.added) == (0, 1, 0)


def test_a_full_buffer_drops_the_oldest_and_counts_it() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=2, capacity=3))
    fill(buffer, range(5))
    assert buffer.counts.dropped == 2
    assert [r.request for r in buffer.take()] == [2, 3, 4]


def test_replay_share_is_of_the_whole_update() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=8, replay=0.2, reservoir=64))
    fill(buffer, range(8))
    assert [r.request for r in buffer.take()] == list(range(8))  # nothing old yet
    fill(buffer, range(8, 16))
    update = [r.request for r in buffer.take()]
    assert update[:8] == list(range(8, 16))
    assert len(update) == 10 and len(set(update)) == 10  # 2 of 10 are old ones, without repetition
    assert set(update[8:]) <= set(range(8))


def test_the_reservoir_is_a_uniform_sample_of_everything_used() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        buffer = OnlineBuffer(BufferSettings(interval=1, replay=0.5, reservoir=10), seed=seed)
        for number in range(40):
            fill(buffer, [number])
            buffer.take()
        counts[[r.request for r in buffer._old]] += 1
    # 300 draws of 10 out of 40: 75 each with standard deviation 7.5
    assert counts.sum() == 3000
    assert (counts - 75).abs().max() < 5 * 7.5
    assert abs(float(counts[:20].mean() - counts[20:].mean())) < 10  # neither old nor new ones are preferred


def test_no_replay_keeps_nothing_after_use() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=1))
    fill(buffer, [0, 1])
    buffer.take()
    assert buffer._old == [] and len(buffer.heldout) == 0


def test_held_out_requests_are_never_learned_from() -> None:
    settings = BufferSettings(interval=1, holdout=0.25, holdout_size=20)
    buffer = OnlineBuffer(settings, seed=3)
    trained: set[int] = set()
    for number in range(400):
        fill(buffer, [number])
        trained |= {r.request for r in buffer.take()}
    assert buffer.counts.held_out == 400 - len(trained)
    assert 60 < buffer.counts.held_out < 140  # 100 expected, standard deviation 8.7
    assert len(buffer.heldout) == 20
    assert not trained & {r.request for r in buffer.heldout}
    again = OnlineBuffer(settings, seed=3)
    fill(again, [399, *range(399)])  # the choice depends on the request, not on what came before
    assert again.counts.held_out == buffer.counts.held_out


def test_pack_and_unpack_are_inverse() -> None:
    records = [record(0), record(1, length=9, positions=(1, 2, 8), tag="code"), record(2, positions=(5,))]
    assert all(same(a, b) for a, b in zip(records, unpack(pack(records)), strict=True))
    assert unpack(pack([])) == []


def test_state_resumes_exactly_when_text_may_be_kept() -> None:
    settings = BufferSettings(interval=4, replay=0.3, holdout=0.2, persist=True)
    straight, first = OnlineBuffer(settings), OnlineBuffer(settings)
    for buffer in (straight, first):
        fill(buffer, range(6))
        buffer.take()
        fill(buffer, range(6, 9))
    second = OnlineBuffer(settings)
    second.load_state_dict(first.state_dict())
    for buffer in (straight, second):
        fill(buffer, range(9, 12))
    a, b = straight.take(), second.take()
    assert [r.request for r in a] == [r.request for r in b]
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert asdict(straight.counts) == asdict(second.counts)
    assert [r.request for r in straight.heldout] == [r.request for r in second.heldout]


def test_private_text_is_not_in_the_state_by_default() -> None:
    buffer = OnlineBuffer(BufferSettings(interval=4, replay=0.3, holdout=0.2))
    fill(buffer, range(6))
    state = buffer.state_dict()
    assert set(state) == {"counts", "updates"}
    assert state["counts"]["lost"] == len(buffer) > 0
    resumed = OnlineBuffer(BufferSettings(interval=4))
    resumed.load_state_dict(state)
    assert len(resumed) == 0 and resumed.counts.lost == len(buffer)


def test_persisted_text_is_refused_by_a_buffer_that_may_not_keep_it() -> None:
    kept = OnlineBuffer(BufferSettings(persist=True))
    fill(kept, range(2))
    with pytest.raises(InvalidValue, match="persist_buffer is false"):
        OnlineBuffer(BufferSettings()).load_state_dict(kept.state_dict())


def test_file_round_trip(tmp_path: Path) -> None:
    settings = BufferSettings(interval=2, replay=0.5, holdout=0.2, persist=True)
    buffer = OnlineBuffer(settings)
    fill(buffer, range(7))
    buffer.take()
    fill(buffer, range(7, 10))
    path = tmp_path / "buffer" / "rank-0.safetensors"
    buffer.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished beside it
    other = OnlineBuffer(settings)
    other.load(path)
    a, b = buffer.take(), other.take()
    assert len(a) > 1 and all(same(x, y) for x, y in zip(a, b, strict=True))


def test_an_unwilling_buffer_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="persist_buffer to true"):
        OnlineBuffer(BufferSettings()).save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    buffer = OnlineBuffer(BufferSettings(persist=True))
    fill(buffer, range(3))
    path = tmp_path / "b.safetensors"
    if damage != "missing":
        buffer.save(path)
        data = path.read_bytes()
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(InvalidValue, match=r"cannot read the stored buffer .*b\.safetensors"):
        buffer.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0),
        ("capacity", 0),
        ("reservoir", 0),
        ("holdout_size", 0),
        ("max_age", 0),
        ("replay", -0.1),
        ("replay", 0.6),
        ("holdout", 0.9),
        ("interval", 5000),
    ],
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(InvalidValue, match=field):
        BufferSettings(**{field: value})


def test_collate_marks_the_right_positions_and_keeps_every_bit() -> None:
    records = [record(0, length=6, positions=(1, 4)), record(1, length=9, positions=(2, 3, 7))]
    batch = collate(records, draft=2)
    assert batch.contexts.shape == (2, 8)  # cut behind the last marked position
    assert batch.lengths.tolist() == [5, 8]
    assert batch.row.tolist() == [0, 0, 1, 1, 1]
    assert batch.position.tolist() == [1, 4, 2, 3, 7]
    assert batch.labels().tolist() == [
        *records[0].ids[[1, 4]].tolist(),
        *records[1].ids[[2, 3, 7]].tolist(),
    ]
    assert batch.contexts[0, 5:].tolist() == [0, 0, 0]
    law = batch.law()
    assert torch.equal(law.logprobs, torch.cat([r.law.logprobs for r in records]))
    assert torch.equal(law.tail_logmass, torch.cat([r.law.tail_logmass for r in records]))
    assert (batch.draft, batch.requests.tolist()) == (2, [0, 1])
    assert all(not x.is_floating_point() for x in vars(batch).values() if isinstance(x, torch.Tensor))


def test_impossible_tails_survive_as_bits() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    item = Record(torch.tensor([1, 2]), torch.tensor([1]), TeacherLaw.from_probs(probs, 3))
    law = collate([item]).law()
    assert law.tail_logmass.tolist() == [-math.inf] and law.logprobs[0, 2] == -math.inf and law.processed


def test_a_batch_of_nothing_is_valid() -> None:
    batch = collate([], draft=1)
    assert batch.position.shape == (0,) and batch.contexts.shape == (1, 1) and len(batch.law()) == 0
    assert batch.to("cpu").draft == 1


def test_laws_of_different_settings_do_not_share_an_update() -> None:
    other = record(1)
    warm = Record(other.ids, other.positions, TeacherLaw.from_logits(torch.randn(2, 7), 4, temperature=0.7))
    with pytest.raises(InvalidValue, match="one setting"):
        collate([record(0), warm])


def test_batch_fields_are_checked() -> None:
    good = collate([record(0)])
    with pytest.raises(InvalidValue, match=r"OnlineBatch\.row"):
        OnlineBatch(**{**vars(good), "row": good.row[:1]})
