"""ADED: token trees out of a tri-gram table that learns from the target while it decodes.

"Adaptive Draft-Verification for Efficient Large Language Model Decoding" (AAAI 2025). The tree decoder verifies the
trees (deterministic rule: the law is the target's whatever the table holds); here the table is updated with the
likeliest tokens of the target's law BEFORE temperature, so that one table serves all temperatures.
"""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.session import drain
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.drafters.ngram import SEARCHES, NgramDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidType, InvalidValue, unknown_choice
from draftsmith.inference.ngram_table import AdaptiveTable, K, NgramTable, empty_table
from draftsmith.inference.requests import Commit, DecodeResult, Recorder, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_settings import TreeSettings
from draftsmith.inference.tree_verification import TreeVerdict

ADAPT = ("process", "call", "never")
LEARN = ("committed", "verified")
UNSEEN_PAIR = ("bigram", "none")
_AT_ONCE = 64  # prompt positions whose laws are made at once


@dataclass(frozen=True)
class AdedSettings:
    """Settings of ADED."""

    search: str = field(
        default="heap",
        metadata={
            "help": "how trees grow. heap: the likeliest paths, exact. mcts: walks that also favour what was rarely "
            "visited. path: one chain",
            "choices": SEARCHES,
        },
    )
    nodes: int = field(default=32, metadata={"help": "most drafted nodes of a tree"})
    depth: int = field(default=6, metadata={"help": "most levels of a tree below its root"})
    iterations: int = field(default=150, metadata={"help": "search mcts: walks per tree"})
    explore_c1: float = field(default=1.0, metadata={"help": "search mcts: weight of exploration"})
    explore_c2: float = field(default=100.0, metadata={"help": "search mcts: visits after which exploration grows"})
    adapt: str = field(
        default="process",
        metadata={
            "help": "how long the table remembers what the target said. process: as long as the decoder; requests then "
            "share it. call: one decode call. never: the table as it was built",
            "choices": ADAPT,
        },
    )
    learn: str = field(
        default="committed",
        metadata={
            "help": "what updates the table. committed: the positions that a round committed. verified: every node "
            "that the target looked at, which learns sooner and costs an update a node",
            "choices": LEARN,
        },
    )
    learn_prompt: int = field(
        default=512,
        metadata={"help": "last tokens of a prompt that the table learns from, too, at the price of the head; 0: none"},
    )
    unseen_pair: str = field(
        default="bigram",
        metadata={
            "help": "behind two tokens never seen together. bigram: what followed the last one. none: nothing",
            "choices": UNSEEN_PAIR,
        },
    )
    eta: float = field(default=0.5, metadata={"help": "rate of an update, above 0 to 1"})
    capacity: int = field(default=2_000_000, metadata={"help": "most keys that are learned; the oldest go first"})
    top: int = field(default=K, metadata={"help": "entries of a key where no table is given (K)"})
    lookup_length: int = field(
        default=0, metadata={"help": "tokens copied from the row's own text and merged into the tree; 0: none"}
    )

    def __post_init__(self) -> None:
        if self.adapt not in ADAPT:
            raise unknown_choice("adapt", self.adapt, ADAPT)
        if self.learn not in LEARN:
            raise unknown_choice("learn", self.learn, LEARN)
        if self.unseen_pair not in UNSEEN_PAIR:
            raise unknown_choice("unseen_pair", self.unseen_pair, UNSEEN_PAIR)
        if self.learn_prompt < 0:
            raise InvalidValue(f"learn_prompt must be at least 0, got {self.learn_prompt}")
        for name in ("nodes", "depth", "top"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")
        self.drafter(self.adaptive(empty_table(1)), None)

    def adaptive(self, base: NgramTable) -> AdaptiveTable:
        """Raises InvalidValue for values out of their range."""
        return AdaptiveTable(base, self.eta, self.capacity, bigrams=self.unseen_pair == "bigram")

    def drafter(self, table: AdaptiveTable, pad: int | None) -> NgramDrafter:
        """Raises InvalidValue for values out of their range."""
        return NgramDrafter(
            table,
            search=self.search,
            iterations=self.iterations,
            explore=(self.explore_c1, self.explore_c2),
            lookup_length=self.lookup_length,
            pad=pad,
        )


class EmptyTableWarning(UserWarning):
    """Nothing to draft from, now or later."""


class AdedDecoder:
    """The tree decoder with a table that follows the target."""

    def __init__(
        self,
        target: Engine,
        table: NgramTable | None = None,
        *,
        sampling: SamplingParams | None = None,
        settings: AdedSettings | None = None,
        seed: int = 0,
        tokenizer: Any | None = None,
        recorder: Recorder | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """table: None begins with an empty one; an EmptyTableWarning where it may not learn either."""
        settings = settings or AdedSettings()
        if table is None:
            table = empty_table(vocab_size or target.spec.vocab_size, settings.top)
        if not len(table) and settings.adapt == "never":
            warnings.warn(
                "the n-gram table is empty and adapt is 'never': nothing will be drafted; give a table (--draft), or "
                "let it learn",
                EmptyTableWarning,
                stacklevel=2,
            )
        self.table = settings.adaptive(table)
        self._settings = settings
        self._drafter = settings.drafter(self.table, getattr(tokenizer, "bos_token_id", None))
        self._inner = TreeDecoder(
            target,
            self._drafter,
            sampling=sampling,
            settings=TreeSettings(nodes=settings.nodes, depth=settings.depth),
            seed=seed,
            tokenizer=tokenizer,
            recorder=recorder,
            vocab_size=vocab_size,
            listener=None if settings.adapt == "never" else self._learn,
            reader=None if settings.adapt == "never" or not settings.learn_prompt else self._read,
        )

    def decode(self, requests: Sequence[TokenRequest]) -> DecodeResult:
        """Decode all requests as one batch."""
        return drain(self.stream(requests))

    def stream(self, requests: Sequence[TokenRequest]) -> Generator[Commit, None, DecodeResult]:
        """Yields what every round commits to each row; the generator's return value is the DecodeResult."""
        if self._settings.adapt == "call":
            self.table.forget()
        before = self.table.updates
        result = yield from self._inner.stream(requests)
        s = self._settings
        result.notes["aded"] = {
            "search": s.search,
            "nodes": s.nodes,
            "depth": s.depth,
            "adapt": s.adapt,
            "learn": s.learn,
            "learn_prompt": s.learn_prompt,
            "unseen_pair": s.unseen_pair,
            "eta": s.eta,
            "k": self.table.base.k,
            "table_keys": len(self.table.base),
            "learned_keys": self.table.learned,
            "updates": self.table.updates - before,
            **({"iterations": s.iterations, "c1": s.explore_c1, "c2": s.explore_c2} if s.search == "mcts" else {}),
        }
        return result

    def _read(self, logits: Callable[[slice], Tensor], texts: Sequence[Sequence[int]]) -> None:
        """Update the keys of the prompts' last tokens, their very last ones aside: those are the first roots."""
        ends = [len(text) - 1 for text in texts]
        starts = [max(0, end - self._settings.learn_prompt) for end in ends]
        for first in range(min(starts), max(ends), _AT_ONCE):
            last = min(first + _AT_ONCE, max(ends))
            laws = logits(slice(first, last)).float().softmax(-1)
            best = laws.topk(min(self.table.base.k, laws.shape[-1]), -1)
            tokens, probs = best.indices.tolist(), best.values.tolist()
            for b, text in enumerate(texts):
                for j in range(max(first, starts[b]), min(last, ends[b])):
                    a = text[j - 1] if j else self.table.base.vocab_size
                    self.table.update(a, text[j], tokens[b][j - first], probs[b][j - first])

    def _learn(
        self, tree: Tree, verdict: TreeVerdict, logits: Tensor, live: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> None:
        """Update the keys of the nodes that the round committed, or of all nodes that the target looked at."""
        k = min(self.table.base.k, logits.shape[-1])
        if self._settings.learn == "committed":
            nodes, counts = verdict.path, verdict.k + 1
            if logits.device.type == "cpu":  # elsewhere asking for the longest path would be one more wait
                nodes = nodes[:, : int(counts.max())]
            logits = logits.gather(1, nodes.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        else:
            nodes, counts = torch.arange(tree.width, device=logits.device).expand(tree.batch, -1), tree.size
        top = logits.float().softmax(-1).topk(k, -1)
        last = tree.tokens.gather(1, nodes)
        before = tree.tokens.gather(1, tree.parent.gather(1, nodes).clamp_min(0))
        key = torch.stack([counts.unsqueeze(1).expand_as(nodes), before, last], -1)
        read = torch.cat([key.double(), top.indices.double(), top.values.double()], -1).tolist()  # one wait
        for b in live:
            for j, (count, before_, last_, *said) in enumerate(read[b]):
                if j >= count:
                    break
                a = int(before_)
                if j == 0:  # the root, behind whatever stands in the text before it
                    a = texts[b][-2] if len(texts[b]) > 1 else self.table.base.vocab_size
                self.table.update(a, int(last_), [int(t) for t in said[:k]], said[k:])


def build(
    parts: Mapping[str, Any],
    *,
    sampling: SamplingParams | None,
    settings: AdedSettings,
    seed: int,
    tokenizer: Any | None,
    recorder: Recorder | None,
    costs: CostCurve | None,
    vocab_size: int | None,
) -> AdedDecoder:
    """For the registry: the draft, where there is one, is an `NgramTable` or a drafter over one."""
    table = parts.get("draft")
    if isinstance(table, NgramDrafter):
        table = table.table
    if isinstance(table, AdaptiveTable):
        table = table.base
    if table is not None and not isinstance(table, NgramTable):
        raise InvalidType(
            f"decoder 'aded' drafts from an n-gram table, got a {type(table).__name__}: build one with 'draftsmith "
            "ngram', or use decoder 'tree' with this draft"
        )
    return AdedDecoder(
        parts["target"],
        table,
        sampling=sampling,
        settings=settings,
        seed=seed,
        tokenizer=tokenizer,
        recorder=recorder,
        vocab_size=vocab_size,
    )
