"""`plan` and `doctor` on every shipped config; what EMO's costs, adapters and EAGLE heads hold, by hand."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.inference import cli
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats import own
from draftsmith.inference.formats.record import DrafterRecord
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.modules import emo_lm
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_target import EagleSizes
from draftsmith.modules.emo_lm import EMOLM, EMOConfig
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lora import LoRAConfig
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import networks, shipped
from draftsmith.trainers.memory import Pieces
from draftsmith.trainers.meta import HostReads
from tests.eagles import toy_tensors
from tests.tiny import lm, write_lm

V, D = 320, 64  # of the target; its draft is half as wide
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with targets, drafts and requests where the shipped configs look for them."""
    place = tmp_path_factory.mktemp("models")
    (place / "runs" / "demo" / "exports").mkdir(parents=True)
    (place / "exports").mkdir()
    for name, width in (("target", D), ("draft", D // 2), ("static", D // 2)):
        for folder in (place / "exports", place / "runs" / "demo" / "exports"):
            write_lm(folder / name, vocab_size=V, width=width, layers=4, max_length=4096)
    (place / "runs" / "demo" / "requests.jsonl").write_text('{"prompt": "def f", "tag": "code"}\n' * 20)
    return place


@pytest.fixture
def place(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**60, 0, 2**60))
    return models


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code = cli.main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err or out
    return json.loads(out)


def always(plan: Any, stage: int) -> Any:
    (row,) = (row for row in plan["memory_per_rank"] if row["stage"] == stage)
    return row["always"]


def target_count() -> int:
    return networks.parameter_count(lm(vocab_size=V, width=D, layers=4))


# --- every shipped config


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_config_is_planned(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    plan = said(capsys, "plan", "-c", name)
    assert [row["stage"] for row in plan["memory_per_rank"]] == [0, 1, 2, 3]
    assert plan["tokens_per_step"] > 0
    for row in plan["memory_per_rank"]:
        assert row["phases"]["forward"]["activations"] > 0 and row["peak"] > sum(row["always"].values())
    trained = sum(count for net, count in plan["parameters"].items() if net.startswith("net"))
    assert plan["checkpoint_bytes"] in (12 * trained, 14 * trained)
    beside_target = name.startswith(("osd/", "eagle/", "demo/online", "demo/offline"))
    held = None if not beside_target else 2 * V * D if name == "eagle/cached" else target_count()
    assert plan["parameters"].get("teacher", plan["parameters"].get("served target")) == held
    if plan["world_size"] > 1:
        assert always(plan, 3)["weights"] < always(plan, 0)["weights"]


@pytest.mark.parametrize("name", shipped.names())
def test_doctor_has_nothing_against_a_shipped_config(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = said(capsys, "doctor", "-c", name, "--no-data", "--run", "new")
    worse = [(row["check"], row["verdict"]) for row in found if row["verdict"] != "ok"]
    serves = name.startswith(("osd/debug", "osd/online", "demo/online"))  # without buffers on disk
    assert worse == ([("resume", "warning")] if serves else [])


# --- EMO


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 4 * V * D),
        ({"cost_dtype": "bfloat16"}, 2 * V * D),
        ({"project": 16}, 4 * V * 16),
        ({"costs": "exports/draft"}, 4 * V * D // 2),
        ({"costs": "adaptive"}, 0),
    ],
)
def test_token_costs_are_memory(
    place: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], size: int
) -> None:
    words = [f"--model.emo.{key}={value}" for key, value in settings.items()]
    plan = said(capsys, "plan", "-c", "emo/base", *words)
    assert {always(plan, stage)["costs"] for stage in range(4)} == {size}
    assert plan["parameters"] == {"net": target_count()}


