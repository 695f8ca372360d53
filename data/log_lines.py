"""One line of a request log as servers and their callers write them (OpenAI-style JSON): what was asked and answered.

Read are, with what `request_logs.py` and the corpus make of it:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"messages": [...], "choices": [{"message": {"role": "assistant", "content": "..."}, "finish_reason": "stop"}]}
    {"prompt": "...", "choices": [{"text": "...", "finish_reason": "length"}]}      also "completion" or "answer"
    {"request": {...}, "response": {...}}      either form split in two; {"body": {...}} inside them is looked into

A prompt may be token ids. vLLM adds the ids that it read and wrote where a request asks for them (return_token_ids):
"prompt_token_ids" and "token_ids", in the choice or beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnusableLine(Exception):
    """Why one line cannot be used. kind: "malformed" or another count of `request_logs.LogReport`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True)
class LogLine:
    """One answered request; of the prompt there is a text, ids, or a chat, of the answer a text, ids, or both."""

    prompt: str | None
    prompt_ids: tuple[int, ...] | None  # as the server read it
    messages: tuple[Mapping[str, str], ...] | None  # of a chat, without the answer
    answer: str | None
    answer_ids: tuple[int, ...] | None  # as the server wrote it, the end token among them
    finished: bool  # the model ended the answer itself
    tag: str


def parse_line(line: str) -> LogLine:
    """Read one line. Raises UnusableLine for what is not JSON, or none of the forms above."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableLine("malformed", f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise UnusableLine("malformed", f"a JSON {type(entry).__name__}, not an object")
    question, reply = _halves(entry)
    choice = _choice(reply)
    answer = _answer(choice, reply)
    answer_ids = _ids(choice.get("token_ids"))
    prompt_ids = _ids(choice.get("prompt_token_ids")) or _ids(reply.get("prompt_token_ids"))
    asked, messages, prompt = question.get("messages"), None, question.get("prompt")
    if isinstance(asked, list):
        if answer is None and asked and _role(asked[-1]) == "assistant":
            answer = _content(asked[-1])
            asked = asked[:-1]
        messages = tuple({"role": _role(turn), "content": _content(turn)} for turn in asked)
        prompt = None
    elif isinstance(prompt, list):
        prompt_ids = prompt_ids or _ids(prompt)
        if prompt and prompt_ids is None:
            raise UnusableLine("malformed", "no prompt (prompt or messages)")
    elif not isinstance(prompt, str) and prompt_ids is None:
        raise UnusableLine("malformed", "no prompt (prompt or messages)")
    if answer is None and answer_ids is None:
        raise UnusableLine("malformed", "no answer (choices, completion, answer or a last assistant message)")
    return LogLine(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_ids=prompt_ids,
        messages=messages,
        answer=answer,
        answer_ids=answer_ids,
        finished=choice.get("finish_reason") == "stop",
        tag=_tag(entry, question),
    )


def _halves(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects that hold the question and the reply (often one and the same)."""
    question, reply = entry, entry
    if isinstance(entry.get("request"), dict):
        question = entry["request"]
    if isinstance(question.get("body"), dict):
        question = question["body"]
    if isinstance(entry.get("response"), dict):
        reply = entry["response"]
    if isinstance(reply.get("body"), dict) and reply is not entry:
        reply = reply["body"]
    return question, reply


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    """The first choice; empty where the reply has none."""
    choices = reply.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _answer(choice: dict[str, Any], reply: dict[str, Any]) -> str | None:
    if isinstance(choice.get("text"), str):
        return str(choice["text"])
    if isinstance(choice.get("message"), dict):
        return _content(choice["message"])
    for name in ("completion", "answer", "response"):
        if isinstance(reply.get(name), str):
            return str(reply[name])
    return None


def _ids(value: Any) -> tuple[int, ...] | None:
    """Token ids, None for anything else."""
    if isinstance(value, list) and value and all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        return tuple(value)
    return None


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise UnusableLine("malformed", "a message without a role")
    return role


def _content(message: Any) -> str:
    """The text of a message: a string, or the text parts of a list."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UnusableLine("malformed", "a message whose content is not text")
    return content


def _tag(entry: dict[str, Any], question: dict[str, Any]) -> str:
    for source in (entry, question):
        metadata = source.get("metadata")
        for tag in (source.get("tag"), metadata.get("tag") if isinstance(metadata, dict) else None):
            if isinstance(tag, str):
                return tag
    model = question.get("model")
    return model if isinstance(model, str) else ""
