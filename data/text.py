"""Text for language models: documents, tokenised once and packed, or packed on the fly, behind loaders that resume.

What is expensive (reading, near-duplicate search, tokenizer training, tokenising) happens once, in `prepare_data`, and
is kept in a cache directory under a key of everything that decides the result.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from draftsmith.data.chat import use_template
from draftsmith.data.corpus import CorpusConfig, Document, digest, is_validation, load_corpus, read_documents, signature
from draftsmith.data.resumable_data import ResumableData
from draftsmith.data.stateful_loader import StatefulLoader, StatefulStreamLoader
from draftsmith.data.token_store import PackedTokens, TokenStore, encode_documents, new_directory, write_store
from draftsmith.data.token_stream import TokenStream
from draftsmith.data.tokenizer import MIN_VOCAB, load_tokenizer, train_bpe
from draftsmith.data.whitespace import keep_whitespace
from draftsmith.data.whole_documents import WholeDocuments
from draftsmith.inference.couplings import tokenizer_identity
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.requests import TokenRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKINGS = ("cut", "whole")
_FORMAT = 1  # part of the cache key: raise it when the same settings would give other tokens


@dataclass(frozen=True)
class TextConfig:
    """How text becomes batches."""

    tokenizer: str = "bpe:2048"  # a directory, or bpe:N to train a byte-level BPE of N tokens on the training text
    length: int = 256  # tokens per sample
    batch_size: int = 8  # samples per rank
    separate_documents: bool = False  # True: no attention across documents, positions restart; costs a [T, T] mask
    packing: str = "cut"  # cut: every `length` tokens; whole: documents are cut only where they are longer than a row
    add_bos: bool = False  # begin each plain text with BOS (what many pretrained targets expect)
    answers_only: bool = True  # of conversations, learn only what the assistant wrote
    whitespace: str = ""  # "xlnet": line ends, tabs and runs of spaces are tokens (XLNet's tokenizer drops them)
    chat_template: str = ""  # empty: the tokenizer's own; "simple"; or a Jinja file
    shuffle: bool = True
    seed: int = 0
    num_workers: int = 0
    cache_dir: str = ""  # empty: $DRAFTSMITH_CACHE, else ~/.cache/draftsmith
    streaming: bool = False  # pack on the fly instead of tokenising first; needs a tokenizer directory and dedup null
    batches_per_epoch: int = 1000  # streaming only
    shuffle_window: int = 256  # streaming only: samples that are shuffled among themselves
    val_documents: int = 200  # streaming only: validation documents that are kept, from the start of the stream

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InvalidValue(f"text.length must be at least 2 (a token and its successor), got {self.length}")
        for name in ("batch_size", "batches_per_epoch", "shuffle_window", "val_documents"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"text.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise InvalidValue(f"text.num_workers must be at least 0, got {self.num_workers}")
        if self.packing not in PACKINGS:
            raise unknown_choice("text.packing", self.packing, PACKINGS)
        if self.packing == "whole" and (self.streaming or not self.separate_documents):
            raise InvalidValue("text.packing whole needs text.separate_documents true and text.streaming false")
        size = self.bpe_size
        if size is not None and size < MIN_VOCAB:
            raise InvalidValue(f"text.tokenizer is {self.tokenizer!r}: the size must be at least {MIN_VOCAB}")
        if self.whitespace not in ("", "xlnet"):
            raise unknown_choice("text.whitespace", self.whitespace, ("xlnet",))
        if self.whitespace and size is not None:
            raise InvalidValue("text.whitespace is for a tokenizer directory: a byte-level BPE keeps whitespace anyway")
        if size is not None and self.streaming:
            raise InvalidValue(f"streaming needs a tokenizer directory, got {self.tokenizer!r}: train one first")

    @property
    def bpe_size(self) -> int | None:
        """N of "bpe:N"; None for a directory."""
        if not self.tokenizer.startswith("bpe:"):
            return None
        size = self.tokenizer.removeprefix("bpe:")
        if not size.isdecimal():
            raise InvalidValue(f"text.tokenizer is {self.tokenizer!r}: write bpe:N with a number, for example bpe:2048")
        return int(size)


_DEFAULT_CORPUS = CorpusConfig()
_DEFAULT_TEXT = TextConfig()


class TextDataModule(ResumableData):
    """Training and validation batches (`TokenBatch`) of packed text."""

    def __init__(self, corpus: CorpusConfig = _DEFAULT_CORPUS, text: TextConfig = _DEFAULT_TEXT) -> None:
        """Args: corpus: which documents. text: how they become batches."""
        super().__init__()
        if text.streaming and corpus.dedup is not None:
            raise InvalidValue("near-duplicates cannot be searched in a stream: set corpus.dedup to null")
        self.corpus, self.text = corpus, text
        self._train: PackedTokens | None = None
        self._val: PackedTokens | None = None
        self._info: dict[str, str] = {}

    # --- preparation, once per machine ---

    @cached_property
    def directory(self) -> Path:
        """Where the prepared data lies (or will lie): cache directory and key."""
        root = Path(self.text.cache_dir or os.environ.get("DRAFTSMITH_CACHE", "") or "~/.cache/draftsmith").expanduser()
        text = {k: v for k, v in asdict(self.text).items() if k in ("add_bos", "answers_only", "streaming")}
        if self.text.streaming:
            text["val_documents"] = self.text.val_documents
        if self.text.bpe_size is None:
            tokenizer = self._open_tokenizer(Path(self.text.tokenizer))  # for its errors, before anything is hashed
            identity = tokenizer_identity(Path(self.text.tokenizer))
            text["tokenizer"] = [identity.hash if identity else self.text.tokenizer, tokenizer.chat_template]
            if self.text.whitespace:
                text["whitespace"] = self.text.whitespace
        else:
            text["tokenizer"] = [self.text.tokenizer, self.text.chat_template]
        key = json.dumps([_FORMAT, signature(self.corpus), text], sort_keys=True)
        return root / f"text-{hashlib.sha256(key.encode()).hexdigest()[:20]}"

    def prepare_data(self) -> None:
        """Read, divide, train the tokenizer if asked, tokenise. Nothing to do where it has been done before."""
        if self.directory.is_dir():
            return
        if self.text.streaming:
            train: tuple[Document, ...] = ()
            val = tuple(islice((d for d in self._stream() if self._is_val(d)), self.text.val_documents))
            # the stream itself is not read here: its fingerprint is that of names, sizes and times
            summary, fingerprint = "streaming", f"stream:{signature(self.corpus)}"
        else:
            divided = load_corpus(self.corpus)
            train, val, summary = divided.train, divided.val, divided.summary()
            fingerprint = hashlib.sha256((digest(train) + digest(val)).encode()).hexdigest()
        with new_directory(self.directory) as temporary:
            if self.text.bpe_size is not None:
                train_bpe((d.text for d in train), self.text.bpe_size).save_pretrained(temporary / "tokenizer")
                tokenizer = self._open_tokenizer(temporary / "tokenizer")
            elif self.text.whitespace:
                keep_whitespace(Path(self.text.tokenizer), temporary / "tokenizer")
                tokenizer = self._open_tokenizer(temporary / "tokenizer")
            else:
                tokenizer = self._open_tokenizer(Path(self.text.tokenizer))
            for name, documents in (("train", train), ("val", val)):
                (temporary / name).mkdir()
                encoded = encode_documents(
                    documents, tokenizer, add_bos=self.text.add_bos, answers_only=self.text.answers_only
                )
                write_store(temporary / name, encoded, len(tokenizer))
            info = {"corpus": summary, "fingerprint": fingerprint}
            (temporary / "info.json").write_text(json.dumps(info), "utf-8")

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared data; a new run forgets the position of the one before."""
        self._loader = self._resume = None
        self._open()

    def _open(self) -> None:
        if self._info:
            return
        try:
            info = json.loads((self.directory / "info.json").read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise InvalidState(f"no prepared data in {str(self.directory)!r} ({e}): call prepare_data first") from e
        tokenizer = self.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        pack = WholeDocuments if self.text.packing == "whole" else PackedTokens
        self._train, self._val = (
            pack(
                TokenStore(self.directory / name),
                self.text.length,
                separate=self.text.separate_documents,
                pad_id=pad_id,
                fingerprint=info["fingerprint"][:16],
            )
            for name in ("train", "val")
        )
        self._info = info

    def _open_tokenizer(self, directory: Path) -> "PreTrainedTokenizerFast":
        tokenizer = load_tokenizer(directory)
        if self.text.chat_template:
            use_template(tokenizer, self.text.chat_template)
        return tokenizer

    def _stream(self) -> Iterator[Document]:
        return read_documents(self.corpus, streaming=True)

    def _is_val(self, document: Document) -> bool:
        return is_validation(document.group, self.corpus)

    # --- what others ask ---

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's directory, to be copied into exports. One that is made here is there after `prepare_data`."""
        own = self.text.bpe_size is not None or self.text.whitespace
        return self.directory / "tokenizer" if own else Path(self.text.tokenizer)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return self._open_tokenizer(self.tokenizer_dir)

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.text.batch_size

    @property
    def row_length(self) -> int:
        """Tokens of a row, padding included."""
        return self.text.length

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer; the network may have more rows."""
        return len(self.tokenizer)

    def data_fingerprint(self) -> str:
        """sha256 of the documents and their division; of a stream only of names, sizes and times, marked "stream:"."""
        self._open()
        return self._info["fingerprint"]

    def summary(self) -> str:
        """One line: documents, duplicates, split, tokens."""
        train, val = self._packed("train").store.num_tokens, self._packed("val").store.num_tokens
        packed = TextDataModule._packed(self, "train")
        rows = f", rows of whole documents {packed.fill:.1%} full" if isinstance(packed, WholeDocuments) else ""
        return (
            f"{self._info['corpus']}; {train} training tokens, {val} validation tokens, vocabulary {self.vocab_size}"
            f"{rows}"
        )

    def label_counts(self, size: int) -> torch.Tensor:
        """int64 [size]: how often each token id is a label of the training text. Raises InvalidValue for a stream."""
        if self.text.streaming:
            raise InvalidValue("labels of a stream cannot be counted beforehand: set text.streaming to false")
        store = self._packed("train").store
        return torch.from_numpy(np.bincount(store.ids[store.mask.astype(bool)], minlength=size))

    def prompts(
        self, count: int, length: int = 32, max_new_tokens: int = 128, tag: str | None = None
    ) -> list[TokenRequest]:
        """Requests that begin as validation documents do, the tags taking turns.

        Args: length: tokens of a prompt (a conversation is cut before its first answer instead). tag: only this one.
        The n-th round over a tag's documents starts n * length tokens later, so no two prompts are the same place.
        Raises InvalidValue when validation text is too short for that many.
        """
        store = self._packed("val").store
        names = sorted(store.tag_names) if tag is None else [tag]
        if unknown := [n for n in names if n not in store.tag_names]:
            raise InvalidValue(f"no validation text with tag {unknown[0]!r}: there is {sorted(store.tag_names)}")
        queues = [_prompt_queue(store, name, length) for name in names]
        requests: list[TokenRequest] = []
        while queues and len(requests) < count:
            for queue in list(queues):
                if (found := next(queue, None)) is None:
                    queues.remove(queue)
                elif len(requests) < count:
                    ids, name = found
                    requests.append(TokenRequest(ids, max_new_tokens, row_id=len(requests), tag=name))
        if len(requests) < count:
            raise InvalidValue(
                f"validation text has only {len(requests)} prompts of {length} tokens, {count} were asked for: "
                "raise corpus.val_fraction or ask for fewer or shorter ones"
            )
        return requests

    def _packed(self, name: str) -> PackedTokens:
        self._open()
        packed = self._train if name == "train" else self._val
        assert packed is not None
        return packed

    # --- loaders ---

    def _train_loader(self) -> StatefulLoader | StatefulStreamLoader:
        rank, world_size = self._ranks()
        if not self.text.streaming:
            return StatefulLoader(
                self._packed("train"),
                self.text.batch_size,
                seed=self.text.seed,
                shuffle=self.text.shuffle,
                last="drop",
                num_workers=self.text.num_workers,
                rank=rank,
                world_size=world_size,
            )
        source = TokenStream(
            lambda: (d for d in self._stream() if not self._is_val(d)),
            self.tokenizer,
            self.text.length,
            separate=self.text.separate_documents,
            add_bos=self.text.add_bos,
            answers_only=self.text.answers_only,
            window=self.text.shuffle_window if self.text.shuffle else 1,
            seed=self.text.seed,
            fingerprint=self.data_fingerprint(),
        )
        return StatefulStreamLoader(
            source,
            self.text.batch_size,
            self.text.batches_per_epoch,
            seed=self.text.seed,
            num_workers=self.text.num_workers,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Every validation sample once, in order; the last batch is filled with padding rows. [] without validation."""
        packed = self._packed("val")
        if len(packed) == 0:
            return []
        rank, world_size = self._ranks()
        return StatefulLoader(
            packed,
            self.text.batch_size,
            last="pad",
            num_workers=self.text.num_workers,
            rank=rank,
            world_size=world_size,
        )

    def test_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        return self.val_dataloader()


def _prompt_queue(store: TokenStore, tag: str, length: int) -> Iterator[tuple[list[int], str]]:
    number = store.tag_names.index(tag)
    documents = [i for i in range(store.num_documents) if int(store.tags[i]) == number]
    start = 0
    while documents:
        usable = []
        for index in documents:
            d = store.document(index)
            if not d.mask[0]:  # a conversation: up to its first answer
                answers = d.mask.nonzero()[0]
                if start == 0 and len(answers):
                    yield [int(i) for i in d.ids[: answers[0]]], tag
            elif start + length < len(d.ids):  # at least one token is left to predict
                yield [int(i) for i in d.ids[start : start + length]], tag
                usable.append(index)
        documents, start = usable, start + length
