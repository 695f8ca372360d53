"""What goes into a decoder and what comes out of it (contract 11). Metrics read only `RoundStats`."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class TokenRequest:
    """Continue one token sequence.

    row_id keys the row's randomness (same seed, row_id and prompt: same output, whoever shares the batch).
    Generation stops after the first of: a stop id (kept in the output), a stop string (the text is cut before it, the
    tokens that complete it are kept), max_new_tokens.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    row_id: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    tag: str = ""  # domain, class or language; statistics are split by it

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise InvalidValue("empty prompt: give at least one token (for example the tokenizer's BOS token)")
        if self.max_new_tokens < 1:
            raise InvalidValue(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass
class RoundStats:
    """One entry per (round, row), in the order of events; a plain decoding step is a round with drafted = 0.

    The prefill pass counts as the first round's target call only if it commits a token.
    """

    row: list[int] = field(default_factory=list)  # index into the requests
    drafted: list[int] = field(default_factory=list)  # n: tokens offered to the target for this row (nodes of a tree)
    accepted: list[int] = field(default_factory=list)  # k: leading accepts, 0..n (a tree: nodes on the accepted path)
    committed: list[int] = field(default_factory=list)  # tokens that reached the output, after cutting at a stop
    beta_sum: list[float] = field(default_factory=list)  # sum of 1 - TV(p, q) over the tests that were made
    seconds: list[float] = field(default_factory=list)  # wall time of the round, shared by its rows
    examined: list[int] = field(default_factory=list)  # tests made; a chain of n: min(k + 1, n), see `append`

    def __post_init__(self) -> None:
        for n, k in zip(self.drafted[len(self.examined) :], self.accepted[len(self.examined) :], strict=True):
            self.examined.append(min(k + 1, n))

    def append(
        self,
        row: int,
        drafted: int,
        accepted: int,
        committed: int,
        beta_sum: float,
        seconds: float,
        examined: int | None = None,
    ) -> None:
        """examined: tests made, one a drawn child of a tree; None: a chain, min(accepted + 1, drafted)."""
        self.row.append(row)
        self.drafted.append(drafted)
        self.accepted.append(accepted)
        self.committed.append(committed)
        self.beta_sum.append(beta_sum)
        self.seconds.append(seconds)
        self.examined.append(min(accepted + 1, drafted) if examined is None else examined)

    def extend(self, other: "RoundStats", row_offset: int = 0) -> None:
        """Append another call's rounds, its rows renumbered from `row_offset`."""
        for name, column in vars(self).items():
            values = getattr(other, name)
            column.extend([v + row_offset for v in values] if name == "row" else values)

    def by_row(self, count: int) -> "list[RoundStats]":
        """The rounds of each of `count` requests apart, every one as row 0."""
        parts = [RoundStats() for _ in range(count)]
        for row, *values in zip(*vars(self).values(), strict=True):
            parts[row].append(0, *values)
        return parts

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class DecodeResult:
    """The outcome of one `decode` call, in the order of its requests."""

    output: list[list[int]]  # new tokens only
    rounds: RoundStats
    nfe: dict[str, int]  # network calls by role: "target", "draft"
    seconds: float
    stop: list[str]  # per row: "stop_id", "stop_string", "length"
    text: list[str] | None = None  # cut before the stop string; only when the decoder was given a tokenizer
    notes: dict[str, Any] = field(default_factory=dict)  # what was really done: the rule, effective values; JSON-ready


@dataclass(frozen=True)
class Commit:
    """Tokens that became final in one round (the streaming form of a decoder yields these)."""

    row: int
    tokens: list[int]
    accepted: int  # how many of them were drafted
    stop: str | None  # set on the row's last commit


@dataclass(frozen=True)
class RoundView:
    """What a recorder sees after each verification; device tensors of the round, valid only during the call.

    Position i of `target_logits` predicts the token at index `context_length + i` of the row's sequence (no off-by-one:
    row i is the law of the token that stands, or would stand, at that index).
    """

    requests: Sequence[TokenRequest]
    rows: Sequence[int]  # [B] indices into `requests` of the rows in this round
    context: Sequence[Sequence[int]]  # [B] committed tokens before this round, prompt included
    drafted: Tensor  # int64 [B, g]
    num_drafted: Sequence[int]  # [B] n <= g
    accepted: Sequence[int]  # [B] k
    next_token: Sequence[int]  # [B] the correction (k < n) or the bonus token (k == n)
    target_logits: Tensor  # [B, g+1, V] raw, before temperature and filters
    target_law: Tensor | None  # [B, g+1, V] after every processor; None when greedy
    draft_law: Tensor | None  # [B, g, V]; None when greedy or when the draft is deterministic


Recorder = Callable[[RoundView], None]


class Decoder(Protocol):
    """A decoding method over token sequences; built by `registry.build`."""

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult: ...

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields commits as they happen; the generator's return value (StopIteration.value) is the result."""
        ...
