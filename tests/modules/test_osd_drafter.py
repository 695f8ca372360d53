"""OSDDrafter: which rows learn, from what, what a step changes, bad input, and a whole Lightning run on text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from draftsmith.data.batches import OnlineBatch, TokenBatch
from draftsmith.data.online_buffer import collate
from draftsmith.inference.errors import InvalidState, InvalidValue, UnknownKey
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.modules.hf_model import FrozenTeacher, HFModel, output_head
from draftsmith.modules.losses.divergence import row_loss
from draftsmith.modules.optim import OptimConfig
from draftsmith.modules.osd_drafter import OSDDrafter
from tests.tiny import lm, write_lm, write_tokenizer

V = 40
ARCH = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
SMALL = HFModel(arch=ARCH)


def teacher() -> FrozenTeacher:
    return FrozenTeacher(lm(seed=3, vocab_size=V, layers=1, width=16).requires_grad_(False))


def drafter(**changes: Any) -> OSDDrafter:
    torch.manual_seed(0)
    module = OSDDrafter(**({"draft": SMALL} | changes))
    module.configure_model()
    module.use_teacher(teacher())
    return module


def online(seed: int = 0, positions: Sequence[Sequence[int]] = ((3, 5), (2,)), **changes: Any) -> OnlineBatch:
    """Records with the teacher's own laws."""
    generator = torch.Generator().manual_seed(seed)
    net, records = teacher().model, []
    for marked in positions:
        ids = torch.randint(V, (8,), generator=generator)
        at = torch.tensor(marked, dtype=torch.int64)
        with torch.no_grad():
            logits = net(ids.unsqueeze(0)).logits[0]
        records.append(Record(ids, at, TeacherLaw.from_logits(logits[at - 1], V)))
    return dataclasses.replace(collate(records), **changes)


def text(rows: int = 3, width: int = 10, first: int = 4, seed: int = 0) -> TokenBatch:
    ids = torch.randint(V, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= first).to(torch.int8).expand(rows, width).contiguous()
    return TokenBatch(ids, mask, torch.zeros(rows, width, dtype=torch.int32), torch.arange(rows))


def logits_of(module: OSDDrafter, ids: Tensor) -> Tensor:
    return module.net(0)(ids).logits


# --- losses


def test_the_online_loss_is_that_of_the_rows_that_predict_the_marked_tokens() -> None:
    module, batch = drafter(), online()
    out = module.online_loss(batch)
    q = logits_of(module, batch.contexts).log_softmax(-1)[batch.row, batch.position - 1]
    p = teacher().model(batch.contexts).logits.log_softmax(-1)[batch.row, batch.position - 1]
    expected = (p.exp() * (p - q)).sum(-1)
    assert out.stats is not None
    assert torch.allclose(out.stats.loss, expected, atol=1e-5)
    assert torch.allclose(out.stats.alpha, torch.minimum(p, q).exp().sum(-1), atol=1e-5)
    late = logits_of(module, batch.contexts).log_softmax(-1)[batch.row, batch.position]
    assert not torch.allclose(out.stats.loss, (p.exp() * (p - late)).sum(-1), atol=1e-2)  # the paper's code: one late


def test_gradients_are_zero_outside_the_marked_positions() -> None:
    module, batch = drafter(), online(positions=((3,),))
    net = module.net(0)
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        out.last_hidden_state.retain_grad()
        seen.append(out.last_hidden_state)

    handle = net.base_model.register_forward_hook(keep)
    module.online_loss(batch).total.backward()
    handle.remove()
    grad = seen[0].grad
    assert grad is not None
    rows = grad[0].abs().sum(-1)
    assert rows[2] > 0 and rows[:2].sum() == 0 and rows[3:].sum() == 0  # token 3 is predicted by row 2
    assert float(net.lm_head.weight.grad.abs().sum()) > 0


