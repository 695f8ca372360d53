"""Drafts from counted suffixes of the request's own text and of earlier outputs: a chain, a tree, or beside a model.

"SuffixDecoding" (NeurIPS 2025, arXiv 2411.04975), sections 3 and 4. Drafts are deterministic, so the token rule with a
one-hot q verifies them. Who drafts must tell the cache what was committed: decoders/suffix.py does.
Shape letters: B batch, g draft length, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.acceptance import one_hot
from draftsmith.inference.drafters.base import Drafter, DraftSession, DraftTask, Proposal
from draftsmith.inference.drafters.tree_base import TreeTask
from draftsmith.inference.drafters.tree_shapes import ShapeSession
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.ngram_search import Shape
from draftsmith.inference.sampling import PenaltyState
from draftsmith.inference.suffix_cache import SuffixCache
from draftsmith.inference.suffix_tree import NOTHING, Budget, Draft

_MEMORY = 0.9  # of the running mean of what the learned drafter gets accepted


class SuffixRows:
    """The rows of one decode call: which request of the cache each is, and where its drafts end."""

    def __init__(self, cache: SuffixCache, budget: Budget) -> None:
        self.cache = cache
        self.budget = budget
        self._ids: list[str] = []
        self._stops: list[frozenset[int]] = []

    def announce(self, ids: Sequence[str], stop_ids: Sequence[Iterable[int]]) -> None:
        """The requests of the next decode call, in its order; they must be running in the cache."""
        self._ids = list(ids)
        self._stops = [frozenset(s) for s in stop_ids]

    def rows(self, count: int) -> "SuffixRows":
        """Rows of a call that starts now."""
        if len(self._ids) != count:
            raise InvalidValue(
                f"{len(self._ids)} requests were announced to the suffix drafter and {count} are decoded: build it "
                "with registry.build, whose decoder announces them"
            )
        mine = SuffixRows(self.cache, self.budget)
        mine.announce(self._ids, self._stops)
        return mine

    def select(self, rows: Sequence[int]) -> None:
        self._ids = [self._ids[r] for r in rows]
        self._stops = [self._stops[r] for r in rows]

    def draft(self, row: int, want: int) -> Draft:
        """At most `want` tokens, none behind a stop id."""
        if want <= 0:
            return NOTHING
        found = self.cache.speculate(self._ids[row], replace(self.budget, most=min(want, self.budget.most)))
        stops = self._stops[row]
        if not stops.intersection(found.tokens):
            return found
        kept: dict[int, int] = {-1: -1}  # old index -> new, for what has no stop above it
        tokens: list[int] = []
        parent: list[int] = []
        probs: list[float] = []
        for i, (token, above, p) in enumerate(zip(found.tokens, found.parent, found.probs, strict=True)):
            if above in kept:
                tokens.append(token)
                parent.append(kept[above])
                probs.append(p)
                if token not in stops:
                    kept[i] = len(tokens) - 1
        return Draft(tokens, parent, probs, found.match)


class SuffixDrafter(SuffixRows):
    """A chain drafter without a network."""

    vocab_size: int | None = None
    tokenizer: Any | None = None

    def start(self, task: DraftTask) -> "SuffixSession":
        if task.confidence is not None or task.want_law:
            raise InvalidValue("suffix drafts have no law: schedule 'confidence' and lossy_mix need one")
        return SuffixSession(self.rows(task.rows), task)


class SuffixSession:
    """One decode call's chains."""

    def __init__(self, rows: SuffixRows, task: DraftTask) -> None:
        self.calls = 0
        self._rows = rows
        self._task = task

    def room(self, length: int) -> int:
        return self._task.longest

    def drafts(self, want: Sequence[int]) -> list[Draft]:
        return [self._rows.draft(b, n) for b, n in enumerate(want)]

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        return self.proposal([d.tokens for d in self.drafts(want)])

    def proposal(self, drafts: Sequence[Sequence[int]]) -> Proposal | None:
        g = max(map(len, drafts))
        if g == 0:
            return None
        rows = [[len(d), *d, *[0] * (g - len(d))] for d in drafts]
        both = host_tensor(rows, self._task.device)
        return Proposal(both[:, 1:], both[:, 0], None)

    def commit(self, lengths: Sequence[int]) -> None:
        """Nothing to forget: the cache holds committed tokens only."""

    def select(self, rows: Sequence[int]) -> None:
        self._rows.select(rows)


