"""Run folders: ids, the lock, torn checkpoints, the checkpoint callbacks, provenance."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.trainers import runs, shipped
from draftsmith.trainers.callbacks.checkpoint import (
    CheckpointConfig,
    RandomStates,
    StepCheckpoint,
    best_checkpoint,
)
from draftsmith.trainers.callbacks.stop_signals import Stopped, StopSignals
from draftsmith.trainers.provenance import Session

# --- ids


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (runs.FOLDER_VARIABLE, "SLURM_JOB_ID", "SLURM_JOB_NAME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_run_folder_by_id_path_job_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.folder("x", "lm/debug") == Path("runs/x")
    assert runs.folder("there/x", "lm/debug") == Path("there/x")
    first = runs.folder(None, "lm/debug")
    assert first.parent == Path("runs") and first.name.startswith("lm-debug-20")
    monkeypatch.setattr(time, "strftime", lambda form, *rest: "T")
    runs.folder(None, "a b").mkdir(parents=True)
    assert runs.folder(None, "a b") == Path("runs/a-b-T-2")  # two of one second do not share
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert runs.folder(None, "lm/debug") == Path("runs/77")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # an allocation in which many commands run is not one run
    assert runs.folder(None, "lm/debug") != Path("runs/77")
    monkeypatch.setenv(runs.FOLDER_VARIABLE, "chosen/by/rank0")
    assert runs.folder(None, "lm/debug") == Path("chosen/by/rank0")


def test_bad_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("", " ", ".", ".."):
        with pytest.raises(InvalidValue, match="--run wants an id"):
            runs.folder(bad, "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidValue, match="give --run ID"):
        runs.folder(None, "x")
    Path("runs/target").mkdir(parents=True)
    Path("runs/target/config.yaml").write_text("{}")
    with pytest.raises(InvalidValue, match="did you mean 'target'"):
        runs.existing("tagret")
    assert runs.existing("target") == Path("runs/target")


# --- the lock


def test_a_live_owner_is_respected_and_a_dead_one_gives_way() -> None:
    run = Path("runs/x")
    (run / "checkpoints").mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = runs.Owner(sleeper.pid, socket.gethostname(), runs._started(sleeper.pid), None)
        assert owner.alive()
        (run / ".lock").write_text(json.dumps(dataclasses.asdict(owner)))
        with pytest.raises(InvalidState, match=f"in use by process {sleeper.pid}"), runs.RunLock(run):
            pass
        reused = dataclasses.replace(owner, started="1")  # the same pid, another process
        assert not reused.alive()
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not owner.alive()
    with runs.RunLock(run) as lock:
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(InvalidState, match="in use by process"), runs.RunLock(run):
            pass
        assert lock.path.exists()  # the refused one did not take it away
    assert not (run / ".lock").exists() and run.exists()


def test_owners_on_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = runs.Owner(1, "another-host", "1", "77")
    assert elsewhere.alive()  # cannot be asked
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert not elsewhere.alive()  # our own job, requeued on this host
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert elsewhere.alive()


def test_a_damaged_lock_is_stale_and_an_unused_folder_goes_away() -> None:
    run = Path("runs/x")
    run.mkdir(parents=True)
    (run / ".lock").write_text("{")
    with runs.RunLock(run):
        pass
    with pytest.raises(ValueError, match="before anything"), runs.RunLock(Path("runs/new")):
        raise ValueError("before anything was written")
    assert not Path("runs/new").exists() and run.exists()


# --- checkpoints


class Toy(pl.LightningModule):
    """One weight; each step draws from every generator and notes what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.drawn: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.drawn.append((torch.rand(()).item(), float(np.random.rand())))
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(run: Path, callbacks: list[Callback], ckpt: Path | None = None, data: Any = None, **settings: Any) -> Toy:
    torch.manual_seed(0)
    np.random.seed(0)
    toy = Toy()
    loader = DataLoader(torch.ones(6, 1))
    trainer = pl.Trainer(
        default_root_dir=run,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2} | settings),
    )
    path = None if ckpt is None else str(ckpt)
    if data is None:
        trainer.fit(toy, loader, DataLoader(torch.ones(1, 1)), ckpt_path=path)
    else:
        trainer.fit(toy, datamodule=data, ckpt_path=path)
    return toy


