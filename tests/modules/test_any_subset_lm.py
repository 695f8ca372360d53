"""The any-subset module: what the loss is, who it counts, what validation repeats, and which data is refused."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.data import orderings
from draftsmith.data.batches import TokenBatch
from draftsmith.data.orderings import MaskSchedule, Ordering
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig
from draftsmith.modules.any_subset_lm import AnySubset
from draftsmith.modules.any_subset_sample import RIGHT, WRONG, infilled, panel
from draftsmith.modules.optim import OptimConfig
from tests.markov_chain import N, V, batch_of, sample

MASK, STEPS = V, 150
CONFIG = AnySubsetConfig(V + 1, 16, 2, 2, 32, N, MASK)
MASKING = MaskSchedule(0.4, 0.8, 0.2, 4)


def module(**settings: Any) -> AnySubset:
    torch.manual_seed(0)
    made = AnySubset(CONFIG, **{"masking": MASKING, "embedding_std": 0.5, **settings})
    made.configure_model()
    return made.eval()


def chains(count: int = 4, first: int = 0) -> TokenBatch:
    return batch_of(sample(count, torch.Generator().manual_seed(first)), first)


def log_probs(subject: AnySubset, batch: TokenBatch, ordering: Ordering) -> Tensor:
    """[B, K] of the targets' tokens, plainly."""
    net = subject.net
    assert net is not None
    limit = ordering.num_visible if subject.loss_name == "parallel" else None
    logits = net.head(net(batch.ids, ordering.rank, ordering.num_visible, ordering.targets, limit))
    tokens = batch.ids.gather(1, ordering.targets)
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def trainer(tmp_path: Path, **settings: Any) -> pl.Trainer:
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain |= {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_model_summary": False}
    return pl.Trainer(**(plain | {"num_sanity_val_steps": 0} | settings))


def loader(*batches: TokenBatch) -> DataLoader[TokenBatch]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


# --- the loss


@pytest.mark.parametrize("loss", ["joint", "parallel"])
@pytest.mark.parametrize("order", orderings.ORDERS)
def test_loss_is_the_log_likelihood_of_the_hidden_tokens(loss: str, order: str) -> None:
    mean, total = (module(loss=loss, order=order, reduction=name) for name in ("mean", "sum"))
    batch = chains()
    ordering, _ = mean.training_ordering(batch, step=7)
    expected = -log_probs(mean, batch, ordering) * ordering.real
    out = mean.loss(batch, ordering, statistics=False)
    assert out.total.item() == pytest.approx((expected.sum(1) / ordering.counts).sum().item(), rel=1e-5)
    out = total.loss(batch, ordering, statistics=True)
    assert out.total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert out.stats is not None and len(out.stats.rows) == int(ordering.counts.sum())


def test_gradients_are_those_of_the_plain_loss_and_the_mask_row_has_none() -> None:
    subject, batch = module(), chains()
    ordering, _ = subject.training_ordering(batch, step=7)
    assert subject.net is not None
    subject.loss(batch, ordering, statistics=False).total.backward()
    found = {name: p.grad.clone() for name, p in subject.net.named_parameters() if p.grad is not None}
    subject.net.zero_grad()
    nll = -(log_probs(subject, batch, ordering) * ordering.real).sum(1) / ordering.counts
    nll.sum().backward()
    for name, p in subject.net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)
    assert not found["lm_head.weight"][MASK].any() and found["lm_head.weight"][0].any()


def test_padding_and_rows_of_padding_do_not_count() -> None:
    subject = module()
    whole, padded = chains(2), chains(3)
    padded.document[2:], padded.loss_mask[2:], padded.sample_id[2:] = -1, 0, -1
    padded.ids[2:] = 0
    assert torch.equal(padded.ids[:2], sample(3, torch.Generator().manual_seed(0))[:2])
    whole.ids[:] = padded.ids[:2]
    rates = torch.full((3,), 0.5, dtype=torch.float64)
    lengths = (padded.document >= 0).sum(1)
    big = orderings.draw(rates, torch.arange(3), lengths, N, seed=0)
    small = orderings.draw(rates[:2], torch.arange(2), lengths[:2], N, seed=0)
    found = subject.loss(padded, big, statistics=True)
    assert found.total.item() == pytest.approx(subject.loss(whole, small, statistics=True).total.item(), rel=1e-6)
    assert found.stats is not None and int(found.stats.rows.max()) < 2 * big.targets.shape[1]


def test_only_labels_are_learned_but_a_text_begins_with_one() -> None:
    subject, batch = module(reduction="sum"), chains(1)
    batch.loss_mask[:, 10:] = 0  # what the user of a conversation said
    rates = torch.tensor([0.99], dtype=torch.float64)
    ordering = orderings.draw(rates, torch.tensor([3]), torch.tensor([N]), N, seed=0)
    learned = (ordering.targets < 10) & ordering.real
    assert bool((ordering.targets == 0).any())
    assert float(subject.loss(batch, ordering, statistics=False).weight) == int(learned.sum())


def test_two_ranks_and_two_micro_batches_hide_what_one_process_hides(tmp_path: Path) -> None:
    subject, batch = module(), chains(8)
    whole, rates = subject.training_ordering(batch, step=5)
    rows: dict[int, Tensor] = {}
    for rank in range(2):
        for micro in range(2):
            at = orderings.places(rank, 2, 2, micro)
            subject._trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=2)  # type: ignore[assignment]  # all it reads
            part = TokenBatch(batch.ids[at], batch.loss_mask[at], batch.document[at], batch.sample_id[at])
            ordering, some = subject.training_ordering(part, step=5, micro=micro + 2)
            assert torch.equal(some, rates[at])
            rows |= dict(zip(at.tolist(), ordering.rank, strict=True))
    assert torch.equal(torch.stack([rows[i] for i in range(8)]), whole.rank)


