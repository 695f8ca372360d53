"""Prompts from a JSONL file: an object a line with `prompt` (text) or `prompt_ids` (token ids), optionally `tag`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidValue

_KEYS = "a key 'prompt' (text) or 'prompt_ids' (list of token ids), optionally 'tag'"


@dataclass(frozen=True)
class PromptLine:
    """One prompt; exactly one of the first two fields is given."""

    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    tag: str = ""  # domain, class or language; statistics are split by it

    def ids(self, tokenizer: Any | None) -> list[int]:
        """The prompt as token ids. Raises InvalidValue for text without a tokenizer or text that gives no token."""
        if self.prompt_ids is not None:
            return list(self.prompt_ids)
        if tokenizer is None:
            raise InvalidValue(
                "the target has no tokenizer, so a prompt cannot be text: give token ids ('prompt_ids' in a JSONL file)"
            )
        found: list[int] = tokenizer.encode(self.prompt)
        if not found:
            raise InvalidValue("empty prompt: give some text (the tokenizer makes no token of it)")
        return found


def read_prompts(path: str | Path) -> list[PromptLine]:
    """All prompts of a JSONL file; blank lines are skipped, other keys are ignored.

    Raises InvalidValue naming file:line for a line that is not such an object, and for a file without prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidValue(f"cannot read prompts from {path}: {reason}: give a JSONL file") from error
    found = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidValue(f"{path} holds no prompts: every line is a JSON object with {_KEYS}")
    return found


def _parse(line: str, where: str) -> PromptLine:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{where}: not valid JSON ({error}): every line is an object with {_KEYS}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("prompt_ids" in row):
        raise InvalidValue(f"{where}: wants an object with {_KEYS}")
    text, ids, tag = row.get("prompt"), row.get("prompt_ids"), row.get("tag", "")
    if not isinstance(tag, str):
        raise InvalidValue(f"{where}: 'tag' must be text, got {tag!r:.40}")
    if "prompt" in row:
        if not isinstance(text, str) or not text:
            raise InvalidValue(f"{where}: 'prompt' must be text that is not empty, got {text!r:.40}")
        return PromptLine(text, None, tag)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise InvalidValue(f"{where}: 'prompt_ids' must be a list of token ids that is not empty, got {ids!r:.40}")
    return PromptLine(None, tuple(ids), tag)
