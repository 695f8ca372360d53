"""Tests of sampled text: MAUVE tells sets apart, and the callback's figures are those of the samples it took."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.text_metrics import mean_entropy
from draftsmith.modules.emo_lm import EMOLM
from draftsmith.modules.hf_model import HFModel
from draftsmith.trainers import mauve as mauves
from draftsmith.trainers.callbacks import text_eval
from draftsmith.trainers.callbacks.text_eval import TextEval
from draftsmith.trainers.mauve import by_definition, by_package, implementation, mauve
from tests.tiny import write_lm

V = 64


def test_mauve_is_one_for_alike_and_small_for_different_texts() -> None:
    g = torch.Generator().manual_seed(0)
    human, alike = torch.randn(2, 200, 8, generator=g)
    other = torch.randn(200, 8, generator=g) + 3.0
    near, far = mauve(human, alike), mauve(human, other)
    assert near > 0.9 and far < 0.1
    assert mauve(human, human) == pytest.approx(1.0, abs=1e-6)
    assert mauve(torch.zeros(4, 3), torch.zeros(4, 3), clusters=1) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(InvalidValue, match="two sets"):
        mauve(human, torch.zeros(200, 7))


def test_the_package_agrees_with_the_definition(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mauve", reason="mauve-text is not installed: pip install -c constraints.txt '.[mauve]'")
    assert implementation().startswith("mauve-text ")
    g = torch.Generator().manual_seed(0)
    # four clusters that no k-means can miss: the histograms are the same, and so is the area to the last digits
    centres = torch.eye(4) * 20
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.3, 0.5]])
    human, model = (centres[torch.multinomial(p, 200, True, generator=g)] for p in shares)
    human, model = (x + 0.1 * torch.randn(200, 4, generator=g) for x in (human, model))
    exact = by_definition(human, model, 4)
    assert 0.1 < exact < 0.9 and by_package(human, model, 4) == pytest.approx(exact, abs=1e-6)
    assert mauve(human, model, 4) == by_package(human, model, 4)
    # overlapping clouds: each k-means finds its own clusters, and both give much the same area
    human, model = torch.randn(2, 400, 8, generator=g)
    for shift in (0.0, 0.5, 3.0):
        moved = model + shift * torch.eye(8)[0]
        assert by_package(human, moved, 40) == pytest.approx(by_definition(human, moved, 40), abs=0.1)
    assert mauve(torch.zeros(4, 3), torch.zeros(4, 3), clusters=1) == pytest.approx(1.0, abs=1e-6)
    said = capfd.readouterr()
    assert said.out == said.err == ""  # faiss warns of small clusters


def test_without_the_package_the_definition_is_taken_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    human, model = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(mauves, "_PACKAGE", "no-such-package-of-anyone")
    assert mauve(human, model) == by_definition(human, model, 6) and implementation().startswith("draftsmith")
    calls: list[float] = []
    monkeypatch.setattr(mauves, "_PACKAGE", "pytest")  # installed, whatever it is
    monkeypatch.setattr(mauves, "by_package", lambda *given: calls.append(given[2]) or 0.25)
    assert mauve(human, model) == 0.25 and calls == [6] and implementation() == f"pytest {pytest.__version__}"


class Data(pl.LightningDataModule):
    def prompts(self, count: int, length: int, max_new_tokens: int) -> list[TokenRequest]:
        g = torch.Generator().manual_seed(0)
        rows = torch.randint(2, V, (count, length), generator=g).tolist()
        return [TokenRequest(row, max_new_tokens, row_id=i) for i, row in enumerate(rows)]

    def test_dataloader(self) -> Any:
        mask = torch.ones(2, 8, dtype=torch.int8)
        ids = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(1))
        batch = TokenBatch(ids, mask, torch.zeros(2, 8, dtype=torch.int32), torch.arange(2))
        return torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]  # a list is a data set


def run(module: pl.LightningModule, callback: TextEval) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    (found,) = trainer.test(module, datamodule=Data(), verbose=False)
    return dict(found)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_the_figures_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": V, "width": 16, "layers": 1, "max_length": 64}
    place = write_lm(tmp_path / "lm", tokenizer=False, **sizes)
    sharp = write_lm(tmp_path / "base", tokenizer=False, seed=7, **sizes)
    module = EMOLM(HFModel(path=str(place)))
    callback = TextEval(samples=20, prompt_length=4, max_new_tokens=12, oracle=str(sharp), baseline=str(sharp), batch=8)
    said: list[str] = []
    monkeypatch.setattr(text_eval, "rank_zero_info", said.append)
    found = run(module, callback)
    assert said == [f"text/*/mauve is computed by {implementation()}"]
    whose = ("human", "model", "baseline", "matched")
    for who in whose:
        assert 0 < found[f"text/{who}/distinct_1"] <= found[f"text/{who}/distinct_4"] <= 1
        assert found[f"text/{who}/oracle_perplexity"] > 1
    for who in whose[1:]:
        assert 0 < found[f"text/{who}/mauve"] <= 1
    assert found["text/matched/entropy"] == pytest.approx(found["text/model/entropy"], abs=0.02)
    human = [list(r.prompt) for r in Data().prompts(20, 16, 12)]
    assert found["text/model/entropy"] == pytest.approx(mean_entropy(module.net, human), rel=1e-4)
    # the oracle wrote the baseline's samples itself: it finds them likelier than random text
    assert found["text/baseline/oracle_perplexity"] < found["text/human/oracle_perplexity"]
    assert "test/perplexity" in found and "test/cost" in found
    assert run(module, callback) == found  # the same seed, the same figures


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="samples must be at least 1, got 0"):
        TextEval(samples=0)
    with pytest.raises(InvalidType, match="tests an LM or EMOLM, got LightningModule"):
        TextEval().setup(None, pl.LightningModule(), "test")  # type: ignore[arg-type]  # not looked at
