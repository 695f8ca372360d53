"""`draftsmith inspect` shows what the loader gives: labels, shift, documents; it fails when text does not come back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from draftsmith.data.tokenizer import train_bpe
from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers import inspect

CHATS = [
    [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "Four 世界."}],
    [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}],
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in CHATS))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"The text of document {name}.\n")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = inspect.main(list(argv))
    return code, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code, out = run(capsys, *argv, "--json")
    assert code == 0
    return json.loads(out)


def test_conversations(capsys: pytest.CaptureFixture[str], chats: Path) -> None:
    shown = run_json(
        capsys, "--text", str(chats), "--field", "messages", "--tokenizer", "bpe:300", "--length", "64", "--separate"
    )
    (views,) = shown["samples"]
    assert "".join(v["text"] for v in views if v["kind"] == "context" and v["document"] == 0) == (
        "<|user|>What is 2+2?<|end|><|assistant|>"
    )
    assert "".join(v["text"] for v in views if v["kind"] == "label" and v["document"] == 1) == "Yes.<|end|>"
    starts = [v["t"] for v in views if v["position"] == 0 and v["kind"] != "padding"]
    assert [views[t]["text"] for t in starts] == ["<|user|>"] * 2
    assert [v["t"] for v in views] == list(range(64)) and views[-1]["kind"] == "padding"
    assert [(r["kind"], r["equal"]) for r in shown["round_trips"]] == [("chat", True)] * 2


def test_plain_text_joined_and_apart(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ("--text", str(folder), "--tokenizer", "bpe:300", "--length", "80")
    (joined,) = run_json(capsys, *arguments)["samples"]
    real = [v for v in joined if v["kind"] != "padding"]
    assert [v["kind"] for v in real] == ["context"] + ["label"] * (len(real) - 1)
    assert "".join(v["text"] for v in real) == ("The text of document one.\n<|eos|>The text of document two.\n<|eos|>")
    (apart,) = run_json(capsys, *arguments, "--separate")["samples"]
    assert [v["t"] for v in apart if v["kind"] == "context"] == [
        v["t"] for v in apart if v["position"] == 0 and v["kind"] != "padding"
    ]
    assert {v["document"] for v in apart} == {0, 1, -1}


def test_the_shift_table_says_which_token_predicts_which(capsys: pytest.CaptureFixture[str], chats: Path) -> None:
    code, out = run(
        capsys, "--text", str(chats), "--field", "messages", "--tokenizer", "bpe:300", "--length", "64", "--rows", "0"
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    predicting = next(line for line in lines if "'<|assistant|>'" in line)
    assert predicting[-1].startswith("'F")  # the token before the answer predicts its first token
    assert next(line for line in lines if "'<|user|>'" in line)[-1] == "-"
    assert "equal      chat" in out


def test_without_color_the_context_is_marked(
    capsys: pytest.CaptureFixture[str], chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--text", str(chats), "--field", "messages", "--tokenizer", "bpe:300", "--length", "64", "--separate")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[32m" in run(capsys, *arguments)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    out = run(capsys, *arguments)[1]
    assert "\x1b" not in out
    assert "<<|user|>What is 2+2?<|end|><|assistant|>>Four 世界.<|end|>‖<<|user|>Sure?" in out


def test_exit_code_1_when_text_does_not_come_back(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    backend = train_bpe(["the text of document one and two"], 280).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    directory = tmp_path / "lossy"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained(directory)
    code, out = run(capsys, "--text", f"{folder}/*.txt", "--tokenizer", str(directory), "--length", "20")
    assert code == 1
    assert "DIFFERENT  text" in out and "'The text" in out and "'the text" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either -c CONFIG or --text FILE"),
        (["-c", "x", "--text", "y"], "give either -c CONFIG or --text FILE"),
        (["--text", "stdlib"], "--text needs --tokenizer"),
        (["--text", "nowhere.txt", "--tokenizer", "bpe:300"], "no such file, folder or pattern: 'nowhere.txt'"),
        (["--text", "stdlib", "--tokenizer", "nowhere"], "no tokenizer directory 'nowhere'"),
        (["--text", "stdlib", "--tokenizer", "bpe:300", "--n", "0"], "--n must be at least 1"),
        (["--lenght", "3"], "did you mean --length"),
    ],
)
def test_bad_input(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidValue, match=message):
        inspect.main(argv)


@pytest.mark.slow
def test_a_shipped_config(tmp_path: Path) -> None:
    """As a user types it: exit code 0, JSON on stdout only; 2 and one line for a config that is not there."""
    command = [sys.executable, "-m", "draftsmith.inference.cli", "inspect"]
    environment = {"DRAFTSMITH_CACHE": str(tmp_path), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([*command, "-c", "lm/debug", "--n", "2", "--json"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    shown = json.loads(done.stdout)
    assert len(shown["samples"]) == 2 and shown["round_trips"][0]["equal"]
    assert all(v["kind"] in ("label", "context", "padding") for v in shown["samples"][0])
    done = subprocess.run([*command, "-c", "lm/nowhere"], capture_output=True, env=environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"lm/nowhere" in done.stderr
