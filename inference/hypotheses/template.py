"""Chat templates and BOS: the same recorded answers behind prompts that are rendered in another way.

Other hypotheses change the drafter; this one changes the contexts, and with them the target's law. So a rendering is a
hypothesis only where the target itself finds the recorded answers likelier under it: the right template is the one
under which the target wrote them. It is named only where the drafter is accepted more under it, too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hypotheses.base import Facts, Hypothesis

GIVEN = "as given"
_WANTED = "an object with 'prompt', 'prompt_ids' or 'messages', and with 'answer' or 'answer_ids'"


@dataclass(frozen=True)
class Answered:
    """A prompt and what the target answered."""

    prompt: str | None
    messages: tuple[Mapping[str, str], ...]
    prompt_ids: tuple[int, ...]
    answer: str | None
    answer_ids: tuple[int, ...]


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """Renderings under which the target's answers are likelier than as deployed."""
    if not hasattr(c, "rendering"):
        return
    for name in (GIVEN, *facts.renderings):
        if name != c.rendering:
            yield Hypothesis(
                "chat template",
                f"prompts: {name}",
                {"rendering": name},
                f"the target wrote these answers behind prompts rendered so: {name}",
                {"any engine": f"render prompts so for target and drafter: {name}"},
            )


def read_answered(path: Path) -> list[Answered]:
    """Lines of a JSONL file. Raises InvalidValue naming file:line for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"cannot read answers from {path}: {error}: give a JSONL file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompts = [name for name in ("prompt", "prompt_ids", "messages") if row.get(name)]
            answers = [name for name in ("answer", "answer_ids") if row.get(name)]
            if len(prompts) != 1 or len(answers) != 1:
                raise TypeError("one of each is needed")
            messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in row.get("messages") or ())
            ids, said = ([int(i) for i in row.get(name) or ()] for name in ("prompt_ids", "answer_ids"))
            found.append(Answered(row.get("prompt"), messages, tuple(ids), row.get("answer"), tuple(said)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidValue(f"{path}:{number}: wants {_WANTED} ({error})") from None
    if not found:
        raise InvalidValue(f"{path} holds no answers: every line is {_WANTED}")
    return found


def rendered(
    lines: Sequence[Answered], tokenizer: Any | None, bos: int | None
) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
    """(rendering -> prompts as ids, answers as ids). The first rendering is `GIVEN`.

    bos: the target's id, None where it has none. Raises InvalidValue for text or messages without what renders them.
    """
    answers = [list(line.answer_ids) or _encode(tokenizer, line.answer, special=False) for line in lines]
    given = [_given(line, tokenizer) for line in lines]
    found = {GIVEN: given}
    if bos is not None:
        bare = [[*ids[_leading(ids, bos) :]] for ids in given]
        found |= {name: [[*[bos] * n, *ids] for ids in bare] for name, n in (("no BOS", 0), ("one BOS", 1))}
        found["two BOS"] = [[bos, bos, *ids] for ids in bare]
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        found |= _chats(lines, tokenizer)
    return {name: ids for name, ids in found.items() if name == GIVEN or (ids != given and all(ids))}, answers


def _chats(lines: Sequence[Answered], tokenizer: Any) -> dict[str, list[list[int]]]:
    """What other ways of using the chat template make of the same messages (a text prompt: of one user message)."""
    if any(line.prompt_ids for line in lines):
        return {}
    chats = [list(line.messages) or [{"role": "user", "content": str(line.prompt)}] for line in lines]
    without = [[m for m in chat if m["role"] != "system"] for chat in chats]
    found = {
        "chat template": [_chat(tokenizer, chat) for chat in chats],
        "no template": [_encode(tokenizer, "\n".join(m["content"] for m in chat)) for chat in chats],
        "no generation prompt": [_chat(tokenizer, chat, add_generation_prompt=False) for chat in chats],
    }
    opened, closed = found["chat template"], found["no generation prompt"]
    found["generation prompt twice"] = [[*a, *a[len(b) :]] for a, b in zip(opened, closed, strict=True)]
    if all(without) and without != chats:
        found["no system prompt"] = [_chat(tokenizer, chat) for chat in without]
    if "enable_thinking" in str(tokenizer.chat_template):
        for thinking in (True, False):
            name = f"thinking {'on' if thinking else 'off'}"
            found[name] = [_chat(tokenizer, chat, enable_thinking=thinking) for chat in chats]
    return found


def _given(line: Answered, tokenizer: Any | None) -> list[int]:
    if line.prompt_ids:
        return list(line.prompt_ids)
    if line.messages:
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise InvalidValue("the target's tokenizer has no chat template: give prompts as text or ids, not messages")
        return _chat(tokenizer, list(line.messages))
    return _encode(tokenizer, line.prompt)


def _chat(
    tokenizer: Any, chat: list[Mapping[str, str]], *, add_generation_prompt: bool = True, **more: Any
) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt, **more)
    return _encode(tokenizer, text, special=False)


def _encode(tokenizer: Any | None, text: str | None, *, special: bool = True) -> list[int]:
    if tokenizer is None:
        raise InvalidValue("the target has no tokenizer: give 'prompt_ids' and 'answer_ids'")
    found: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return found


def _leading(ids: Sequence[int], bos: int) -> int:
    return next((i for i, token in enumerate(ids) if token != bos), len(ids))
