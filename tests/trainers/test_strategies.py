"""Strategies by name: one-line refusals, float inputs that stay float32, and steps that are really left out."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision

from draftsmith.inference.errors import InvalidValue, MissingExtra
from draftsmith.trainers import shipped, strategies
from draftsmith.trainers.export import rebuild
from tests.tiny_run import make_place
from tests.zero_runs import fit, rows, watch, zero

STEPS = 4


@pytest.mark.parametrize("name", strategies.ZERO)
def test_every_named_strategy_has_its_shipped_config(name: str) -> None:
    content = strategies.read_config(f"deepspeed/{name}")
    assert content["zero_optimization"]["stage"] == int(name[4])
    offloads = {key for key in content["zero_optimization"] if key.startswith("offload")}
    expected = {"offload_optimizer", "offload_param"} if "3-off" in name else {"offload_optimizer"}
    assert offloads == (expected if "offload" in name else set())
    assert shipped.resolve(f"deepspeed/{name}", ".json").is_file()


@pytest.mark.parametrize(("key", "instead"), list(strategies._OURS.items()))
def test_keys_that_the_trainer_fills_are_refused(tmp_path: Path, key: str, instead: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(InvalidValue, match=f"sets {key}, which comes from .*{instead.split()[0]}"):
        strategies.read_config(str(path))


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot read"), ("[]", "no keys"), ("{}", "choose 1, 2 or 3"), ('{"zero": 2}', "stage")]
)
def test_a_broken_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(InvalidValue, match=said):
        strategies.read_config(str(tmp_path / "ds.json"))


def test_names_and_precisions_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"unknown trainer.strategy 'zero4': .*did you mean 'zero"):
        strategies.check("zero4", "cpu", "32-true")
    with pytest.raises(InvalidValue, match="take zero1-3"):
        strategies.check("deepspeed_stage_2", "cpu", "32-true")
    for precision in ("16-mixed", "16-true", 16):
        with pytest.raises(InvalidValue, match="bf16-mixed"):
            strategies.check("ddp", "cpu", precision)
    for name in strategies.NAMES:
        strategies.check(name, "cpu", "bf16-mixed")


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'draftsmith\[deepspeed\]'"):
        strategies.ZeRO()


def test_a_time_of_0_999_survives_bf16() -> None:
    """Lightning's own plugin makes it 1.0, after which log(1 - t) is infinite (contract 12)."""
    batch = {"time": torch.tensor(0.999), "ids": torch.tensor([3])}
    assert float(DeepSpeedPrecision("bf16-mixed").convert_input(batch)["time"]) == 1.0
    strategy = strategies.ZeRO()
    strategy.precision_plugin = DeepSpeedPrecision("bf16-mixed")  # as the Trainer hands it over
    kept = strategy.precision_plugin.convert_input(batch)
    assert kept["time"].dtype == torch.float32 and torch.equal(kept["time"], batch["time"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("strategies"), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.acceptance)])
def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(place: Path, stage: int) -> None:
    """One rank's loss is infinite in the last step: the run ends with the weights that it had before it."""
    words = ["--checkpoint.every_n_steps", "1", "--checkpoint.monitor", "null"]
    name = f"bad{stage}"
    fit(place, name, *zero(place, stage, 2, 4), *watch(place, name, bad_step=STEPS - 1), *words)
    assert [row["skipped"] for row in rows(place, name) if row["rank"] == 1] == [0.0] * (STEPS - 1) + [1.0]
    folder = place / "runs" / name / "checkpoints"
    three, four = (
        rebuild(folder.parent, str(folder / f"step-{step:08d}.ckpt")).state_dict() for step in (STEPS - 1, STEPS)
    )
    assert all(torch.equal(three[key], four[key]) for key in three)


class Drafter:
    """What `ZeRO.setup` asks of a module."""

    def __init__(self, draft_keys: tuple[str, ...], source: str) -> None:
        self.draft_keys, self.source = draft_keys, source


@pytest.mark.parametrize(
    ("strategy", "module", "said"),
    [
        ("zero1", Drafter(("code", "prose"), "teacher"), r"several drafts \(code, prose\).*ddp"),
        ("zero3", Drafter(("draft",), "student"), r"'student' decodes in the training step"),
    ],
)
def test_what_deepspeed_cannot_train_is_refused(strategy: str, module: Drafter, said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        strategies.ZeRO(f"deepspeed/{strategy}").setup(SimpleNamespace(lightning_module=module))


def test_a_teacher_in_pieces_needs_zero3() -> None:
    strategy = strategies.ZeRO("deepspeed/zero2", partition_teacher=True)
    with pytest.raises(InvalidValue, match=r"partition_teacher needs ZeRO-3, and this is stage 2"):
        strategy.setup(SimpleNamespace(lightning_module=Drafter(("draft",), "teacher")))


@pytest.mark.slow
def test_an_unknown_name_ends_in_one_line(place: Path) -> None:
    _, err = fit(place, "none", "--trainer.strategy", "zero9", code=2)
    assert err.startswith("error: unknown trainer.strategy 'zero9'") and err.count("\n") == 1
