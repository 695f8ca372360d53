"""Batches of ParallelBench in token form: what a small masked model learns the tasks from.

Unlimited: sample i is a function of (seed, i), its task and length are drawn with it. The standard sets that models are
judged on have other seeds (see `tasks.standard_set`).
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

from draftsmith.data.batches import PADDING, CanvasBatch
from draftsmith.data.parallelbench.registry import with_names
from draftsmith.data.parallelbench.tasks import Sample
from draftsmith.data.parallelbench.token_form import END, PAD, TokenForm
from draftsmith.data.stateful_loader import StatefulLoader
from draftsmith.inference.errors import InvalidValue

_TRAIN, _VALIDATION, _TEST = 1 << 48, 1 << 49, 1 << 50  # first seeds: no standard set gets there
LEARNABLE = (
    *("copy", "sort", "reverse", "shuffle", "replace_index", "replace_random", "insert_index", "insert_random"),
    *("remove_index", "remove_random", "words_to_sentence_easy", "words_to_sentence_medium"),
    *("words_to_sentence_hard", "domino"),
)


@dataclass(frozen=True)
class TokenFormConfig:
    """Which tasks, and how they become batches."""

    tasks: tuple[str, ...] = LEARNABLE
    words: int = 24  # names that the list tasks draw from; more are harder to learn
    batch_size: int = 96  # per rank
    epoch_samples: int = 1 << 20  # an epoch; a longer run sees them again
    val_samples: int = 512
    seed: int = 0
    tokenizer_dir: str = "runs/parallelbench-tokenizer"  # where the word-level tokenizer is written

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name in ("words", "batch_size", "epoch_samples", "val_samples"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"bench.{name} must be at least 1, got {getattr(self, name)}")


DEFAULT_TOKEN_FORM = TokenFormConfig()


def drawn(form: TokenForm, number: int) -> Sample:
    """Sample of a number: a task and one of its lengths, then the sample itself."""
    rng = random.Random(number)
    task = form.tasks[rng.choice(list(form.tasks))]
    return task.sample(number, rng.choice(task.lengths))


class TokenFormSamples:
    """A stretch of samples, as loaders read it."""

    def __init__(self, form: TokenForm, size: int, first: int) -> None:
        self.form, self.size, self.first = form, size, first
        names = hashlib.sha256("\n".join(form.vocabulary).encode()).hexdigest()[:16]
        self.fingerprint = f"parallelbench/{names}/{first}"

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Sequence[int]) -> CanvasBatch:
        """The batch of these samples, padded on the right; an index PADDING gives a row of length 0."""
        rows: list[list[int]] = []
        prompts: list[int] = []
        for index in indices:
            if index == PADDING:
                rows.append([])
                prompts.append(0)
                continue
            sample = drawn(self.form, self.first + index)
            prompt = self.form.prompt(sample)
            rows.append([*prompt, *self.form.ids(sample.reference)])
            prompts.append(len(prompt))
        longest = max(map(len, rows))
        length = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
        return CanvasBatch(ids, torch.tensor(prompts), length, length, torch.tensor(list(indices)))


class ParallelBenchDataModule(LightningDataModule):
    """Training and validation batches (`CanvasBatch`) of ParallelBench's tasks in token form."""

    def __init__(self, bench: TokenFormConfig = DEFAULT_TOKEN_FORM) -> None:
        super().__init__()
        self.bench = bench
        self.form = TokenForm(with_names(bench.tasks, bench.words))

    @property
    def rows(self) -> int:
        """Of a batch, per rank."""
        return self.bench.batch_size

    @property
    def vocab_size(self) -> int:
        """Without the mask."""
        return self.form.mask_id

    @property
    def special_ids(self) -> dict[str, int]:
        """What a network for these tasks must agree with."""
        return {"mask_id": self.form.mask_id, "eos_id": END, "pad_id": PAD}

    @property
    def tokenizer_dir(self) -> Path:
        return Path(self.bench.tokenizer_dir)

    def prepare_data(self) -> None:
        """Writes the tokenizer, so that the export knows what its ids mean."""
        self.form.save_tokenizer(self.tokenizer_dir)

    def data_fingerprint(self) -> str:
        return self._part(1, _TRAIN).fingerprint

    def summary(self) -> str:
        """One line."""
        return f"ParallelBench in token form, {len(self.form.tasks)} tasks, vocabulary {self.form.vocab_size}"

    def _part(self, size: int, first: int) -> TokenFormSamples:
        return TokenFormSamples(self.form, size, first + (self.bench.seed << 24))

    def train_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._part(self.bench.epoch_samples, _TRAIN), self.bench.batch_size, seed=self.bench.seed)

    def val_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._part(self.bench.val_samples, _VALIDATION), self.bench.batch_size, last="pad")

    def test_dataloader(self) -> StatefulLoader:
        return StatefulLoader(self._part(self.bench.val_samples, _TEST), self.bench.batch_size, last="pad")