def test_tokens_behind_a_mark_do_not_matter() -> None:
    module, batch = drafter(), online(positions=((3, 7), (2,)))
    before = module.online_loss(batch).total
    batch.contexts[1, 2:] = 5  # the second record is marked at index 2 only
    assert torch.equal(module.online_loss(batch).total, before)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "fkl_rkl_mix", "tvd", "ce", "emo"])
def test_one_small_step_lowers_the_loss_on_a_fixed_record(loss: str) -> None:
    module, batch = drafter(loss=loss), online()
    before = module.online_loss(batch).total
    before.backward()
    with torch.no_grad():
        for p in module.net(0).parameters():
            p -= 1e-3 * p.grad
    assert module.online_loss(batch).total < before


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "fkl_rkl_mix", "tvd", "emo"])
def test_losses_are_zero_only_where_the_draft_has_the_targets_law(loss: str) -> None:
    module, batch = drafter(loss=loss), online()
    out = module.online_loss(batch).stats
    assert out is not None and bool((out.loss > 1e-3).all())
    module.nets[0] = lm(seed=3, vocab_size=V, layers=1, width=16)  # the target itself as the draft
    equal = module.online_loss(batch).stats
    assert equal is not None and bool((equal.loss.abs() < 1e-5).all())


def test_jsd_is_bounded_and_symmetric() -> None:
    jsd = row_loss("jsd")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 9, generator=g) * 6, torch.randn(50, 9, generator=g) * 6
    ab = jsd(a, TeacherLaw.from_logits(b, 9))
    ba = jsd(b, TeacherLaw.from_logits(a, 9))
    assert torch.allclose(ab, ba, atol=1e-5)
    assert bool((ab >= 0).all()) and bool((ab <= torch.log(torch.tensor(2.0)) + 1e-6).all())


def test_emo_takes_its_costs_from_the_target() -> None:
    module = drafter(loss="emo", draft=HFModel(arch=ARCH | {"vocab_size": V + 3}))
    out = module.text_loss(text())
    loss = module._emo_loss()
    head = output_head(teacher().model)[0]
    torch.testing.assert_close(loss.costs.unit, head / head.norm(dim=-1, keepdim=True))  # cut to the common rows
    assert out.stats is not None and set(out.stats.more) == {"nll", "cost"}
    lone = drafter(loss="emo")
    lone.teacher = None
    with pytest.raises(InvalidState, match=r"set model\.teacher\.path"):
        lone.online_loss(online())


@pytest.mark.parametrize("loss", ["forward_kl", "emo"])
def test_text_loss_equals_the_recorded_one(loss: str) -> None:
    """The live teacher and laws recorded from it are the same thing."""
    module = drafter(loss=loss)
    batch = text(rows=1, width=8, first=3)
    live = module.text_loss(batch)
    at = torch.arange(3, 8)
    law = TeacherLaw.from_logits(teacher().model(batch.ids).logits[0, at - 1], V)
    recorded = module.online_loss(collate([Record(batch.ids[0], at, law)]))
    assert live.weight == 5
    assert torch.allclose(live.total, recorded.total, atol=1e-4)


def test_positions_behind_the_drafts_context_are_left_out() -> None:
    module = drafter(draft=HFModel(arch=ARCH | {"max_position_embeddings": 5}))
    batch = online(positions=((3, 4, 5, 7), (2,)))
    out = module.online_loss(batch)
    inside = online(positions=((3, 4), (2,)))
    assert out.weight == 3
    assert torch.allclose(out.total, module.online_loss(inside).total, atol=1e-6)
    assert drafter(loss="ce", draft=HFModel(arch=ARCH | {"max_position_embeddings": 5})).online_loss(batch).weight == 3


def test_label_fine_tuning_ignores_the_laws() -> None:
    module, batch = drafter(loss="ce"), online()
    q = logits_of(module, batch.contexts).log_softmax(-1)[batch.row, batch.position - 1]
    assert torch.allclose(module.online_loss(batch).total, -q.gather(1, batch.labels()[:, None]).sum(), atol=1e-5)


