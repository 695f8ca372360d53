"""The EMO module: loss, logs, costs and where they come from, checkpoints, export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.modules import emo_lm
from draftsmith.modules.emo_lm import EMOLM, EMOConfig
from draftsmith.modules.hf_model import HFModel, output_head
from draftsmith.modules.lm import LM
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.emo import EMO, Mix
from draftsmith.modules.optim import OptimConfig
from tests.modules.test_lm import LLAMA, V, batch, loader, trainer
from tests.tiny import write_lm


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("lm") / "lm", tokenizer=False, vocab_size=V, width=16, max_length=32)


def module(path: Path, **settings: Any) -> EMOLM:
    lm = EMOLM(HFModel(path=str(path)), EMOConfig(**settings), OptimConfig(lr=1e-2, schedule="constant"))
    lm.configure_model()
    return lm


def reference(lm: EMOLM, b: TokenBatch, costs: TokenCosts) -> tuple[Tensor, Tensor]:
    """(EMO, cross-entropy) summed over the labels, by the equations."""
    assert lm.net is not None
    logits = lm.net(input_ids=b.ids).logits[:, :-1].float()[b.loss_mask[:, 1:].bool()]
    labels = b.ids[:, 1:][b.loss_mask[:, 1:].bool()]
    return EMO(costs, lm.emo.mix())(logits, labels).sum(), F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("costs", ["head", "adaptive"])
@pytest.mark.parametrize("mode", ["mle_anchored", "emo_anchored"])
def test_loss_is_emo_over_the_labels(pretrained: Path, mode: str, costs: str) -> None:
    lm, b = module(pretrained, mode=mode, costs=costs), batch()
    b.loss_mask[:, 6:] = 0
    assert lm.net is not None
    before = TokenCosts.of(output_head(lm.net)[0].detach())
    for p in lm.net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    now = TokenCosts.of(output_head(lm.net)[0].detach())
    want, nll = reference(lm, b, now if costs == "adaptive" else before)
    other, _ = reference(lm, b, before if costs == "adaptive" else now)
    for statistics in (False, True):
        out = lm.loss(b, statistics)
        torch.testing.assert_close(out.total, want)
        assert not torch.isclose(out.total, other, rtol=1e-4)  # the control: the two sources differ
        assert out.weight == int(b.loss_mask.sum())
    assert out.stats is not None
    torch.testing.assert_close(out.stats.loss.sum(), nll.detach())


def test_gradient_checkpointing_recomputes_the_head_and_changes_nothing_else(pretrained: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        lm = EMOLM(HFModel(path=str(pretrained)), gradient_checkpointing=checkpointing)
        lm.configure_model()
        lm.train()
        total = lm.loss(batch(), False).total
        assert (total.grad_fn.grads is None) == checkpointing  # type: ignore[union-attr]  # the function's attribute
        total.backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_training_learns_and_logs(pretrained: Path, tmp_path: Path) -> None:
    lm = module(pretrained)
    run = trainer(tmp_path, max_epochs=30)
    run.fit(lm, loader(batch()), loader(batch(), batch()))
    logged = run.callback_metrics
    assert float(logged["train/nll"]) < 2.0 < 4.0
    assert 0 < float(logged["train/cost"]) < 1
    assert float(logged["emo/mean_cost"]) == pytest.approx(lm.costs.mean)  # type: ignore[union-attr]  # built
    (metrics,) = run.validate(lm, loader(batch()), verbose=False)
    with torch.no_grad():
        assert lm.costs is not None
        _, nll = reference(lm, batch(), lm.costs)
        out = lm.loss(batch(), True)
    assert out.stats is not None
    count = float(out.weight)
    assert metrics["val/loss"] == pytest.approx(float(nll) / count, rel=1e-4)  # likelihood, whatever is trained
    assert metrics["val/cost"] == pytest.approx(float(out.stats.more["cost"].mean()), rel=1e-4)
    (tested,) = run.test(lm, loader(batch()), verbose=False)
    assert tested["test/cost"] == metrics["val/cost"] and tested["test/loss"] == metrics["val/loss"]


def test_unclamped_it_reports_the_likelihood_as_its_loss(pretrained: Path, tmp_path: Path) -> None:
    lm = module(pretrained, limit=float("inf"))
    run = trainer(tmp_path, max_steps=1)
    run.fit(lm, loader(batch()))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(
        float(run.callback_metrics["train/nll"]), rel=1e-5
    )


def test_a_batch_without_labels_is_harmless(pretrained: Path, tmp_path: Path) -> None:
    empty = batch()
    empty.loss_mask.zero_()
    run = trainer(tmp_path, max_steps=2)
    lm = module(pretrained)
    run.fit(lm, loader(empty, empty), loader(empty))
    assert float(run.callback_metrics["train/cost"]) == 0 and float(run.callback_metrics["val/cost"]) == 0
    assert all(bool(p.isfinite().all()) for p in lm.parameters())


def test_checkpoint_holds_the_network_alone_and_the_costs_come_back(pretrained: Path, tmp_path: Path) -> None:
    lm = module(pretrained, mode="emo_anchored", limit=2.0)
    run = trainer(tmp_path, max_steps=3)
    run.fit(lm, loader(batch(), batch(), batch()))
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"net"} and emo_lm._COSTS not in saved
    again = EMOLM.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.emo == lm.emo and again.costs is not None and lm.costs is not None
    torch.testing.assert_close(again.costs.unit, lm.costs.unit, rtol=0, atol=0)  # of the pretrained head, not this one
    assert isinstance(again, LM)
    spec = again.export_spec()
    assert spec.kind == "lm" and spec.model is again.net
    assert spec.trained["emo"] == {"mode": "emo_anchored", "ratio": "plain", "limit": 2.0, "costs": "head"}


def test_costs_of_random_weights_travel_in_the_checkpoint(tmp_path: Path) -> None:
    lm = EMOLM(HFModel(arch=LLAMA))
    run = trainer(tmp_path, max_steps=1)
    run.fit(lm, loader(batch()))
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(99)
    again = EMOLM.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.costs is not None and lm.costs is not None
    torch.testing.assert_close(again.costs.unit, lm.costs.unit, rtol=0, atol=0)


def test_costs_of_another_model(pretrained: Path, tmp_path: Path) -> None:
    other = write_lm(tmp_path / "other", tokenizer=False, vocab_size=V, width=32, seed=5)
    lm = module(pretrained, costs=str(other), project=30, center=True, cost_dtype="bfloat16")
    assert lm.costs is not None and lm.costs.unit.shape == (V, 30) and lm.costs.unit.dtype == torch.bfloat16
    assert 0 < lm.costs.projection_error <= 0.1
    assert bool(lm.loss(batch(), False).total.isfinite())
    assert lm.export_spec().trained["emo"]["costs"] == "other"
    smaller = write_lm(tmp_path / "smaller", tokenizer=False, vocab_size=V - 1)
    with pytest.raises(InvalidValue, match=f"cost embedding has {V - 1} rows, logits have {V}"):
        module(pretrained, costs=str(smaller))


def test_bad_input(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValue, match="unknown EMO mode"):
        EMOConfig(mode="emo")
    with pytest.raises(InvalidValue, match=r"unknown emo\.cost_dtype 'float8'"):
        EMOConfig(cost_dtype="float8")
    with pytest.raises(InvalidValue, match="leave project out"):
        EMOConfig(costs="adaptive", project=8)
    with pytest.raises(InvalidState, match="configure_model"):
        EMOLM(HFModel(arch=LLAMA)).row_loss()
    monkeypatch.setattr(emo_lm, "_ADAPTIVE_BYTES", V * 16 * 4 - 1)
    with pytest.raises(InvalidValue, match=r"set emo\.force_adaptive"):
        module(pretrained, costs="adaptive")
    assert bool(module(pretrained, costs="adaptive", force_adaptive=True).loss(batch(), False).total.isfinite())


def test_the_mix_is_what_the_config_says() -> None:
    assert EMOConfig().mix() == Mix("mle_anchored", "plain", None)
    assert EMOConfig.of({"mode": "emo_anchored", "ratio": "shift", "limit": 4.0}).mix() == Mix(
        "emo_anchored", "shift", 4.0
    )
