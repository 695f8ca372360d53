"""Text of a growing row of tokens as it becomes certain: whole characters, nothing that may begin a stop string."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoding shows while the bytes of a character are not all there


class TextStream:
    """Turns tokens into text piece by piece; the pieces join to the text of the whole output (`DecodeResult.text`).

    A token's text is the difference of two short decodes, so that spaces and characters that depend on neighbours come
    out as in the whole. Held back: incomplete characters, and an ending that a stop string may begin with.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._tokens: list[int] = []
        self._start = 0  # first token of the decoded window
        self._read = 0  # tokens whose text was taken
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been completed."""
        return self._stopped

    def push(self, token: int) -> str:
        """The text that this token makes certain; empty when none does, and after a stop string."""
        self._tokens.append(token)
        text = self._decode(self._start, None)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text, len(self._tokens))

    def finish(self) -> str:
        """What was still held back."""
        rest = self._advance(self._decode(self._start, None), len(self._tokens))
        held, self._held = self._held, ""
        return rest + ("" if self._stopped else held)

    def _advance(self, text: str, read: int) -> str:
        known = self._decode(self._start, self._read)
        self._start, self._read = self._read, read
        if self._stopped:
            return ""
        grown = self._held + text[len(known) :]
        hits = [at for stop in self._stop_strings if (at := grown.find(stop)) >= 0]
        if hits:
            self._stopped, self._held = True, ""
            return grown[: min(hits)]
        keep = max((_overlap(grown, stop) for stop in self._stop_strings), default=0)
        self._held = grown[len(grown) - keep :]
        return grown[: len(grown) - keep]

    def _decode(self, start: int, end: int | None) -> str:
        window = self._tokens[start:end]
        return str(self._tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that is a beginning of `stop`, shorter than `stop` itself."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
