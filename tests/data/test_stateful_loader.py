"""A resumed loader gives what the interrupted one had left: alone, on ranks, with workers, streaming, in Lightning."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.data.batches import Batch
from draftsmith.data.stateful_loader import StatefulLoader, StatefulStreamLoader, permutation
from draftsmith.inference.errors import InvalidState, InvalidValue


@dataclass(eq=False)
class IdBatch(Batch):
    sample_id: Tensor  # int64 [B]


class Numbers:
    """A map-style source whose samples are their own numbers."""

    fingerprint = "numbers"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Sequence[int]) -> IdBatch:
        return IdBatch(torch.tensor(indices))


class Counting:
    """An endless source: 0, 1, 2, ... with a cursor."""

    fingerprint = "counting"

    def samples(self, cursor: Mapping[str, int]) -> Iterator[tuple[int, Mapping[str, int]]]:
        number = cursor.get("next", 0)
        while True:
            yield number, {"next": number + 1}
            number += 1

    def collate(self, samples: Sequence[int]) -> IdBatch:
        return IdBatch(torch.tensor(list(samples)))


def ids(batches: Any) -> list[list[int]]:
    return [b.sample_id.tolist() for b in batches]


def take(iterator: Iterator[Batch], n: int) -> list[list[int]]:
    return ids(next(iterator) for _ in range(n))


def passes(loader: Any, epochs: int) -> list[list[list[int]]]:
    return [ids(loader) for _ in range(epochs)]


def test_permutation_is_a_pinned_function_of_seed_and_epoch() -> None:
    # pinned: a change of these numbers would silently reorder every run that is resumed across versions
    assert permutation(8, 0, 0).tolist() == [4, 2, 1, 0, 7, 3, 6, 5]
    assert sorted(permutation(1000, 3, 2)) == list(range(1000))
    assert permutation(100, 0, 0).tolist() != permutation(100, 0, 1).tolist() != permutation(100, 1, 1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 7),
    world=st.integers(1, 3),
    last=st.sampled_from(["drop", "pad"]),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_resume_equals_the_uninterrupted_run(
    size: int, batch: int, world: int, last: Any, shuffle: bool, data: st.DataObject
) -> None:
    if last == "drop" and size < batch * world:
        return

    def make(rank: int) -> StatefulLoader:
        return StatefulLoader(Numbers(size), batch, seed=7, shuffle=shuffle, last=last, rank=rank, world_size=world)

    whole = [passes(make(rank), 3) for rank in range(world)]
    assert len({len(epoch) for rank in whole for epoch in rank}) == 1  # as many batches everywhere, always
    for epoch in range(3):
        seen = [i for rank in whole for b in rank[epoch] for i in b]
        real = [i for i in seen if i >= 0]
        assert len(real) == len(set(real))
        if last == "pad":
            assert set(real) == set(range(size)) and len(seen) - size < batch * world
        else:
            assert len(real) == len(seen) == size // (batch * world) * batch * world
    stop_epoch = data.draw(st.integers(0, 1))
    stop_batch = data.draw(st.integers(0, len(whole[0][0])))
    for rank in range(world):
        first = make(rank)
        for _ in range(stop_epoch):
            ids(first)
        iterator = iter(first)
        assert take(iterator, stop_batch) == whole[rank][stop_epoch][:stop_batch]
        if stop_batch == 0 and stop_epoch:  # a pass that was not begun: the position is the end of the one before
            continue
        second = make(rank)
        second.load_state_dict(make(0).state_dict() | first.state_dict())
        assert first.state_dict() == second.state_dict()
        assert ids(second) == whole[rank][stop_epoch][stop_batch:]
        assert ids(second) == whole[rank][stop_epoch + 1]


def test_state_is_the_same_on_every_rank_and_serves_another_number_of_ranks() -> None:
    ranks = [StatefulLoader(Numbers(48), 3, seed=1, shuffle=True, rank=r, world_size=2) for r in range(2)]
    seen = [i for loader in ranks for b in take(iter(loader), 4) for i in b]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    alone = StatefulLoader(Numbers(48), 3, seed=1, shuffle=True, rank=0, world_size=1)
    alone.load_state_dict(ranks[1].state_dict())
    rest = [i for b in ids(alone) for i in b]
    assert sorted(seen + rest) == list(range(48))


def test_workers_draw_nothing_from_the_global_generator() -> None:
    """A resumed run iterates once more than one that was never stopped: its dropout must not see that."""
    before = torch.get_rng_state()
    for loader in (
        StatefulLoader(Numbers(8), 4, num_workers=1, rank=0, world_size=1),
        StatefulStreamLoader(Counting(), 2, 1, num_workers=1, rank=0, world_size=1),
    ):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_workers_change_nothing_and_what_they_fetched_ahead_is_not_counted(stop: int) -> None:
    def make(workers: int) -> StatefulLoader:
        return StatefulLoader(Numbers(33), 4, shuffle=True, last="pad", num_workers=workers, rank=0, world_size=1)

    whole = passes(make(0), 2)
    first = make(2)
    iterator = iter(first)
    assert take(iterator, stop) == whole[0][:stop]
    assert first.state_dict()["taken"] == 4 * stop  # 2 workers have fetched 4 more by now
    second = make(2)
    second.load_state_dict(first.state_dict())
    del iterator
    assert ids(second) == whole[0][stop:]
    assert ids(second) == whole[1]


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), world=st.integers(1, 3), per_epoch=st.integers(1, 6), stop=st.integers(0, 12))
def test_stream_resumes_where_it_stood(batch: int, world: int, per_epoch: int, stop: int) -> None:
    def make(rank: int) -> StatefulStreamLoader:
        return StatefulStreamLoader(Counting(), batch, per_epoch, rank=rank, world_size=world)

    seen: list[int] = []
    states = []
    for rank in range(world):
        loader = make(rank)
        got: list[list[int]] = []
        while len(got) < stop:
            iterator = iter(loader)
            got += take(iterator, min(per_epoch, stop - len(got)))
        resumed = make(rank)
        resumed.load_state_dict(loader.state_dict())
        states.append(resumed.state_dict())
        while len(got) < stop + 5:
            for b in resumed:
                got.append(b.sample_id.tolist())
                if len(got) == stop + 5:
                    break
        seen += [i for b in got for i in b]
    assert sorted(seen) == list(range((stop + 5) * batch * world))
    assert all(s == states[0] for s in states)


def test_stream_workers_give_the_same_batches() -> None:
    def make(workers: int, rank: int = 1) -> StatefulStreamLoader:
        return StatefulStreamLoader(Counting(), 2, 5, num_workers=workers, rank=rank, world_size=2)

    whole = passes(make(0), 2)
    first = make(2)
    iterator = iter(first)
    assert take(iterator, 3) == whole[0][:3]
    assert first.state_dict()["cursor"] == {"next": 12}
    second = make(2)
    second.load_state_dict(first.state_dict())
    del iterator
    assert ids(second) == whole[0][3:]
    assert ids(second) == whole[1]


def test_an_announced_epoch_starts_at_its_beginning_and_the_current_one_goes_on() -> None:
    loader = StatefulLoader(Numbers(12), 4, shuffle=True, rank=0, world_size=1)
    whole = passes(StatefulLoader(Numbers(12), 4, shuffle=True, rank=0, world_size=1), 3)
    take(iter(loader), 1)
    loader.batch_sampler.sampler.set_epoch(2)  # the way Lightning takes
    assert ids(loader) == whole[2]
    resumed = StatefulLoader(Numbers(12), 4, shuffle=True, rank=0, world_size=1)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "taken": 4})
    resumed.set_epoch(1)
    assert ids(resumed) == whole[1][1:]


def test_refusals() -> None:
    loader = StatefulLoader(Numbers(12), 4, rank=0, world_size=1)
    state = loader.state_dict()
    for change in ({"fingerprint": "other"}, {"seed": 5}, {"kind": "stream"}, {"size": 13}, {"shuffle": True}):
        with pytest.raises(InvalidState, match=f"{next(iter(change))}.*resume"):
            loader.load_state_dict({**state, **change})
    with pytest.raises(InvalidValue, match=r"3 samples do not fill one global batch of 4 \(4 x 1 ranks\)"):
        StatefulLoader(Numbers(3), 4, rank=0, world_size=1)
    with pytest.raises(InvalidValue, match="batch_size"):
        StatefulLoader(Numbers(3), 0)
    with pytest.raises(InvalidValue, match="num_workers"):
        StatefulLoader(Numbers(3), 1, num_workers=-1)
    with pytest.raises(InvalidValue, match="drop, pad; did you mean 'drop'"):
        StatefulLoader(Numbers(3), 1, last="drops")  # type: ignore[arg-type]  # the bad value is the point
    with pytest.raises(InvalidValue, match="batches_per_epoch"):
        StatefulStreamLoader(Counting(), 1, 0)


class Watcher(pl.LightningModule):
    """Notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        numbers = batch.sample_id if isinstance(batch, IdBatch) else batch
        self.seen.append((self.global_step, numbers.tolist()))
        return self.layer(numbers.float().unsqueeze(1)).mean() * 0.0

    def validation_step(self, batch: Any, _: int) -> None:
        assert isinstance(batch, IdBatch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


EVERY_STEP = {"every_n_train_steps": 1}


def train(
    folder: Path, train_loader: Any, ckpt: str | None = None, save: dict[str, Any] = EVERY_STEP, **trainer: Any
) -> list[tuple[int, list[int]]]:
    module = Watcher()
    checkpoints = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **save)
    settings = {"max_epochs": 3, **trainer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[checkpoints],
            **settings,
        ).fit(
            module,
            train_loader,
            StatefulLoader(Numbers(5), 2, last="pad", rank=0, world_size=1),
            ckpt_path=ckpt,
        )
    return module.seen


