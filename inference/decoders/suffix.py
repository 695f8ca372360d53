"""Suffix decoding: drafts from counted suffixes, verified as a chain or as a tree, alone or beside a learned drafter.

"SuffixDecoding" (NeurIPS 2025, arXiv 2411.04975). The decoder tells the cache of suffixes what was committed; drafting
is drafters/suffix.py, verification the chain decoder's or the tree decoder's. Outputs are shared between the requests
of one decoder (set max_cached_requests=0 to keep them apart).
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.inference.decoders.session import drain
from draftsmith.inference.decoders.speculative import SpeculativeSettings, build
from draftsmith.inference.decoders.tree import build as build_tree
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.drafters.suffix import HybridDrafter, SuffixDrafter, SuffixRows, SuffixTreeDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import Commit, Decoder, DecodeResult, TokenRequest
from draftsmith.inference.suffix_cache import SuffixCache, vocabulary_hash
from draftsmith.inference.suffix_tree import Budget
from draftsmith.inference.tree_settings import TreeSettings


@dataclass(frozen=True)
class SuffixFields:
    """What all forms of suffix decoding share."""

    suffix_depth: int = field(default=24, metadata={"help": "longest string that is counted: match and draft together"})
    max_spec_factor: float = field(
        default=1.0, metadata={"help": "drafted tokens per matched token; 2 to 4 is aggressive"}
    )
    max_spec_offset: float = field(
        default=0.0, metadata={"help": "drafted tokens beyond that; negative suppresses drafts from short matches"}
    )
    min_token_prob: float = field(
        default=0.1, metadata={"help": "least estimated probability of a drafted token; 0.3 where verifying is dear"}
    )
    max_cached_requests: int = field(
        default=10_000, metadata={"help": "outputs shared between requests, oldest out first; 0: each draws on itself"}
    )
    max_cached_mb: float = field(default=256.0, metadata={"help": "bound on the memory of the shared outputs"})
    suffix_corpus: str = field(
        default="", metadata={"help": "file of earlier outputs to begin with (written by suffix_corpus_out)"}
    )
    suffix_corpus_out: str = field(
        default="", metadata={"help": "file to write the shared outputs to after each call; they are private text"}
    )

    def check_suffix(self) -> None:
        """Raises InvalidValue for values out of their range."""
        if self.suffix_depth < 2:
            raise InvalidValue(f"suffix_depth must be at least 2 (a token and what follows), got {self.suffix_depth}")
        self.budget(1)
        self.cache()

    def budget(self, most: int, tree: bool = False) -> Budget:
        return Budget(most, self.max_spec_factor, self.max_spec_offset, self.min_token_prob, tree)

    def cache(self) -> SuffixCache:
        """A new, empty cache."""
        return SuffixCache(self.suffix_depth, self.max_cached_requests, int(self.max_cached_mb * 2**20))


@dataclass(frozen=True)
class SuffixSettings(SuffixFields, SpeculativeSettings):
    """Settings of suffix decoding with chains; `draft_length` is the longest draft (max_spec_tokens)."""

    draft_length: int = field(
        default=24, metadata={"help": "most tokens of a draft; after a match of m tokens factor m + offset are drafted"}
    )
    max_draft_length: int = field(default=24, metadata={"help": "longest draft of the changing schedules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_suffix()
        if self.schedule == "confidence" or self.lossy_mix:
            raise InvalidValue("suffix drafts have no law: schedule 'confidence' and lossy_mix do not apply to them")


@dataclass(frozen=True)
class HybridSettings(SuffixFields, SpeculativeSettings):
    """Settings of suffix decoding beside a learned drafter; `draft_length` is the longest draft of either."""

    draft_length: int = field(default=24, metadata={"help": "most tokens of a suffix draft (max_spec_tokens)"})
    max_draft_length: int = field(default=24, metadata={"help": "longest draft of the changing schedules"})
    learned_length: int = field(default=5, metadata={"help": "most tokens of a draft by the learned drafter"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_suffix()
        if self.learned_length < 1:
            raise InvalidValue(f"learned_length must be at least 1, got {self.learned_length}")


@dataclass(frozen=True)
class SuffixTreeSettings(SuffixFields):
    """Settings of suffix decoding with trees."""

    nodes: int = field(default=24, metadata={"help": "most drafted nodes of a tree (max_spec_tokens)"})
    tree_depth: int = field(default=16, metadata={"help": "most levels of a tree below its root"})

    def __post_init__(self) -> None:
        self.check_suffix()
        for name in ("nodes", "tree_depth"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")


class SuffixDecoder:
    """A chain or tree decoder whose drafter looks into a cache of suffixes; keeps that cache up to date."""

    def __init__(
        self, inner: Decoder, rows: SuffixRows, *, vocabulary: str | None = None, corpus_out: Path | None = None
    ) -> None:
        """inner: decodes with a drafter made of `rows`. vocabulary: hash of the target's, for the corpus file."""
        self.inner = inner
        self.cache = rows.cache
        self._rows = rows
        self._vocabulary = vocabulary
        self._corpus_out = corpus_out
        self._calls = 0

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields what every round commits to each row; the generator's return value is the DecodeResult.

        A request's id in the cache begins with its tag: `cache.forget(tag)` erases the outputs of a session.
        """
        if requests:
            self.cache.check_room(max(r.max_new_tokens for r in requests))
        ids = [f"{r.tag}/{self._calls}/{i}" for i, r in enumerate(requests)]
        self._calls += 1
        for name, request in zip(ids, requests, strict=True):
            self.cache.start(name, request.prompt)
        running = dict(enumerate(ids))
        self._rows.announce(ids, [r.stop_ids for r in requests])
        commits = self.inner.stream(requests)
        try:
            while True:
                try:
                    commit = next(commits)
                except StopIteration as end:
                    result: DecodeResult = end.value
                    break
                self.cache.append(ids[commit.row], commit.tokens)
                if commit.stop is not None:
                    self.cache.stop(running.pop(commit.row))
                yield commit
        finally:  # also when the caller gives up the stream
            commits.close()
            for name in running.values():
                self.cache.stop(name)
        if self._corpus_out is not None:
            self.cache.write_corpus(self._corpus_out, self._vocabulary)
        budget = self._rows.budget
        result.notes["suffix"] = {
            "max_spec_tokens": budget.most,
            "max_spec_factor": budget.factor,
            "max_spec_offset": budget.offset,
            "min_token_prob": budget.least_prob,
            **self.cache.notes(),
        }
        return result


def _around(
    inner: Decoder, rows: SuffixRows, settings: SuffixFields, parts: Mapping[str, Any], rest: Mapping[str, Any]
) -> SuffixDecoder:
    vocabulary = vocabulary_hash(rest["tokenizer"])
    if settings.suffix_corpus:
        vocab_size = rest["vocab_size"] or parts["target"].spec.vocab_size
        rows.cache.read_corpus(Path(settings.suffix_corpus), vocab_size, vocabulary)
    out = Path(settings.suffix_corpus_out) if settings.suffix_corpus_out else None
    return SuffixDecoder(inner, rows, vocabulary=vocabulary, corpus_out=out)


def build_suffix(parts: Mapping[str, Any], *, settings: SuffixSettings, **rest: Any) -> SuffixDecoder:
    """For the registry."""
    drafter = SuffixDrafter(settings.cache(), settings.budget(settings.longest))
    return _around(build({**parts, "draft": drafter}, settings=settings, **rest), drafter, settings, parts, rest)


def build_hybrid(parts: Mapping[str, Any], *, settings: HybridSettings, **rest: Any) -> SuffixDecoder:
    """For the registry: the draft is an engine, or any Drafter."""
    drafter, draft = SuffixDrafter(settings.cache(), settings.budget(settings.longest)), parts["draft"]
    learned = draft if hasattr(draft, "start") else ModelDrafter(draft)
    both = HybridDrafter(drafter, learned, settings.learned_length)
    return _around(build({**parts, "draft": both}, settings=settings, **rest), drafter, settings, parts, rest)


def build_suffix_tree(parts: Mapping[str, Any], *, settings: SuffixTreeSettings, **rest: Any) -> SuffixDecoder:
    """For the registry."""
    drafter = SuffixTreeDrafter(settings.cache(), settings.budget(settings.nodes, tree=True))
    tree = TreeSettings(nodes=settings.nodes, depth=settings.tree_depth)
    inner = build_tree({**parts, "draft": drafter}, settings=tree, **rest)
    return _around(inner, drafter, settings, parts, rest)
