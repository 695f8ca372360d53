"""Prompt files as people write them; the refusals are in test_decode_command.py, through the command."""

import json
from pathlib import Path

import pytest

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.prompts import PromptLine, read_prompts
from tests import tiny


def test_lines_blank_lines_other_keys_and_line_separators_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a\u2028b", "id": 7}, {"prompt_ids": [0, 3], "tag": "code"}]
    text = "\r\n".join(["", *(json.dumps(row, ensure_ascii=False) for row in rows), "  "])
    path.write_bytes(text.encode())
    assert read_prompts(path) == [PromptLine("a\u2028b", None), PromptLine(None, (0, 3), "code")]


def test_ids(tmp_path: Path) -> None:
    tokenizer = tiny.write_tokenizer(tmp_path)
    assert PromptLine(None, (0, 3)).ids(None) == [0, 3]
    assert tokenizer.decode(PromptLine("naïve", None).ids(tokenizer)) == "naïve"
    with pytest.raises(InvalidValue, match="cannot be text: give token ids"):
        PromptLine("text", None).ids(None)
    with pytest.raises(InvalidValue, match="empty prompt"):
        PromptLine("", None).ids(tokenizer)
