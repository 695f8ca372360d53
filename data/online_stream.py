"""Serving as a data set: decode requests with the served draft, record the target's laws, yield online updates.

Source: "Online Speculative Decoding" (arXiv 2310.07177), the online algorithm; contract 13. One iteration is

    serve up to `in_flight` requests  ->  records into the buffer of the draft that served them
    a buffer is due?                  ->  yield its records as one `OnlineBatch`, `steps` times (gradient steps)

The stream lives in the main process (no workers) and yields lazily: the next requests are served after the step on the
last batch, by whatever draft has been swapped in by then. Several ranks read one stream: request number r belongs to
rank r mod world; which draft learns next is agreed between them, so all ranks yield the same number of batches.

The state to resume from is the position in the requests and the counters. Records are in it only with `buffer.persist`;
otherwise a checkpoint belongs to a moment `at_rest` (nothing waits to be learned); `come_to_rest` brings one about.
"""

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from draftsmith.data.batches import OnlineBatch
from draftsmith.data.online_buffer import BufferSettings, OnlineBuffer, collate, load_state, pack, save_state, unpack
from draftsmith.data.request_logs import LoggedRequest, score
from draftsmith.data.router import DraftRouter
from draftsmith.data.served_log import Served
from draftsmith.inference import registry
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.laws import Record
from draftsmith.inference.recorder import LawRecorder, RecorderSettings
from draftsmith.inference.requests import Decoder, RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import ServedDraft

Item = TokenRequest | LoggedRequest


class RequestSource(Protocol):
    """Where requests come from. Reading from the same `start` gives the same requests."""

    @property
    def length(self) -> int | None:
        """How many there are; None when that is not known or there is no end."""
        ...

    def read(self, start: int = 0) -> Iterator[Item]: ...


class Requests:
    """A data set of requests, known in advance."""

    def __init__(self, items: Sequence[Item]) -> None:
        if not items:
            raise InvalidValue("no requests to serve: the list is empty")
        self.items = items

    @property
    def length(self) -> int:
        return len(self.items)

    def read(self, start: int = 0) -> Iterator[Item]:
        return (self.items[i] for i in range(start, len(self.items)))


class Endless:
    """Requests of a user's factory: `factory(start)` gives an iterator from the start-th request on."""

    length: int | None = None

    def __init__(self, factory: Callable[[int], Iterator[Item]]) -> None:
        self.factory = factory

    def read(self, start: int = 0) -> Iterator[Item]:
        return iter(self.factory(start))


@dataclass(frozen=True)
class ServeSettings:
    """How requests are served while a draft learns from them."""

    in_flight: int = 8  # requests decoded together; more than the buffer's interval would delay updates
    steps: int = 1  # S: gradient steps per update
    limit: int | None = None  # stop after this many requests (an endless source needs it, or the trainer's max_steps)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    # settings of the registry's "speculative" decoder; its fall-back is off, since a clock would make runs unrepeatable
    decoder: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise InvalidValue(f"in_flight must be at least 1, got {self.in_flight}")
        if self.steps < 1:
            raise InvalidValue(f"steps (gradient steps per update) must be at least 1, got {self.steps}")
        if self.limit is not None and self.limit < 1:
            raise InvalidValue(f"limit counts requests and must be at least 1 (or null), got {self.limit}")


@dataclass
class _Update:
    draft: int
    records: list[Record]
    step: int = 0