def test_a_batch_without_positions_still_reaches_every_parameter() -> None:
    """A rank with nothing to add must still take part in the gradient exchange."""
    module = drafter()
    out = module.online_loss(collate([]))
    out.total.backward()
    grads = [p.grad for p in module.net(0).parameters()]
    assert out.total == 0 and all(g is not None and bool((g == 0).all()) for g in grads)


def test_a_warm_up_of_forward_kl_before_tvd(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = drafter(loss="tvd", forward_kl_steps=5), online()
    kl, tv = drafter().online_loss(batch).total, drafter(loss="tvd").online_loss(batch).total
    for step, expected in ((0, kl), (4, kl), (5, tv)):
        monkeypatch.setattr(OSDDrafter, "trainer_step", step)
        assert torch.allclose(module.online_loss(batch).total, expected)
    monkeypatch.setattr(OSDDrafter, "trainer_step", 0)
    module.eval()
    assert torch.allclose(module.online_loss(batch).total, tv)  # validation always shows the loss itself


def test_packed_documents_do_not_see_each_other() -> None:
    module = drafter()
    batch = text(rows=1, width=8, first=1)
    batch.document[0, 5:] = 1
    batch.separate = True
    assert module.text_loss(batch).weight == 6  # of 7 labels, the second document's first token has no row before it
    before = module.text_loss(batch).total
    batch.ids[0, 0] = (batch.ids[0, 0] + 1) % V
    alone = dataclasses.replace(batch, loss_mask=batch.loss_mask * (torch.arange(8) >= 5))
    first = module.text_loss(alone).total
    batch.ids[0, 1] = (batch.ids[0, 1] + 1) % V
    assert torch.allclose(module.text_loss(dataclasses.replace(alone, ids=batch.ids)).total, first, atol=1e-5)
    assert not torch.allclose(module.text_loss(batch).total, before)


# --- several drafts, and steps that are skipped


class Fixed(pl.LightningDataModule):
    """Hands out given batches."""

    def __init__(self, train: Sequence[Any], val: Sequence[Any] = ()) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.val, batch_size=None) if self.val else []  # type: ignore[arg-type]


def fit(module: OSDDrafter, train: Sequence[Any], val: Sequence[Any] = (), **changes: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **changes,
    )
    trainer.fit(module, datamodule=Fixed(train, val))
    return trainer


def weights(module: OSDDrafter, index: int) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.net(index).parameters()])


QUICK = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1)


@pytest.mark.filterwarnings("ignore")
def test_only_the_draft_of_the_batch_moves() -> None:
    module = drafter(draft=None, drafts={"a": SMALL, "b": SMALL}, optim=QUICK)
    first = [weights(module, i) for i in range(2)]
    trainer = fit(module, [online(draft=1), online(seed=1, draft=1)])
    assert torch.equal(weights(module, 0), first[0])  # no gradient, no weight decay either
    assert not torch.equal(weights(module, 1), first[1])
    moments = trainer.optimizers[0].state
    assert all(p not in moments for p in module.net(0).parameters())
    assert len(trainer.optimizers) == 1 and len(trainer.optimizers[0].param_groups) == 4  # decayed or not, per draft


@pytest.mark.filterwarnings("ignore")
def test_a_non_finite_loss_is_skipped_and_counted() -> None:
    module = drafter(optim=QUICK)
    bad = online()
    bad.logprob_bits = torch.full_like(bad.logprob_bits, 0x7FC00000)  # NaN
    before = weights(module, 0)
    trainer = fit(module, [bad, bad])
    assert torch.equal(weights(module, 0), before)
    assert trainer.callback_metrics["train/skipped"] == 2
    fit(module, [online()])
    assert not torch.equal(weights(module, 0), before)


