"""HF models by path and sizes, teachers outside registration, and the LM module: loss, isolation, checkpoints."""

import io
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue
from draftsmith.inference.manifest import Metric
from draftsmith.modules.hf_model import FrozenTeacher, HFModel, last_hidden, output_head, special_ids
from draftsmith.modules.lm import DEFINITIONS, LM
from draftsmith.modules.optim import OptimConfig
from tests.tiny import write_lm

V = 61
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def batch(rows: int = 4, time: int = 12, seed: int = 0, separate: bool = False) -> TokenBatch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, time, dtype=torch.int8)
    mask[:, 0] = 0
    return TokenBatch(
        ids=torch.randint(V, (rows, time), generator=g),
        loss_mask=mask,
        document=torch.zeros(rows, time, dtype=torch.int32),
        sample_id=torch.arange(rows),
        separate=separate,
    )


def loader(*batches: TokenBatch) -> DataLoader[TokenBatch]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set


def module(**kwargs: Any) -> LM:
    lm = LM(HFModel(arch=LLAMA), **kwargs)
    torch.manual_seed(0)
    lm.configure_model()
    return lm


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(settings | kwargs))


# --- Hugging Face models


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_head_of_hidden_is_the_models_own_forward(model_type: str) -> None:
    arch = LLAMA | {"model_type": model_type}
    if model_type == "gpt2":
        arch = {k: v for k, v in arch.items() if k not in ("intermediate_size", "num_key_value_heads")}
    net = HFModel(arch=arch).build().eval()
    assert net.dtype == torch.float32 and not net.config.use_cache
    ids = batch().ids
    weight, bias = output_head(net)
    torch.testing.assert_close(F.linear(last_hidden(net, ids), weight, bias), net(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_are_isolated(model_type: str, attention: str) -> None:
    arch = LLAMA | {"model_type": model_type}
    if model_type == "gpt2":
        arch = {k: v for k, v in arch.items() if k not in ("intermediate_size", "num_key_value_heads")}
    net = HFModel(arch=arch).build().eval()
    net.set_attn_implementation(attention)
    packed = batch(rows=2, separate=True)
    packed.document[:, 5:9], packed.document[:, 9:] = 1, -1  # two documents and padding
    hidden = last_hidden(net, packed.ids, packed.positions(), packed.visible())
    alone = last_hidden(net, packed.ids[:, 5:9])
    torch.testing.assert_close(hidden[:, 5:9], alone, atol=1e-5, rtol=1e-4)
    leaky = last_hidden(net, packed.ids)
    assert not torch.allclose(leaky[:, 5:9], alone, atol=1e-3)  # negative control


def test_a_directory_loads_in_the_asked_dtype(tmp_path: Path) -> None:
    write_lm(tmp_path / "lm", tokenizer=False)
    net = HFModel(path=str(tmp_path / "lm"), dtype="bfloat16").build()
    assert net.dtype == torch.bfloat16 and net.training
    assert HFModel(path=str(tmp_path / "lm")).build().dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "exactly one of path"),
        ({"path": "x", "arch": LLAMA}, "exactly one of path"),
        ({"path": "x", "dtype": "float8"}, "unknown dtype 'float8'"),
        ({"arch": {"hidden_size": 4}}, "no model_type"),
    ],
)
def test_bad_specs_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        HFModel(**spec)


def test_what_cannot_be_built_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[HFModel, str]] = [
        (HFModel(arch={"model_type": "lama"}), "no model_type 'lama'; did you mean 'llama'"),
        (HFModel(arch=LLAMA | {"hiden_size": 3}), "unknown model.arch key for llama 'hiden_size'.*'hidden_size'"),
        (HFModel(arch=LLAMA | {"hidden_size": 17}), "cannot be built as llama"),
        (HFModel(path=str(tmp_path / "missing")), "no model directory"),
        (HFModel(path=str(tmp_path / "empty")), "cannot load a causal language model from"),
        (HFModel(path="nobody/nothing-of-the-kind"), "neither in the local Hugging Face cache nor reachable"),
    ]
    for spec, message in cases:
        with pytest.raises(InvalidValue, match=message) as caught:
            spec.build()
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    directory = write_lm(tmp_path / "lm", tokenizer=False)
    net = HFModel(path=str(directory)).build()
    torch.save(net.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InvalidValue, match="cannot load"):
        HFModel(path=str(directory)).build()


