"""`make gpu-smoke` without a GPU: it says so; and the logic of its checks on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference import registry
from draftsmith.inference.errors import InvalidState
from draftsmith.trainers import gpu_smoke, shipped
from draftsmith.trainers.gpu_smoke import Outcome


def test_without_cuda_it_is_one_line_and_exit_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "draftsmith.trainers.gpu_smoke"]
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no GPU" in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_checks_that_need_no_gpu_to_be_right(tmp_path: Path) -> None:
    assert "largest error" in gpu_smoke.bfloat16("cpu")
    assert gpu_smoke.collectives("gloo", "cpu", tmp_path) == "gloo sums"
    assert "ms a pass" in gpu_smoke.compiled("cpu", backend="eager")


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("name", registry.names())
def test_decode_rounds(name: str, greedy: bool) -> None:
    assert "0 waits in" in gpu_smoke.decode_round(name, greedy, "cpu")


def test_too_many_waits_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        def __init__(self, found: list[str], device: str) -> None:
            found += ["called a synchronizing operation"] * 100

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(gpu_smoke, "counted_waits", Many)
    with pytest.raises(InvalidState, match="100 waits"):
        gpu_smoke.decode_round("autoregressive", True, "cpu")


def test_a_check_that_raises_is_an_outcome() -> None:
    def broken() -> str:
        raise RuntimeError("CUDA error:\n  misaligned address")

    found = gpu_smoke.attempt("x", broken)
    assert not found.ok and found.detail == "RuntimeError: CUDA error: misaligned address"
    assert gpu_smoke.line(found).startswith("FAILED x")
    assert gpu_smoke.attempt("y", lambda: "fine").ok


def test_every_shipped_config_has_its_step(tmp_path: Path) -> None:
    found = gpu_smoke.fits(tmp_path)
    names = {words[1] for words in found}
    assert names == {name for name in shipped.names() if not name.startswith("demo/")}
    assert found[0][:2] == ["-c", "lm/debug"]  # the others' target comes from it
    assert all("--trainer.max_steps=1" in words for words in found)
    online = next(words for words in found if words[1] == "osd/online")
    assert f"--data.target={tmp_path}/target" in online and f"--model.draft.path={tmp_path}/target" in online


def test_the_result_file(tmp_path: Path) -> None:
    gpu_smoke.report(tmp_path / "x.json", [Outcome("a", True, 0.5, "fine")])
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["checks"] == [{"name": "a", "ok": True, "seconds": 0.5, "detail": "fine"}]
    assert content["versions"]["torch"] and content["gpus"] == []
