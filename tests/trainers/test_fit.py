"""`draftsmith fit` in its own processes: exact resume after real kills, two gloo ranks, and one-line errors."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from draftsmith.trainers import runs
from tests.tiny_run import TIMEOUT, finish, make_place, start

STEPS = 18


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("fit"), STEPS)


def recorder(place: Path, name: str, delay: float = 0.0) -> Path:
    """An overlay that records the samples of each step into `name`.jsonl."""
    callback = {
        "class_path": "tests.trainers.recorder.SampleRecorder",
        "init_args": {"path": str(place / f"{name}.jsonl"), "delay": delay},
    }
    overlay = place / f"{name}.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return overlay


def records(place: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    path = place / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["rank"] == rank]


def losses(run: Path, tag: str = "train/loss") -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = runs.newest_checkpoint(run)
    assert newest is not None and runs.step_of(newest) == STEPS
    content: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    return content


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The uninterrupted run."""
    overlay = recorder(place, "whole")
    out, err = finish(start(place, "fit", "-c", "tiny.yaml", "-c", str(overlay), "--run", "whole"))
    assert "draftsmith export runs/whole OUT" in out and "val/loss" in out
    assert "Warning" not in err and "warn" not in err.lower(), err
    return place / "runs" / "whole"


def wait_for_step(place: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] >= step for line in records(place, name)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_stopped_runs_resume_exactly(place: Path, whole: Path) -> None:
    """SIGKILL after step 7, SIGTERM after step 12, then on: samples, draws, losses and weights are those of one run."""
    overlay = recorder(place, "parts", delay=0.15)
    command = ("fit", "-c", "tiny.yaml", "-c", str(overlay), "--run", "parts")
    process = start(place, *command)
    wait_for_step(place, "parts", 7, process)
    process.send_signal(signal.SIGSTOP)  # alive, and in no hurry
    _, err = finish(start(place, *command), 2)  # a second live run is refused
    assert f"in use by process {process.pid}" in err and err.count("\n") == 1
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    run = place / "runs" / "parts"
    assert (run / ".lock").exists()  # stale: the next one takes it over

    process = start(place, *command)
    wait_for_step(place, "parts", 12, process)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 128 + signal.SIGTERM)
    assert "resumes step-00000005.ckpt" in err
    assert "the checkpoint is saved; to go on: draftsmith fit --run parts" in err
    newest = runs.newest_checkpoint(run)
    assert newest is not None and 12 <= runs.step_of(newest) < STEPS

    _, err = finish(start(place, "fit", "--run", "parts"))  # from its own config.yaml
    assert f"resumes {newest.name}" in err

    one = {line["step"]: line for line in records(place, "whole")}
    parts = records(place, "parts")
    assert sorted(one) == list(range(STEPS)) and len(parts) > STEPS  # steps after the killed checkpoint ran twice
    assert {line["step"] for line in parts} == set(one)
    for line in parts:
        assert line == one[line["step"]]
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    assert losses(run, "val/loss") == losses(whole, "val/loss")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=0)
    story = json.loads((run / runs.PROVENANCE).read_text())
    assert [s["status"] for s in story["earlier"]] == ["running", "stopped"] and story["status"] == "finished"
    assert not (run / ".lock").exists()


@pytest.mark.slow
def test_two_gloo_ranks_learn_as_one_process_does(place: Path, whole: Path) -> None:
    """Two ranks of batch 2 see what one process of batch 4 sees; losses agree to 1e-4; Ctrl-C ends both ranks."""
    overlay = recorder(place, "ranks")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.text.batch_size", "2")
    _, err = finish(start(place, "fit", "-c", "tiny.yaml", "-c", str(overlay), "--run", "ranks", *two))
    assert "warn" not in err.lower(), err
    a, b = records(place, "ranks", 0), records(place, "ranks", 1)
    for line, other, single in zip(a, b, records(place, "whole"), strict=True):
        assert sorted(line["samples"] + other["samples"]) == sorted(single["samples"])
    run = place / "runs" / "ranks"
    for tag in ("train/loss", "val/loss"):
        one, ranks = losses(whole, tag), losses(run, tag)
        assert one.keys() == ranks.keys()
        for step, value in one.items():
            assert ranks[step] == pytest.approx(value, rel=1e-4)

    overlay = recorder(place, "stopped", delay=0.1)
    process = start(
        place, "fit", "-c", "tiny.yaml", "-c", str(overlay), "--run", "stopped", *two, "--trainer.max_steps", "200"
    )
    wait_for_step(place, "stopped", 3, process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 128 + signal.SIGINT)
    assert "stopped by SIGINT after step" in err and "Traceback" not in err
    assert runs.newest_checkpoint(place / "runs" / "stopped") is not None


@pytest.mark.slow
def test_validate_and_test_read_the_run(place: Path, whole: Path) -> None:
    out, err = finish(start(place, "validate", "--run", "whole", "--json"))
    figures = json.loads(out)
    best = min(losses(whole, "val/loss").values())
    assert figures["val/loss"] == pytest.approx(best, rel=1e-6) and "/best-" in figures["checkpoint"]
    assert "warn" not in err.lower(), err
    out, _ = finish(start(place, "test", "--run", "whole", "--ckpt_path", "last"))
    assert "test/perplexity" in out and "step-00000018.ckpt" in out