def test_logits_that_change_after_the_head_are_refused() -> None:
    sizes = {k: v for k, v in LLAMA.items() if k != "model_type"}
    with pytest.raises(InvalidType, match="final_logit_softcapping"):
        HFModel(arch={"model_type": "gemma2", "head_dim": 4, **sizes}).build()
    with pytest.raises(InvalidType, match="logits_scaling=2"):
        HFModel(arch={"model_type": "granite", "logits_scaling": 2.0, **sizes}).build()


# --- teachers


def test_teacher_must_be_frozen_and_in_eval_mode() -> None:
    net = HFModel(arch=LLAMA).build()
    with pytest.raises(InvalidState, match="train mode"):
        FrozenTeacher(net.requires_grad_(False))
    with pytest.raises(InvalidState, match="requires gradients"):
        FrozenTeacher(net.eval().requires_grad_(True))
    teacher = FrozenTeacher(net.requires_grad_(False))
    head = teacher.head(teacher.hidden(batch().ids).flatten(0, 1), 0.7)
    assert teacher.vocab_size == V and head.temperature == 0.7 and not head.hidden.requires_grad


def test_teacher_stays_out_of_parameters_and_checkpoints() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teacher = FrozenTeacher.load(HFModel(arch=LLAMA))

    holder = Holder()
    assert set(holder.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(holder.parameters())) == 2
    assert holder.teacher.to("meta").model.device.type == "meta" and holder.student.weight.device.type == "cpu"


# --- the module


