"""Tokenised text on disk, and the samples of fixed length that are packed from it.

A store is a directory of raw arrays that are mapped into memory, never unpickled: ids.bin (uint16 or uint32), mask.bin
(uint8), offsets.npy, tags.npy, store.json. It is written under a private temporary name and renamed, so a directory
under its final name is complete; two processes that write the same one do no harm.
Shape letters: B batch, T time, N tokens, D documents.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.chat import encode_chat
from draftsmith.data.corpus import Document
from draftsmith.data.tokenizer import encode_texts
from draftsmith.inference.errors import InvalidState, InvalidValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
_CHUNK = 256  # documents tokenised at once


@dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens. A text ends with EOS, a conversation as its template ends it, what was served as it was."""

    ids: NDArray[np.int64]  # [n]
    mask: NDArray[np.uint8]  # [n]; 1: the token is a label
    tag: str


def encode_documents(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerFast", *, add_bos: bool, answers_only: bool
) -> Iterator[EncodedDocument]:
    """Tokenise lazily, `_CHUNK` documents at a time; exactly one result per document, in order.

    Args: answers_only: of conversations, only what the assistant wrote is a label.
    Raises InvalidValue naming the document when a conversation cannot be encoded.
    """
    iterator = iter(documents)
    head = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    while chunk := list(islice(iterator, _CHUNK)):
        texts = iter(encode_texts(tokenizer, [d.text for d in chunk if not d.messages and not d.ids]))
        for d in chunk:
            if d.ids:
                if not all(0 <= x < len(tokenizer) for x in d.ids):
                    raise InvalidValue(f"{d.source}: token ids outside 0..{len(tokenizer) - 1}: of another tokenizer")
                ids = list(d.ids)
                mask = [int(not answers_only or i >= d.prompt_ids) for i in range(len(ids))]
            elif d.messages:
                try:
                    chat = encode_chat(tokenizer, d.messages)
                except InvalidValue as e:
                    raise InvalidValue(f"{d.source}: {e}") from e
                ids, mask = chat.ids, chat.mask if answers_only else [1] * len(chat.ids)
            else:
                ids = [*head, *next(texts), tokenizer.eos_token_id]
                mask = [1] * len(ids)
            yield EncodedDocument(np.asarray(ids, np.int64), np.asarray(mask, np.uint8), d.tag)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A private temporary directory that becomes `target` when the block ends well; else nothing remains.

    Where another process was faster its directory stays and ours is dropped. Raises InvalidValue if nothing can be
    written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))  # mode 0700
    except OSError as e:
        raise InvalidValue(f"cannot write to {str(target.parent)!r} ({e.strerror}): set text.cache_dir") from e
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_store(directory: Path, documents: Iterable[EncodedDocument], vocab_size: int) -> None:
    """Write a store into an existing empty directory (see `new_directory`)."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    ends, tags = [0], []
    names: dict[str, int] = {}
    with (directory / "ids.bin").open("wb") as ids, (directory / "mask.bin").open("wb") as mask:
        for d in documents:
            ids.write(d.ids.astype(dtype).tobytes())
            mask.write(d.mask.tobytes())
            ends.append(ends[-1] + len(d.ids))
            tags.append(names.setdefault(d.tag, len(names)))
        for file in (ids, mask):
            file.flush()
            os.fsync(file.fileno())
    np.save(directory / "offsets.npy", np.asarray(ends, np.int64), allow_pickle=False)
    np.save(directory / "tags.npy", np.asarray(tags, np.int32), allow_pickle=False)
    info = {"version": _VERSION, "dtype": dtype.name, "tokens": ends[-1], "tags": list(names)}
    (directory / "store.json").write_text(json.dumps(info, ensure_ascii=False, indent=1), "utf-8")


class TokenStore:
    """A store opened for reading; pickles as its path, so worker processes map the same files."""

    def __init__(self, directory: Path) -> None:
        """Raises InvalidState when files are missing, damaged or of another version."""
        self.directory = directory
        try:
            info = json.loads((directory / "store.json").read_text("utf-8"))
            if info["version"] != _VERSION:
                raise ValueError(f"version {info['version']}, this program reads {_VERSION}")
            dtype, tokens = np.dtype(info["dtype"]), int(info["tokens"])
            for name, size in (("ids.bin", tokens * dtype.itemsize), ("mask.bin", tokens)):
                if (found := (directory / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            self.offsets: NDArray[np.int64] = np.load(directory / "offsets.npy", allow_pickle=False)  # [D + 1]
            self.tags: NDArray[np.int32] = np.load(directory / "tags.npy", allow_pickle=False)  # [D], into tag_names
            self.tag_names: list[str] = list(info["tags"])
            if tokens:  # an empty file cannot be mapped
                self.ids: NDArray[Any] = np.memmap(directory / "ids.bin", dtype, "r")  # [N]
                self.mask: NDArray[np.uint8] = np.memmap(directory / "mask.bin", np.uint8, "r")  # [N]
            else:
                self.ids, self.mask = np.empty(0, dtype), np.empty(0, np.uint8)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InvalidState(f"damaged token store {str(directory)!r} ({e}): delete it, it is built again") from e

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.directory,)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        return len(self.tags)

    def document(self, index: int) -> EncodedDocument:
        """The tokens of one document."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        tag = self.tag_names[int(self.tags[index])]
        return EncodedDocument(self.ids[part].astype(np.int64), np.array(self.mask[part]), tag)


