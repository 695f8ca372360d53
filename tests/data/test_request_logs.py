"""Logs of production servers: every form that is read, what is passed over, and laws recomputed on the logged text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.request_logs import LoggedRequest, RequestLog, score
from draftsmith.data.tokenizer import train_bpe
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.requests import TokenRequest
from tests.fakes import markov, near

CHAT = [{"role": "user", "content": "add two numbers"}]
REPLY = {"role": "assistant", "content": "def add(a, b): return a + b"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(["def add(a, b): return a + b", "add two numbers", "say hello"], 280)


def log(tmp_path: Path, lines: list[Any], tokenizer: Any, **kwargs: Any) -> RequestLog:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return RequestLog([path], tokenizer, max_length=kwargs.pop("max_length", 512), **kwargs)


CHATS = {
    "trailing message": {"messages": [*CHAT, REPLY]},
    "choices": {"messages": CHAT, "choices": [{"message": REPLY}]},
    "request and response": {
        "request": {"messages": CHAT, "model": "m"},
        "response": {"choices": [{"message": REPLY}]},
    },
    "batch api": {
        "custom_id": "1",
        "body": {"messages": CHAT},
        "response": {"status_code": 200, "body": {"choices": [{"message": REPLY}]}},
    },
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "add two"}, {"text": " numbers"}]}],
        "choices": [{"message": REPLY}],
    },
}


@pytest.mark.parametrize("form", CHATS)
def test_chats(tmp_path: Path, tokenizer: Any, form: str) -> None:
    (item,) = log(tmp_path, [CHATS[form]], tokenizer).read()
    assert tokenizer.decode(list(item.request.prompt)) == "<|user|>add two numbers<|end|><|assistant|>"
    assert tokenizer.decode(list(item.answer)) == REPLY["content"]
    assert item.request.max_new_tokens == len(item.answer)


COMPLETIONS = {
    "choices": {"prompt": "say hello", "choices": [{"text": " twice"}]},
    "completion": {"prompt": "say hello", "completion": " twice"},
    "answer": {"prompt": "say hello", "answer": " twice"},
    "response text": {"prompt": "say hello", "response": " twice"},
    "split": {"request": {"prompt": "say hello"}, "response": {"choices": [{"text": " twice"}]}},
}


@pytest.mark.parametrize("form", COMPLETIONS)
def test_completions(tmp_path: Path, tokenizer: Any, form: str) -> None:
    (item,) = log(tmp_path, [COMPLETIONS[form]], tokenizer).read()
    assert list(item.request.prompt) == tokenizer("say hello")["input_ids"]
    assert tokenizer.decode(list(item.answer)) == " twice"


def test_prompts_as_token_ids(tmp_path: Path, tokenizer: Any) -> None:
    (item,) = log(tmp_path, [{"prompt": [9, 8, 7], "completion": "x"}], tokenizer).read()
    assert item.request.prompt == (9, 8, 7)


VLLM = {  # as vLLM's server replies with return_token_ids
    "completion": {"prompt": "say hello", "choices": [{"text": "?", "prompt_token_ids": [9, 8], "token_ids": [7, 6]}]},
    "prompt of ids": {"prompt": [9, 8], "choices": [{"text": "?", "token_ids": [7, 6]}]},
    "chat": {
        "messages": CHAT,
        "prompt_token_ids": [9, 8],
        "choices": [{"message": REPLY, "token_ids": [7, 6], "finish_reason": "stop"}],
    },
    "split": {
        "request": {"prompt": "say hello"},
        "response": {"prompt_token_ids": [9, 8], "choices": [{"token_ids": [7, 6], "finish_reason": "stop"}]},
    },
}


@pytest.mark.parametrize("form", VLLM)
def test_logged_token_ids_are_taken_as_they_are(tmp_path: Path, tokenizer: Any, form: str) -> None:
    (item,) = log(tmp_path, [VLLM[form]], tokenizer).read()
    assert (item.request.prompt, item.answer) == ((9, 8), (7, 6))
    assert item.request.max_new_tokens == 2


def test_token_ids_of_another_tokenizer_and_empty_ones(tmp_path: Path, tokenizer: Any) -> None:
    foreign = {"prompt": "say hello", "choices": [{"text": "x", "token_ids": [10**6]}]}
    empty = {"prompt": "say hello", "choices": [{"text": " twice", "token_ids": []}]}
    source = log(tmp_path, [foreign, empty], tokenizer)
    (item,) = source.read()
    assert tokenizer.decode(list(item.answer)) == " twice"  # no ids: the text is tokenised
    assert source.report.malformed == 1 and "answer token ids outside" in source.report.first_problem


def test_an_answer_that_the_model_ended_gets_its_end_token(tmp_path: Path, tokenizer: Any) -> None:
    def ends(reason: str, chat: bool) -> int:
        reply = {"message": REPLY} if chat else {"text": " twice"}
        question = {"messages": CHAT} if chat else {"prompt": "say hello"}
        (item,) = log(tmp_path, [{**question, "choices": [reply | {"finish_reason": reason}]}], tokenizer).read()
        return item.answer[-1]

    special = set(tokenizer.all_special_ids)
    assert ends("stop", chat=True) == tokenizer.convert_tokens_to_ids("<|end|>")
    assert ends("stop", chat=False) == tokenizer.eos_token_id
    assert ends("length", chat=True) not in special and ends("length", chat=False) not in special


def test_tags(tmp_path: Path, tokenizer: Any) -> None:
    base = {"prompt": "say hello", "completion": " twice"}
    lines = [base | {"tag": "code"}, base | {"metadata": {"tag": "prose"}}, base | {"model": "m-7b"}, base]
    assert [x.request.tag for x in log(tmp_path, lines, tokenizer).read()] == ["code", "prose", "m-7b", ""]


def test_unusable_lines_are_counted_and_the_first_is_shown(tmp_path: Path, tokenizer: Any) -> None:
    good = {"prompt": "say hello", "completion": " twice"}
    lines = [
        good,
        "{not json",
        "[1, 2]",
        {"prompt": "say hello"},
        {"completion": "x"},
        {"messages": [{"content": "no role"}], "completion": "x"},
        {"messages": [{"role": "user", "content": {"image": 1}}], "completion": "x"},
        {"messages": [{"role": "wizard", "content": "the template refuses"}], "completion": "x"},
        {"prompt": [10**6], "completion": "x"},
        {"prompt": [True], "completion": "x"},
        {"prompt": "", "completion": "x"},
        {"prompt": "say hello", "completion": ""},
        {"messages": [], "completion": "x"},
        {"prompt": "say hello" * 200, "completion": "x"},
        "",
        good,
    ]
    source = log(tmp_path, lines, tokenizer)
    assert len(list(source.read())) == 2
    report = source.report
    assert (report.lines, report.used, report.malformed, report.empty, report.too_long) == (15, 2, 9, 3, 1)
    assert "requests.jsonl:2: not JSON" in report.first_problem
    assert "9 malformed" in str(report) and "\n" not in str(report)


def test_reading_on_from_a_position(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"prompt": f"say hello {i}", "completion": " twice"} for i in range(6)]
    lines.insert(2, "broken")
    source = log(tmp_path, lines, tokenizer)
    everything = list(source.read())
    assert list(source.read(4)) == everything[4:]
    assert list(source.read(6)) == []


@pytest.mark.parametrize("lines", [[""], ["{", "nonsense"], [{"prompt": "only a question"}]])
def test_nothing_usable_is_one_clear_line(tmp_path: Path, tokenizer: Any, lines: list[Any]) -> None:
    with pytest.raises(InvalidValue, match=r"no usable request in .*OpenAI-style") as error:
        log(tmp_path, lines, tokenizer)
    assert "\n" not in str(error.value)


def test_missing_file_and_no_file(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidValue, match=r"absent\.jsonl does not exist"):
        RequestLog([tmp_path / "absent.jsonl"], tokenizer, max_length=64)
    with pytest.raises(InvalidValue, match="at least one"):
        RequestLog([], tokenizer, max_length=64)


def test_a_chat_without_template_says_so(tmp_path: Path, tokenizer: Any) -> None:
    bare = train_bpe(["say hello"], 280)
    bare.chat_template = None
    with pytest.raises(InvalidValue, match="no chat template"):
        log(tmp_path, [CHATS["choices"]], bare)


TARGET = markov(11, 2, seed=0)
DRAFT = near(TARGET, seed=1)
LOGGED = [
    LoggedRequest(TokenRequest((1, 2, 3), tag="a"), (4, 5, 6, 7)),
    LoggedRequest(TokenRequest((9,), tag="b"), (8, 0, 10)),
]


def test_laws_are_those_that_predict_the_logged_tokens() -> None:
    records = score(
        TARGET, DRAFT, LOGGED, RecorderSettings(top_k=11, temperature=0.8), numbers=[40, 41], draft_version=3
    )
    for item, record in zip(LOGGED, records, strict=True):
        text = [*item.request.prompt, *item.answer]
        first = len(item.request.prompt)
        assert record.ids.tolist() == text and record.tag == item.request.tag
        assert record.positions.tolist() == list(range(first, len(text)))
        for n, j in enumerate(record.positions.tolist()):
            before = text[j - 2] if j >= 2 else 0
            expected = torch.log_softmax(TARGET.table[before, text[j - 1]] / 0.8, -1)
            stored = torch.empty(11).scatter_(0, record.law.ids[n], record.law.logprobs[n])
            assert torch.allclose(stored, expected, atol=1e-5)
            assert not torch.allclose(
                stored, torch.log_softmax(TARGET.table[text[j - 1], text[j]] / 0.8, -1), atol=1e-3
            )
    assert [r.request for r in records] == [40, 41] and records[0].draft_version == 3


def test_acceptance_of_the_served_draft_on_logged_text() -> None:
    record = score(TARGET, DRAFT, LOGGED[:1], RecorderSettings(top_k=3))[0]
    text = [1, 2, 3, 4, 5, 6, 7]
    pairs = [(text[j - 2], text[j - 1]) for j in range(3, 7)]
    expected = [torch.minimum(TARGET.table[c].softmax(-1), DRAFT.table[c].softmax(-1)).sum() for c in pairs]
    assert record.alpha == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)
    assert record.examined == 4


def test_wrong_keeps_where_the_drafts_best_guess_is_not_the_logged_token() -> None:
    records = score(TARGET, DRAFT, LOGGED, RecorderSettings(positions="wrong", top_k=3))
    for item, record in zip(LOGGED, records, strict=True):
        text = [*item.request.prompt, *item.answer]
        guess = {j: int(DRAFT.table[text[j - 2] if j >= 2 else 0, text[j - 1]].argmax()) for j in range(1, len(text))}
        first = len(item.request.prompt)
        assert record.positions.tolist() == [j for j in range(first, len(text)) if guess[j] != text[j]]
    own = score(
        TARGET,
        TARGET,
        [LoggedRequest(TokenRequest((1, 2)), (int(TARGET.table[1, 2].argmax()),))],
        RecorderSettings(positions="wrong"),
    )
    assert len(own[0].law) == 0  # nothing was wrong


def test_chunks_of_the_head_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(TARGET, DRAFT, LOGGED, RecorderSettings(top_k=4))
    monkeypatch.setattr("draftsmith.data.request_logs._LOGITS_PER_CHUNK", 22)  # two rows at a time
    parts = score(TARGET, DRAFT, LOGGED, RecorderSettings(top_k=4))
    assert all(torch.equal(a.law.logprobs, b.law.logprobs) for a, b in zip(whole, parts, strict=True))


def test_served_laws_cannot_be_recomputed() -> None:
    with pytest.raises(InvalidValue, match="'raw'"):
        score(TARGET, DRAFT, LOGGED, RecorderSettings(law="served"))


def test_answers_behind_the_drafts_context_are_left_out() -> None:
    short = near(TARGET, seed=1)
    short.max_length = 5
    whole = score(TARGET, DRAFT, LOGGED, RecorderSettings(top_k=11))
    cut = score(TARGET, short, LOGGED, RecorderSettings(top_k=11))
    assert whole[0].positions.tolist() == [3, 4, 5, 6] and cut[0].positions.tolist() == [3, 4, 5]
    assert torch.equal(cut[0].law.logprobs, whole[0].law.logprobs[:3]) and cut[0].examined == 3
    assert torch.equal(cut[1].positions, whole[1].positions) and cut[1].alpha == whole[1].alpha
    short.max_length = 2
    nothing = score(TARGET, short, LOGGED[:1], RecorderSettings(top_k=11))[0]
    assert len(nothing.law) == 0 and nothing.alpha != nothing.alpha and nothing.examined == 0