@pytest.mark.filterwarnings("ignore")
def test_one_bad_batch_spoils_an_accumulated_step() -> None:
    module = drafter(optim=QUICK)
    bad = online()
    bad.logprob_bits = torch.full_like(bad.logprob_bits, 0x7FC00000)
    before = weights(module, 0)
    fit(module, [bad, online()], accumulate_grad_batches=2)
    assert torch.equal(weights(module, 0), before)


@pytest.mark.filterwarnings("ignore")
def test_ten_non_finite_losses_in_a_row_end_the_run() -> None:
    bad = online()
    bad.logprob_bits = torch.full_like(bad.logprob_bits, 0x7FC00000)
    with pytest.raises(InvalidState, match="10 steps in a row"):
        fit(drafter(optim=QUICK), [bad] * 9 + [bad])
    fit(drafter(optim=QUICK), [bad] * 9 + [online()] + [bad] * 9)  # nine are not yet ten


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["teacher", "student", "mix_request", "mix_token"])
def test_distilling_on_text_raises_acceptance(source: str) -> None:
    module = drafter(optim=OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.0), source=source, prompt_length=3)
    train = [text(rows=16, width=12, first=3, seed=s) for s in range(40)]
    held_out = text(rows=16, width=12, first=3, seed=99)
    before = module.eval().text_loss(held_out).stats
    trainer = fit(module.train(), train, [held_out])
    assert before is not None
    assert float(trainer.callback_metrics["val/alpha"]) > float(before.alpha.mean()) + 0.1
    assert module.net(0).training  # writing in eval mode was undone


@pytest.mark.filterwarnings("ignore")
def test_the_target_is_not_in_the_checkpoint_and_hyper_parameters_are_plain(tmp_path: Path) -> None:
    write_lm(tmp_path / "target", seed=3, vocab_size=V, layers=1, width=16, tokenizer=False)
    module = OSDDrafter(draft=SMALL, teacher=HFModel(path=str(tmp_path / "target")), optim=QUICK)
    trainer = fit(module, [online()])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)  # only plain types and tensors can be read like this
    assert {k.split(".")[0] for k in stored["state_dict"]} == {"nets"}
    n = sum(p.numel() for p in module.net(0).parameters())
    assert sum(x.numel() for k, x in stored["state_dict"].items() if k.startswith("nets.0.")) == n
    again = OSDDrafter.load_from_checkpoint(tmp_path / "x.ckpt", strict=False)
    assert again.hparams == module.hparams


@pytest.mark.filterwarnings("ignore")
def test_restarting_the_schedule_begins_it_again() -> None:
    class Restart(pl.Callback):
        rates: list[float]

        def __init__(self) -> None:
            self.rates = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            if trainer.global_step == 6:
                pl_module.restart_schedule()

    callback = Restart()
    config = OptimConfig(lr=1.0e-3, schedule="cosine", total_steps=8, final_lr_ratio=0.0)
    fit(drafter(optim=config), [online(seed=s) for s in range(10)], callbacks=[callback])
    assert callback.rates[5] < 0.2e-3  # near the end of the cosine
    assert callback.rates[6] > 0.9e-3 and callback.rates[7] < callback.rates[6]


# --- export


def test_export_spec_of_one_draft(tmp_path: Path) -> None:
    write_lm(tmp_path / "draft", vocab_size=320)
    module = OSDDrafter(draft=HFModel(path=str(tmp_path / "draft")))
    with pytest.raises(InvalidState, match="configure_model"):
        module.export_spec()
    module.configure_model()
    module.note(target_dir="/models/target", positions="wrong", alpha_ema={"draft": 0.7})
    spec = module.export_spec()
    assert (spec.kind, spec.tokenizer_dir, spec.target_dir) == ("drafter", str(tmp_path / "draft"), "/models/target")
    assert spec.trained["loss"] == "forward_kl" and spec.trained["positions"] == "wrong"
    assert spec.metrics["online/alpha_ema"].value == 0.7
    assert spec.model is module.net(0)