class OnlineStream(IterableDataset[OnlineBatch]):
    """Yields `OnlineBatch`es; call `bind` with the engines before iterating."""

    def __init__(
        self,
        source: RequestSource,
        *,
        serve: ServeSettings,
        recorder: RecorderSettings,
        buffer: BufferSettings,
        num_drafts: int = 1,
        router: DraftRouter | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_dir: Path | None = None,
    ) -> None:
        """Raises InvalidValue for settings that contradict each other.

        router: needed for several drafts. buffer_dir: where records go when they may be stored (`buffer.persist`).
        """
        if serve.sampling.greedy and recorder.law == "served":
            raise InvalidValue("greedy serving has no served law to record: set recorder.law to 'raw'")
        if (router is None) != (num_drafts == 1) or (router is not None and len(router.keys) != num_drafts):
            keys = "no router" if router is None else f"a router over {', '.join(router.keys)}"
            raise InvalidValue(f"{num_drafts} drafts and {keys}: several drafts need a router with one key each")
        if buffer.persist and buffer_dir is None:
            raise InvalidValue("persist_buffer needs a folder to write to: give buffer_dir")
        self.source = source
        self.serve = serve
        self.router = router
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.buffer_dir = buffer_dir
        self.buffers = [OnlineBuffer(buffer, seed=seed, draft=d) for d in range(num_drafts)]
        self.recorder = LawRecorder(recorder)
        self.log: deque[Served] = deque(maxlen=1 << 16)  # whoever logs takes them out
        self.served = 0  # requests of all ranks since the start of the run
        self.position = 0  # of the source, in this epoch
        self.updates = 0
        self._resting = False
        self._at_rest = True
        self._current: _Update | None = None
        self._loaded: dict[str, Any] | None = None
        self._target: Engine | None = None
        self._drafts: Sequence[ServedDraft] = ()
        self.reduce: Callable[[Tensor], Tensor] = lambda x: x  # sums over all ranks
        self._decoders: dict[int, Decoder] = {}

    def bind(
        self,
        target: Engine,
        drafts: Sequence[ServedDraft],
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Set the engines.

        Args: reduce: sums a tensor over all ranks; needed when there are several. vocab_size: ids that all heads share,
        where they are padded differently.
        Raises InvalidValue when the number of drafts differs from the one announced.
        """
        if len(drafts) != len(self.buffers):
            raise InvalidValue(f"{len(drafts)} drafts were bound to a stream for {len(self.buffers)}")
        if reduce is None and self.world_size > 1:
            raise InvalidValue(f"{self.world_size} ranks must agree on updates: bind the stream with a reduce function")
        self._target, self._drafts = target, drafts
        self.reduce = reduce or (lambda x: x)
        self._decoders = {}
        for draft in drafts:
            for engine in (draft.active, draft.spare):
                self._decoders[id(engine)] = self._decoder(engine, vocab_size)

    def _decoder(self, draft: Engine, vocab_size: int | None) -> Decoder:
        decoder: Decoder = registry.build(
            "speculative",
            {"target": self._target, "draft": draft},
            sampling=self.serve.sampling,
            settings={"fallback": "never", **self.serve.decoder},
            seed=self.seed,
            recorder=self.recorder,
            vocab_size=vocab_size,
        )
        return decoder

    def __len__(self) -> int:
        """An upper bound of the batches per epoch: without a length Lightning would fetch one batch ahead."""
        length = self._total()
        if length is None:
            return sys.maxsize
        rounds = -(-length // (self._group() * self.world_size)) + 1
        return rounds * len(self.buffers) * self.serve.steps

    def _total(self) -> int | None:
        known = [n for n in (self.source.length, self.serve.limit) if n is not None]
        return min(known) if known else None

    def _group(self) -> int:
        return min(self.serve.in_flight, self.buffers[0].settings.interval)

    @property
    def at_rest(self) -> bool:
        """Does nothing wait to be learned, on any rank? Then position and counters are the whole state.

        It is so from the last step of an update that emptied the buffers until the next request.
        """
        return self._at_rest

    def come_to_rest(self) -> None:
        """Before serving on, empty every buffer into an update; call on all ranks alike."""
        self._resting = True

    def __iter__(self) -> Iterator[OnlineBatch]:
        if self._target is None:
            raise InvalidState("the stream has no engines yet: call bind(target, drafts) (the DraftSwap callback does)")
        incoming = self.source.read(self.position)
        while True:
            yield from self._due_updates()
            if not self._serve_next(incoming):
                break
        self._resting = True
        yield from self._due_updates()
        self.position = 0

    def _due_updates(self) -> Iterator[OnlineBatch]:
        """Yield updates until none is due. All ranks pass here together."""
        while True:
            if self._current is None:
                draft = self._next_draft()
                if draft is None:
                    return
                self._current = _Update(draft, self.buffers[draft].take())
                self.updates += 1
            update = self._current
            batch = collate(update.records, update.draft)
            for step in range(update.step, self.serve.steps):
                update.step = step + 1
                if update.step == self.serve.steps:  # while the last step runs, this update waits no longer
                    self._current = None
                    self._at_rest = self._waiting() == 0
                yield replace(batch, step=step, steps=self.serve.steps)

    def _waiting(self) -> int:
        """Records in the buffers of all ranks, and of an unfinished update."""
        own = sum(map(len, self.buffers)) + (len(self._current.records) if self._current else 0)
        return int(self.reduce(torch.tensor(own)).item())

    def _next_draft(self) -> int | None:
        """The first draft whose buffers, over all ranks, are due; None when none is."""
        local = torch.tensor(
            [[len(buffer), int(buffer.overdue(self.served))] for buffer in self.buffers], dtype=torch.int64
        )
        counts = self.reduce(local).tolist()
        for draft, (waiting, overdue) in enumerate(counts):
            if waiting >= self.buffers[draft].settings.interval or (waiting and (overdue or self._resting)):
                return draft
        self._resting = False
        if self._waiting() == 0:
            self._at_rest = True  # nothing that was served could be learned from
        return None

    def _serve_next(self, incoming: Iterator[Item]) -> bool:
        """Serve the next group; False when no request is left. Every rank reads all of them and serves its share."""
        count = self._group() * self.world_size
        if self.serve.limit is not None:
            count = min(count, self.serve.limit - self.position)
        items = list(islice(incoming, count))
        if not items:
            return False
        self._at_rest = False
        mine = range(self.rank, len(items), self.world_size)
        groups: dict[int, list[int]] = {}
        for i in mine:
            item = items[i]
            request = item.request if isinstance(item, LoggedRequest) else item
            groups.setdefault(self.router(request) if self.router else 0, []).append(i)
        for draft, members in sorted(groups.items()):
            self._serve_group(draft, [items[i] for i in members], [self.served + i for i in members])
        self.served += len(items)
        self.position += len(items)
        return True

    def _serve_group(self, draft: int, items: list[Item], numbers: list[int]) -> None:
        """Serve requests of one draft together and file their records."""
        served = self._drafts[draft]
        live = [(n, replace(x, row_id=n)) for n, x in zip(numbers, items, strict=True) if isinstance(x, TokenRequest)]
        logged = [(n, x) for n, x in zip(numbers, items, strict=True) if isinstance(x, LoggedRequest)]
        if live:
            requests = [request for _, request in live]
            self.recorder.clear()  # what a call that failed may have left
            result = self._decoders[id(served.active)].decode(requests)
            records = self.recorder.finish_all(
                requests, result, numbers=[n for n, _ in live], draft_version=served.version
            )
            rounds = result.rounds.by_row(len(requests))
            for record, output, own in zip(records, result.output, rounds, strict=True):
                self._file(draft, record, len(output), own)
        if logged:
            assert self._target is not None
            records = score(
                self._target,
                served.active,
                [x for _, x in logged],
                self.recorder.settings,
                numbers=[n for n, _ in logged],
                draft_version=served.version,
            )
            for record, (_, x) in zip(records, logged, strict=True):
                self._file(draft, record, len(x.answer), RoundStats())

    def _file(self, draft: int, record: Record, tokens: int, rounds: RoundStats) -> None:
        self.log.append(
            Served(
                number=record.request,
                tag=record.tag,
                draft=draft,
                version=record.draft_version,
                alpha=record.alpha,
                examined=record.examined,
                tokens=tokens,
                rounds=rounds,
            )
        )
        self.buffers[draft].add(record, now=record.request)

    def counters(self) -> dict[str, int]:
        """Sums over all drafts and ranks: what became of the records, and what the recorder dropped.

        Call it on all ranks alike.
        """
        totals: dict[str, int] = {"recorder_dropped": self.recorder.dropped}
        for buffer in self.buffers:
            for name, value in vars(buffer.counts).items():
                totals[name] = totals.get(name, 0) + value
        totals["unrouted"] = self.router.unknown if self.router else 0
        sums = self.reduce(torch.tensor(list(totals.values()))).tolist()
        return dict(zip(totals, sums, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Position and counters of all ranks together; call it on all ranks alike.

        With `buffer.persist` each rank also writes its records to `buffer_dir`; the state names the files.
        """
        current = self._current
        state: dict[str, Any] = {
            "served": self.served,
            "position": self.position,
            "updates": self.updates,
            "resting": self._resting,
            "world_size": self.world_size,
        }
        buffers = [buffer.state_dict() for buffer in self.buffers]
        if self.buffers[0].settings.persist:
            state["file"] = f"served-{self.served:09d}-update-{self.updates:07d}"
            unfinished = current and {"draft": current.draft, "step": current.step, "records": pack(current.records)}
            save_state(self._file_of(state["file"]), {"buffers": buffers, "current": unfinished})
            return state
        state["waiting"] = self._waiting()
        for buffer in buffers:
            sums = self.reduce(torch.tensor(list(buffer["counts"].values())))
            buffer["counts"] = dict(zip(buffer["counts"], sums.tolist(), strict=True))
        return state | {"buffers": buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; warns when records were waiting that it could not hold.

        Raises InvalidValue when stored records cannot be read, or belong to another number of ranks.
        """
        if state == self._loaded and state["served"] == self.served and state["updates"] == self.updates:
            return  # Lightning hands it over twice: with the data module and with the loader
        self._loaded = state
        for name in ("served", "position", "updates"):
            setattr(self, name, state[name])
        self._resting = state["resting"]
        self._current = None
        if "file" in state:
            if state["world_size"] != self.world_size:
                raise InvalidValue(
                    f"the stored buffers belong to {state['world_size']} ranks and this run has {self.world_size}: "
                    "resume with as many, or from a checkpoint of a run without persist_buffer"
                )
            stored = load_state(self._file_of(state["file"]))
            if stored["current"]:
                records = unpack(stored["current"]["records"])
                self._current = _Update(stored["current"]["draft"], records, stored["current"]["step"])
            buffers = stored["buffers"]
        else:
            buffers = state["buffers"]
            if self.rank > 0:  # the sums of all ranks go on at rank 0
                buffers = [x | {"counts": dict.fromkeys(x["counts"], 0)} for x in buffers]
            elif state["waiting"]:
                warnings.warn(
                    f"{state['waiting']} records waited to be learned from when the checkpoint was taken and are gone "
                    "(persist_buffer is false): this run will differ from an uninterrupted one",
                    stacklevel=2,
                )
        for buffer, own in zip(self.buffers, buffers, strict=True):
            buffer.load_state_dict(own)
        self._at_rest = self._current is None and not any(map(len, self.buffers))

    def _file_of(self, stem: str) -> Path:
        if self.buffer_dir is None:
            raise InvalidValue(
                "the checkpoint names stored buffers, but no buffer_dir is set: set persist_buffer to true"
            )
        return self.buffer_dir / f"{stem}-rank-{self.rank}.safetensors"
