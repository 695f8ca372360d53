"""ParallelBench in token form as batches for training."""

import torch

from draftsmith.data.batches import PADDING
from draftsmith.data.parallelbench.token_data import (
    LEARNABLE,
    ParallelBenchDataModule,
    TokenFormConfig,
    TokenFormSamples,
    drawn,
)
from draftsmith.data.parallelbench.token_form import PAD, TokenForm


def module(**settings: int) -> ParallelBenchDataModule:
    return ParallelBenchDataModule(TokenFormConfig(batch_size=16, epoch_samples=64, val_samples=20, **settings))


def test_rows_are_prompt_and_a_right_answer() -> None:
    data = module()
    source = TokenFormSamples(data.form, 100, 1 << 48)
    batch = source.fetch([*range(99), PADDING])
    names = set()
    for i in range(99):
        row, prompt, length = batch.ids[i].tolist(), int(batch.prompt[i]), int(batch.length[i])
        sample = drawn(data.form, (1 << 48) + i)
        names.add(sample.task)
        assert row[:prompt] == data.form.prompt(sample)
        assert data.form.tasks[sample.task].valid(sample, data.form.tokens(row[prompt:length]))
        assert row[length:] == [PAD] * (batch.ids.shape[1] - length)
    assert len(names) > 10
    assert batch.length[-1] == 0
    assert batch.sample_id[-1] == PADDING
    assert torch.equal(batch.least, batch.length)  # the canvas says how long an answer is: it is never cut
    assert torch.equal(source.fetch([7]).ids[0], batch.ids[7, : source.fetch([7]).ids.shape[1]])


def test_parts_do_not_overlap() -> None:
    data = module()
    seen = [
        tuple(row)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        for batch in loader
        for row in batch.ids.tolist()
        if any(row)
    ]
    assert len(seen) == 64 + 20 + 20
    assert len(set(seen)) > 100  # three names of few may come twice


def test_the_form_is_read_back_from_the_tokenizers_vocabulary() -> None:
    data = module()
    found = TokenForm.of({token: i for i, token in enumerate(data.form.vocabulary)})
    assert found is not None
    assert found.vocabulary == data.form.vocabulary
    assert tuple(found.tasks) == LEARNABLE
    assert TokenForm.of({"a": 0, "b": 1}) is None
    assert TokenForm.of({"<copy>": 0, "b": 1}) is None
    assert data.special_ids["mask_id"] == data.vocab_size == data.form.vocab_size - 1
    assert module(words=12).data_fingerprint() != data.data_fingerprint()
    assert "14 tasks" in data.summary()
