"""Validation by really decoding: the figures are those of the decoder, for text and for online data."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from draftsmith.data.batches import TokenBatch
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_data import OnlineDataModule, RouterConfig, TrafficConfig
from draftsmith.data.online_stream import ServeSettings
from draftsmith.inference import load, metrics, registry
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.load_eagle import load_eagle
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import engine_of
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_target import EagleSizes
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.optim import OptimConfig
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import export_eagle
from draftsmith.trainers.callbacks.acceptance import AcceptanceEval
from draftsmith.trainers.callbacks.draft_swap import DraftSwap
from tests.tiny import write_lm

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    write_lm(place / "target", seed=1, max_length=64)
    write_lm(place / "draft", seed=2, layers=1, width=16, max_length=64)
    for name, tag in (("code", "code"), ("prose", "prose")):
        rows = [{"prompt": f"{tag} text {i}", "tag": tag} for i in range(12)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


class Text(pl.LightningDataModule):
    """A few batches of random text, and prompts as TextDataModule offers them."""

    def _batches(self, count: int) -> Any:
        mask = torch.ones(2, 8, dtype=torch.int8)
        mask[:, 0] = 0
        document = torch.zeros(2, 8, dtype=torch.int32)
        batches = [TokenBatch(torch.randint(300, (2, 8)), mask, document, torch.arange(2)) for _ in range(count)]
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self._batches(2)

    def val_dataloader(self) -> Any:
        return self._batches(1)

    def prompts(self, count: int, length: int, max_new_tokens: int) -> list[TokenRequest]:
        return [TokenRequest(tuple(range(5 + i, 5 + i + length)), max_new_tokens) for i in range(count)]


def trainer_of(folder: Path, *callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **changes,
    )


def test_the_figures_are_those_of_the_decoder_with_the_weights_of_that_moment(place: Path, tmp_path: Path) -> None:
    evaluation = AcceptanceEval(
        requests=6, prompt_length=4, max_new_tokens=12, draft_length=3, temperature=0.7, batch=4
    )
    module = OSDDrafter(
        draft=HFModel(path=str(place / "draft")),
        teacher=HFModel(path=str(place / "target")),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
    )
    data = Text()
    trainer = trainer_of(tmp_path, evaluation, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    decoder = registry.build(
        "speculative",
        {"target": load(place / "target"), "draft": engine_of(module.net(0))},
        sampling=SamplingParams(temperature=0.7),
        settings={"draft_length": 3, "fallback": "never"},
    )
    requests = [TokenRequest(r.prompt, 12, row_id=i) for i, r in enumerate(data.prompts(6, 4, 12))]
    expected = metrics.summarize(decoder.decode(requests).rounds)
    assert expected.alpha is not None and expected.tau is not None
    shown = trainer.callback_metrics
    assert float(shown["val/alpha_decode"]) == pytest.approx(expected.alpha.value, abs=1e-6)
    assert float(shown["val/tau"]) == pytest.approx(expected.tau.value, abs=1e-6)
    assert (
        float(shown["val/alpha_decode_low"])
        <= float(shown["val/alpha_decode"])
        <= float(shown["val/alpha_decode_high"])
    )
    assert "val/alpha" in shown  # the teacher-forced one beside it


@pytest.mark.parametrize(("policy", "settings"), [("chain", {"policy": "chain", "nodes": 3, "depth": 3}), ("auto", {})])
@pytest.mark.parametrize("version", [1, 3])
def test_an_eagle_head_is_measured_as_its_export_drafts(
    place: Path, tmp_path: Path, version: int, policy: str, settings: dict[str, Any]
) -> None:
    evaluation = AcceptanceEval(
        requests=5,
        prompt_length=4,
        max_new_tokens=12,
        draft_length=3 if settings else 5,
        temperature=0.7,
        batch=2,
        policy=policy,
    )
    module = EagleDrafter(
        HFModel(path=str(place / "target")),
        EagleSizes(version=version, draft_vocab_size=None),
        steps=1 if version == 1 else 2,
        optim=OptimConfig(lr=1e-2, weight_decay=0.0, schedule="constant"),
    )
    data = Text()
    trainer = trainer_of(tmp_path, evaluation, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert module.net is not None
    (tmp_path / "head").mkdir()
    tokens = torch.randint(300, (2, 6))
    export_eagle.save(module.net, torch.float32, tmp_path / "head", tmp_path / "inputs.safetensors", tokens)
    decoder = registry.build(
        "tree",
        {"target": load(place / "target"), "draft": load_eagle(tmp_path / "head")},
        sampling=SamplingParams(temperature=0.7),
        settings=settings,
    )
    requests = [TokenRequest(r.prompt, 12, row_id=i) for i, r in enumerate(data.prompts(5, 4, 12))]
    expected = metrics.summarize(decoder.decode(requests).rounds)
    assert expected.tau is not None
    assert float(trainer.callback_metrics["val/tau"]) == pytest.approx(expected.tau.value, abs=1e-6)
    assert module.net.training and all(p.requires_grad for p in module.net.parameters())  # its copy was evaluated


def test_training_on_cached_states_loads_the_target_to_decode_with(place: Path, tmp_path: Path) -> None:
    evaluation = AcceptanceEval(requests=2, prompt_length=4, max_new_tokens=6)
    module = EagleDrafter(HFModel(path=str(place / "target")), steps=2, cached=True)
    module.configure_model()
    assert module.target is not None and module.target.model is None
    engine = evaluation._find_target(trainer_of(tmp_path), module)
    assert engine.spec == load(place / "target").part.spec


def test_a_second_validation_sees_new_weights_and_the_same_prompts(place: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Note(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["val/alpha_decode"]))

    module = OSDDrafter(
        draft=HFModel(path=str(place / "draft")),
        teacher=HFModel(path=str(place / "target")),
        optim=OptimConfig(lr=3e-2, schedule="constant"),
    )
    evaluation = AcceptanceEval(requests=4, prompt_length=4, max_new_tokens=12)
    trainer_of(tmp_path, evaluation, Note(), val_check_interval=1, num_sanity_val_steps=0).fit(
        module, datamodule=Text()
    )
    assert len(seen) == 2 and seen[0] != seen[1]


def test_online_data_brings_target_and_prompts_and_routes_them(place: Path, tmp_path: Path) -> None:
    files = (str(place / "code.jsonl"), str(place / "prose.jsonl"))
    data = OnlineDataModule(
        str(place / "target"),
        TrafficConfig(prompts=files, val_prompts=files, max_new_tokens=6, val_requests=20),
        serve=ServeSettings(in_flight=4),
        buffer=BufferSettings(interval=4),
        router=RouterConfig(drafts=("code", "prose")),
    )
    drafts = {key: HFModel(path=str(place / "draft")) for key in ("code", "prose")}
    module = OSDDrafter(drafts=drafts, optim=OptimConfig(lr=1e-3, schedule="constant"))
    asked: list[tuple[int, set[str]]] = []

    class Spy(AcceptanceEval):
        def _decode(self, index: int, requests: Any) -> None:
            asked.append((index, {r.tag for r in requests}))
            super()._decode(index, requests)

    trainer = trainer_of(
        tmp_path,
        DraftSwap(gate=False),
        Spy(requests=20, max_new_tokens=6),
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert set(map(repr, asked)) == {repr((0, {"code"})), repr((1, {"prose"}))}
    assert "val/alpha_decode" in trainer.callback_metrics and "val/alpha" not in trainer.callback_metrics


def test_prompts_of_a_file(place: Path, tmp_path: Path) -> None:
    data = Text()
    data.tokenizer = load(place / "target").tokenizer
    evaluation = AcceptanceEval(requests=5, max_new_tokens=4, prompts=str(place / "code.jsonl"))
    module = OSDDrafter(draft=HFModel(path=str(place / "draft")), teacher=HFModel(path=str(place / "target")))
    trainer_of(tmp_path, evaluation, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert [r.tag for r in evaluation._requests] == ["code"] * 5


def test_what_is_missing_is_said(place: Path, tmp_path: Path) -> None:
    class Bare(pl.LightningDataModule):
        train_dataloader, val_dataloader, _batches = Text.train_dataloader, Text.val_dataloader, Text._batches

    module = OSDDrafter(draft=HFModel(path=str(place / "draft")), teacher=HFModel(path=str(place / "target")))
    with pytest.raises(InvalidValue, match="has no prompts"):
        trainer_of(tmp_path, AcceptanceEval(), num_sanity_val_steps=0).fit(module, datamodule=Bare())
    alone = OSDDrafter(draft=HFModel(path=str(place / "draft")), loss="ce")
    with pytest.raises(InvalidValue, match="has no target"):
        trainer_of(tmp_path, AcceptanceEval(), num_sanity_val_steps=0).fit(alone, datamodule=Text())

    class Other(pl.LightningModule):
        def training_step(self, *args: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(InvalidType, match="an OSDDrafter or an EagleDrafter"):
        trainer_of(tmp_path, AcceptanceEval()).fit(Other(), datamodule=Text())


@pytest.mark.parametrize(
    "changes", [{"requests": 0}, {"max_new_tokens": 0}, {"batch": 0}, {"draft_length": 0}, {"policy": "tree"}]
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        AcceptanceEval(**changes)
