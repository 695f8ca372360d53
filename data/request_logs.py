"""Request logs as production servers write them (OpenAI-style JSON lines, prompt and answer) as a stream to learn from.

The answers are the target's own (it served them); its laws were not logged and are recomputed here in one forward pass
over the logged text. `log_lines.py` has the forms that are read, in one file or several, mixed as they come; token ids
are taken as they were logged where they were, else the text is tokenised. "tag", "metadata": {"tag": ...} or "model"
gives the tag. `finish_reason` "stop" means that the model ended the answer itself: its end token is appended to a text.
Shape letters: R requests, T tokens, M positions, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.data.chat import encode_prompt, render
from draftsmith.data.log_lines import LogLine, UnusableLine, parse_line
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.requests import TokenRequest

_LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True)
class LoggedRequest:
    """A request that was already answered."""

    request: TokenRequest
    answer: tuple[int, ...]


@dataclass
class LogReport:
    """What became of the lines."""

    lines: int = 0
    used: int = 0
    malformed: int = 0  # not JSON, or neither of the forms above
    empty: int = 0  # an empty prompt or answer
    too_long: int = 0  # prompt and answer exceed the model's context
    first_problem: str = ""  # with file and line

    def __str__(self) -> str:
        parts = [f"{n} {name}" for name, n in vars(self).items() if name not in ("lines", "first_problem") and n]
        return f"{self.lines} lines: {', '.join(parts) or 'nothing'}" + (
            f"; first problem: {self.first_problem}" if self.first_problem else ""
        )


class RequestLog:
    """A re-readable stream of logged requests.

    Raises InvalidValue at once when a file is missing, or when no line of all files is usable.
    """

    length: int | None = None  # known only after reading everything

    def __init__(self, paths: Sequence[str | Path], tokenizer: Any, *, max_length: int, max_tag: int = 64) -> None:
        """tokenizer: a transformers tokenizer; chats want one with a chat template. max_length: the model's context."""
        self.paths = [Path(path) for path in paths]
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_tag = max_tag
        self.report = LogReport()
        if not self.paths:
            raise InvalidValue("no request log was given: name at least one JSON-lines file")
        for path in self.paths:
            if not path.is_file():
                raise InvalidValue(f"request log {path} does not exist or is not a file")
        if next(self.read(), None) is None:
            raise InvalidValue(
                f"no usable request in {', '.join(map(str, self.paths))} ({self.report}); "
                "expected OpenAI-style JSON lines with a prompt (or messages) and an answer"
            )
        self.report = LogReport()

    def read(self, start: int = 0) -> Iterator[LoggedRequest]:
        """The usable requests in file order, from the `start`-th one on; `report` counts what is passed over.

        Skipping re-reads and re-tokenises the lines before `start`, and counts them again.
        """
        self.report = LogReport()
        for path in self.paths:
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    self.report.lines += 1
                    try:
                        logged = self._parse(line)
                    except UnusableLine as problem:
                        setattr(self.report, problem.kind, getattr(self.report, problem.kind) + 1)
                        self.report.first_problem = self.report.first_problem or f"{path}:{number}: {problem}"
                        continue
                    self.report.used += 1
                    if self.report.used > start:
                        yield logged

    def _parse(self, line: str) -> LoggedRequest:
        found = parse_line(line)
        chat = found.messages is not None
        prompt = self._checked(found.prompt_ids, "prompt") if found.prompt_ids is not None else self._prompt(found)
        if found.answer_ids is not None:
            ids = self._checked(found.answer_ids, "answer")
        else:
            ids = self._ids(found.answer or "", special=False)
            end = self._end_of_turn if chat else self.tokenizer.eos_token_id
            if found.finished and end is not None and ids and ids[-1] != end:
                ids.append(end)
        if not prompt or not ids:
            raise UnusableLine("empty", "empty prompt" if not prompt else "empty answer")
        if len(prompt) + len(ids) > self.max_length:
            raise UnusableLine("too_long", f"{len(prompt)} + {len(ids)} tokens exceed the context of {self.max_length}")
        request = TokenRequest(prompt=tuple(prompt), max_new_tokens=len(ids), tag=found.tag[: self.max_tag])
        return LoggedRequest(request, tuple(ids))

    def _checked(self, ids: Sequence[int], what: str) -> list[int]:
        size = len(self.tokenizer)
        if any(not 0 <= x < size for x in ids):
            raise UnusableLine("malformed", f"{what} token ids outside 0..{size - 1}: another tokenizer wrote them")
        return list(ids)

    def _prompt(self, found: LogLine) -> list[int]:
        if found.messages is None:
            return self._ids(found.prompt, special=True) if found.prompt else []
        if not found.messages:
            return []
        if self.tokenizer.chat_template is None:
            raise UnusableLine("malformed", "a chat, but the target's tokenizer has no chat template")
        try:
            return encode_prompt(self.tokenizer, [dict(turn) for turn in found.messages])
        except InvalidValue as error:
            raise UnusableLine("malformed", str(error)) from error

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The special token that the chat template writes behind an answer, else the tokenizer's EOS."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            text = render(self.tokenizer, turns)
        except InvalidValue:
            text = ""
        behind = self._ids(text[text.rfind("y") + 1 :], special=False)
        special = behind and behind[0] in self.tokenizer.all_special_ids
        end: int | None = behind[0] if special else self.tokenizer.eos_token_id
        return end

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