def make_batch(
    ids: NDArray[np.int64],  # [B, T]
    mask: NDArray[np.uint8],  # [B, T]
    document: NDArray[np.int64],  # [B, T], any numbering; PADDING at padded positions
    sample_id: Sequence[int],  # [B]
    *,
    separate: bool,
) -> TokenBatch:
    """The one place where labels and documents of a row are settled.

    The first token of a row has nothing before it to predict it; nor has a document's first token where documents are
    kept apart. Documents are numbered within the row, or are all 0 where they may see each other.
    """
    real = document != PADDING
    label = mask.astype(bool) & real
    label[:, 0] = False
    if separate:
        starts = document[:, 1:] != document[:, :-1]
        label[:, 1:] &= ~starts
        number = np.zeros_like(document)
        np.cumsum(starts, axis=1, out=number[:, 1:])
    else:
        number = np.zeros_like(document)
    number[~real] = PADDING
    return TokenBatch(
        ids=torch.from_numpy(ids),
        loss_mask=torch.from_numpy(label.astype(np.int8)),
        document=torch.from_numpy(number.astype(np.int32)),
        sample_id=torch.tensor(list(sample_id), dtype=torch.int64),
        separate=separate,
    )


class PackedTokens:
    """A store cut into samples of T tokens: sample i is tokens i*T .. (i+1)*T - 1, the last one padded.

    No token is lost. A document that crosses a cut goes on in the next sample without its beginning.
    """

    def __init__(self, store: TokenStore, length: int, *, separate: bool, pad_id: int, fingerprint: str = "") -> None:
        """Args: fingerprint: of the data; loaders compare it on resume."""
        if length < 2:
            raise InvalidValue(f"length must be at least 2 (a token and its successor), got {length}")
        self.store, self.length, self.separate, self.pad_id = store, length, separate, pad_id
        self.fingerprint = f"{fingerprint}/{length}/{'separate' if separate else 'joined'}"

    def __len__(self) -> int:
        return -(-self.store.num_tokens // self.length)

    def fetch(self, indices: Sequence[int]) -> TokenBatch:
        """The batch of these samples; an index PADDING gives a row of padding."""
        rows = np.asarray(indices, np.int64)[:, None]
        place = rows * self.length + np.arange(self.length)
        real = (rows >= 0) & (place < self.store.num_tokens)
        place = np.where(real, place, 0)
        ids = np.where(real, self.store.ids[place].astype(np.int64), self.pad_id)
        document = np.where(real, np.searchsorted(self.store.offsets, place, side="right"), PADDING)
        return make_batch(ids, self.store.mask[place], document, [int(i) for i in indices], separate=self.separate)
