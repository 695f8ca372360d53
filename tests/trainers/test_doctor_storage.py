"""Doctor's checks of the run folder, the room on its disk, and the checkpoint that lies there."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import runs, shards
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig
from draftsmith.trainers.checks import storage
from draftsmith.trainers.checks.finding import ERROR, OK, WARNING, size
from tests.doctor_subject import elsewhere, says, subject, two  # noqa: F401  # a fixture
from tests.tiny_run import ARCH

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage.checks(subject(run=tmp_path / "file" / "x"))
    says(found, ERROR, "file", "is no folder", "--run")
    seconds, how = storage.save_seconds(subject(run=tmp_path / "file" / "x"))
    assert seconds == 0 and "cannot be written" in how


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    says(storage.checks(subject(run=tmp_path / "x"))[0], ERROR, "read-only")


def free(count: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(count)))


def test_room_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    count = one.parameters
    assert storage.checkpoint_bytes(one) == 12 * count
    needed = 3 * 12 * count + 2 * 4 * count  # keep 2, one more while it is written, and the best
    free(2 * needed, monkeypatch)
    says(storage.disk(one), OK, size(needed))
    free(1.1 * needed, monkeypatch)
    says(storage.disk(one), WARNING, "hardly more")
    free(needed - 1, monkeypatch)
    says(storage.disk(one), ERROR, "too little", "checkpoint.keep")
    free(100, monkeypatch)
    says(storage.disk(one), ERROR, "not even one fits")
    free(needed - 1, monkeypatch)
    says(storage.disk(subject(checkpoint=CheckpointConfig(monitor=None))), OK)


def test_what_deepspeed_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    count = subject().parameters
    assert storage.checkpoint_bytes(two(strategy="zero2", precision="bf16-mixed")) == 14 * count
    assert storage.checkpoint_bytes(two(strategy="zero2")) == 16 * count


def test_checkpoints_that_are_there_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    folder = one.run / runs.CHECKPOINTS
    folder.mkdir(parents=True)
    (folder / "step-00000001.ckpt").write_bytes(bytes(24 * one.parameters))
    free(20.5 * one.parameters, monkeypatch)
    assert storage.disk(one).verdict != ERROR  # 44 P needed, 24 P of them are there


def test_a_run_in_use() -> None:
    says(storage.in_use(subject()), OK, "free")
    with runs.RunLock(Path("runs/x")):
        says(storage.in_use(subject()), OK, "ours")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lock = runs.RunLock(Path("runs/x"))
        owner = dataclasses.asdict(runs.Owner(other.pid, socket.gethostname(), runs._started(other.pid), None))
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        lock.path.write_text(json.dumps(owner))
        says(storage.in_use(subject()), ERROR, f"process {other.pid}", "--run")
        other.communicate(b"\n")
    says(storage.in_use(subject()), OK, "which is gone")
    lock.path.write_text("{")
    says(storage.in_use(subject()), WARNING, "cannot be read")


def save(module: Any, ranks: int = 1, step: int = 7) -> Path:
    """What a run of `module` leaves."""
    module.configure_model()
    path = Path("runs/x") / runs.CHECKPOINTS / f"step-{step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: {} for name in runs._NEEDED}
    states = {"RandomStates": {"ranks": [{}] * ranks}}
    torch.save({**content, "state_dict": module.state_dict(), "callbacks": states, "global_step": step}, path)
    return path


def test_a_checkpoint_that_fits() -> None:
    (found,) = storage.checkpoint(subject())
    says(found, OK, "none")
    save(LM(HFModel(arch=ARCH)))
    (found,) = storage.checkpoint(subject())
    says(found, OK, "from step 7")


def test_a_checkpoint_of_another_method() -> None:
    save(OSDDrafter(draft=HFModel(arch=ARCH)))
    (found,) = storage.checkpoint(subject())
    says(found, ERROR, "another method", "OSDDrafter", "trains LM", "--run")


@pytest.mark.parametrize(
    ("arch", "words"),
    [({"hidden_size": 32}, ("[300, 32]", "[300, 16]")), ({"num_hidden_layers": 2}, ("has no net.model.layers.1",))],
)
def test_a_checkpoint_of_other_shapes(arch: dict[str, int], words: tuple[str, ...]) -> None:
    saved, now = (ARCH | arch, ARCH) if "hidden_size" in arch else (ARCH, ARCH | arch)
    save(LM(HFModel(arch=saved)))
    (found,) = storage.checkpoint(subject(module=LM(HFModel(arch=now))))
    says(found, ERROR, *words, "--run")


def test_a_checkpoint_of_another_number_of_ranks_or_strategy() -> None:
    save(LM(HFModel(arch=ARCH)), ranks=4)
    says(storage.checkpoint(two())[0], WARNING, "4 ranks", "has 2", "random states")
    says(storage.checkpoint(two(strategy="zero2"))[0], ERROR, "single file", "ddp")


def test_a_sharded_checkpoint() -> None:
    module = LM(HFModel(arch=ARCH))
    module.configure_model()
    network = shards.network_hash((name, p.shape) for name, p in module.named_parameters())
    path = Path("runs/x") / runs.CHECKPOINTS / "step-00000009.ckpt"
    made = shards.temporary(path)
    made.mkdir(parents=True)
    (made / "state").write_text("")
    shards.publish(made, path, world_size=4, stage=2, network=network)
    says(storage.checkpoint(two())[0], ERROR, "DeepSpeed checkpoint", "ddp")
    says(storage.checkpoint(two(strategy="zero3"))[0], ERROR, "saved by zero2", "stage is 3", "--run")
    says(storage.checkpoint(two(strategy="zero2"))[0], ERROR, "4 ranks", "has 2", "--checkpoint.elastic true")
    elastic = CheckpointConfig(elastic=True)
    says(storage.checkpoint(two(strategy="zero2", checkpoint=elastic))[0], OK, "4 ranks", "step 9")
    says(storage.checkpoint(two(strategy="zero2", devices=4))[0], OK, "step 9")
    other = LM(HFModel(arch=ARCH | {"hidden_size": 32}))
    says(storage.checkpoint(two(strategy="zero2", devices=4, module=other))[0], ERROR, "another network", "--run")
    osd = OSDDrafter(draft=HFModel(arch=ARCH))
    says(storage.checkpoint(two(strategy="zero2", devices=4, module=osd))[0], ERROR, "another network (or method)")
