"""`draftsmith submit` and the shipped scripts: what they ask of SLURM agrees with what they tell `fit` (stubs only)."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference import cli
from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers import runs, submit

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory; no job around us."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SBATCH_", runs.FOLDER_VARIABLE)):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stub(name: str, body: str) -> None:
    """A program in ./bin."""
    path = Path("bin") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = os.listdir()
    assert cli.main(["submit", "--dry-run", *argv]) == 0
    assert os.listdir() == before  # nothing is written
    return capsys.readouterr().out


def options(script: str) -> dict[str, str]:
    """The #SBATCH lines."""
    found = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if "#SBATCH --" in line]
    return {key: value for key, _, value in found}


def fit_arguments(script: str, *arguments: str, **variables: str) -> list[str]:
    """Run the script with a stub of srun; what `draftsmith fit` would be given."""
    stub("srun", 'for word in "$@"; do echo "$word"; done')
    Path("script").write_text(script)
    environment = {"PATH": f"{Path('bin').absolute()}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "8", **variables}
    done = subprocess.run(["bash", "script", *arguments], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["--cpus-per-task=8", "--kill-on-bad-exit=1"] and done.stderr == ""
    assert Path(words[2]).name == "draftsmith" and words[3] == "fit"
    return words[4:]


# --- the script


def test_gpus_nodes_devices_and_strategy_agree(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("-c", "lm/base", "--run", "x", "--nodes", "2", "--gpus", "4", "--time", "8:00:00", "--partition", "a100")
    out = dry(capsys, *given, "--account", "me", "--signal-grace", "300", "--", "--model.optim.lr", "3e-4")
    asked = options(out)
    assert asked == {
        "job-name": "x",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "8",
        "time": "8:00:00",
        "partition": "a100",
        "account": "me",
        "requeue": "",
        "signal": "SIGUSR1@300",
        "open-mode": "append",
        "output": "runs/x/slurm.log",
    }
    assert fit_arguments(out) == [
        *("-c", "lm/base", "--model.optim.lr", "3e-4"),
        *("--trainer.devices=4", "--trainer.num_nodes=2", "--trainer.accelerator=gpu", "--trainer.strategy=ddp"),
        "--run=runs/x",
    ]
    assert "# would be written to runs/x/submit.sbatch and submitted by: sbatch --parsable runs/x/submit.sbatch" in out


def test_cpu_ranks_and_a_strategy_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(capsys, "-c", "lm/debug", "--run", "x", "--tasks-per-node", "2", "--", "--trainer.strategy", "ddp_spawn")
    asked = options(out)
    assert asked["ntasks-per-node"] == "2" and asked["cpus-per-task"] == "1" and "gpus-per-node" not in asked
    words = fit_arguments(out)
    assert "--trainer.devices=2" in words and "--trainer.accelerator=cpu" in words
    assert "--trainer.strategy=ddp" not in words  # the asked one stays
    # a CPU config is a CPU job, any other one takes one GPU
    assert "gpus-per-node" not in options(dry(capsys, "-c", "lm/debug", "--run", "x"))
    assert options(dry(capsys, "-c", "lm/base", "--run", "x"))["gpus-per-node"] == "1"
    assert not any("strategy" in w for w in fit_arguments(dry(capsys, "-c", "lm/base", "--run", "x")))


def test_an_array_has_seeds_and_folders_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(capsys, "-c", "lm/debug", "--run", "sweep", "--array", "0-9%4", "--sbatch", "qos=long")
    asked = options(out)
    assert asked["array"] == "0-9%4" and asked["output"] == "runs/sweep/seed-%a.log" and asked["qos"] == "long"
    words = fit_arguments(out, SLURM_ARRAY_TASK_ID="7")
    assert words[-2:] == ["--seed_everything=7", "--run=runs/sweep/seed-7"]


def test_words_with_spaces_survive_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    out = dry(capsys, "-c", "lm/debug", "--run", "x", "--", "--data.corpus.sources", '["a b", "$HOME"]')
    assert '["a b", "$HOME"]' in fit_arguments(out)


def test_without_run_it_is_named_after_the_config_and_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.match(r"lm-debug-\d{8}-\d{6}$", options(dry(capsys, "-c", "lm/debug"))["job-name"])


def test_a_run_goes_on_from_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/old")
    run.mkdir(parents=True)
    (run / runs.CONFIG).write_text((ROOT / "configs/lm/debug.yaml").read_text())
    assert fit_arguments(dry(capsys, "--run", "old"))[:2] == ["-c", "runs/old/config.yaml"]


# --- submitting


def test_it_is_written_and_submitted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub("sbatch", f"echo \"$@\" > {shlex.quote(str(Path('asked').absolute()))}; echo '12;cluster'")
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert cli.main(["submit", "-c", "lm/debug", "--run", "x"]) == 0
    out = capsys.readouterr().out
    assert "job   12\nrun   runs/x\nlog   runs/x/slurm.log\n" in out and "scancel --signal=USR1 12" in out
    assert Path("asked").read_text() == "--parsable runs/x/submit.sbatch\n"
    written = Path("runs/x/submit.sbatch").read_text()
    assert written.startswith("#!/bin/bash\n# Written by: draftsmith submit -c lm/debug --run x\n")

    stub("sbatch", "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1")
    assert cli.main(["submit", "-c", "lm/debug", "--run", "x", "--partition", "none"]) == 2
    assert capsys.readouterr().err == (
        "error: sbatch refused runs/x/submit.sbatch: invalid partition specified: none\n"
    )


def test_no_sbatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    assert cli.main(["submit", "-c", "lm/debug", "--run", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: no sbatch on PATH: submit from a login node") and not os.listdir()


# --- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-c lm/debgu", "did you mean 'lm/debug'"),
        ("--run nothing", "no run in 'runs/nothing'"),
        ("-c lm/debug --time soon", "--time wants minutes, H:MM:SS or D-HH:MM:SS, more than zero, got 'soon'"),
        ("-c lm/debug --time 0", "--time wants"),
        ("-c lm/debug --gpus -1", "--gpus must be at least 0, got -1"),
        ("-c lm/debug --nodes 0", "--nodes must be at least 1, got 0"),
        ("-c lm/debug --tasks-per-node 0", "--tasks-per-node must be at least 1"),
        ("-c lm/debug --cpus-per-task 0", "--cpus-per-task must be at least 1"),
        ("-c lm/debug --gpus 2 --tasks-per-node 4", "every GPU has one task"),
        ("-c lm/debug --time 1 --signal-grace 60", "--signal-grace must lie between 1 and 59 seconds"),
        ("-c lm/debug --signal-grace 0", "--signal-grace must lie between 1 and 65535 seconds"),
        ("-c lm/debug --array many", "--array wants numbers or ranges"),
        ("-c lm/debug --job-name bash", "that means a shell"),
        ("-c lm/debug --run a%b", "--run may not hold spaces, quotes or %"),
        ("-c lm/debug --partition 'a b'", "--partition wants one word"),
        ("-c lm/debug --sbatch nodes=3", "submit sets --nodes itself"),
        ("-c lm/debug --sbatch=--qos=x", "--sbatch wants KEY=VALUE"),
        ("-c lm/debug --gpu 2", "did you mean --gpus?"),
        ("-c lm/debug -- --trainer.devices 4", "--trainer.devices follows from --gpus or --tasks-per-node"),
        ("-c lm/debug -- --run=x", "--run follows from --run, before the --"),
        ("-c lm/debug --array 0-2 -- --seed_everything 1", "the seeds of an array are its task numbers"),
        ("-c lm/debug -- --model.optim.lrr 1", "unknown key"),
        ("-c lm/debug --gpus 2 -- --trainer.strategy zero9", "unknown trainer.strategy 'zero9': choose one of"),
        ("-c lm/debug --nodes 2 -- --trainer.strategy single_device", "is for one process, and the job has 2"),
    ],
)
def test_bad_input_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--dry-run", *shlex.split(words)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not os.listdir()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:30", 7230), ("1-12", 129600), ("1-0:30", 88200), ("2-1:00:01", 176401)],
)
def test_times_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert submit.seconds(time) == seconds
    for bad in (f"{time}:", f"-{time}", f"{time}h", ""):
        with pytest.raises(InvalidValue, match="--time wants"):
            submit.seconds(bad)


# --- the shipped scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_shipped_scripts_requeue_append_and_agree(path: Path) -> None:
    text = path.read_text()
    asked = options(text)
    assert asked["requeue"] == "" and asked["open-mode"] == "append" and asked["signal"].startswith("SIGUSR1@")
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    variables = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    words = fit_arguments(text, "-c", "lm/debug", "--x", "a b", **variables, **array)
    assert words[:6] == ["-c", "lm/debug", "--x", "a b", "--trainer.devices=4", "--trainer.num_nodes=2"]
    rest: Any = ["--seed_everything=1", "--run=runs/12/seed-1"] if "array" in asked else []
    assert words[6:] == rest
    logic = re.search(r"\b(if|for|while|case|function)\b", "\n".join(x for x in text.splitlines() if x[:1] != "#"))
    assert logic is None


def test_a_sweep_has_a_name_of_its_own() -> None:
    variables = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1", "RUN": "mine"}
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    words = fit_arguments((ROOT / "slurm/sweep.sbatch").read_text(), **variables, **array)
    assert words[-1] == "--run=runs/mine/seed-1"
