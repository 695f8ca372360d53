"""Packing on the fly, for text that is too much to tokenise first: bounded memory, exact resume.

The stream is the documents again and again (a pass each), tokenised and cut into samples of T tokens as `PackedTokens`
does it; the last sample of a pass is padded. Shuffling takes `window` samples at a time and orders them by a counter
hash, so the order is a pure function of (seed, sample index) and the whole state is a cursor of five integers.
Limits: on resume the documents before the cursor are read again, though not tokenised.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.corpus import Document
from draftsmith.data.stateful_loader import permutation
from draftsmith.data.token_store import EncodedDocument, encode_documents, make_batch
from draftsmith.inference.errors import InvalidValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class StreamSample:
    """One packed sample before it joins a batch."""

    ids: NDArray[np.int64]  # [T]
    mask: NDArray[np.uint8]  # [T]
    document: NDArray[np.int64]  # [T], the document's number in its pass; PADDING behind the last token of a pass
    sample_id: int


@dataclass(frozen=True)
class _Place:
    """Where a sample begins: token `token` of document `document` of pass `epoch`."""

    epoch: int = 0
    document: int = 0
    token: int = 0


class TokenStream:
    """An endless source of packed samples for `StatefulStreamLoader`."""

    def __init__(
        self,
        documents: Callable[[], Iterator[Document]],
        tokenizer: "PreTrainedTokenizerFast",
        length: int,
        *,
        separate: bool,
        add_bos: bool,
        answers_only: bool,
        window: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        """Args: documents: starts a pass; must give the same documents each time. window: 1 keeps the order."""
        if length < 2:
            raise InvalidValue(f"length must be at least 2 (a token and its successor), got {length}")
        if window < 1:
            raise InvalidValue(f"shuffle_window must be at least 1 (1: no shuffling), got {window}")
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self.separate, self.add_bos, self.answers_only = separate, add_bos, answers_only
        self.window, self.seed = window, seed
        self.fingerprint = f"{fingerprint}/{length}/{'separate' if separate else 'joined'}/{window}"
        pad = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id if pad is None else pad

    def samples(self, cursor: Mapping[str, int]) -> Iterator[tuple[StreamSample, Mapping[str, int]]]:
        """Samples from `cursor` on, each with the cursor behind it. {} is the start."""
        number = cursor.get("window", 0)
        skip = cursor.get("skip", 0)  # samples of the window that were given out
        place = _Place(cursor.get("epoch", 0), cursor.get("document", 0), cursor.get("token", 0))
        packed = self._packed(place, number * self.window)
        while True:
            block = list(islice(packed, self.window))
            order = permutation(self.window, self.seed, number)
            for given in range(skip, self.window):
                whole = given + 1 == self.window
                start = block[-1][1] if whole else place
                yield (
                    block[order[given]][0],
                    {
                        "window": number + whole,
                        "skip": 0 if whole else given + 1,
                        "epoch": start.epoch,
                        "document": start.document,
                        "token": start.token,
                    },
                )
            place, number, skip = block[-1][1], number + 1, 0

    def collate(self, samples: Sequence[StreamSample]) -> TokenBatch:
        """The samples as one batch."""
        return make_batch(
            np.stack([s.ids for s in samples]),
            np.stack([s.mask for s in samples]),
            np.stack([s.document for s in samples]),
            [s.sample_id for s in samples],
            separate=self.separate,
        )

    def _packed(self, place: _Place, sample_id: int) -> Iterator[tuple[StreamSample, _Place]]:
        """Samples in stream order, each with the place where the next one begins."""
        while True:
            buffer = _Buffer(self.length, self.pad_id)
            first = sample_id
            for index, document in enumerate(self._encoded(place.document), place.document):
                skip = place.token if index == place.document else 0
                buffer.add(index, skip, document)
                while buffer.size >= self.length:
                    sample = buffer.take(sample_id)
                    yield sample, _Place(place.epoch, *buffer.next_token(index))
                    sample_id += 1
            if place == _Place(place.epoch) and not buffer.size and sample_id == first:
                raise InvalidValue("the stream has no training text: lower corpus.val_fraction or give more sources")
            if buffer.size:
                yield buffer.take(sample_id), _Place(place.epoch + 1)
                sample_id += 1
            place = _Place(place.epoch + 1)

    def _encoded(self, first: int) -> Iterator[EncodedDocument]:
        documents = islice(self.documents(), first, None)
        return encode_documents(documents, self.tokenizer, add_bos=self.add_bos, answers_only=self.answers_only)


class _Buffer:
    """Tokens that wait to fill a sample, in the pieces in which the documents brought them."""

    def __init__(self, length: int, pad_id: int) -> None:
        self.length, self.pad_id = length, pad_id
        self.pieces: deque[tuple[int, int, NDArray[np.int64], NDArray[np.uint8]]] = (
            deque()
        )  # document, offset, ids, mask
        self.size = 0

    def add(self, document: int, skip: int, encoded: EncodedDocument) -> None:
        if len(encoded.ids) > skip:
            self.pieces.append((document, skip, encoded.ids[skip:], encoded.mask[skip:]))
            self.size += len(encoded.ids) - skip

    def next_token(self, last_document: int) -> tuple[int, int]:
        """(document, offset) of the first token that waits; the document after `last_document` when none does."""
        return self.pieces[0][:2] if self.pieces else (last_document + 1, 0)

    def take(self, sample_id: int) -> StreamSample:
        """The next T tokens, padded when fewer wait."""
        ids = np.full(self.length, self.pad_id, np.int64)
        mask = np.zeros(self.length, np.uint8)
        document = np.full(self.length, PADDING, np.int64)
        filled = 0
        while self.pieces and filled < self.length:
            number, offset, piece_ids, piece_mask = self.pieces.popleft()
            n = min(len(piece_ids), self.length - filled)
            ids[filled : filled + n], mask[filled : filled + n] = piece_ids[:n], piece_mask[:n]
            document[filled : filled + n] = number
            if n < len(piece_ids):
                self.pieces.appendleft((number, offset + n, piece_ids[n:], piece_mask[n:]))
            filled += n
        self.size -= filled
        return StreamSample(ids, mask, document, sample_id)
