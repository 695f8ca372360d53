"""Doctor's checks of strategy, DeepSpeed's config, number formats and the port where ranks meet."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers.checks import strategy
from draftsmith.trainers.checks.finding import ERROR, OK, WARNING
from draftsmith.trainers.checks.subject import Subject
from tests.doctor_subject import GOOD, elsewhere, says, subject, two  # noqa: F401  # a fixture
from tests.tiny_run import ARCH

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_strategies() -> None:
    says(strategy.strategy(subject()), OK, "auto, 1 ranks")
    says(strategy.strategy(two(strategy="zero2")), OK, "zero2")
    says(strategy.strategy(two(strategy="zero4")), ERROR, "'zero4'", "zero2")
    says(strategy.strategy(two(strategy="single_device")), ERROR, "one process", "ddp")
    own = {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": {}}
    says(strategy.strategy(two(strategy=own)), ERROR, "Lightning's own", "zero2")


def zero(tmp_path: Path, **content: Any) -> Subject:
    """A run under a DeepSpeed config of one's own."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    own = {"class_path": "draftsmith.trainers.strategies.ZeRO", "init_args": {"config": str(path)}}
    return two(strategy=own)


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps", "trainer.accumulate_grad_batches")),
        ({"train_batch_size": 64}, ("train_batch_size", "batch_size")),
        ({"bf16": {"enabled": True}}, ("bf16", "trainer.precision")),
        ({"optimizer": {"type": "Adam"}}, ("optimizer", "model.optim")),
        ({"zero_optimization": OFFLOAD}, ("offload_optimizer to cpu", '"zero_force_ds_cpu_optimizer": false')),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ("stage 3 only",)),
        ({"zero_optimization": {"stage": 4}}, ("stage",)),
    ],
)
def test_deepspeed_configs_that_conflict(tmp_path: Path, content: dict[str, Any], words: tuple[str, ...]) -> None:
    (found,) = strategy.deepspeed(zero(tmp_path, **content))
    says(found, ERROR, *words)


def test_deepspeed_configs_that_do_not(tmp_path: Path) -> None:
    allowed = {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False}
    (found,) = strategy.deepspeed(zero(tmp_path, **allowed))
    says(found, OK, "stage 2", "optimizer on cpu")
    assert strategy.deepspeed(two()) == []
    for name, stage in (("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero2-offload", 2), ("zero3-offload", 3)):
        (found,) = strategy.deepspeed(two(strategy=name))
        says(found, OK, f"stage {stage}")
    says(strategy.deepspeed(two(strategy="zero2", gradient_clip_val=1.0, gradient_clip_algorithm="value"))[0], ERROR)
    several = OSDDrafter(drafts={"a": HFModel(arch=ARCH), "b": HFModel(arch=ARCH)})
    says(strategy.deepspeed(two(strategy="zero2", module=several))[0], ERROR, "2 drafts", "ddp")


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftsmith.trainers import strategies

    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    (found,) = strategy.deepspeed(two(strategy="zero3"))
    says(found, ERROR, "not installed", "pip install 'draftsmith[deepspeed]'")


@pytest.mark.parametrize("asked", ["16-mixed", "16-true", "16"])
def test_float16_for_families_that_overflow(asked: str) -> None:
    (found,) = strategy.precision(subject(precision=asked))
    says(found, ERROR, "llama", "bf16-mixed", asked)
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2}
    says(strategy.precision(subject(precision=asked, module=LM(HFModel(arch=gpt2))))[0], OK)


def test_other_number_formats() -> None:
    for asked in (None, "32-true", "bf16-mixed"):
        (found,) = strategy.precision(subject(precision=asked))
        says(found, OK, "llama")
    low = subject(module=LM(HFModel(arch=ARCH, dtype="bfloat16")))
    says(strategy.precision(low)[1], WARNING, "bfloat16", "float32")
    half = subject(module=LM(HFModel(arch=ARCH, dtype="float16")))
    says(strategy.precision(half)[1], ERROR, "float16")


def test_the_port_where_ranks_meet() -> None:
    says(strategy.port(subject()), OK, "one rank")
    says(strategy.port(two()), OK, "not set")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        found = strategy.port(two(env={"MASTER_PORT": str(number)}))
        says(found, ERROR, f"port {number}", "set MASTER_PORT")
    says(strategy.port(two(env={"MASTER_PORT": str(number)})), OK, "free")
    says(strategy.port(two(env={"MASTER_PORT": "here"})), ERROR, "'here'")
    says(strategy.port(two(env={"MASTER_PORT": "70000"})), ERROR, "70000")


def test_slurms_own_port_is_looked_at() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for number in range(16000, 25000):
            try:
                taken.bind(("", number))
                break
            except OSError:
                continue
        taken.listen()
        here = dataclasses.replace(GOOD, number=f"98{number - 15000:04d}")
        says(strategy.port(two(job=here)), ERROR, f"port {number}")