class SuffixTreeDrafter(SuffixRows):
    """A tree drafter without a network: the likeliest continuations of the best match."""

    aux_layers: tuple[int, ...] = ()
    vocab_size: int | None = None
    tokenizer: Any | None = None

    def start(self, task: TreeTask) -> "SuffixTreeSession":
        return SuffixTreeSession(self.rows(task.rows), task)


class SuffixTreeSession(ShapeSession):
    """One decode call's trees."""

    def __init__(self, rows: SuffixRows, task: TreeTask) -> None:
        super().__init__(task)
        self._rows = rows

    def shape(self, row: int, text: Sequence[int], nodes: int, depth: int) -> Shape:
        draft = self._rows.draft(row, nodes)
        return draft.tokens, draft.parent

    def select(self, rows: Sequence[int]) -> None:
        self._rows.select(rows)


class HybridDrafter:
    """Suffix drafts where they promise more than a learned drafter has lately brought; else the learned drafter.

    A row takes its suffix draft when the draft's score is above the running mean of what the learned drafter got
    accepted in that row (at first: above its draft length). Rounds in which no row needs the learned drafter skip it;
    it reads what it missed when it is asked next.
    """

    def __init__(self, suffix: SuffixDrafter, learned: Drafter, learned_length: int = 5) -> None:
        """learned_length: most tokens that the learned drafter is asked for."""
        self.suffix = suffix
        self.learned = learned
        self._length = learned_length

    @property
    def vocab_size(self) -> int | None:
        return self.learned.vocab_size

    @property
    def tokenizer(self) -> Any | None:
        return self.learned.tokenizer

    def start(self, task: DraftTask) -> "HybridSession":
        length = min(self._length, task.longest)
        learned = self.learned.start(replace(task, longest=length))
        return HybridSession(SuffixSession(self.suffix.rows(task.rows), task), learned, task, length)


class HybridSession:
    """One decode call of both."""

    def __init__(self, suffix: SuffixSession, learned: DraftSession, task: DraftTask, length: int) -> None:
        self._suffix = suffix
        self._length = length
        self._learned = learned
        self._task = task
        self._mean = [float(length)] * task.rows  # accepted per round of the learned drafter
        self._before: list[int] | None = None  # lengths of the rows when the learned drafter drafted last
        self._by_learned = [False] * task.rows

    @property
    def calls(self) -> int:
        return self._learned.calls

    def room(self, length: int) -> int:
        return self._learned.room(length)

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        drafts = self._suffix.drafts(want)
        chosen = [bool(d.tokens) and d.score > mean for d, mean in zip(drafts, self._mean, strict=True)]
        self._by_learned = [bool(n) and not c for n, c in zip(want, chosen, strict=True)]
        self._before = [len(t) for t in tokens]
        if not any(self._by_learned):
            return self._suffix.proposal([d.tokens for d in drafts])
        short = [min(n, self._length) for n in want]
        made = self._learned.propose(tokens, short, None if u is None else u[:, : max(short)], penalties)
        if made is None:
            return self._suffix.proposal([d.tokens if c else [] for d, c in zip(drafts, chosen, strict=True)])
        device = self._task.device
        n = host_tensor([short], device)[0] if made.n is None else made.n
        if not any(chosen):
            return Proposal(made.tokens, n, made.law)
        g = max(made.tokens.shape[1], *(len(d.tokens) for d, c in zip(drafts, chosen, strict=True) if c))
        taken = [d.tokens if c else [] for d, c in zip(drafts, chosen, strict=True)]
        rows = host_tensor([[len(t), *t, *[0] * (g - len(t))] for t in taken], device)
        here = rows[:, 0] > 0
        more = g - made.tokens.shape[1]
        ids = torch.where(here.unsqueeze(1), rows[:, 1:], torch.nn.functional.pad(made.tokens, (0, more)))
        law = made.law
        if law is not None:  # a draft that is certain of its token is a law too
            wide = torch.nn.functional.pad(law, (0, 0, 0, more))
            law = torch.where(here[:, None, None], one_hot(ids, wide), wide)
        return Proposal(ids, torch.where(here, rows[:, 0], n), law)

    def commit(self, lengths: Sequence[int]) -> None:
        if self._before is not None:
            for b, (old, new) in enumerate(zip(self._before, lengths, strict=True)):
                if self._by_learned[b] and new > old:
                    self._mean[b] = _MEMORY * self._mean[b] + (1 - _MEMORY) * (new - old - 1)
        self._before = None
        self._learned.commit(lengths)

    def select(self, rows: Sequence[int]) -> None:
        self._suffix.select(rows)
        self._learned.select(rows)
        self._mean = [self._mean[r] for r in rows]
