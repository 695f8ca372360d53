"""Every mistake in a command line or config: one line that names it, exit code 2, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.inference.cli import main
from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers import cli, runs
from draftsmith.trainers.one_line import condense


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (runs.FOLDER_VARIABLE, "SLURM_JOB_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


CASES: dict[str, tuple[list[str], str]] = {
    "no config": (["fit"], "give -c CONFIG"),
    "config without value": (["fit", "-c"], "-c wants a value"),
    "unknown config": (["fit", "-c", "lm/debgu"], "did you mean 'lm/debug'"),
    "no such run": (["fit", "--run", "x"], "no run in 'runs/x'"),
    "unknown top key": (["fit", "-c", "lm/debug", "--nonsense", "3"], "unknown key 'nonsense'"),
    "unknown trainer key": (
        ["fit", "-c", "lm/debug", "--trainer.max_step", "3"],
        "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'",
    ),
    "unknown model key": (
        ["fit", "-c", "lm/debug", "--model.optim.lrr", "3"],
        "unknown key 'optim.lrr'; did you mean 'optim.lr'",
    ),
    "unknown data key": (
        ["fit", "-c", "lm/debug", "--data.corpus.sourcs", "3"],
        "unknown key 'corpus.sourcs'; did you mean 'corpus.sources'",
    ),
    "wrong type": (["fit", "-c", "lm/debug", "--model.optim.lr", "abc"], "model.optim.lr: Expected a float"),
    "bad choice": (["fit", "-c", "lm/debug", "--model.optim.schedule", "cosin"], "did you mean 'cosine'"),
    "bad value below data": (["fit", "-c", "lm/debug", "--data.text.length", "1"], "text.length must be at least 2"),
    "bad checkpoint setting": (["fit", "-c", "lm/debug", "--checkpoint.mode", "x"], "unknown checkpoint.mode 'x'"),
    "no such class": (["fit", "-c", "lm/debug", "--model", "draftsmith.modules.lm.LMM"], "has no attribute 'LMM'"),
    "no such strategy": (["fit", "-c", "lm/debug", "--trainer.strategy", "ddpp"], "unknown trainer.strategy 'ddpp'"),
    "no such checkpoint": (["fit", "-c", "lm/debug", "--ckpt_path", "nope.ckpt"], "no checkpoint 'nope.ckpt'"),
    "best without run": (["validate", "-c", "lm/debug", "--ckpt_path", "best"], "needs --run ID"),
    "nothing to test": (["test"], "nothing to test"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = CASES[name]
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and message in said[0], said
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


FILES: dict[str, tuple[str, str]] = {
    "not yaml": ("model: {a: [1}", r"line 1, is not YAML"),
    "empty": ("", "holds no keys"),
    "a list": ("[1, 2]", "holds no keys"),
    "unknown key": ("trainer: {max_stepz: 3}", "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'"),
    "interpolation": ("data: {init_args: {text: {length: '${nowhere.length}'}}}", "'nowhere.length' not found"),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_a_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[name]
    Path("c.yaml").write_text(content)
    assert main(["fit", "-c", "lm/debug", "-c", "c.yaml"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0], said


def test_a_damaged_checkpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.ckpt").write_bytes(b"PK")
    assert main(["fit", "-c", "lm/debug", "--ckpt_path", "x.ckpt"]) == 2
    assert "cannot resume from x.ckpt: its end is missing (2 bytes)" in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["fit", *argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_overrides_and_interpolation_agree(capsys: pytest.CaptureFixture[str]) -> None:
    """The trap: resolved per file, ${...} would keep the file's value when the command line overrides its source."""
    Path("c.yaml").write_text("model: {init_args: {optim: {warmup_steps: '${trainer.max_steps}'}}}")
    config = printed(capsys, "-c", "lm/debug", "-c", "c.yaml")
    assert config["model"]["init_args"]["optim"]["warmup_steps"] == 40
    config = printed(capsys, "-c", "lm/debug", "-c", "c.yaml", "--trainer.max_steps", "7")
    assert config["trainer"]["max_steps"] == config["model"]["init_args"]["optim"]["warmup_steps"] == 7


@pytest.mark.parametrize("null", [["--data.corpus.dedup", "null"], ["--data.init_args.corpus.dedup=null"]])
def test_null_on_the_command_line(null: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    corpus = printed(capsys, "-c", "lm/debug", *null)["data"]["init_args"]["corpus"]
    assert corpus["dedup"] is None and corpus["sources"] == ["stdlib"]  # its neighbours stay
    model = printed(capsys, "-c", "lm/debug", "--model.chunk_rows", "7", "--model.chunk_rows", "null")["model"]
    assert model["init_args"]["chunk_rows"] is None and model["init_args"]["optim"]["lr"] == 0.003


def test_help_is_our_own_page(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "validate", "test"):
        assert main([verb, "--help"]) == 0
        page = capsys.readouterr().out
        assert f"usage: draftsmith {verb}" in page and "example" in page and "lm/debug" in page


def test_our_options_are_taken_out_of_the_command_line() -> None:
    given = cli.parse(
        "fit", ["-c", "lm/debug", "--run=r", "--model.gradient_checkpointing", "--ckpt_path", "p", "--a=1"]
    )
    assert given.run == "r" and given.ckpt_path == "p" and given.name == "lm/debug"
    assert given.rest == ["--model.gradient_checkpointing", "--a=1"] and len(given.configs) == 1
    assert cli.parse("fit", ["--json"]).rest == ["--json"] and cli.parse("test", ["--json"]).json


def test_condense_keeps_what_it_does_not_know() -> None:
    assert condense("something new\nin two lines") == "something new"
    assert condense("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc") == (
        "trainer.max_steps: Expected a int. Got value: abc"
    )


def test_module_from_config_builds_the_model_part_alone(tmp_path: Path) -> None:
    from draftsmith.modules.lm import LM
    from draftsmith.trainers import shipped

    module = cli.module_from_config(shipped.resolve("lm/debug"))
    assert isinstance(module, LM) and module.net is None and module.optim.lr == 0.003
    (tmp_path / "none.yaml").write_text("trainer: {max_steps: 1}")
    with pytest.raises(InvalidValue, match="has no model: part"):
        cli.module_from_config(tmp_path / "none.yaml")
    with pytest.raises(InvalidValue, match="cannot read"):
        cli.module_from_config(tmp_path / "missing.yaml")
