"""What suffix decoding remembers: a tree of each request's own text, and one of the outputs of earlier requests.

"SuffixDecoding" (NeurIPS 2025, arXiv 2411.04975), sections 3 and 4. Prompts are in the request's own tree only; what is
shared are outputs. They are private text too: the cache lives as long as the decoder that holds it, nothing is written
unless asked for, and with max_requests = 0 no token of one request can influence another one's drafts.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.suffix_tree import LEAF_BYTES, NODE_BYTES, NOTHING, TOKEN_BYTES, Budget, Draft, SuffixTree

CORPUS_KIND = "suffix-corpus"
_OWN = 0  # the one sequence of a request's own tree


@dataclass(frozen=True)
class Corpus:
    """A warm start, for the result's notes."""

    sha256: str
    sequences: int
    tokens: int


@dataclass
class _Active:
    own: SuffixTree
    number: int | None  # its sequence in the shared tree; None: not shared


class SuffixCache:
    """Requests by id: start, append as tokens are committed, stop; the oldest outputs go first."""

    def __init__(self, depth: int = 24, max_requests: int = 10_000, max_bytes: int = 256 << 20) -> None:
        """Raises InvalidValue for a depth below 2 and for negative bounds."""
        if max_requests < 0 or max_bytes < 0:
            raise InvalidValue(
                f"max_cached_requests and max_cached_mb must be at least 0, got {max_requests} and {max_bytes >> 20}"
            )
        self.depth = depth
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.shared = SuffixTree(depth)
        self.corpus: Corpus | None = None
        self._active: dict[str, _Active] = {}
        self._cached: dict[str, int] = {}  # id -> sequence in the shared tree, oldest first
        self._numbers = 0

    def check_room(self, tokens: int) -> None:
        """Raises InvalidValue when one output of so many tokens is over the memory limit (an upper estimate)."""
        need = tokens * (NODE_BYTES + LEAF_BYTES + TOKEN_BYTES)
        if self.max_requests and need > self.max_bytes:
            raise InvalidValue(
                f"max_cached_mb is {self.max_bytes / 2**20:g}, below one request: {tokens} tokens take about "
                f"{need / 2**20:.1f} MB ({NODE_BYTES + LEAF_BYTES} bytes a node and its leaf); raise it, or set "
                "max_cached_requests to 0"
            )

    def start(self, request: str, prompt: Sequence[int]) -> None:
        """A request begins; a finished one of the same id is forgotten. Raises InvalidState for one that is running."""
        if request in self._active:
            raise InvalidState(f"request {request!r} was started twice: stop it first")
        if request in self._cached:
            self.shared.remove(self._cached.pop(request))
        own = SuffixTree(self.depth)
        own.append(_OWN, prompt)
        self._active[request] = _Active(own, self._number() if self.max_requests else None)

    def append(self, request: str, tokens: Sequence[int]) -> None:
        """Committed tokens of a running request, bonus included. Raises InvalidState for an unknown id."""
        state = self._running(request)
        state.own.append(_OWN, tokens)
        if state.number is not None:
            self.shared.append(state.number, tokens)

    def stop(self, request: str) -> None:
        """A request ends; its output stays shared until it is the oldest over the bounds."""
        number = self._running(request).number
        del self._active[request]
        if number is not None and number in self.shared:
            self._keep(request, number)

    def speculate(self, request: str, budget: Budget) -> Draft:
        """The better of what its own text and what the shared outputs propose (by score; ties: its own)."""
        state = self._running(request)
        context = state.own.text(_OWN)
        if not context:
            return NOTHING
        own = state.own.speculate(context, budget)
        shared = self.shared.speculate(context, budget) if self.shared.tokens else NOTHING
        return shared if shared.score > own.score else own

    def forget(self, prefix: str) -> int:
        """Erase the outputs of all finished requests whose ids begin with `prefix` (a session); how many there were.

        Raises InvalidState while one of them is running.
        """
        running = next((r for r in self._active if r.startswith(prefix)), None)
        if running is not None:
            raise InvalidState(f"request {running!r} is running: stop it before its session is forgotten")
        gone = [r for r in self._cached if r.startswith(prefix)]
        for request in gone:
            self.shared.remove(self._cached.pop(request))
        return len(gone)

    def read_corpus(self, path: Path, vocab_size: int, vocabulary: str | None) -> None:
        """Warm start from a file of earlier outputs (JSONL: a header, then {"ids": [...]} a line).

        vocabulary: hash of the target's (`vocabulary_hash`), None where it has no tokenizer.
        Raises InvalidValue naming the line: not such a file, another vocabulary, an id outside the vocabulary.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidValue(f"{path}: the suffix corpus cannot be read: {error.strerror}") from error
        lines = data.decode("utf-8", errors="replace").splitlines()
        header = _parse(path, 1, lines[0] if lines else "")
        if header.get("kind") != CORPUS_KIND:
            raise InvalidValue(f"{path} is no suffix corpus: line 1 must be a header with kind {CORPUS_KIND!r}")
        theirs = header.get("vocabulary")
        if theirs != vocabulary and None not in (theirs, vocabulary):
            raise InvalidValue(
                f"{path} was written with another tokenizer: vocabulary {theirs}, the target's is {vocabulary}; "
                "collect the corpus again with this target"
            )
        total, count = 0, 0
        for number, line in enumerate(lines[1:], 2):
            ids = _parse(path, number, line).get("ids")
            if not isinstance(ids, list) or not all(type(t) is int for t in ids):
                raise InvalidValue(f"{path}, line {number}: 'ids' must be a list of token ids")
            wrong = next((t for t in ids if not 0 <= t < vocab_size), None)
            if wrong is not None:
                raise InvalidValue(f"{path}, line {number}: id {wrong} is outside the vocabulary 0..{vocab_size - 1}")
            if ids and self.max_requests:
                sequence = self._number()
                self.shared.append(sequence, ids)
                self._keep(f"corpus:{number}", sequence)
            total, count = total + len(ids), count + 1
        self.corpus = Corpus(hashlib.sha256(data).hexdigest(), count, total)

    def write_corpus(self, path: Path, vocabulary: str | None) -> None:
        """The cached outputs as a file for `read_corpus`: text of users, so only where it was asked for."""
        with path.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": CORPUS_KIND, "vocabulary": vocabulary}) + "\n")
            for ids in self.outputs():
                stream.write(json.dumps({"ids": ids}) + "\n")

    def outputs(self) -> Iterator[list[int]]:
        """The cached outputs, oldest first."""
        for number in self._cached.values():
            yield self.shared.text(number)

    def notes(self) -> dict[str, Any]:
        """Effective values, for the result."""
        return {
            "depth": self.depth,
            "max_cached_requests": self.max_requests,
            "max_cached_mb": self.max_bytes / 2**20,
            "cached_requests": len(self._cached),
            "cached_tokens": self.shared.tokens,
            "cached_mb": self.shared.bytes / 2**20,
            "corpus": vars(self.corpus) if self.corpus else None,
        }

    def _running(self, request: str) -> _Active:
        if request not in self._active:
            raise InvalidState(f"request {request!r} is not running: start it first")
        return self._active[request]

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _keep(self, request: str, number: int) -> None:
        self.shared.end(number)
        self._cached[request] = number
        while self._cached and (len(self._cached) > self.max_requests or self.shared.bytes > self.max_bytes):
            oldest = next(iter(self._cached))
            self.shared.remove(self._cached.pop(oldest))


def vocabulary_hash(tokenizer: Any | None) -> str | None:
    """Of a tokenizer's ids and tokens; None without one."""
    if tokenizer is None:
        return None
    table = sorted((int(i), str(token)) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(table, ensure_ascii=False).encode()).hexdigest()


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise InvalidValue(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InvalidValue(f"{path}, line {number}: must be a JSON object")
    return parsed
