"""Loaders whose position survives a checkpoint: a resumed run sees exactly what the interrupted one had left.

The order is a pure function of (seed, epoch, sample index). The state says how many samples the trainer has been GIVEN
(not what workers have fetched ahead), counted over all ranks, so rank 0's checkpoint serves every rank, and a run with
another number of ranks can go on at the same sample.

A global batch is `batch_size * world_size` samples; rank r takes every world_size-th of them, from the r-th on. All
ranks get the same number of batches, decided here and nowhere else: `last="drop"` leaves the samples of an incomplete
global batch out (for training: they differ from epoch to epoch), `last="pad"` fills it with padding rows (for
validation: each sample exactly once).

Lightning finds `state_dict`/`load_state_dict` and stores the state with the fit loop; it announces epochs through
`batch_sampler.sampler.set_epoch`, and DeepSpeed reads `batch_sampler.batch_size`: both lead back to the loader.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from draftsmith.data.batches import PADDING, Batch
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.rng import Stream, uniform

_VERSION = 1
Cursor = Mapping[str, int]
T = TypeVar("T")


class MapSource(Protocol):
    """Samples by number."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples; an index PADDING (-1) asks for a row of padding."""
        ...


class StreamSource(Protocol):
    """Samples one after the other, without end."""

    @property
    def fingerprint(self) -> str: ...

    def samples(self, cursor: Cursor) -> Iterator[tuple[Any, Cursor]]:
        """Samples from `cursor` on ({}: the start), each with the cursor that leads to the next one."""
        ...

    def collate(self, samples: Sequence[Any]) -> Batch: ...


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch: samples sorted by a counter hash, so it never changes with a library's generator."""
    keys = uniform(seed, torch.arange(size), epoch, int(Stream.DATA)).numpy()
    return np.argsort(keys, kind="stable").astype(np.int64)


