"""Kill a training run from outside, again and again, and compare what it learned with an uninterrupted one.

`Watched` runs inside the training process (named in a config overlay): it says in a file what the process is doing,
slows steps down and holds saves open so that a signal can hit them. `Place.survive` is the killer.
"""

import io
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from draftsmith.trainers.callbacks.checkpoint import RandomStates
from draftsmith.trainers.export import rebuild
from tests.tiny_run import TIMEOUT, make_place, start, tiny

TRAIN, SAVE = "train", "save"


class Watched(pl.Callback):
    """Appends each step's samples to `steps.jsonl`, keeps `phase.<rank>`, and makes steps and saves last.

    A save writes the first half of every file, waits `hold` seconds, and writes the rest.
    """

    def __init__(self, folder: str, delay: float, hold: float) -> None:
        self.folder, self.delay, self.hold = Path(folder), delay, hold
        self.rank = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.rank = trainer.global_rank
        self._say(TRAIN)
        whole = torch.save

        def slow(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(f, str | os.PathLike):
                return whole(obj, f, *args, **kwargs)
            buffer = io.BytesIO()
            whole(obj, buffer, *args, **kwargs)
            with Path(f).open("wb") as file:
                self.write_slowly(file.write, buffer.getvalue())
            return None

        torch.save = slow  # DeepSpeed writes its shards with it
        from fsspec.implementations.local import LocalFileOpener

        plain = LocalFileOpener.write  # Lightning writes single files through it
        LocalFileOpener.write = lambda opener, data: self.write_slowly(lambda part: plain(opener, part), bytes(data))

    def write_slowly(self, write: Callable[[bytes], Any], data: bytes) -> None:
        self._say(SAVE)
        half = len(data) // 2
        write(data[:half])
        time.sleep(self.hold)
        write(data[half:])
        self._say(TRAIN)

    def _say(self, phase: str) -> None:
        path = self.folder / f"phase.{self.rank}"
        new = path.with_name(f"{path.name}.new")  # the rank's own: with_suffix would name one file for all ranks
        new.write_text(phase)
        new.replace(path)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        line = {"step": trainer.global_step, "rank": trainer.global_rank, "samples": batch.sample_id.tolist()}
        with (self.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self.delay)


class ForgetRandom(pl.Callback):
    """The negative control: generators are not put back after a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, RandomStates):
                callback._loaded = None


def overlay(folder: Path, delay: float, hold: float, forget: bool = False) -> dict[str, Any]:
    """The part of a config that puts the callbacks into a run; `folder` (made here) is where they write."""
    folder.mkdir(parents=True)
    init = {"folder": str(folder), "delay": delay, "hold": hold}
    callbacks: list[dict[str, Any]] = [{"class_path": "tests.kills.Watched", "init_args": init}]
    if forget:
        callbacks.append({"class_path": "tests.kills.ForgetRandom"})
    return {"trainer": {"callbacks": callbacks}}


def steps(folder: Path) -> dict[tuple[int, int], list[int]]:
    """(rank, step) -> sample ids, over all lives. A step that was run again must have seen the same samples."""
    found: dict[tuple[int, int], list[int]] = {}
    path = folder / "steps.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        at = (row["rank"], row["step"])
        assert found.setdefault(at, row["samples"]) == row["samples"], f"step {at} saw other samples after a resume"
    return found


@dataclass(frozen=True)
class Kill:
    """One blow. SIGKILL ends everything, SIGTERM lets it save first, SIGUSR1 asks for a save, in which it is killed."""

    signum: signal.Signals
    phase: str


@dataclass(frozen=True)
class Hit:
    """What a blow met."""

    signum: signal.Signals
    phase: str  # of some rank at that moment
    step: int  # newest step that had begun


def plan_kills(count: int, rng: random.Random) -> list[Kill]:
    """Every signal in turn, at least every second one aimed into a save."""
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
    kills = [Kill(signals[i % 3], SAVE if i % 2 else TRAIN) for i in range(count)]
    rng.shuffle(kills)
    return kills


class Place:
    """A folder of runs of one tiny config with dropout, so that a generator that is not put back shows."""

    def __init__(self, path: Path, steps: int) -> None:
        path.mkdir(exist_ok=True)
        self.path = make_place(path, steps)
        self.steps = steps
        config = tiny(path, steps)
        config["model"]["init_args"]["model"]["arch"]["attention_dropout"] = 0.2
        config["checkpoint"] = {"every_n_steps": 2, "keep": 2, "monitor": None}
        (path / "tiny.yaml").write_text(yaml.safe_dump(config))

    def uninterrupted(self, name: str, words: Sequence[str]) -> None:
        """The run that others are compared with; `words`: more of its command line."""
        with _alive(self._starter(name, words, delay=0.0, hold=0.0, forget=False)) as process:
            _end(process)

    def survive(
        self,
        name: str,
        words: Sequence[str],
        kills: Sequence[Kill],
        rng: random.Random,
        *,
        forget: bool = False,
        after_each: Callable[[], None] = lambda: None,
    ) -> list[Hit]:
        """Start the run and kill it once per entry of `kills`, then let it run to its end; what each blow met."""
        start = self._starter(name, words, delay=0.1, hold=0.2, forget=forget)
        hits = []
        for kill in kills:
            with _alive(start) as process:
                hits.append(_strike(process, self.path / f"{name}-seen", kill, rng))
                process.communicate(timeout=TIMEOUT)
            after_each()
        with _alive(start) as process:
            _end(process)
        return hits

    def check_equal(self, name: str, other: str) -> None:
        """Both runs saw the same samples at each step and ended with the same weights, to the bit."""
        one, two = steps(self.path / f"{name}-seen"), steps(self.path / f"{other}-seen")
        assert one == two and {step for _, step in one} == set(range(self.steps)), "sample ids differ"
        first, second = (rebuild(self.path / "runs" / run, "last").state_dict() for run in (name, other))
        assert first.keys() == second.keys()
        worst = max(float((first[key] - second[key]).abs().max()) for key in first)
        assert worst == 0.0, f"weights differ by up to {worst:.3g}"

    def _starter(
        self, name: str, words: Sequence[str], *, delay: float, hold: float, forget: bool
    ) -> Callable[[], "subprocess.Popen[str]"]:
        config = self.path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(overlay(self.path / f"{name}-seen", delay, hold, forget)))
        return lambda: start(self.path, "fit", "-c", "tiny.yaml", "-c", str(config), "--run", name, *words)


def _end(process: "subprocess.Popen[str]") -> None:
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"


@contextmanager
def _alive(start: Callable[[], "subprocess.Popen[str]"]) -> Iterator["subprocess.Popen[str]"]:
    """A life of the run; nothing of its group is left afterwards."""
    process = start()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _strike(process: "subprocess.Popen[str]", folder: Path, kill: Kill, rng: random.Random) -> Hit:
    lines = folder / "steps.jsonl"
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    more = rng.randint(1, 4)
    _wait(process, lambda: lines.exists() and len(lines.read_text().splitlines()) >= before + more)
    if kill.signum == signal.SIGUSR1:
        os.killpg(process.pid, signal.SIGUSR1)
    if kill.phase == SAVE or kill.signum == signal.SIGUSR1:
        _wait(process, lambda: _phase(folder) == SAVE)
    time.sleep(rng.uniform(0.0, 0.1))
    hit = Hit(kill.signum, _phase(folder), max(step for _, step in steps(folder)))
    os.killpg(process.pid, signal.SIGTERM if kill.signum == signal.SIGTERM else signal.SIGKILL)
    return hit


def _phase(folder: Path) -> str:
    phases = [path.read_text() for path in folder.glob("phase.[0-9]*") if path.suffix != ".new"]
    return SAVE if SAVE in phases else TRAIN


def _wait(process: "subprocess.Popen[str]", until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not until():
        if process.poll() is not None or time.monotonic() > deadline:
            out, err = process.communicate(timeout=1)
            raise AssertionError(
                f"it ended before it could be killed, or stood still (exit {process.poll()})\n{out}\n{err}"
            )
        time.sleep(0.005)
