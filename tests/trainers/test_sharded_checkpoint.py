"""Checkpoints that are directories: atomic, checked, resumed exactly, exported, and taken over by other ranks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loops.progress import _BatchProgress

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.trainers import runs, shards, strategies
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig, StepCheckpoint
from draftsmith.trainers.export import rebuild
from tests.tiny_run import finish, make_place, start
from tests.zero_runs import curve, fit, samples, watch, zero

STEPS = 12
WIDER = ("--model.model.arch.hidden_size", "32")


def made(directory: Path, step: int = 5) -> Path:
    """A directory as a save leaves it, with small files."""
    path = directory / runs.CHECKPOINTS / f"step-{step:08d}.ckpt"
    temporary = shards.temporary(path)
    (temporary / shards.TAG).mkdir(parents=True)
    for rank in range(2):
        (temporary / shards.TAG / f"rank-{rank}.pt").write_bytes(b"x" * (rank + 3))
    shards.publish(temporary, path, world_size=2, stage=2, network=shards.network_hash([("a", (2, 3))]))
    return path


def test_a_published_directory_is_whole_and_lists_its_files(tmp_path: Path) -> None:
    path = made(tmp_path)
    assert runs.missing_part(path) is None and runs.newest_checkpoint(tmp_path) == path
    told = shards.read(path)
    assert (told.world_size, told.stage) == (2, 2)
    assert told.files == {"checkpoint/rank-0.pt": 3, "checkpoint/rank-1.pt": 4}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_missing_is_said_and_the_one_before_is_taken(tmp_path: Path) -> None:
    older, newer = made(tmp_path, 5), made(tmp_path, 9)
    for damage, said in (
        (lambda: (newer / "checkpoint" / "rank-1.pt").write_bytes(b"x"), r"rank-1.pt has 1 of 4 bytes"),
        (lambda: (newer / "checkpoint" / "rank-1.pt").unlink(), r"rank-1.pt is missing"),
        (lambda: (newer / shards.LIST).write_text("{"), r"shards.json is damaged"),
        (lambda: (newer / shards.LIST).unlink(), r"shards.json is missing"),
    ):
        damage()
        with pytest.warns(runs.TornCheckpoint, match=f"{newer.name} is skipped: its .*{said}"):
            assert runs.newest_checkpoint(tmp_path) == older


def test_leftovers_of_dead_processes_are_invisible_and_cleared(tmp_path: Path) -> None:
    path = made(tmp_path)
    for suffix in (".tmp", ".old", ".tmp.universal"):
        shutil.copytree(path, path.with_name(f".step-00000009.ckpt{suffix}"))
    assert runs.newest_checkpoint(tmp_path) == path
    shards.clear(path.parent)
    assert list(path.parent.iterdir()) == [path]


def test_a_save_over_a_name_and_a_removal(tmp_path: Path) -> None:
    path = made(tmp_path)
    assert made(tmp_path) == path and runs.missing_part(path) is None
    shards.remove(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "devices", "said"),
    [
        ("zero2", 1, "saved by 2 ranks and this run has 1: .*--checkpoint.elastic true"),
        ("zero3", 2, "saved by zero2: resume with that strategy, not zero3"),
        ("ddp", 2, "saved under ZeRO: resume it with --trainer.strategy zero2"),
    ],
)
def test_a_trainer_that_cannot_go_on_says_so_before_it_starts(
    tmp_path: Path, strategy: str, devices: int, said: str
) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, barebones=True)
    with pytest.raises((InvalidState, InvalidValue), match=said):
        strategies.check_resume(trainer, made(tmp_path), elastic=False)
    if strategy == "zero2":
        strategies.check_resume(trainer, made(tmp_path), elastic=True)


def test_a_single_file_is_no_directory(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.ckpt")
    with pytest.raises(InvalidValue, match="strategy that does not shard"):
        shards.read(tmp_path / "a.ckpt")


def resumed(directory: Path, batches: int, before: int, now: int) -> Any:
    """The batch counts of a run that was saved at the end of a batch and goes on with another global batch."""
    progress = _BatchProgress()
    for counts in (progress.current, progress.total):
        counts.ready = counts.started = counts.processed = batches
        counts.completed = batches - 1  # Lightning completes a batch after the hook that saves
    epoch_loop = SimpleNamespace(batch_progress=progress)
    loader = SimpleNamespace(global_batch=now)
    trainer = SimpleNamespace(train_dataloader=loader, fit_loop=SimpleNamespace(epoch_loop=epoch_loop))
    saver = StepCheckpoint(directory, CheckpointConfig())
    saver.load_state_dict({"global_batch": before})
    saver.on_train_start(trainer, pl.LightningModule())
    return progress.current


@pytest.mark.parametrize(("before", "now", "ready"), [(8, 4, 12), (4, 8, 3), (4, 4, 6), (4, 12, 2)])
def test_batches_of_another_size_are_recounted(tmp_path: Path, before: int, now: int, ready: int) -> None:
    counts = resumed(tmp_path, 6, before, now)
    assert (counts.ready, counts.started, counts.processed, counts.completed) == (ready, ready, ready, ready - 1)


def test_a_position_inside_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"sample 20 of its epoch, which is no multiple of the 8 .* divides 4"):
        resumed(tmp_path, 5, 4, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sharded"), STEPS)


@pytest.mark.slow
def test_zero3_on_two_ranks_resumes_exactly_and_goes_on_alone(place: Path) -> None:
    """Stopped at step 6; on two ranks again it ends to the bit as if never stopped, on one it sees the same samples."""
    words = ["--checkpoint.every_n_steps", "6", "--checkpoint.keep", "9"]
    two, one = zero(place, 3, 2, 4), zero(place, 3, 1, 4)
    births = {"class_path": "tests.zero_runs.Births", "init_args": {"path": str(place / "births")}}
    fit(place, "whole", *two, *watch(place, "whole", [births]), *words)
    for rank in range(2):  # no rank held the network whole
        held, parameters = json.loads((place / f"births.{rank}.json").read_text())["trained"]
        assert held == 0 < parameters
    whole = place / "runs" / "whole"
    last = runs.newest_checkpoint(whole)
    assert last is not None and last.is_dir() and runs.step_of(last) == STEPS
    for name in ("parts", "alone"):
        shutil.copytree(whole, place / "runs" / name)
        shards.remove(place / "runs" / name / runs.CHECKPOINTS / last.name)

    _, err = fit(place, "alone", *one, *words, "--checkpoint.elastic", "true", *WIDER, code=2)
    assert "step-00000006.ckpt holds another network than this config describes" in err and "Traceback" not in err

    fit(place, "parts", *two, *watch(place, "parts"), *words)
    expected = {step: ids for step, ids in samples(place, "whole").items() if step >= 6}
    assert samples(place, "parts") == expected and curve(place, "parts") == curve(place, "whole")[6:]
    ends = [rebuild(place / "runs" / name, "last").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    fit(place, "alone", *one, *watch(place, "alone"), *words, "--checkpoint.elastic", "true")
    assert samples(place, "alone") == expected
    assert curve(place, "alone") == pytest.approx(curve(place, "whole")[6:], rel=1e-4)
    told = shards.read(runs.newest_checkpoint(place / "runs" / "alone") or Path())
    assert told.world_size == 1

    best = runs.checkpoint(whole, "best")  # weights alone are a single file, whatever the strategy
    sharded = best.with_name(best.name.replace("best", "step"))
    assert best.is_file() and sharded.is_dir()
    one_file, from_shards = (rebuild(whole, str(path)).state_dict() for path in (best, sharded))
    assert one_file.keys() == from_shards.keys()
    assert all(torch.equal(one_file[key], from_shards[key]) for key in one_file)
    metrics = json.loads((whole / runs.PROVENANCE).read_text())["metrics"]
    for verb, name in (("validate", "val/loss"), ("test", "test/loss")):  # one process reads the shards of two
        out, _ = finish(start(place, verb, "-c", "tiny.yaml", "--ckpt_path", str(last), "--json"))
        figures = json.loads(out.splitlines()[-1])
        assert figures["checkpoint"] == str(last) and figures[name] > 0
        if verb == "validate":  # four rows at once are two on each of two ranks
            assert figures[name] == pytest.approx(metrics[name], rel=1e-5)