class _Loader(ABC):
    """What both loaders share: the position and its life cycle.

    A pass starts at the first `next`, not at `iter` (Lightning calls `iter` before it announces the epoch). After a
    load, or at an announced epoch, the next pass starts at the position as it stands; otherwise it is the next epoch.
    """

    kind: str

    def __init__(
        self, fingerprint: str, batch_size: int, seed: int, num_workers: int, rank: int | None, world_size: int | None
    ) -> None:
        if batch_size < 1:
            raise InvalidValue(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise InvalidValue(f"num_workers must be at least 0, got {num_workers}")
        self.fingerprint, self.batch_size, self.seed, self.num_workers = fingerprint, batch_size, seed, num_workers
        self._rank, self._world_size = rank, world_size
        self.epoch = 0
        self.taken = 0  # samples handed out in this epoch, over all ranks
        self._in_place = True  # the next pass starts at (epoch, taken)

    @property
    def rank(self) -> int:
        if self._rank is not None:
            return self._rank
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    @property
    def world_size(self) -> int:
        if self._world_size is not None:
            return self._world_size
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def batch_sampler(self) -> Self:
        return self

    @property
    def sampler(self) -> Self:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` unless the position lies in it already."""
        if epoch != self.epoch:
            self.epoch, self.taken, self._in_place = epoch, 0, True

    def __iter__(self) -> Iterator[Batch]:
        if not self._in_place:
            self.epoch, self.taken = self.epoch + 1, 0
        self._in_place = False
        yield from self._rest_of_epoch()

    @abstractmethod
    def __len__(self) -> int:
        """Batches per rank in a whole epoch."""

    @abstractmethod
    def _rest_of_epoch(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; the same on every rank."""
        return {
            "version": _VERSION,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "taken": self.taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises InvalidState when data, seed or kind of loader have changed since."""
        for key, mine in (
            ("version", _VERSION),
            ("kind", self.kind),
            ("fingerprint", self.fingerprint),
            ("seed", self.seed),
        ):
            if state.get(key) != mine:
                raise InvalidState(
                    f"the checkpoint's data position is for {key} {state.get(key)!r}, this loader has {mine!r}: resume "
                    "with the data and settings of the run, or start a new run from its weights"
                )
        self.epoch, self.taken, self._in_place = int(state["epoch"]), int(state["taken"]), True


class StatefulLoader(_Loader):
    """Batches of a source of known size."""

    kind = "map"

    def __init__(
        self,
        source: MapSource,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        last: Literal["drop", "pad"] = "drop",
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Args: batch_size: rows per rank. rank, world_size: default: those of torch.distributed, else 0 of 1.

        Raises InvalidValue when there is not one whole global batch to give out.
        """
        super().__init__(source.fingerprint, batch_size, seed, num_workers, rank, world_size)
        if last not in ("drop", "pad"):
            raise unknown_choice("last", last, ("drop", "pad"))
        self.source, self.shuffle, self.last = source, shuffle, last
        if len(self) == 0:
            raise InvalidValue(
                f"{len(source)} samples do not fill one global batch of {self.global_batch} "
                f"({batch_size} x {self.world_size} ranks): lower batch_size or length, or give more text"
            )

    def __len__(self) -> int:
        size = len(self.source)
        return -(-size // self.global_batch) if self.last == "pad" else size // self.global_batch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"size": len(self.source), "shuffle": self.shuffle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, mine in (("size", len(self.source)), ("shuffle", self.shuffle)):
            if state.get(key, mine) != mine:
                raise InvalidState(
                    f"the checkpoint's data had {key} {state[key]}, this has {mine}: resume with the same data"
                )
        super().load_state_dict(state)

    def _rest_of_epoch(self) -> Iterator[Batch]:
        size, step = len(self.source), self.global_batch
        order = permutation(size, self.seed, self.epoch) if self.shuffle else np.arange(size)
        stop = size if self.last == "pad" else size - step + 1
        starts = range(self.taken, stop, step)
        mine = (self._share(order[start : start + step]) for start in starts)
        for start, batch in zip(starts, self._fetch(mine), strict=True):
            self.taken = min(start + step, size)
            yield batch

    def _share(self, samples: NDArray[np.int64]) -> list[int]:
        padded = np.full(self.global_batch, PADDING)
        padded[: len(samples)] = samples
        return [int(i) for i in padded[self.rank :: self.world_size]]

    def _fetch(self, indices: Iterator[list[int]]) -> Iterable[Batch]:
        if self.num_workers == 0:
            return map(self.source.fetch, indices)
        # any iterable of keys is a sampler; with batch_size=None a key may be a list
        return _in_workers(_MapDataset(self.source), self.num_workers, sampler=indices)


class StatefulStreamLoader(_Loader):
    """Batches of an endless source; an epoch is `batches_per_epoch` batches, the next epoch goes on behind it.

    The length is given, so that all ranks agree on it and Lightning does not read one batch ahead (which it does with
    loaders without a length, and which would count a batch that was never trained on).
    Limits: every rank, and every worker, goes through the whole stream and keeps its share. Lightning 2.6 does not load
    the state of a checkpoint that was saved after the last batch of an epoch: a data module must keep it as well, as
    `text.TextDataModule` does (for `StatefulLoader` the announced epoch is enough).
    """

    kind = "stream"

    def __init__(
        self,
        source: StreamSource,
        batch_size: int,
        batches_per_epoch: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Args: seed: only compared on resume; the source holds its own order."""
        super().__init__(source.fingerprint, batch_size, seed, num_workers, rank, world_size)
        if batches_per_epoch < 1:
            raise InvalidValue(f"batches_per_epoch must be at least 1, got {batches_per_epoch}")
        self.source, self.batches_per_epoch = source, batches_per_epoch
        self.cursor: Cursor = {}

    def __len__(self) -> int:
        return self.batches_per_epoch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"cursor": dict(self.cursor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.cursor = {str(k): int(v) for k, v in state["cursor"].items()}

    def _rest_of_epoch(self) -> Iterator[Batch]:
        stop = self.batches_per_epoch * self.global_batch
        if self.taken >= stop:
            return
        share = _StreamShare(self.source, self.cursor, self.batch_size, self.rank, self.world_size)
        batches: Iterable[tuple[Batch, Cursor]] = share
        if self.num_workers:
            batches = _in_workers(share, self.num_workers)
        for batch, cursor in batches:
            self.taken += self.global_batch
            self.cursor = cursor
            yield batch
            if self.taken >= stop:
                return


class _MapDataset(Dataset[Batch]):
    def __init__(self, source: MapSource) -> None:
        self.source = source

    def __getitem__(self, indices: list[int]) -> Batch:
        return self.source.fetch(indices)


class _StreamShare(IterableDataset[tuple[Batch, Cursor]]):
    """One rank's rows of every global batch, with the cursor behind it; worker w of W makes every W-th batch."""

    def __init__(self, source: StreamSource, cursor: Cursor, batch_size: int, rank: int, world_size: int) -> None:
        self.source, self.cursor, self.batch_size, self.rank, self.world_size = (
            source,
            cursor,
            batch_size,
            rank,
            world_size,
        )

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        group: list[Any] = []
        index = 0
        for sample, cursor in self.source.samples(self.cursor):
            group.append(sample)
            if len(group) == self.batch_size * self.world_size:
                if index % workers == number:
                    yield self.source.collate(group[self.rank :: self.world_size]), cursor
                index += 1
                group = []


def _in_workers(dataset: Dataset[T], num_workers: int, **more: Any) -> "DataLoader[T]":
    """Its batches, made by worker processes.

    The generator is its own: a DataLoader draws its workers' seed from the global one whenever it is iterated, so a
    resumed run, which iterates once more, would go on with other dropout.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),
        **more,
    )


def _unchanged(batch: T) -> T:
    return batch


def _quiet_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked tokenizer with threads could deadlock, and says so
