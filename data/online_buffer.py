"""The buffer R between serving and learning (OSD): records of one draft, taken in one piece every I records.

Source: "Online Speculative Decoding" (arXiv 2310.07177), the online algorithm; the replay share and the held-out window
are ours (spec, "Shifting domains", and the gate of contract 13).

Private text: records live in memory only and are dropped after use. `persist=True` is needed to write them anywhere;
replay and the held-out window keep some of them longer, still only in memory unless `persist` is set.
Shape letters: R records, T tokens of a record, M positions of all records, K stored tokens of a law.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.data.batches import OnlineBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform


@dataclass(frozen=True)
class BufferSettings:
    """When a buffer is ready for an update, and what an update sees."""

    interval: int = 8  # I: records per update
    max_age: int | None = None  # an update is also due when the oldest record waited for this many served requests
    capacity: int = 1024  # records waiting at most; the oldest is dropped, and counted, when one more comes
    replay: float = 0.0  # share of an update's records drawn from old ones (0.1 to 0.3 helps against forgetting)
    reservoir: int = 256  # old records to draw from: a uniform sample of all records ever used
    holdout: float = 0.0  # share of the requests that is never trained on but judges new drafts (the gate)
    holdout_size: int = 64  # how many of them, the most recent ones
    persist: bool = False  # may records, which hold private text, be written to disk?

    def __post_init__(self) -> None:
        for name in ("interval", "capacity", "reservoir", "holdout_size"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"buffer {name} must be at least 1, got {getattr(self, name)}")
        if self.max_age is not None and self.max_age < 1:
            raise InvalidValue(f"buffer max_age counts requests and must be at least 1 (or null), got {self.max_age}")
        if not 0.0 <= self.replay <= 0.5:
            raise InvalidValue(f"buffer replay is a share between 0 and 0.5 (0.1 to 0.3 is usual), got {self.replay}")
        if not 0.0 <= self.holdout <= 0.5:
            raise InvalidValue(f"buffer holdout is a share between 0 and 0.5 (0.1 to 0.2 is usual), got {self.holdout}")
        if self.capacity < self.interval:
            raise InvalidValue(
                f"a buffer of capacity {self.capacity} never holds interval = {self.interval} records: raise capacity"
            )


@dataclass
class BufferCounts:
    """What became of the records, since the start of the run."""

    added: int = 0  # to the FIFO
    held_out: int = 0
    skipped: int = 0  # records without positions: nothing to learn from
    dropped: int = 0  # pushed out of a full FIFO before an update
    used: int = 0
    lost: int = 0  # waiting when a checkpoint was taken that may not hold text, and so gone after a resume


class OnlineBuffer:
    """FIFO R of one draft with replay reservoir and held-out window.

    `now` is the number of requests served so far: ages are counted in requests, so that a run repeats itself.
    """

    def __init__(self, settings: BufferSettings, *, seed: int = 0, draft: int = 0) -> None:
        self.settings = settings
        self.counts = BufferCounts()
        self.heldout: deque[Record] = deque(maxlen=settings.holdout_size)
        self._seed = seed
        self._draft = draft
        self._fresh: deque[Record] = deque()
        self._entered: deque[int] = deque()
        self._old: list[Record] = []
        self._updates = 0

    def __len__(self) -> int:
        """Records that wait for an update."""
        return len(self._fresh)

    def add(self, record: Record, now: int) -> None:
        """Queue a record, or hold it out, or skip it when it has no positions."""
        if len(record.law) == 0:
            self.counts.skipped += 1
            return
        share = self.settings.holdout
        # a function of the request alone: the same requests are held out whatever else happens
        if share > 0 and float(uniform(self._seed, record.request, 0, Stream.DATA)) < share:
            self.heldout.append(record)
            self.counts.held_out += 1
            return
        if len(self._fresh) == self.settings.capacity:
            self._fresh.popleft()
            self._entered.popleft()
            self.counts.dropped += 1
        self._fresh.append(record)
        self._entered.append(now)
        self.counts.added += 1

    def overdue(self, now: int) -> bool:
        """Has the oldest record waited for max_age requests?"""
        limit = self.settings.max_age
        return limit is not None and bool(self._entered) and now - self._entered[0] >= limit

    def due(self, now: int) -> bool:
        """Is an update due? (With several ranks the stream decides from the counts of all of them.)"""
        return len(self) >= self.settings.interval or self.overdue(now)

    def take(self) -> list[Record]:
        """Everything that waits, oldest first, and the replay share behind it; the buffer is empty afterwards."""
        fresh = list(self._fresh)
        self._fresh.clear()
        self._entered.clear()
        share = self.settings.replay
        chosen: list[Record] = []
        if share > 0:
            wanted = min(round(len(fresh) * share / (1.0 - share)), len(self._old))
            # the `wanted` smallest of independent uniforms are a sample without replacement
            stream = Stream.DATA + NUM_STREAMS * (self._draft + 1)
            keys = uniform(self._seed, self._updates, torch.arange(len(self._old)), stream)
            chosen = [self._old[i] for i in sorted(keys.argsort()[:wanted].tolist())]
            for record in fresh:
                self._remember(record)
        if share == 0:
            self.counts.used += len(fresh)
        self._updates += 1
        return fresh + chosen

    def _remember(self, record: Record) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R): every record ever used is kept with equal probability."""
        seen = self.counts.used
        if len(self._old) < self.settings.reservoir:
            self._old.append(record)
        else:
            slot = int(float(uniform(self._seed, seen, self._draft, Stream.ACCEPT)) * (seen + 1))
            if slot < len(self._old):
                self._old[slot] = record
        self.counts.used += 1

    def state_dict(self) -> dict[str, Any]:
        """Counters; with `persist` also the records. Plain numbers and tensors only.

        Without `persist` the records that wait are counted as lost: a run resumed from here differs from the
        uninterrupted one by them, so checkpoints belong to moments when the buffer is empty.
        """
        state: dict[str, Any] = {"counts": asdict(self.counts), "updates": self._updates}
        if self.settings.persist:
            state["entered"] = list(self._entered)
            for name, records in (("fresh", self._fresh), ("old", self._old), ("heldout", self.heldout)):
                state[name] = pack(records)
        else:
            state["counts"]["lost"] += len(self)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises InvalidValue when the state holds text that this buffer may not keep."""
        if "fresh" in state and not self.settings.persist:
            raise InvalidValue(
                "the stored buffer holds records but persist_buffer is false: set persist_buffer to true"
            )
        self.counts = BufferCounts(**state["counts"])
        self._updates = state["updates"]
        self._fresh, self._old = deque(), []
        self._entered = deque(state.get("entered", []))
        self.heldout.clear()
        if "fresh" in state:
            self._fresh.extend(unpack(state["fresh"]))
            self._old.extend(unpack(state["old"]))
            self.heldout.extend(unpack(state["heldout"]))

    def save(self, path: Path) -> None:
        """Write `state_dict` to one file. Raises InvalidValue unless `persist` is set."""
        if not self.settings.persist:
            raise InvalidValue("this buffer may not be written to disk: set persist_buffer to true to allow it")
        save_state(path, self.state_dict())

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises InvalidValue naming the file when it is missing or damaged."""
        self.load_state_dict(load_state(path))