def test_adaptive_costs_are_made_in_the_step(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forward(costs: str) -> int:
        plan = said(capsys, "plan", "-c", "emo/base", f"--model.emo.costs={costs}")
        count: int = plan["memory_per_rank"][0]["phases"]["forward"]["activations"]
        return count

    assert forward("adaptive") - forward("head") >= 4 * V * D


def test_costs_that_do_not_fit_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lm(place / "other", vocab_size=V - 20)
    assert cli.main(["doctor", "-c", "emo/base", "--no-data", "--model.emo.costs=other"]) == 2
    assert "cost embedding has 300 rows, logits have 320: see model.emo.costs" in capsys.readouterr().out
    wide = HFModel(arch={"model_type": "llama", "vocab_size": 2**17, "hidden_size": 4096, "num_hidden_layers": 1})
    with pytest.raises(InvalidValue, match="allowed is 1 GB"):
        networks.without_weights(EMOLM(wide, EMOConfig(costs="adaptive")))


def test_costs_from_the_teachers_head_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = said(capsys, "plan", "-c", "osd/offline", "--model.loss=emo")
    assert always(plan, 0)["costs"] == 4 * V * D and always(plan, 0)["teacher"] == 4 * target_count()
    module = OSDDrafter(draft=HFModel(path="exports/draft"), teacher=HFModel(path="exports/target"))
    networks.without_weights(module)
    assert networks.costs(module) is None  # forward_kl has none


# --- adapters


class Adapted(nn.Module):
    """A linear map and an adapter of rank 2 on it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapt(net: Any, config: LoRAConfig) -> None:
    """What `lora.inject` does, in small; peft is an extra."""
    net.requires_grad_(False)
    for layer in net.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)


def test_of_a_network_with_adapters_they_alone_are_trained(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emo_lm, "inject", adapt)
    base, learns = target_count(), 4 * 2 * (D + 2 * D)  # in each layer, up_proj is D -> 2D
    words = ["-c", "emo/base", "--model.lora.r=2", "--trainer.devices=2", "--trainer.strategy=zero2"]
    plan = said(capsys, "plan", *words)
    assert plan["parameters"] == {"net": learns, "net, frozen": base}
    none, two, three = (always(plan, stage) for stage in (0, 2, 3))
    assert none["weights"] == 4 * (base + learns) and none["optimizer"] == 8 * learns
    assert plan["memory_per_rank"][0]["phases"]["backward"]["gradients"] == 4 * learns
    assert two["weights"] == 4 * (base + learns) and two["masters"] == 2 * learns
    assert three["weights"] == 2 * (base + learns) and three["optimizer"] == 4 * learns
    assert plan["memory_per_rank"][3]["phases"]["forward"]["gathered"] == 4 * (base + learns)
    assert plan["checkpoint_bytes"] == 4 * (base + learns) + 12 * learns
    half = ["--model.model.dtype=bfloat16", "--trainer.precision=bf16-mixed"]
    low = said(capsys, "plan", *words, *half)
    assert always(low, 0)["weights"] == 2 * base + 4 * learns  # adapters are made in float32
    found = said(capsys, "doctor", *words, "--no-data", "--run", "new", *half)
    assert {row["verdict"] for row in found} == {"ok"}  # frozen weights may be kept in bfloat16


def test_a_checkpoint_with_adapters_fits_its_config(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftsmith.trainers import runs

    monkeypatch.setattr(emo_lm, "inject", adapt)
    module = EMOLM(HFModel(path="exports/target"), lora=LoRAConfig(2))
    module.configure_model()
    folder = Path("runs/adapted") / runs.CHECKPOINTS
    folder.mkdir(parents=True)
    content = {name: {} for name in runs._NEEDED} | {"state_dict": module.state_dict(), "global_step": 3}
    torch.save(content, folder / "step-00000003.ckpt")
    words = ["-c", "emo/base", "--no-data", "--run", "adapted"]
    found = {row["check"]: row["text"] for row in said(capsys, "doctor", *words, "--model.lora.r=2")}
    assert "goes on from step 3" in found["checkpoint"]
    assert cli.main(["doctor", *words]) == 2
    assert "has no net.model.layers.0.mlp.up_proj.weight" in capsys.readouterr().out


def test_peft_puts_its_adapters_on_networks_without_weights(place: Path) -> None:
    pytest.importorskip("peft")

    def module() -> EMOLM:
        return EMOLM(HFModel(path="exports/target"), lora=LoRAConfig(4))

    real = module()
    real.configure_model()
    (net,) = networks.without_weights(module()).values()
    expected = {name: (p.shape, p.requires_grad) for name, p in real._built().named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in net.named_parameters()} == expected
    assert {p.device.type for p in net.parameters()} == {"meta"}


# --- EAGLE


@pytest.mark.parametrize(
    "sizes", [EagleSizes(), EagleSizes(draft_vocab_size=100), EagleSizes(1), EagleSizes(own_embedding=True)]
)
def test_an_eagle_head_without_weights_is_the_one_that_trains(place: Path, sizes: EagleSizes) -> None:
    def module() -> EagleDrafter:
        return EagleDrafter(HFModel(path="exports/target"), sizes, steps=1)

    real, planned = module(), module()
    real.configure_model()
    (net,) = networks.without_weights(planned).values()
    expected = {name: (p.shape, p.dtype) for name, p in real._built().state_dict().items()}
    assert {name: (p.shape, p.dtype) for name, p in net.state_dict().items()} == expected
    assert networks.count(networks.teacher_tensors(planned)) == target_count()
    assert networks.token_rows(net) == V and networks.family(net) == "llama"


def test_cached_states_need_the_targets_tables_alone(place: Path) -> None:
    module = EagleDrafter(HFModel(path="exports/target"), cached=True)
    networks.without_weights(module)
    assert networks.teacher(module) is None and networks.count(networks.teacher_tensors(module)) == 2 * V * D


def test_a_warm_start_has_the_sizes_of_its_head(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = EagleSizes(draft_vocab_size=50, fc_norm=True).config(lm(vocab_size=V, width=D, layers=4).config)
    (tmp_path / "head").mkdir()
    own.write(DrafterRecord(config, toy_tensors(config)), tmp_path / "head")
    plan = said(capsys, "plan", "-c", "eagle/debug", f"--model.init_from={tmp_path / 'head'}")
    assert plan["parameters"]["net"] == networks.parameter_count(EagleHead(config))


def test_zero3_is_refused_for_eagle_heads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "-c", "eagle/debug", "--no-data", "--trainer.strategy=zero3"]) == 2
    assert "an EAGLE head is small and runs many times a step" in capsys.readouterr().out


def test_a_checkpoint_of_another_method_with_the_same_prefix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from draftsmith.trainers import runs

    module = EagleDrafter(HFModel(path="exports/target"))
    module.configure_model()
    folder = Path("runs/eagle") / runs.CHECKPOINTS
    folder.mkdir(parents=True)
    content = {name: {} for name in runs._NEEDED} | {"state_dict": module.state_dict(), "global_step": 3}
    torch.save(content, folder / "step-00000003.ckpt")
    assert cli.main(["doctor", "-c", "emo/base", "--no-data", "--run", "eagle"]) == 2
    assert "is of another method (EagleDrafter; this config trains EMOLM)" in capsys.readouterr().out


# --- answers of the meta device


def test_ids_that_repeat_are_answered() -> None:
    ids = torch.empty(5, dtype=torch.int64, device="meta")
    with HostReads() as reads:
        distinct, place = torch.unique(ids, return_inverse=True)
        (alone,) = torch.unique(ids[:1])[None]
    assert distinct.shape == (4,) and place.shape == (5,) and alone.shape == (1,)
    assert reads.reads["mask"] == 2  # a GPU waits for each


# --- a teacher that the ranks share

SHARED = (
    "{class_path: draftsmith.trainers.strategies.ZeRO, init_args: {config: deepspeed/zero%d, partition_teacher: true}}"
)
WORDS = ("-c", "demo/offline", "--trainer.devices=2")  # a config without AcceptanceEval


def test_the_body_of_a_teacher_is_shared_under_zero3_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = V * D
    body = target_count() - head
    whole = said(capsys, "plan", *WORDS, "--trainer.strategy=zero3")
    shared = said(capsys, "plan", *WORDS, f"--trainer.strategy={SHARED % 3}")
    for stage in range(3):
        assert always(shared, stage) == always(whole, stage)
    assert always(whole, 3)["teacher"] == 4 * (body + head)
    assert always(shared, 3)["teacher"] == 4 * (body // 2 + head)
    gathered = [plan["memory_per_rank"][3]["phases"]["forward"]["gathered"] for plan in (whole, shared)]
    assert gathered[0] == 4 * shared["parameters"]["nets.0"] < gathered[1] == 4 * body  # all of it is fetched ahead


def test_of_a_teacher_that_runs_so_much_is_gathered() -> None:
    pieces = Pieces(body=1000, head=50, largest=30, size=2)
    assert pieces.held(4) == 2 * (250 + 50)
    assert pieces.gathered(4, {"stage3_prefetch_bucket_size": 100}) == 2 * 130
    assert pieces.gathered(4, {}) == 2 * 1000
    assert pieces.gathered(4, {"stage3_max_live_parameters": 400}) == 2 * 400
    assert pieces.gathered(1, {}) == 0  # alone a rank has all of it


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((*WORDS, f"--trainer.strategy={SHARED % 2}"), "partition_teacher needs ZeRO-3"),
        (("-c", "lm/debug", f"--trainer.strategy={SHARED % 3}"), "LM has no teacher: set it to false"),
        (("-c", "osd/offline", f"--trainer.strategy={SHARED % 3}"), "AcceptanceEval decodes with the teacher"),
        (("-c", "osd/offline", "--trainer.strategy=zero3", "--model.source=student"), "model.source student decodes"),
    ],
)
def test_what_cannot_share_its_teacher(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    assert cli.main(["doctor", *words, "--no-data", "--run", "new"]) == 2
    out = capsys.readouterr().out
    assert text in out and out.count("error  ") == 1


def test_a_teacher_may_be_shared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "doctor", *WORDS, f"--trainer.strategy={SHARED % 3}", "--no-data", "--run", "new")
    assert {row["verdict"] for row in found} == {"ok"}