def lightning_loader(kind: str) -> Any:
    if kind == "map":
        return StatefulLoader(Numbers(17), 4, seed=3, shuffle=True, rank=0, world_size=1)
    if kind == "stream":
        return StatefulStreamLoader(Counting(), 4, 4, rank=0, world_size=1)
    return DataLoader(list(range(16)), batch_size=4)


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(
    "trainer",
    [{}, {"limit_train_batches": 3}, {"val_check_interval": 2, "num_sanity_val_steps": 2}],
    ids=["plain", "limited", "validated"],
)
def test_lightning_resumes_exactly_from_every_step(tmp_path: Path, kind: str, trainer: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", lightning_loader(kind), **trainer)
    per_epoch = trainer.get("limit_train_batches", 4)
    assert len(whole) == 3 * per_epoch
    if kind == "stream":
        assert [i for _, b in whole for i in b] == list(range(12 * per_epoch))
    for step in range(1, len(whole)):
        rest = train(
            tmp_path / "rest", lightning_loader(kind), str(tmp_path / "whole" / f"step={step}.ckpt"), **trainer
        )
        assert rest == whole[step:], f"resumed after step {step}"


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["after the epoch", "after validation"])
@pytest.mark.parametrize("limit", [3, 1.0])
def test_lightning_resumes_exactly_from_the_end_of_an_epoch(tmp_path: Path, at_epoch_end: bool, limit: float) -> None:
    # streams need the data module's state for this: tests/data/test_text.py
    save = {"every_n_epochs": 1, "save_on_train_epoch_end": at_epoch_end}
    whole = train(tmp_path / "whole", lightning_loader("map"), save=save, limit_train_batches=limit)
    for epoch in (1, 2):
        step = epoch * len(whole) // 3
        saved = str(tmp_path / "whole" / f"step={step}.ckpt")
        rest = train(tmp_path / "rest", lightning_loader("map"), saved, limit_train_batches=limit)
        assert rest == whole[step:], f"resumed after step {step}"


def test_negative_control_a_plain_loader_fails_that_test(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", lightning_loader("plain"))
    rest = train(tmp_path / "rest", lightning_loader("plain"), str(tmp_path / "whole" / "step=2.ckpt"))
    assert rest != whole[2:]


def test_negative_control_a_loader_without_length_loses_a_batch(tmp_path: Path) -> None:
    """Why streams have a length: of a loader without one Lightning reads one batch ahead, and counts it as taken."""

    class Unsized(StatefulStreamLoader):
        __len__ = None  # type: ignore[assignment]  # as an IterableDataset without length

    def make() -> Unsized:
        return Unsized(Counting(), 4, 4, rank=0, world_size=1)

    whole = train(tmp_path / "whole", make(), max_epochs=1)
    rest = train(tmp_path / "rest", make(), str(tmp_path / "whole" / "step=2.ckpt"), max_epochs=1)
    assert rest != whole[2:]