_TENSOR = "$tensor"  # key of the place holder that stands for a tensor in the JSON part


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts and lists of numbers and tensors to one safetensors file (numbers as JSON in its header).

    Atomically: a temporary file is renamed. Makes the folder.
    """
    tensors: dict[str, Tensor] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name := str(len(tensors))] = value.contiguous()
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {key: strip(x) for key, x in value.items()}
        return [strip(x) for x in value] if isinstance(value, list) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    header = json.dumps(strip(state))
    save_file(tensors, unfinished, metadata={"state": header})
    os.replace(unfinished, path)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote. Raises InvalidValue naming the file when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidValue(f"cannot read the stored buffer {path}: {error}") from error

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_TENSOR]] if _TENSOR in value else {key: fill(x) for key, x in value.items()}
        return [fill(x) for x in value] if isinstance(value, list) else value

    return fill(header)


def pack(records: Iterable[Record]) -> dict[str, Any]:
    """Records as a few flat tensors and a list of plain numbers (for checkpoints and files)."""
    items = list(records)
    if not items:
        return {"tensors": {}, "records": []}
    law = TeacherLaw.cat([record.law for record in items])
    return {
        "tensors": {
            "ids": torch.cat([record.ids for record in items]),
            "positions": torch.cat([record.positions for record in items]),
            "law_ids": law.ids,
            "logprobs": law.logprobs,
            "tail_logmass": law.tail_logmass,
        },
        "records": [
            {
                "tokens": len(record.ids),
                "positions": len(record.positions),
                "tag": record.tag,
                "request": record.request,
                "alpha": record.alpha if record.examined else None,
                "examined": record.examined,
                "draft_version": record.draft_version,
            }
            for record in items
        ],
        "temperature": law.temperature,
        "processed": law.processed,
    }


def unpack(packed: dict[str, Any]) -> list[Record]:
    """The inverse of `pack`."""
    records: list[Record] = []
    t = m = 0
    x = packed["tensors"]
    for meta in packed["records"]:
        span = slice(m, m + meta["positions"])
        records.append(
            Record(
                ids=x["ids"][t : t + meta["tokens"]].clone(),
                positions=x["positions"][span].clone(),
                law=TeacherLaw(
                    x["law_ids"][span].clone(),
                    x["logprobs"][span].clone(),
                    x["tail_logmass"][span].clone(),
                    packed["temperature"],
                    packed["processed"],
                ),
                tag=meta["tag"],
                request=meta["request"],
                alpha=float("nan") if meta["alpha"] is None else meta["alpha"],
                examined=meta["examined"],
                draft_version=meta["draft_version"],
            )
        )
        t += meta["tokens"]
        m += meta["positions"]
    return records


def collate(records: Sequence[Record], draft: int = 0) -> OnlineBatch:
    """One update's batch: contexts padded on the right, positions of all records in one flat list.

    No records make a batch without positions (a rank that has nothing to add to an update still takes part in it).
    """
    if not records:
        nothing = torch.zeros(0, dtype=torch.int64)
        return OnlineBatch(
            contexts=torch.zeros(1, 1, dtype=torch.int64),
            lengths=torch.ones(1, dtype=torch.int64),
            row=nothing,
            position=nothing,
            law_ids=torch.zeros(0, 1, dtype=torch.int64),
            logprob_bits=torch.zeros(0, 1, dtype=torch.int32),
            tail_bits=torch.zeros(0, dtype=torch.int32),
            requests=nothing,
            draft=draft,
        )
    law = TeacherLaw.cat([record.law for record in records])
    # tokens behind the last marked position predict nothing that counts
    lengths = [int(record.positions.max()) + 1 for record in records]
    contexts = torch.zeros(len(records), max(lengths), dtype=torch.int64)
    for r, (record, length) in enumerate(zip(records, lengths, strict=True)):
        contexts[r, :length] = record.ids[:length]
    counts = torch.tensor([len(record.positions) for record in records])
    return OnlineBatch(
        contexts=contexts,
        lengths=torch.tensor(lengths),
        row=torch.arange(len(records)).repeat_interleave(counts),
        position=torch.cat([record.positions for record in records]),
        law_ids=law.ids,
        logprob_bits=law.logprobs.view(torch.int32),
        tail_bits=law.tail_logmass.view(torch.int32),
        requests=torch.tensor([record.request for record in records]),
        draft=draft,
        temperature=law.temperature,
        processed=law.processed,
    )