def saved(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_step_and_best_checkpoints(tmp_path: Path) -> None:
    config = CheckpointConfig(every_n_steps=5, keep=2)
    directory = tmp_path / "checkpoints"
    best = best_checkpoint(directory, config)
    assert best is not None and best_checkpoint(directory, CheckpointConfig(monitor=None)) is None
    fit(tmp_path, [StepCheckpoint(directory, config), best])
    # 12 steps: 5 was dropped, 12 is the end; validation improves to the end
    assert saved(tmp_path) == ["best-00000012.ckpt", "step-00000010.ckpt", "step-00000012.ckpt"]
    assert runs.newest_checkpoint(tmp_path) == directory / "step-00000012.ckpt"
    assert runs.checkpoint(tmp_path, "last") == directory / "step-00000012.ckpt"
    assert runs.checkpoint(tmp_path, "best") == directory / "best-00000012.ckpt"
    assert "optimizer_states" not in torch.load(directory / "best-00000012.ckpt", weights_only=True)
    with pytest.raises(InvalidValue, match="choose best or last"):
        runs.checkpoint(tmp_path, "newest")
    with pytest.raises(InvalidValue, match="no best checkpoint"):
        runs.checkpoint(tmp_path / "other", "best")


def test_the_last_step_is_saved_and_accumulation_saves_whole_steps_only(tmp_path: Path) -> None:
    steps: list[int] = []

    class Counting(StepCheckpoint):
        def _save(self, trainer: pl.Trainer) -> None:
            before = self.saved
            super()._save(trainer)
            if self.saved != before:
                steps.append(trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    fit(
        tmp_path,
        [Counting(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=2, keep=9))],
        accumulate_grad_batches=2,
        max_steps=5,
        max_epochs=-1,
    )
    assert saved(tmp_path) == [f"step-0000000{n}.ckpt" for n in (2, 4, 5)]
    assert steps == [4, 8, 10]  # at the batch that made the step, before the next one gathers gradients


def test_another_interval_on_resume_still_drops_old_files(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    fit(tmp_path, [StepCheckpoint(directory, CheckpointConfig(every_n_steps=3))], max_steps=6, max_epochs=-1)
    assert saved(tmp_path) == ["step-00000003.ckpt", "step-00000006.ckpt"]
    fit(tmp_path, [StepCheckpoint(directory, CheckpointConfig(every_n_steps=4))], runs.newest_checkpoint(tmp_path))
    assert saved(tmp_path) == ["step-00000008.ckpt", "step-00000012.ckpt"]


def test_going_back_to_an_older_checkpoint_drops_the_newer_ones(tmp_path: Path) -> None:
    directory, config = tmp_path / "checkpoints", CheckpointConfig(every_n_steps=4, keep=9)
    fit(tmp_path, [StepCheckpoint(directory, config)])
    assert saved(tmp_path) == ["step-00000004.ckpt", "step-00000008.ckpt", "step-00000012.ckpt"]
    again = StepCheckpoint(directory, CheckpointConfig(every_n_steps=5, keep=9))
    fit(tmp_path, [again], directory / "step-00000004.ckpt", max_steps=6, max_epochs=-1)
    assert saved(tmp_path) == ["step-00000004.ckpt", "step-00000005.ckpt", "step-00000006.ckpt"]


def test_torn_checkpoints_are_skipped_with_the_reason(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    fit(tmp_path, [StepCheckpoint(directory, CheckpointConfig(every_n_steps=3, keep=9))])
    assert saved(tmp_path) == [f"step-000000{n:02d}.ckpt" for n in (3, 6, 9, 12)]
    newest = directory / "step-00000012.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    content = torch.load(directory / "step-00000009.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, directory / "step-00000009.ckpt")
    (directory / "step-00000099.ckpt").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert runs.newest_checkpoint(tmp_path) == directory / "step-00000006.ckpt"
    said = [str(w.message) for w in caught if w.category is runs.TornCheckpoint]
    assert "step-00000099.ckpt is skipped: its end is missing (0 bytes)" in said[0]
    assert f"step-00000012.ckpt is skipped: its end is missing ({len(whole) // 2} bytes)" in said[1]
    assert "step-00000009.ckpt is skipped: it has no optimizer_states" in said[2]
    assert len(said) == 3


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_any_cut_is_noticed(tmp_path: Path, cut: int) -> None:
    fit(tmp_path, [StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig())])
    path = tmp_path / "checkpoints" / "step-00000012.ckpt"
    assert runs.missing_part(path) is None
    path.write_bytes(path.read_bytes()[:-cut])
    assert runs.missing_part(path) is not None


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "step-00000001.ckpt"
    torch.save({"state_dict": Evil()}, path)
    assert "damaged" in str(runs.missing_part(path)) and not (tmp_path / "executed").exists()


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def callbacks(run: Path) -> list[Callback]:
        return [RandomStates(), StepCheckpoint(run / "checkpoints", CheckpointConfig(every_n_steps=4, keep=9))]

    whole = fit(tmp_path / "a", callbacks(tmp_path / "a")).drawn
    rest = fit(tmp_path / "b", callbacks(tmp_path / "b"), tmp_path / "a/checkpoints/step-00000004.ckpt").drawn
    assert rest == whole[4:]
    without = callbacks(tmp_path / "c")[1:]  # negative control
    assert fit(tmp_path / "c", without, tmp_path / "a/checkpoints/step-00000004.ckpt").drawn != whole[4:]


class Signal(Callback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, step: int, signum: int = signal.SIGTERM, times: int = 1) -> None:
        self.step, self.signum, self.times = step, signum, times

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_whole_step_and_ends_the_run(tmp_path: Path, signum: int) -> None:
    before = signal.getsignal(signum)
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=100))
    with pytest.raises(Stopped, match="after step 4; the checkpoint is saved") as caught:
        fit(tmp_path, [Signal(3, signum), StopSignals(saver), saver])
    assert caught.value.signum == signum and saved(tmp_path) == ["step-00000004.ckpt"]
    assert signal.getsignal(signum) == before
    toy = fit(tmp_path, [StepCheckpoint(tmp_path / "x", CheckpointConfig())], runs.newest_checkpoint(tmp_path))
    assert len(toy.drawn) == 8  # the other steps