# --- the module in a trainer


def test_training_lowers_a_validation_that_repeats_itself(tmp_path: Path) -> None:
    wide = dataclasses.replace(CONFIG, hidden_size=32, intermediate_size=64)
    easy = MaskSchedule(0.2, 0.5, 0.2, 0)
    optim = OptimConfig(lr=1e-2, warmup_steps=5)
    subject = AnySubset(wide, masking=easy, embedding_std=0.3, optim=optim, val_rates=(0.25, 0.75))
    run = trainer(tmp_path, max_steps=STEPS, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    validation = loader(chains(16, 1000))
    (before,) = run.validate(subject, validation, verbose=False)
    (again,) = run.validate(subject, validation, verbose=False)
    assert before == again
    assert before["val/loss"] == pytest.approx((before["val_hidden/nll_0.25"] + before["val_hidden/nll_0.75"]) / 2)
    run.fit(subject, loader(*(chains(16, 16 * i) for i in range(STEPS))), validation)
    (after,) = run.validate(subject, validation, verbose=False)
    assert after["val/loss"] < before["val/loss"] - 0.1 and before["val/loss"] < math.log(V) + 0.5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    board.Reload()
    (text, *_) = board.Tensors("val/infilled/text_summary")
    assert RIGHT in text.tensor_proto.string_val[0].decode() or WRONG in text.tensor_proto.string_val[0].decode()
    assert "val_hidden/nll_0.75" in board.Tags()["scalars"]
    assert all(0.2 <= event.value <= 0.5 for event in board.Scalars("train/mask_rate"))


def test_a_checkpoint_says_what_an_export_needs(tmp_path: Path) -> None:
    subject = AnySubset(CONFIG, masking=MASKING)
    run = trainer(tmp_path, max_steps=2)
    run.fit(subject, loader(chains(), chains()), loader(chains(4, 90)))
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    fresh = AnySubset(**stored["hyper_parameters"])
    fresh.configure_model()
    fresh.load_state_dict(stored["state_dict"])
    fresh.on_load_checkpoint(stored)
    spec = fresh.export_spec()
    assert spec.kind == "any-subset-lm" and spec.model is fresh.net and spec.steps == 2
    assert spec.trained == {
        "order": "lattice",
        "mask_rate": [0.4, 0.8],
        "max_length": N,
        "mask_id": MASK,
        "loss": "joint",
    }
    assert set(spec.metrics) == {"val/loss", "val/accuracy"}
    with pytest.raises(InvalidState, match="configure_model"):
        AnySubset(CONFIG).export_spec()


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    subject = module()
    assert subject.net is not None
    kept = {name: p.clone() for name, p in subject.net.named_parameters()}
    whole = subject.loss

    def broken(*args: Any, **more: Any) -> Any:
        out = whole(*args, **more)
        return type(out)(out.total * float("nan"), out.weight, out.stats)

    subject.loss = broken  # type: ignore[method-assign]  # what a bad batch does
    run = trainer(tmp_path, max_steps=3)
    run.fit(subject, loader(chains(), chains(), chains()))
    assert run.callback_metrics["train/skipped"] == 3
    assert all(torch.equal(kept[name], p) for name, p in subject.net.named_parameters())


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": None}, "exactly one of model.net"),
        ({"init_from": "x"}, "exactly one of model.net"),
        ({"order": "random"}, "unknown order 'random'"),
        ({"loss": "jiont"}, "did you mean 'joint'"),
        ({"reduction": "max"}, "unknown reduction"),
        ({"val_rates": ()}, "val_rates"),
        ({"val_rates": (0.5, 1.0)}, "val_rates"),
        ({"embedding_std": 0.0}, "embedding_std"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        AnySubset(**{"net": CONFIG, **settings})


class Data(pl.LightningDataModule):
    """What a module asks of its data."""

    def __init__(self, vocab_size: int = V, length: int = N, separate: bool = False, special: tuple[int, ...] = ()):
        super().__init__()
        self.vocab_size, self.text = vocab_size, SimpleNamespace(length=length, separate_documents=separate)
        self.tokenizer = SimpleNamespace(all_special_ids=list(special), eos_token_id=0, decode=str)

    def val_dataloader(self) -> DataLoader[TokenBatch]:
        return loader(chains())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocab_size": V + 2}, f"network only {V + 1} rows: set model.net.vocab_size to {V + 3}"),
        ({"length": N + 1}, "shorten data.text.length"),
        ({"separate": True}, "separate_documents"),
        ({"vocab_size": V + 1}, f"mask id {MASK} is a token of text"),
        ({"vocab_size": V + 1, "special": (1, 2)}, f"mask id {MASK} is a token of text"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        trainer(tmp_path).validate(module(), datamodule=Data(**data), verbose=False)
    trainer(tmp_path).validate(module(), datamodule=Data(vocab_size=V + 1, special=(MASK,)), verbose=False)


# --- the panel


def test_the_panel_colours_tokens() -> None:
    text = panel([1, 2, 3, 4, 5], [1, 2, 7, 4, 5], range(1, 4), None)
    assert text.startswith(f"`1` {RIGHT}`2` {WRONG}`7` (`3`) {RIGHT}`4` `5`") and text.endswith(
        "2 of 3 tokens are the text's own"
    )
    assert infilled(module().net, chains(1).ids[0], None).count(RIGHT) + infilled(  # type: ignore[arg-type]  # built
        module().net, chains(1).ids[0], None  # type: ignore[arg-type]
    ).count(WRONG) == 12  # fmt: skip
