"""The data of online learning as a DataModule: whose requests, how they are served, what is kept of them.

The target is loaded here, in its served form, and is all that decodes; the drafts' served copies come from the module
that trains (the DraftSwap callback binds them).
"""

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.corpus import CorpusConfig, Document, load_corpus
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_stream import Endless, OnlineStream, Requests, RequestSource, ServeSettings
from draftsmith.data.request_logs import RequestLog
from draftsmith.data.router import Centroids, DraftRouter, TextFunction, tag_of
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.prompts import read_prompts
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.rng import Stream, uniform
from draftsmith.inference.served_draft import embedding_rows

ORDERS = ("given", "shuffled", "by_tag")


@dataclass(frozen=True)
class TrafficConfig:
    """Where requests come from: at most one of prompts, logs and factory; without them, the corpus."""

    prompts: tuple[str, ...] = ()  # JSONL files: {"prompt": text} or {"prompt_ids": [...]}, optionally "tag"
    logs: tuple[str, ...] = ()  # JSONL files as OpenAI-style servers write them, with prompt and answer
    factory: str = ""  # "package.module:function": function(start, tokenizer) gives an iterator of TokenRequests
    corpus: CorpusConfig = field(default_factory=CorpusConfig)  # the first `prompt_length` tokens of each document
    prompt_length: int = 32
    max_new_tokens: int = 128
    order: str = "given"  # of prompts and corpus: "given", "shuffled", or "by_tag" (one domain after the other)
    val_prompts: tuple[str, ...] = ()  # JSONL files as `prompts`, for validation by decoding; never learned from
    val_requests: int = 32  # how many of them, or of a corpus' validation documents
    seed: int = 0  # of the shuffling

    def __post_init__(self) -> None:
        given = [n for n in ("prompts", "logs", "factory") if getattr(self, n)]
        if len(given) > 1:
            raise InvalidValue(f"traffic comes from one of prompts, logs and factory, got {' and '.join(given)}")
        if self.order not in ORDERS:
            raise unknown_choice("traffic.order", self.order, ORDERS)
        for name in ("prompt_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"traffic.{name} must be at least 1, got {getattr(self, name)}")
        if self.val_requests < 0:
            raise InvalidValue(f"traffic.val_requests must be at least 0, got {self.val_requests}")


@dataclass(frozen=True)
class RouterConfig:
    """Which of several drafts serves a request."""

    drafts: tuple[str, ...] = ()  # their keys, as in model.drafts; empty: one draft, no routing
    by: str = "tag"  # "tag", "function" (of the prompt's text), or "centroid" (nearest mean prompt embedding)
    function: str = ""  # "package.module:function", text -> key
    fallback: str | None = None  # draft of unknown keys; null: they are an error
    examples: int = 64  # centroid: labelled prompts per key, the first of the traffic with that tag

    def __post_init__(self) -> None:
        if self.by not in ("tag", "function", "centroid"):
            raise unknown_choice("router.by", self.by, ("tag", "function", "centroid"))
        if (self.by == "function") != bool(self.function):
            raise InvalidValue("router.function goes with router.by=function: set both or neither")
        if self.examples < 1:
            raise InvalidValue(f"router.examples must be at least 1, got {self.examples}")


_ONE_DRAFT = RouterConfig()
_SERVE, _RECORDER, _BUFFER = ServeSettings(), RecorderSettings(), BufferSettings()


class OnlineDataModule(LightningDataModule):
    """Training batches are updates from served requests (`OnlineStream`); validation is by decoding (a callback)."""

    def __init__(
        self,
        target: str,
        traffic: TrafficConfig,
        serve: ServeSettings = _SERVE,
        recorder: RecorderSettings = _RECORDER,
        buffer: BufferSettings = _BUFFER,
        router: RouterConfig = _ONE_DRAFT,
        dtype: str | None = None,
        engine: str = "auto",
        seed: int = 0,
    ) -> None:
        """Args:
        target: directory of the target (a model or an export); it serves and is never trained.
        traffic: the requests.
        serve: how they are decoded, and how often a draft learns from them.
        recorder: which laws are kept.
        buffer: when they are learned from; `persist` allows private text on disk (needed for exact resume at any step).
        router: for several drafts.
        dtype: to compute the target in; null: as stored.
        engine: "native", "hf", or "auto".
        seed: of sampling, held-out choice and replay.
        """
        super().__init__()
        self.target_dir = target
        self.traffic, self.serve, self.recorder, self.buffer = traffic, serve, recorder, buffer
        self.router_config, self.dtype, self.engine, self.seed = router, dtype, engine, seed
        self.stream: OnlineStream | None = None
        self._target: LoadedPart | None = None
        self._resume: dict[str, Any] | None = None
        self._val: list[TokenRequest] = []

    # --- what others ask

    @property
    def target(self) -> LoadedPart:
        """The loaded target. Raises InvalidState before `setup`."""
        if self._target is None:
            raise InvalidState("the target is not loaded yet: call setup('fit') first (the trainer does)")
        return self._target

    @property
    def tokenizer_dir(self) -> Path | None:
        """The target's directory, whose tokenizer the drafts share; None when it has none."""
        return Path(self.target_dir) if self.target.identity is not None else None

    @property
    def vocab_size(self) -> int:
        """Ids that mean tokens."""
        return self.target.side.vocab_size

    def data_fingerprint(self) -> str:
        """sha256 of what decides the traffic; of files their contents."""
        digest = hashlib.sha256(repr(replace(self.traffic, prompts=(), logs=())).encode())
        for path in (*self.traffic.prompts, *self.traffic.logs):
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def val_requests(self) -> list[TokenRequest]:
        """Requests that are never served for learning."""
        return self._val

    @property
    def may_checkpoint(self) -> bool:
        """Would a checkpoint taken now resume exactly? The same on all ranks."""
        return self.buffer.persist or self.stream is None or self.stream.at_rest

    def come_to_rest(self) -> None:
        """Let the stream empty its buffers, so that `may_checkpoint` becomes true. Call on all ranks alike."""
        if self.stream is not None:
            self.stream.come_to_rest()

    # --- set-up

    def setup(self, stage: str | None = None) -> None:
        """Load the target and open the traffic; a new run forgets the position of the one before."""
        device = "cpu" if self.trainer is None else str(self.trainer.strategy.root_device)
        if self._target is None:
            self._target = load(self.target_dir, dtype=self.dtype, device=device, engine=self.engine)
        self._resume = None
        source = self._source()
        keys = self.router_config.drafts
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        folder = None if self.trainer is None else Path(self.trainer.default_root_dir) / "buffer"
        self.stream = OnlineStream(
            source,
            serve=self.serve,
            recorder=self.recorder,
            buffer=self.buffer,
            num_drafts=max(1, len(keys)),
            router=self._router(source) if len(keys) > 1 else None,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            buffer_dir=folder,
        )

    def _source(self) -> RequestSource:
        """The traffic, and the validation requests beside it."""
        traffic, target = self.traffic, self.target
        self._val = self._from_files(traffic.val_prompts)[: traffic.val_requests]
        if traffic.logs:
            return RequestLog(traffic.logs, self._tokenizer(), max_length=target.part.spec.max_length)
        if traffic.factory:
            make = _import(traffic.factory)
            tokenizer = target.tokenizer
            return Endless(lambda start: make(start, tokenizer))
        if traffic.prompts:
            return Requests(self._ordered(self._from_files(traffic.prompts)))
        corpus = load_corpus(traffic.corpus)
        self._val = [*self._val, *self._from_documents(corpus.val)][: traffic.val_requests]
        return Requests(self._ordered(self._from_documents(corpus.train)))

    def _from_files(self, paths: Sequence[str]) -> list[TokenRequest]:
        lines = [line for path in paths for line in read_prompts(path)]
        found = [self._request(line.ids(self.target.tokenizer), line.tag) for line in lines]
        limit = self.target.part.spec.max_length
        short = [r for r in found if len(r.prompt) < limit]  # at least one token must follow
        if len(short) < len(found):
            message = (
                f"{len(found) - len(short)} of {len(found)} prompts do not fit into the target's {limit} positions"
            )
            if not short:
                raise InvalidValue(f"{message} ({', '.join(paths)}): shorten them, or use another target")
            warnings.warn(f"{message} and are left out", stacklevel=2)
        return short

    def _from_documents(self, documents: Sequence[Document]) -> list[TokenRequest]:
        tokenizer, length = self._tokenizer(), self.traffic.prompt_length
        requests = []
        for document in documents:
            ids = tokenizer(document.text[: 32 * length], add_special_tokens=False)["input_ids"][:length]
            if ids:
                requests.append(self._request(ids, document.tag))
        return requests

    def _request(self, ids: Sequence[int], tag: str) -> TokenRequest:
        stop_ids = self.target.stop_ids
        return TokenRequest(tuple(ids), max_new_tokens=self.traffic.max_new_tokens, stop_ids=stop_ids, tag=tag)

    def _ordered(self, requests: list[TokenRequest]) -> list[TokenRequest]:
        if self.traffic.order == "given":
            return requests
        keys = [float(uniform(self.traffic.seed, i, 0, Stream.DATA)) for i in range(len(requests))]
        mixed = sorted(range(len(requests)), key=lambda i: keys[i])
        if self.traffic.order == "by_tag":
            mixed.sort(key=lambda i: requests[i].tag)  # stable: mixed within a tag
        return [requests[i] for i in mixed]

    def _tokenizer(self) -> Any:
        found = self.target.tokenizer
        if found is None:
            raise InvalidValue(
                f"target {self.target_dir} has no tokenizer and the traffic is text: put its tokenizer files there, or "
                "give prompts as token ids ('prompt_ids')"
            )
        return found

    def _router(self, source: RequestSource) -> DraftRouter:
        config = self.router_config
        key_of: Callable[[TokenRequest], str] = tag_of
        if config.by == "function":
            key_of = TextFunction(config.function, self._tokenizer())
        elif config.by == "centroid":
            key_of = Centroids.fit(self._examples(source), self._embeddings())
        return DraftRouter(config.drafts, key_of, fallback=config.fallback)

    def _embeddings(self) -> Tensor:
        return embedding_rows(self.target.part).cpu()

    def _examples(self, source: RequestSource) -> dict[str, list[Sequence[int]]]:
        """The first labelled prompts of each key. Raises InvalidValue by `Centroids.fit` when a key has none."""
        config = self.router_config
        examples: dict[str, list[Sequence[int]]] = {key: [] for key in config.drafts}
        if isinstance(source, Endless):
            raise InvalidValue("router.by=centroid needs tagged prompts or logs to learn the classes from")
        for item in source.read():
            request = item if isinstance(item, TokenRequest) else item.request
            found = examples.get(request.tag)
            if found is not None and len(found) < config.examples:
                found.append(request.prompt)
            if all(len(x) == config.examples for x in examples.values()):
                break
        return examples

    # --- loader

    def state_dict(self) -> dict[str, Any]:
        """The stream's. Lightning keeps loader states too, but forgets those of an epoch's end."""
        return {} if self.stream is None else self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state or None

    def train_dataloader(self) -> OnlineStream:
        assert self.stream is not None
        if self._resume is not None:
            self.stream.load_state_dict(self._resume)
            self._resume = None
        return self.stream

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[TokenBatch]:
        """The validation prompts as one batch without labels: enough for the trainer to hold a validation."""
        if not self._val:
            return []
        ids = torch.zeros(len(self._val), max(len(r.prompt) for r in self._val), dtype=torch.int64)
        document = torch.full(ids.shape, PADDING, dtype=torch.int32)
        for row, request in enumerate(self._val):
            ids[row, : len(request.prompt)] = torch.tensor(request.prompt)
            document[row, : len(request.prompt)] = 0
        batch = TokenBatch(ids, torch.zeros(ids.shape, dtype=torch.int8), document, torch.arange(len(ids)))
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]  # any sequence is a map-style data set


def _import(name: str) -> Callable[[int, Any], Iterator[TokenRequest]]:
    module, _, attribute = name.partition(":")
    try:
        function: Callable[[int, Any], Iterator[TokenRequest]] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidValue(f"cannot import traffic.factory {name!r}: {error}; write 'module:function'") from error
    return function