def naive_loss(lm: LM, b: TokenBatch) -> Tensor:
    assert lm.net is not None
    logits = lm.net(input_ids=b.ids).logits[:, :-1].float()
    labels = b.ids[:, 1:].masked_fill(b.loss_mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def test_loss_is_next_token_cross_entropy_over_the_labels() -> None:
    lm, b = module(), batch()
    b.loss_mask[:, 6:] = 0
    b.loss_mask[0] = 0
    for statistics in (False, True):
        out = lm.loss(b, statistics)
        torch.testing.assert_close(out.total, naive_loss(lm, b))
        assert out.weight == int(b.loss_mask.sum()) == 15


def test_no_label_crosses_a_document_when_documents_are_apart() -> None:
    lm, b = module(), batch(rows=1, separate=True)
    b.document[:, 5:] = 1
    assert lm.loss(b, True).weight == 10  # 11 labels, less the first token of the second document
    before = lm.loss(b, True).total
    b.ids[:, :4] = (b.ids[:, :4] + 1) % V  # another first document
    second = lm.loss(b, True)
    assert second.stats is not None and not torch.isclose(before, second.total)
    b.loss_mask[:, :5] = 0
    own = lm.loss(b, True).total
    b.ids[:, :4] = (b.ids[:, :4] + 1) % V
    torch.testing.assert_close(lm.loss(b, True).total, own)  # the second document does not see the first


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    grads = []
    for checkpointing in (False, True):
        lm = module(gradient_checkpointing=checkpointing)
        lm.train()
        lm.loss(batch(), False).mean.backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    lm = LM(HFModel(arch=LLAMA), OptimConfig(lr=1e-2, schedule="constant"))
    run = trainer(tmp_path, max_epochs=30)
    run.fit(lm, loader(batch()), loader(batch(), batch()))
    assert float(run.callback_metrics["train/loss"]) < 2.0 < 4.0  # log 61 = 4.1 at the start
    (metrics,) = run.validate(lm, loader(batch()), verbose=False)
    with torch.no_grad():
        means = lm.loss(batch(), True)
    assert means.stats is not None
    assert metrics["val/loss"] == pytest.approx(float(means.mean), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(float(means.mean.exp()), rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(float(means.stats.agree.float().mean()), rel=1e-5)
    assert set(metrics) == set(DEFINITIONS)
    (tested,) = run.test(lm, loader(batch()), verbose=False)
    assert tested["test/loss"] == metrics["val/loss"]


def test_a_batch_without_labels_is_harmless(tmp_path: Path) -> None:
    empty = batch()
    empty.loss_mask.zero_()
    lm = LM(HFModel(arch=LLAMA))
    run = trainer(tmp_path, max_steps=2)
    run.fit(lm, loader(empty, empty), loader(empty))
    assert float(run.callback_metrics["train/loss"]) == 0 and float(run.callback_metrics["val/loss"]) == 0
    assert all(bool(p.isfinite().all()) for p in lm.parameters())


class Poisoned(LM):
    """The loss of chosen steps is NaN."""

    bad: tuple[int, ...] = ()

    def loss(self, batch: TokenBatch, statistics: bool) -> Any:
        out = super().loss(batch, statistics)
        if self.training and self.global_step in self.bad:
            object.__setattr__(out, "total", out.total * float("nan"))
        return out


def test_non_finite_losses_are_skipped_and_ten_in_a_row_end_the_run(tmp_path: Path) -> None:
    weights = []
    for steps, bad in ((2, ()), (3, (2,))):  # the third step is skipped: its weights are those of two steps
        torch.manual_seed(0)
        lm = Poisoned(HFModel(arch=LLAMA), OptimConfig(lr=1e-2, total_steps=9))
        lm.bad = bad
        run = trainer(tmp_path, max_epochs=steps, gradient_clip_val=1.0)
        run.fit(lm, loader(batch()))
        assert run.callback_metrics["train/skipped"] == len(bad) and run.global_step == steps
        weights.append([p.detach() for p in lm.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    lm.bad = tuple(range(100))
    with pytest.raises(InvalidState, match="not finite 10 steps in a row"):
        trainer(tmp_path, max_epochs=20).fit(lm, loader(batch()))


def test_checkpoint_is_plain_and_rebuilds_the_module(tmp_path: Path) -> None:
    lm = LM(HFModel(arch=LLAMA), OptimConfig(lr=1e-2), chunk_rows=7)
    run = trainer(tmp_path, max_steps=3)
    run.fit(lm, loader(batch(), batch(), batch()), loader(batch()))
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)  # plain types only, or this raises
    json.dumps(saved["hyper_parameters"])
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"net"}
    again = LM.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.spec == lm.spec and again.optim == lm.optim and again.chunk_rows == 7
    for a, b in zip(again.parameters(), lm.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    spec = again.export_spec()
    assert spec.kind == "lm" and spec.model is again.net and spec.steps == 3
    assert isinstance(spec.metrics["val/loss"], Metric) and spec.metrics["val/loss"].value > 0


class Data(pl.LightningDataModule):
    """Batches with what a text data module says of itself."""

    def __init__(self, tokenizer_dir: Path, vocab_size: int) -> None:
        super().__init__()
        self.tokenizer_dir, self.vocab_size = tokenizer_dir, vocab_size

    def data_fingerprint(self) -> str:
        return "abc"

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        return loader(batch())


def test_the_export_knows_the_data_and_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_lm(tmp_path / "lm")
    assert special_ids(tokenizer) == {"bos_token_id": 0, "eos_token_id": 1}
    lm = LM(HFModel(arch=LLAMA))
    run = trainer(tmp_path, max_steps=1)
    run.fit(lm, datamodule=Data(tokenizer, V))
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert lm.net is not None and lm.net.config.eos_token_id == 1  # llama's own default would be 2
    again = LM.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.net is not None and again.net.config.eos_token_id == 1
    spec = again.export_spec()
    assert spec.tokenizer_dir == str(tokenizer) and spec.data_fingerprint == "abc"
    with pytest.raises(InvalidValue, match="tokenizer has 62 ids and the network only 61 rows"):
        trainer(tmp_path, max_steps=1).fit(LM(HFModel(arch=LLAMA)), datamodule=Data(tokenizer, V + 1))


def test_bad_input() -> None:
    with pytest.raises(InvalidState, match="configure_model"):
        LM(HFModel(arch=LLAMA)).export_spec()
    with pytest.raises(InvalidValue, match="chunk_rows must be at least 1"):
        LM(HFModel(arch=LLAMA), chunk_rows=0)
    with pytest.raises(InvalidValue, match="rows of 40 tokens, but the network has 32 positions"):
        module().loss(batch(time=40), False)


def test_state_dict_round_trip_through_bytes() -> None:
    """A state dict holds the network and nothing else: no metric state, no optimizer settings."""
    lm = module()
    buffer = io.BytesIO()
    torch.save(lm.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == {f"net.{k}" for k in lm.net.state_dict()}  # type: ignore[union-attr]  # built above
