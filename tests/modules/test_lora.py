"""LoRA on the EMO module: what is trained, what a checkpoint and an export hold."""

from pathlib import Path

import pytest
import torch

from draftsmith.inference.errors import InvalidValue, MissingExtra
from draftsmith.modules import lora as lora_module
from draftsmith.modules.emo_lm import EMOLM
from draftsmith.modules.hf_model import HFModel, output_head
from draftsmith.modules.lora import LoRAConfig
from draftsmith.modules.optim import OptimConfig
from tests.modules.test_lm import V, batch, loader, trainer
from tests.tiny import write_lm


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("lm") / "lm", tokenizer=False, vocab_size=V, width=16, max_length=32)


def test_settings_are_checked() -> None:
    for wrong in ({"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(InvalidValue, match="lora wants r >= 1"):
            LoRAConfig(**wrong)  # type: ignore[arg-type]  # one field each
    assert LoRAConfig.of({"r": 4}) == LoRAConfig(4) and LoRAConfig.of(None) is None


def test_a_missing_peft_is_named_with_its_install_line(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'draftsmith\[lora\]'"):
        EMOLM(HFModel(path=str(pretrained)), lora=LoRAConfig(4)).configure_model()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_alone_are_trained_and_the_export_has_them_merged(
    pretrained: Path, tmp_path: Path, checkpointing: bool
) -> None:
    pytest.importorskip("peft")
    lm = EMOLM(
        HFModel(path=str(pretrained)), optim=OptimConfig(lr=3e-2, schedule="constant"), lora=LoRAConfig(4),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    lm.configure_model()
    assert lm.net is not None
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    run = trainer(tmp_path, max_epochs=40)
    run.fit(lm, loader(batch()))
    assert float(run.callback_metrics["train/nll"]) < 3.5 < 4.0
    moved = {name for name, p in lm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained and output_head(lm.net)[0].grad is None
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = EMOLM.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert again.lora == LoRAConfig(4)
    plain = again.export_spec().model.eval()
    assert type(plain) is type(HFModel(path=str(pretrained)).build())
    assert plain.state_dict().keys() == HFModel(path=str(pretrained)).build().state_dict().keys()
    ids = batch().ids
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, again.net(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        other = HFModel(path=str(pretrained)).build().eval()(input_ids=ids).logits
    assert not torch.allclose(plain(input_ids=ids).logits, other, atol=1e-2)  # the control: something was learned


def test_targets_that_do_not_exist(pretrained: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(InvalidValue, match=r"lora\.targets \['no_such_proj'\]"):
        EMOLM(HFModel(path=str(pretrained)), lora=LoRAConfig(targets=("no_such_proj",))).configure_model()
