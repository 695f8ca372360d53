"""Conversations as tokens, with the mask of what the assistant wrote (answer-only losses).

The mask comes from the template's own `{% generation %}` tags where it has them, else from rendering the conversation
turn by turn: what an assistant turn adds behind its generation prompt is the answer, the end-of-turn mark included.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.inference.errors import InvalidValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For the tokenizers of `tokenizer.train_bpe`. Roles are special tokens, so no text can imitate a turn.
SIMPLE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role must be system, user or assistant, got ' + message.role) }}"
    "{% endif %}"
    "{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ChatTokens:
    """One conversation as the model sees it."""

    ids: list[int]
    mask: list[int]  # 1: the assistant wrote this token


def use_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    """Set the chat template: "simple", a file's path, or "" for the tokenizer's own; InvalidValue when it has none."""
    if template == "simple":
        tokenizer.chat_template = SIMPLE_TEMPLATE
    elif template:
        try:
            tokenizer.chat_template = Path(template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InvalidValue(f"cannot read the chat template {template!r}: {e}") from e
    elif tokenizer.chat_template is None:
        raise InvalidValue("the tokenizer has no chat template: set text.chat_template to a Jinja file, or to simple")


def render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, add_generation_prompt: bool = False) -> str:
    """The conversation as text. Raises InvalidValue when the template refuses it."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, ValueError) as e:
        raise InvalidValue(f"the chat template refuses the conversation: {e}") from e


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> ChatTokens:
    """Tokens and assistant mask of a conversation.

    Raises InvalidValue for an empty conversation, one that the template refuses, or a message that spells out one of
    the special tokens (it would become that token: a turn that nobody took).
    """
    if not messages:
        raise InvalidValue("empty conversation: at least one message is needed")
    if spelt := special_in(tokenizer, messages):
        raise InvalidValue(f"a message contains the special token {spelt!r} as text: remove the message or the token")
    if not has_generation_tags(tokenizer):
        return mask_by_turns(tokenizer, messages)
    render(tokenizer, messages)  # for its one-line error
    encoded = tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return ChatTokens(list(encoded["input_ids"]), list(encoded["assistant_masks"]))


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[int]:
    """Tokens of a conversation up to and including the mark that asks for the assistant's turn."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def has_generation_tags(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template says itself what the assistant wrote."""
    return isinstance(tokenizer.chat_template, str) and bool(_GENERATION_TAG.search(tokenizer.chat_template))


def special_in(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    """The first special token spelt out in a message's content, or ""."""
    for message in messages:
        for token in tokenizer.all_special_tokens:
            if token in message["content"]:
                return str(token)
    return ""


def mask_by_turns(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> ChatTokens:
    """As `encode_chat`, for templates without generation tags: spans by rendering one turn more at a time.

    Raises InvalidValue when the template writes earlier turns differently once later ones follow: no span is safe then.
    """
    text = render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(tokenizer, messages[: index + 1])
        if index:
            before = render(tokenizer, messages[:index], add_generation_prompt=True)
        else:  # nothing before it to render: the generation prompt is what follows this turn when another is asked for
            prompt = render(tokenizer, messages[:1], add_generation_prompt=True)[len(after) :]
            before = after.partition(prompt)[0] + prompt if prompt else ""
        if not after.startswith(before) or not text.startswith(after):
            raise InvalidValue(
                f"cannot tell what the assistant wrote in turn {index + 1}: the chat template changes earlier turns; "
                "mark the answer in it with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a < end and start < b for a, b in spans)) for start, end in encoded["offset_mapping"]]
    return ChatTokens(list(encoded["input_ids"]), mask)
