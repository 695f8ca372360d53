"""Answers that a target writes itself to given prompts: the text that drafts and EAGLE heads should be trained on.

Prompts are JSON lines, {"messages": [...]}, {"prompt": "..."} or {"prompt_ids": [...]}. A conversation is cut behind
its first user turn: later turns would answer something that the target never said. Out come JSON lines for
`data.corpus` (as chat: field messages; as text: field text); those of prompts in text or messages are also what
`data.request_logs` reads, which knows no answers as ids.
The work is divided among ranks by line, each writing a file of its own; what a killed process wrote stays, and the same
command goes on behind it. Answers depend on seed and line alone, not on ranks, batches or interruptions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.data.chat import encode_prompt
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.requests import DecodeResult, TokenRequest

SETTINGS = "answers.json"
_KEYS = "'messages' (with a user turn), 'prompt' (text) or 'prompt_ids' (token ids)"


@dataclass(frozen=True)
class Question:
    """One line to be answered."""

    number: int  # of the line among all lines that are no blanks
    ids: tuple[int, ...]
    source: dict[str, Any]  # what goes in front of the answer: messages, prompt or prompt_ids, and the tag


@dataclass
class Tally:
    """What became of a rank's lines."""

    answered: int = 0
    before: int = 0  # answered by an earlier run
    too_long: int = 0  # the prompt leaves no room for an answer
    tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.answered} answers of {self.tokens} tokens, {self.before} there before, "
            f"{self.too_long} prompts too long"
        )


def read_questions(paths: Sequence[Path], tokenizer: Any) -> list[Question]:
    """All lines of the files. Raises InvalidValue naming file:line for one that is no prompt, and for none at all."""
    found: list[Question] = []
    for path in paths:
        try:
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidValue(f"cannot read prompts from {path} ({error}): give a JSONL file") from error
        for at, line in enumerate(lines, 1):
            if line.strip():
                found.append(_question(line, f"{path}:{at}", len(found), tokenizer))
    if not found:
        raise InvalidValue(f"no prompts in {', '.join(map(str, paths))}: every line is an object with {_KEYS}")
    return found


def _question(line: str, where: str, number: int, tokenizer: Any) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or sum(key in row for key in ("messages", "prompt", "prompt_ids")) != 1:
        raise InvalidValue(f"{where}: wants an object with one of {_KEYS}")
    tag = {"tag": row["tag"]} if isinstance(row.get("tag"), str) else {}
    if "prompt_ids" in row:
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise InvalidValue(f"{where}: 'prompt_ids' must be a list of token ids that is not empty")
        return Question(number, tuple(ids), {"prompt_ids": ids, **tag})
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise InvalidValue(f"{where}: 'prompt' must be text that is not empty")
        return Question(number, tuple(tokenizer.encode(row["prompt"])), {"prompt": row["prompt"], **tag})
    turns: list[dict[str, str]] = []
    for turn in row["messages"] if isinstance(row["messages"], list) else []:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise InvalidValue(f'{where}: a message must be {{"role": text, "content": text}}')
        turns.append({"role": str(turn.get("role")), "content": turn["content"]})
        if turns[-1]["role"] == "user":
            return Question(number, tuple(encode_prompt(tokenizer, turns)), {"messages": turns, **tag})
    raise InvalidValue(f"{where}: the conversation has no user turn to answer")


class AnswerFile:
    """One rank's file: whole lines that are there stay, a torn last one is cut off, new ones are appended."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidState for a file that holds something else."""
        self.path = path
        self.rows: list[int] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self.rows.append(int(json.loads(line)["row"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidState(
                    f"{path} holds a line that is no answer ({error}): remove it or choose another OUT"
                ) from None
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write lines and wait for the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def claim(directory: Path, settings: dict[str, Any], name: str = SETTINGS) -> None:
    """Note, in the file `name`, what the answers depend on. Raises InvalidValue when OUT has ones of other settings."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    if not path.exists():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        try:
            os.link(temporary, path)  # of several ranks the first one
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    known = json.loads(path.read_text("utf-8"))
    wrong = sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key))
    if wrong:
        key = wrong[0]
        raise InvalidValue(
            f"{directory} has {path.stem} with {key} {known.get(key)!r}, now it is {settings.get(key)!r}: give the "
            "same settings to go on, or another OUT"
        )


def digest(questions: Sequence[Question]) -> str:
    """sha256 of the prompts, in order."""
    return hashlib.sha256(json.dumps([[q.ids, q.source] for q in questions]).encode()).hexdigest()


def answer(
    questions: Sequence[Question],
    out: Path,
    decode: Callable[[Sequence[TokenRequest]], DecodeResult],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    max_length: int,
    stop_ids: tuple[int, ...],
    batch: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Tally]:
    """Answer this rank's lines that are still missing; the running tally after each batch.

    max_length: of prompt and answer together; an answer is cut there.
    """
    file = AnswerFile(out / f"answers-{rank:05d}-of-{ranks:05d}.jsonl")
    there = set(file.rows)
    tally = Tally(before=len(there))
    left = []
    for question in questions[rank::ranks]:
        if question.number in there:
            continue
        if len(question.ids) >= max_length:
            tally.too_long += 1
            continue
        left.append(question)
    for start in range(0, len(left), batch):
        asked = left[start : start + batch]
        requests = [
            TokenRequest(q.ids, min(max_new_tokens, max_length - len(q.ids)), row_id=q.number, stop_ids=stop_ids)
            for q in asked
        ]
        result = decode(requests)
        rows = []
        for question, ids in zip(asked, result.output, strict=True):
            ended = bool(ids) and ids[-1] in stop_ids
            rows.append(_row(question, ids[:-1] if ended else ids, ended, tokenizer))
            tally.answered += 1
            tally.tokens += len(ids)
        file.append(rows)
        yield tally
    if not left:
        yield tally


def _row(question: Question, ids: Sequence[int], ended: bool, tokenizer: Any) -> dict[str, Any]:
    reason = "stop" if ended else "length"
    row: dict[str, Any] = {"row": question.number, **question.source}
    if "prompt_ids" in row:
        return {**row, "answer_ids": list(ids), "finish_reason": reason}
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    if "messages" in row:
        turn = {"role": "assistant", "content": text}
        return {**row, "messages": [*row["messages"], turn], "finish_reason": reason}
    return {**row, "text": row["prompt"] + text, "choices": [{"text": text, "finish_reason": reason}]}
