"""Canvases of text for masked diffusion: packed samples that are masked anywhere, or prompts with masked answers.

Source: LLaDA (arXiv 2502.09992), sections 2.2 and 2.3: answers of one mini-batch are padded with EOS to the longest,
and that EOS is an ordinary token which is masked and learned: so the model learns where to stop.
Shape letters: B batch, L canvas.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from draftsmith.data.batches import PADDING, CanvasBatch
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.stateful_loader import MapSource, StatefulLoader
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.token_store import PackedTokens, TokenStore
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.errors import InvalidValue

_DEFAULT_CORPUS, _DEFAULT_TEXT = CorpusConfig(), TextConfig()


@dataclass(frozen=True)
class CanvasConfig:
    """How texts become canvases."""

    answers: bool = False  # True: of each conversation the first answer is masked, what stands before it is the prompt
    shortest: int = 16  # packed text: no crop is shorter (the module's crop_share says how often there is one)

    def __post_init__(self) -> None:
        if self.shortest < 1:
            raise InvalidValue(f"canvas.shortest must be at least 1, got {self.shortest}")


DEFAULT_CANVAS = CanvasConfig()


class PackedCanvases:
    """Packed samples, every token of which may be masked."""

    def __init__(self, packed: PackedTokens, shortest: int) -> None:
        self.packed, self.shortest = packed, shortest
        self.fingerprint = f"{packed.fingerprint}/canvas{shortest}"

    def __len__(self) -> int:
        return len(self.packed)

    def fetch(self, indices: Sequence[int]) -> CanvasBatch:
        """The batch of these samples; an index PADDING gives a row of length 0."""
        tokens = self.packed.fetch(indices)
        length = (tokens.document != PADDING).sum(1)
        return CanvasBatch(
            tokens.ids, torch.zeros_like(length), length.clamp_max(self.shortest), length, tokens.sample_id
        )


class AnswerCanvases:
    """Prompts with answers, one document a sample; documents without both, and prompts too long, are left out.

    An answer that does not fit is cut: its canvas then ends without EOS, as an unfinished answer does.
    """

    def __init__(self, store: TokenStore, length: int, eos_id: int, fingerprint: str = "") -> None:
        """Raises InvalidValue when no document has a prompt and an answer."""
        self.store, self.length, self.eos_id = store, length, eos_id
        self.fingerprint = f"{fingerprint}/answers{length}"
        found = [self._ends(index) for index in range(store.num_documents)]
        self.kept = [index for index, (prompt, end) in enumerate(found) if 0 < prompt < min(end, length)]
        self.left_out = store.num_documents - len(self.kept)
        if store.num_documents and not self.kept:
            raise InvalidValue(
                f"none of {store.num_documents} documents has an answer behind a prompt of less than {length} tokens: "
                "give conversations (messages), or set data.canvas.answers to false"
            )
        if self.left_out:
            warnings.warn(f"{self.left_out} of {store.num_documents} documents have no answer to learn", stacklevel=2)

    def _ends(self, index: int) -> tuple[int, int]:
        """(first token of the first answer, end of that answer); (0, 0) without one."""
        mask = self.store.mask[int(self.store.offsets[index]) : int(self.store.offsets[index + 1])]
        labels = np.flatnonzero(mask)
        if not len(labels):
            return 0, 0
        breaks = np.flatnonzero(np.diff(labels) > 1)
        return int(labels[0]), int(labels[breaks[0]] if len(breaks) else labels[-1]) + 1

    def __len__(self) -> int:
        return len(self.kept)

    def fetch(self, indices: Sequence[int]) -> CanvasBatch:
        """The batch of these samples, padded with EOS to the longest; an index PADDING gives a row of length 0."""
        rows: list[NDArray[np.int64]] = []
        prompts: list[int] = []
        for index in indices:
            if index == PADDING:
                rows.append(np.empty(0, np.int64))
                prompts.append(0)
                continue
            number = self.kept[index]
            prompt, end = self._ends(number)
            ids = self.store.document(number).ids[:end]
            if ids[-1] != self.eos_id:
                ids = np.append(ids, self.eos_id)
            rows.append(ids[: self.length])
            prompts.append(prompt)
        used = torch.tensor([len(row) for row in rows])
        longest = int(used.max())
        ids = np.full((len(rows), longest), self.eos_id, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        length = torch.where(used > 0, longest, 0)
        sample = torch.tensor(list(indices), dtype=torch.int64)
        return CanvasBatch(torch.from_numpy(ids), torch.tensor(prompts), used, length, sample)


class CanvasDataModule(TextDataModule):
    """`CanvasBatch`es of text: `TextDataModule`'s corpus, tokenizer and cache, other samples."""

    def __init__(
        self,
        corpus: CorpusConfig = _DEFAULT_CORPUS,
        text: TextConfig = _DEFAULT_TEXT,
        canvas: CanvasConfig = DEFAULT_CANVAS,
    ) -> None:
        """Args: corpus, text: as `TextDataModule` takes them. canvas: what may be masked.

        Raises InvalidValue for what canvases of text cannot be: streamed, or with documents kept apart.
        """
        if text.streaming or text.separate_documents:
            name = "streaming" if text.streaming else "separate_documents"
            raise InvalidValue(f"canvases see whole samples: set data.text.{name} to false")
        super().__init__(corpus, text)
        self.canvas = canvas

    @property
    def special_ids(self) -> dict[str, int]:
        """What a network for this text must agree with; its mask id lies above the tokenizer's own ids."""
        return {"eos_id": int(self.tokenizer.eos_token_id)}

    def source(self, name: str) -> MapSource:
        """The samples of "train" or "val"."""
        packed = self._packed(name)
        if not self.canvas.answers:
            return PackedCanvases(packed, self.canvas.shortest)
        return AnswerCanvases(packed.store, self.text.length, self.special_ids["eos_id"], packed.fingerprint)

    def canvases(
        self, count: int, *, prompt: int, answer: int, mask_id: int, tag: str | None = None
    ) -> list[CanvasRequest]:
        """Requests of `prompt` tokens of validation text (the tags taking turns) and `answer` holes.

        Raises as `prompts`.
        """
        holes = range(prompt, prompt + answer)
        return [
            CanvasRequest([*request.prompt, *[mask_id] * answer], holes, row_id=i, tag=request.tag)
            for i, request in enumerate(self.prompts(count, prompt, answer, tag))
        ]

    def _train_loader(self) -> StatefulLoader:
        return self._loader_of("train", "drop", self.text.shuffle)

    def val_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Every validation sample once, in order; the last batch is filled with rows of length 0."""
        return self._loader_of("val", "pad", False) if len(self._packed("val")) else []

    def _loader_of(self, name: str, last: str, shuffle: bool) -> StatefulLoader:
        rank, world_size = self._ranks()
        return StatefulLoader(
            self.source(name),
            self.text.batch_size,
            seed=self.text.seed,
            shuffle=shuffle,
            last="pad" if last == "pad" else "drop",
            num_workers=self.text.num_workers,
            rank=rank,
            world_size=world_size,
        )