def test_a_second_signal_is_not_waited_for(tmp_path: Path) -> None:
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig())
    with pytest.raises(SystemExit):  # what Lightning makes of the KeyboardInterrupt in mid-step
        fit(tmp_path, [Signal(3, signal.SIGINT, times=2), StopSignals(saver), saver])
    assert not (tmp_path / "checkpoints").exists()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on


class Restless(pl.LightningDataModule):
    """Data that may be interrupted only some steps after it was asked (contract 13)."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.asked, self.rest_at = steps, 0, -1

    @property
    def may_checkpoint(self) -> bool:
        assert self.trainer is not None
        return 0 <= self.rest_at <= self.trainer.global_step

    def come_to_rest(self) -> None:
        assert self.trainer is not None
        self.asked += 1
        self.rest_at = self.trainer.global_step + self.steps

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(6, 1))


def test_a_save_waits_until_the_data_is_at_rest(tmp_path: Path) -> None:
    data = Restless(2)
    saver = StepCheckpoint(tmp_path / "checkpoints", CheckpointConfig(every_n_steps=4, monitor=None))
    with pytest.raises(Stopped, match="after step 6"):
        fit(tmp_path, [Signal(4), StopSignals(saver), saver], data=data)
    assert data.asked == 1 and saved(tmp_path) == ["step-00000006.ckpt"]
    data = Restless(50)
    saver = StepCheckpoint(tmp_path / "b" / "checkpoints", CheckpointConfig(every_n_steps=4, monitor=None))
    with pytest.warns(UserWarning, match="served requests wait to be learned"):
        fit(tmp_path / "b", [saver], data=data)
    assert data.asked == 1 and saved(tmp_path / "b") == ["step-00000012.ckpt"]  # the weights at least are kept


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"keep": 0}, {"mode": "maximal"}])
def test_bad_checkpoint_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=r"checkpoint\."):
        CheckpointConfig(**settings)


# --- provenance, tokenizer, shipped configs


def test_provenance_tells_every_session(tmp_path: Path) -> None:
    Session(tmp_path, 3, None).end("stopped", 5)
    first = json.loads((tmp_path / runs.PROVENANCE).read_text())
    assert first["seed"] == 3 and first["steps"] == 5 and first["versions"]["torch"] == torch.__version__
    assert {"command", "git_commit", "dirty", "hardware", "wall_seconds"} <= first.keys()
    session = Session(tmp_path, 3, "step-00000005.ckpt")
    assert json.loads((tmp_path / runs.PROVENANCE).read_text())["status"] == "running"
    session.end("finished", 9, metrics={"val/loss": 1.0})
    second = json.loads((tmp_path / runs.PROVENANCE).read_text())
    assert second["resumed_from"] == "step-00000005.ckpt" and second["metrics"] == {"val/loss": 1.0}
    assert [s["status"] for s in second["earlier"]] == ["stopped"] and "earlier" not in second["earlier"][0]
    assert second["wall_seconds"] >= first["wall_seconds"]
    assert not list(tmp_path.glob(".*tmp"))


def test_the_tokenizer_is_kept_and_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors", "config.json"):
        (source / name).write_text(name)
    runs.keep_tokenizer(tmp_path, source)
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (source / "tokenizer.json").write_text("changed")
    runs.keep_tokenizer(tmp_path, source)  # what the run began with stays
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "tokenizer.json"


def test_configs_by_name_and_a_file_comes_first(tmp_path: Path) -> None:
    assert "lm/debug" in shipped.names()
    assert shipped.resolve("lm/debug") == shipped.resolve("lm/debug.yaml")
    with pytest.raises(InvalidValue, match="did you mean 'lm/debug'"):
        shipped.resolve("lm/debgu")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "debug.yaml").write_text("mine: 1")
    assert shipped.resolve("lm/debug.yaml") == Path("lm/debug.yaml")
    assert shipped.resolve("lm/debug") != Path("lm/debug.yaml")  # no file of exactly that name
