"""Where a row ends: stop ids, stop strings, the length limit, looked for token by token in the order of the text.

A round commits several tokens at once; whatever stands behind the first hit must not reach the output.
"""

from collections.abc import Sequence
from typing import Any

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import TokenRequest

STOP_ID = "stop_id"
STOP_STRING = "stop_string"
LENGTH = "length"

# A tokenizer's decode shows this while the bytes of a character are incomplete.
_INCOMPLETE = "\ufffd"


class StopScanner:
    """Watches the output of one row.

    Stop strings are looked for in the text of the OUTPUT (the prompt does not count). Only a few tokens are decoded per
    step: the text of a token is the difference of two short decodes, so that spaces and multi-byte characters that
    depend on neighbours come out as in the whole text.
    """

    def __init__(self, request: TokenRequest, tokenizer: Any | None, max_output: int) -> None:
        """max_output: the request's max_new_tokens, or less where the context limit comes first."""
        if any(not s for s in request.stop_strings):
            raise InvalidValue("an empty stop string would stop before the first token: leave it out")
        if request.stop_strings and tokenizer is None:
            raise InvalidValue(f"stop strings {list(request.stop_strings)} need a tokenizer: give one to the decoder")
        self._stop_ids = frozenset(request.stop_ids)
        self._strings = request.stop_strings
        self._tokenizer = tokenizer
        self._max_output = max_output
        self._window = max((len(s) for s in request.stop_strings), default=1) - 1  # text that a hit may begin in
        self._tail = ""
        self._start = 0  # first token of the decoded window
        self._read = 0  # tokens whose text is in the tail
        self.output: list[int] = []

    def push(self, tokens: Sequence[int]) -> tuple[int, str | None]:
        """Take committed tokens in order up to the first stop.

        Returns: how many of them belong to the output, and why it ends there (None: it goes on).
        """
        for i, token in enumerate(tokens):
            self.output.append(token)
            if token in self._stop_ids:
                return i + 1, STOP_ID
            if self._strings and self._hit():
                return i + 1, STOP_STRING
            if len(self.output) >= self._max_output:
                return i + 1, LENGTH
        return len(tokens), None

    def _hit(self) -> bool:
        """Whether the token appended last completes a stop string."""
        assert self._tokenizer is not None
        known = self._decode(self.output[self._start : self._read])
        text = self._decode(self.output[self._start :])
        if text.endswith(_INCOMPLETE):
            return False
        grown = self._tail + text[len(known) :]
        self._tail = grown[max(0, len(grown) - self._window) :]
        self._start, self._read = self._read, len(self.output)
        return any(s in grown for s in self._strings)

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def text(self) -> str:
        """The text of the output, cut before the first stop string. Needs a tokenizer."""
        whole = self._decode(self.output)
        hits = [at for s in self._strings if (at := whole.find(s)) >= 0]
        return whole[: min(hits)] if hits else whole
