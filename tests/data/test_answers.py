"""`draftsmith trace answers`: what is written, resume after a torn line, ranks, and wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data.answers import AnswerFile, read_questions
from draftsmith.data.chat import use_template
from draftsmith.data.corpus import CorpusConfig, read_documents
from draftsmith.data.request_logs import RequestLog
from draftsmith.inference import load, registry
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.trainers.trace import main, shares
from tests.tiny import write_lm, write_tokenizer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chat target, and prompts of all three forms."""
    write_lm(tmp_path / "target", seed=1, max_length=64)
    tokenizer = write_tokenizer(tmp_path / "target")
    use_template(tokenizer, "simple")
    tokenizer.save_pretrained(tmp_path / "target")
    rows: list[dict[str, Any]] = [
        {"prompt": "def add", "tag": "code"},
        {"messages": [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "old"}]},
        {"prompt_ids": [5, 6, 7]},
        {"prompt": "The quick"},
        {"prompt": "x" * 200},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def trace(out: str, *more: str) -> list[dict[str, Any]]:
    """Run the command; all lines of OUT, in the order of the prompts."""
    argv = ["answers", "target", out, "--prompts", "prompts.jsonl", "--max-new-tokens", "9", "--temperature", "1"]
    assert main([*argv, *more]) == 0
    return lines(out)


def lines(out: str) -> list[dict[str, Any]]:
    found = [json.loads(x) for path in Path(out).glob("*.jsonl") for x in path.read_text("utf-8").splitlines()]
    return sorted(found, key=lambda row: row["row"])


def test_answers_are_what_the_target_decodes_and_both_readers_take_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trace("out")
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert "4 answers" in capsys.readouterr().err.splitlines()[-1]
    target = load(place / "target")
    questions = read_questions([place / "prompts.jsonl"], target.tokenizer)
    sampling = SamplingParams(temperature=1.0)
    parts = {"target": target}
    decoder = registry.build("autoregressive", parts, sampling=sampling, vocab_size=target.vocab_size)
    for row, question in zip(rows, questions, strict=False):
        request = TokenRequest(question.ids, min(9, 64 - len(question.ids)), question.number, target.stop_ids)
        expected = decoder.decode([request]).output[0]
        ended = expected[-1] in target.stop_ids
        reason = row["choices"][0]["finish_reason"] if "choices" in row else row["finish_reason"]
        assert reason == ("stop" if ended else "length")
        kept = expected[:-1] if ended else expected
        if "answer_ids" in row:
            assert row["answer_ids"] == kept
        else:
            text = target.tokenizer.decode(kept, skip_special_tokens=True)
            assert (row["messages"][-1]["content"] if "messages" in row else row["choices"][0]["text"]) == text
    assert rows[1]["messages"][0] == {"role": "user", "content": "fox?"} and len(rows[1]["messages"]) == 2
    assert rows[0]["tag"] == "code" and rows[0]["text"].startswith("def add")
    (place / "chat.jsonl").write_text(json.dumps(rows[1]) + "\n")
    (document,) = read_documents(CorpusConfig(sources=("chat.jsonl",), field="messages", dedup=None), streaming=False)
    assert document.messages[-1]["content"] == rows[1]["messages"][-1]["content"]
    log = RequestLog([next(Path("out").glob("*.jsonl"))], target.tokenizer, max_length=64)
    assert len(list(log.read())) >= 1


def test_a_torn_run_goes_on_and_ends_as_an_unbroken_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trace("out", "--batch", "2")
    (path,) = Path("out").glob("*.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\n") + 20])  # killed while the second line was written
    assert trace("out", "--batch", "3") == whole
    assert "3 answers" in (said := capsys.readouterr().err.splitlines()[-1]) and "1 there before" in said
    assert trace("out") == whole  # nothing left to do


def test_ranks_share_the_lines_and_write_the_same_answers(place: Path) -> None:
    whole = trace("one")
    trace("two", "--rank", "1", "--ranks", "2")
    assert [row["row"] for row in lines("two")] == [1, 3]
    assert trace("two", "--rank", "0", "--ranks", "2") == whole
    with pytest.raises(InvalidValue, match="ranks 2, now it is 1"):
        trace("two")


def test_answers_of_other_settings_are_not_mixed(place: Path) -> None:
    trace("out")
    for change, said in ((("--seed", "1"), "seed"), (("--max-length", "20"), "max_length")):
        with pytest.raises(InvalidValue, match=f"answers with {said}"):
            trace("out", *change)


def test_launchers_say_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert shares(None, None) == (0, 1) and shares(2, 3) == (2, 3)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert shares(None, None) == (3, 4)
    for rank, ranks in ((3, 3), (-1, 2), (1, None)):
        with pytest.raises(InvalidValue):
            shares(rank, ranks)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "p.jsonl:2: not valid JSON"),
        ('{"text": "x"}', "p.jsonl:2: wants an object"),
        ('{"prompt": ""}', "'prompt' must be text"),
        ('{"prompt_ids": [true]}', "'prompt_ids' must be"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn"),
        ('{"messages": [{"role": "user"}]}', "a message must be"),
    ],
)
def test_lines_that_are_no_prompts_are_named(place: Path, line: str, said: str) -> None:
    (place / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    tokenizer = load(place / "target").tokenizer
    with pytest.raises(InvalidValue, match=said):
        read_questions([place / "p.jsonl"], tokenizer)


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("hello\n")
    with pytest.raises(InvalidState, match="no answer"):
        AnswerFile(path)
    assert path.read_text() == "hello\n"