@torch.no_grad()
def score(
    target: Engine,
    draft: Engine,
    logged: Sequence[LoggedRequest],
    settings: RecorderSettings,
    *,
    numbers: Sequence[int] | None = None,
    draft_version: int = 0,
) -> list[Record]:
    """Records of logged answers: the target's laws recomputed in one forward pass, and the served draft's acceptance.

    Positions "all": every answer token. "wrong": where the draft's most likely token is not the logged one, which is
    where a greedy draft would have been corrected. The record's alpha is mean sum min(p, q) over the whole answer.
    Answer tokens behind the draft's context are left out: it never drafts there.
    Raises InvalidValue for the law "served": the processors of the logged calls are not known.
    """
    if settings.law != "raw":
        raise InvalidValue("request logs do not tell how the target sampled: set the recorder's law to 'raw'")
    texts = [[*item.request.prompt, *item.answer] for item in logged]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for r, text in enumerate(texts):
        ids[r, : len(text)] = torch.tensor(text)
    row = torch.cat([torch.full((len(item.answer),), r) for r, item in enumerate(logged)])
    position = torch.cat([len(item.request.prompt) + torch.arange(len(item.answer)) for item in logged])
    reach = draft.spec.max_length
    inside = position <= reach
    row, position = row[inside], position[inside]
    label = ids[row, position]
    hidden_p = _rows(target, ids, row, position)  # [M, D]
    hidden_q = _rows(draft, ids[:, :reach], row, position)
    size = min(
        target.spec.vocab_size, draft.spec.vocab_size
    )  # a padded head means the same tokens below the smaller size
    step = max(1, _LOGITS_PER_CHUNK // size)
    laws: list[TeacherLaw] = []
    overlap: list[Tensor] = []
    wrong: list[Tensor] = []
    for start in range(0, max(1, len(row)), step):
        part = slice(start, start + step)
        logits_p = target.head(hidden_p[part])[:, :size].float()
        logits_q = draft.head(hidden_q[part])[:, :size].float().to(logits_p.device)
        laws.append(TeacherLaw.from_logits(logits_p, settings.top_k, settings.temperature).to("cpu"))
        p, q = ((x / settings.temperature).softmax(-1) for x in (logits_p, logits_q))
        overlap.append(torch.minimum(p, q).sum(-1).cpu())
        wrong.append(logits_q.argmax(-1).cpu() != label[part])
    law, alpha = TeacherLaw.cat(laws), torch.cat(overlap)
    keep = torch.ones_like(row, dtype=torch.bool) if settings.positions == "all" else torch.cat(wrong)
    return [
        Record(
            ids=torch.tensor(text),
            positions=position[mine := (row == r) & keep],
            law=law[mine],
            tag=item.request.tag,
            request=r if numbers is None else numbers[r],
            alpha=float(alpha[row == r].mean()),  # NaN when the draft reaches none of the answer
            examined=int((row == r).sum()),
            draft_version=draft_version,
        )
        for r, (item, text) in enumerate(zip(logged, texts, strict=True))
    ]


def _rows(engine: Engine, ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Hidden states [M, D] that predict the tokens at `position`: those of position - 1."""
    hidden, _ = engine.forward(ids.to(engine.device))
    return hidden[row.to(engine.device), (position - 1).to(engine.device)]