def test_export_spec_of_several_drafts() -> None:
    module = drafter(draft=None, drafts={"code": SMALL, "prose": SMALL})
    module.note(alpha_ema={"code": 0.5, "prose": 0.6})
    with pytest.raises(UnknownKey, match=r"which draft.*code, prose"):
        module.export_spec()
    with pytest.raises(UnknownKey, match=r"no draft 'poems'.*code, prose"):
        module.export_spec("poems")
    spec = module.export_spec("prose")
    assert spec.model is module.net(1) and spec.trained["tag"] == "prose"
    assert spec.metrics["online/alpha_ema"].value == 0.6


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "forward_lk"}, "unknown loss 'forward_lk'.*forward_kl.*did you mean 'forward_kl'"),
        ({"source": "techer"}, "unknown source 'techer'.*did you mean 'teacher'"),
        ({"loss": "jsd", "jsd_beta": 1.0}, "jsd beta"),
        ({"student_share": 0.0}, "student_share"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"sample_temperature": -1.0}, "sample_temperature"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"forward_kl_steps": -1}, "forward_kl_steps"),
        ({"loss": "ce", "forward_kl_steps": 3}, "ce learns from labels"),
        ({"draft": None}, "exactly one of model.draft and model.drafts"),
        ({"drafts": {"a": SMALL}}, "exactly one of model.draft and model.drafts"),
    ],
)
def test_settings_are_refused_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as error:
        OSDDrafter(**({"draft": SMALL} | changes))
    assert "\n" not in str(error.value)


def test_vocabularies_that_differ_are_refused_at_construction(tmp_path: Path) -> None:
    write_lm(tmp_path / "target", vocab_size=320)
    with pytest.raises(InvalidValue, match="vocabularies differ"):
        OSDDrafter(draft=SMALL, teacher=HFModel(path=str(tmp_path / "target")))
    write_lm(tmp_path / "draft", vocab_size=320, layers=1, tokenizer=False)
    write_tokenizer(tmp_path / "draft", "quite another text, with other merges " * 5, vocab_size=290)
    with pytest.raises(InvalidValue, match="vocabularies differ"):
        OSDDrafter(draft=HFModel(path=str(tmp_path / "draft")), teacher=HFModel(path=str(tmp_path / "target")))
    with pytest.raises(ValueError, match="vocabularies differ"):  # the builtin that the spec names
        OSDDrafter(draft=SMALL, teacher=HFModel(path=str(tmp_path / "target")))


def test_a_target_in_train_mode_or_with_gradients_is_refused() -> None:
    for model in (lm(vocab_size=V).requires_grad_(False).train(), lm(vocab_size=V).eval()):
        with pytest.raises(RuntimeError, match="target"):
            FrozenTeacher(model)


def test_text_without_a_target_says_what_to_set() -> None:
    module = OSDDrafter(draft=SMALL)
    module.configure_model()
    with pytest.raises(InvalidState, match=r"model\.teacher\.path"):
        module.text_loss(text())


@pytest.mark.filterwarnings("ignore")
def test_several_drafts_do_not_learn_from_text() -> None:
    with pytest.raises(InvalidValue, match="online only"):
        fit(drafter(draft=None, drafts={"a": SMALL, "b": SMALL}), [text()])


@pytest.mark.parametrize("loss", ["reverse_kl", "fkl_rkl_mix"])
def test_losses_that_need_full_support_refuse_filtered_laws(loss: str) -> None:
    probs = torch.zeros(1, V)
    probs[0, :3] = 1 / 3
    batch = collate([Record(torch.tensor([1, 2, 3]), torch.tensor([2]), TeacherLaw.from_probs(probs, 4))])
    with pytest.raises(InvalidValue, match="infinite against laws after top-k"):
        drafter(loss=loss).online_loss(batch)
    assert torch.isfinite(drafter(loss="tvd").online_loss(batch).total)
