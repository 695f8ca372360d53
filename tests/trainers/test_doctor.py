"""`draftsmith doctor`: the command on good and bad runs, and what `fit` warns of in a SLURM job."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.inference import cli
from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers import doctor
from draftsmith.trainers.cli import parse
from draftsmith.trainers.training import ParseCLI
from tests.doctor_subject import elsewhere, stub  # noqa: F401  # a fixture
from tests.tiny_run import make_place

pytestmark = pytest.mark.usefixtures("elsewhere")


# --- the command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path, steps=4)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_good_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "-c", "tiny.yaml", "--run", "x", "--json")
    found = {row["check"]: row for row in json.loads(out)}
    assert code == 0 and {row["verdict"] for row in found.values()} == {"ok"}, out
    names = {"slurm", "strategy", "precision", "port", "run folder", "disk", "checkpoint", "tokenizer", "labels"}
    assert names | {"resume", "micro batch", "bf16 inputs"} <= set(found)
    assert not Path("runs/x").exists()  # it looks and leaves nothing
    assert "preparing" in err


def test_without_data_nothing_is_prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "-c", "tiny.yaml", "--run", "x", "--no-data")
    assert code == 0 and "labels" not in out and not Path("cache").exists() and err == ""
    assert out.splitlines()[-1] == "0 errors, 0 warnings"


def test_errors_exit_with_2_and_overrides_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("-c", "tiny.yaml", "--run", "x", "--no-data", "--trainer.strategy", "zeroo")
    code, out, _ = run(capsys, *argv)
    assert code == 2 and "error    strategy" in out and "1 error, 0 warnings" in out


def test_a_script_with_the_wrong_number_of_tasks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.sbatch").write_text("#!/bin/bash\n#SBATCH --ntasks=4 --ntasks-per-node=4 --requeue --signal=USR1@600\n")
    argv = ["-c", "tiny.yaml", "--run", "x", "--no-data", "--script=x.sbatch"]
    code, out, _ = run(capsys, *argv, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert code == 2 and "SLURM has 4 tasks and the config wants 2 devices x 1 nodes = 2" in out
    code, out, _ = run(capsys, *argv, "--trainer.devices", "4", "--trainer.strategy", "ddp")
    assert code == 0, out


def test_a_head_that_is_too_small_is_found_in_the_config(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--model.model.arch.vocab_size", "299")
    assert code == 2 and "the tokenizer has 300 ids and the head 299 rows" in out


def test_data_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--data.corpus.sources", "[nowhere.txt]")
    assert code == 2 and "error    data" in out and "nowhere.txt" in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ((), "nothing to check"),
        (("-c", "nothing"), "nothing"),
        (("-c", "tiny.yaml", "--script"), "--script wants a file"),
        (("-c", "tiny.yaml", "--script", "none.sbatch"), "none.sbatch"),
        (("--run", "nope"), "nope"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], word: str
) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2 and word in err and len(err.strip().splitlines()) == 1


def test_a_config_that_fit_would_not_take_is_the_finding(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--model.optim.lr", "-1")
    assert code == 2 and out.startswith("error    config") and "lr" in out


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "draftsmith doctor -c lm/base" in out


# --- inside fit


def warned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...] = (), **env: str
) -> str:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    doctor.warn_under_slurm(ParseCLI(parse("fit", ["-c", "tiny.yaml", *overrides])), Path("runs/x"))
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_fit_warns_in_a_job_and_nowhere_else(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warned(capsys, monkeypatch) == ""
    env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    stub("scontrol", "echo '#SBATCH --requeue'", monkeypatch)
    err = warned(capsys, monkeypatch, **env)
    assert "doctor: slurm tasks: SLURM has 2 tasks and the config wants 1 devices x 1 nodes" in err
    assert "doctor: signal: no --signal" in err
    assert all(line.startswith("doctor: ") for line in err.splitlines())
    assert not Path("cache").exists()  # no data is prepared for it


def test_fit_asks_before_anything_is_built(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(cli: Any, run: Path) -> None:
        raise InvalidValue(f"asked about {run}")

    monkeypatch.setattr(doctor, "warn_under_slurm", stop)
    assert cli.main(["fit", "-c", "tiny.yaml", "--run", "x"]) == 2
    assert "asked about runs/x" in capsys.readouterr().err


def test_yaml_of_a_strategy_class_is_understood(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(Path("tiny.yaml").read_text())
    own = {"class_path": "draftsmith.trainers.strategies.ZeRO", "init_args": {"config": "deepspeed/zero3"}}
    content["trainer"]["strategy"] = own
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = run(capsys, "-c", "tiny.yaml", "--run", "x", "--no-data")
    assert code == 0 and "ZeRO stage 3" in out
