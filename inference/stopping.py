"""Where a row ends: stop ids, stop strings, the length limit, looked for token by token in the order of the text.

A round commits several tokens at once; whatever stands behind the first hit must not reach the output.
"""

from collections.abc import Sequence
from typing import Any

from draftsmith.inference.detokenize import TextStream
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import TokenRequest

STOP_ID = "stop_id"
STOP_STRING = "stop_string"
LENGTH = "length"


class StopScanner:
    """Watches the output of one row.

    Stop strings are looked for in the text of the OUTPUT (the prompt does not count).
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
        self._text = TextStream(tokenizer, request.stop_strings) if request.stop_strings else None
        self.output: list[int] = []

    def push(self, tokens: Sequence[int]) -> tuple[int, str | None]:
        """Take committed tokens in order up to the first stop.

        Returns: how many of them belong to the output, and why it ends there (None: it goes on).
        """
        for i, token in enumerate(tokens):
            self.output.append(token)
            if token in self._stop_ids:
                return i + 1, STOP_ID
            if self._text is not None:
                self._text.push(token)
                if self._text.stopped:
                    return i + 1, STOP_STRING
            if len(self.output) >= self._max_output:
                return i + 1, LENGTH
        return len(tokens), None

    def text(self) -> str:
        """The text of the output, cut before the first stop string. Needs a tokenizer."""
        assert self._tokenizer is not None
        whole = str(self._tokenizer.decode(self.output, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        hits = [at for s in self._strings if (at := whole.find(s)) >= 0]
        return whole[: min(hits)] if hits else whole
