"""A counted suffix tree over token sequences, bounded in depth, that grows a token at a time and forgets sequences.

"SuffixDecoding" (NeurIPS 2025, arXiv 2411.04975), section 3. A node stands for a string of at most D tokens and counts
its occurrences. What occurs once is not spelled out: it is a leaf, a reference into the sequence that holds it, which
grows with that sequence at no cost and becomes a node once a second occurrence comes by. So a token costs O(D) steps
at most, and a text without repetitions one leaf a token.

D depth bound, m match length, p the probability of a drafted token: the product of count(child) / count(parent) from
the matched node down to it. Equal counts are decided by the smaller token id, so the tree's answers are a function of
what it holds, not of the order in which it came.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from draftsmith.inference.errors import InvalidState, InvalidValue

# By tracemalloc over code and over random text (CPython 3.12); only for the estimate `bytes`.
NODE_BYTES, LEAF_BYTES, TOKEN_BYTES = 270, 106, 36
_EPSILON = 1e-6


class _Text:
    """One sequence, and the nodes at which the suffixes end that are not inside a leaf: start -> node."""

    __slots__ = ("ends", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: dict[int, _Node] | None = {}  # None once nothing more comes


class _Node:
    __slots__ = ("best", "children", "count")

    def __init__(self, count: int) -> None:
        self.count = count
        self.children: dict[int, _Child] = {}
        self.best = -1  # the child with the highest count; -1: no child


_Leaf = tuple[
    _Text, int
]  # a string that occurs once: it ends with this token of the text, and goes on as the text does
_Child = _Node | _Leaf


@dataclass(frozen=True)
class Draft:
    """Proposed continuation of a context, by the best of its matches."""

    tokens: list[int]
    parent: list[int]  # of each token, an index into `tokens`; -1: the context itself. A chain: -1, 0, 1, ...
    probs: list[float]
    match: int  # m, how many context tokens were matched; 0: nothing was

    @property
    def score(self) -> float:
        """Estimated accepted tokens: the sum of the probabilities."""
        return sum(self.probs)


NOTHING = Draft([], [], [], 0)


@dataclass(frozen=True)
class Budget:
    """How much is drafted after a match of m tokens, min(most, floor(factor m + offset)), and what is left out."""

    most: int = 24  # max_spec_tokens
    factor: float = 1.0  # alpha; 2 to 4 is aggressive
    offset: float = 0.0  # beta; negative suppresses drafts from short matches
    least_prob: float = 0.1  # min_token_prob
    tree: bool = False  # the likeliest tokens of all continuations, not one chain

    def __post_init__(self) -> None:
        if self.most < 0:
            raise InvalidValue(f"the most tokens of a draft must be at least 0, got {self.most}")
        if not self.factor >= 0:
            raise InvalidValue(f"max_spec_factor must be at least 0, got {self.factor}")
        if not 0 <= self.least_prob <= 1:
            raise InvalidValue(f"min_token_prob lies between 0 and 1, got {self.least_prob}")

    def tokens(self, match: int) -> int:
        return max(0, min(self.most, int(self.factor * match + self.offset + _EPSILON)))


class SuffixTree:
    """Counts every string of at most `depth` tokens that occurs in its sequences."""

    def __init__(self, depth: int = 24) -> None:
        if depth < 2:
            raise InvalidValue(f"the depth of a suffix tree must be at least 2 (a token and what follows), got {depth}")
        self.depth = depth
        self.nodes = self.leaves = self.tokens = 0
        self._root = _Node(0)
        self._texts: dict[int, _Text] = {}

    @property
    def bytes(self) -> int:
        """Estimate of the memory held."""
        return self.nodes * NODE_BYTES + self.leaves * LEAF_BYTES + self.tokens * TOKEN_BYTES

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._texts

    def text(self, sequence: int) -> list[int]:
        """The tokens of a sequence. Raises InvalidState for an id that is not there."""
        if sequence not in self._texts:
            raise InvalidState(f"sequence {sequence} is not in the suffix tree")
        return self._texts[sequence].tokens

    # Growing and forgetting

    def append(self, sequence: int, tokens: Sequence[int]) -> None:
        """Let a sequence go on (a new id begins one). Raises InvalidState for one that was ended."""
        text = self._texts.setdefault(sequence, _Text())
        if text.ends is None:
            raise InvalidState(f"sequence {sequence} was ended: its suffixes are no longer followed")
        for token in tokens:
            self._push(text, token)

    def end(self, sequence: int) -> None:
        """Nothing more comes of this sequence; it stays counted."""
        self._texts[sequence].ends = None

    def _push(self, text: _Text, token: int) -> None:
        assert text.ends is not None
        i = len(text.tokens)
        text.tokens.append(token)
        self.tokens += 1
        self._root.count += 1
        text.ends[i] = self._root
        deeper: dict[int, _Node] = {}
        for start, node in text.ends.items():
            depth = i - start + 1
            child = node.children.get(token)
            if child is None:
                node.children[token] = (text, i)
                self.leaves += 1
                count = 1
            else:
                if isinstance(child, tuple):
                    child = self._spell_out(node, token, child, depth)
                child.count += 1
                count = child.count
                if depth < self.depth:
                    deeper[start] = child
            if node.best != token and (
                node.best < 0 or (count, -token) > (_count(node.children[node.best]), -node.best)
            ):
                node.best = token
        text.ends = deeper

    def _spell_out(self, node: _Node, token: int, leaf: _Leaf, depth: int) -> _Node:
        """A leaf becomes a node at `depth`; what it referred to goes on below it."""
        text, at = leaf
        made = _Node(1)
        node.children[token] = made
        self.nodes += 1
        self.leaves -= 1
        if depth < self.depth:
            if at + 1 < len(text.tokens):
                following = text.tokens[at + 1]
                made.children[following] = (text, at + 1)
                made.best = following
                self.leaves += 1
            elif text.ends is not None:
                text.ends[at + 1 - depth] = made
        return made

    def remove(self, sequence: int) -> None:
        """Take a sequence out of all counts. Raises InvalidState for an id that is not there."""
        tokens = self.text(sequence)
        del self._texts[sequence]
        self.tokens -= len(tokens)
        for start in range(len(tokens)):
            node = self._root
            node.count -= 1
            for token in tokens[start : start + self.depth]:
                child = node.children[token]
                if isinstance(child, tuple) or child.count == 1:
                    self._drop(child)
                    del node.children[token]
                    _choose(node, token)
                    break
                child.count -= 1
                _choose(node, token)
                node = child

    def _drop(self, child: _Child) -> None:
        while isinstance(child, _Node):  # counted once: one path
            self.nodes -= 1
            if not child.children:
                return
            (child,) = child.children.values()
        self.leaves -= 1

    # Looking up

    def _find(self, tail: list[int], length: int) -> _Child | None:
        """Where the last `length` tokens of `tail` end, None where they do not occur."""
        node = self._root
        for i in range(len(tail) - length, len(tail)):
            child = node.children.get(tail[i])
            if child is None:
                return None
            if isinstance(child, tuple):
                text, at = child
                rest = tail[i + 1 :]
                return (text, at + len(rest)) if text.tokens[at + 1 : at + 1 + len(rest)] == rest else None
            node = child
        return node

    def count(self, string: Sequence[int]) -> int:
        """How often a string of 1..depth tokens occurs."""
        found = self._find(list(string), len(string)) if 0 < len(string) <= self.depth else None
        return 0 if found is None else _count(found)

    def match(self, context: Sequence[int]) -> int:
        """Tokens of the longest suffix of the context that occurs, at most `depth`."""
        tail = list(context[-self.depth :])
        for m in range(1, len(tail) + 1):
            if self._find(tail, m) is None:  # longer ones hold this one
                return m - 1
        return len(tail)

    def speculate(self, context: Sequence[int], budget: Budget) -> Draft:
        """The continuation of highest score over all match lengths; ties prefer the longer match.

        O(D^2 + D budget) steps, whatever the tree holds.
        """
        best, score = NOTHING, 0.0
        tail = list(context[-self.depth :])
        for m in range(1, len(tail) + 1):
            place = self._find(tail, m)
            if place is None:
                break
            if isinstance(place, tuple) and place[1] + 1 >= len(place[0].tokens):
                break  # it occurs once, at the end of a sequence: nothing follows it or anything longer
            size = budget.tokens(m)
            if size:
                found = self._tree(place, m, size, budget) if budget.tree else self._chain(place, m, size, budget)
                if found.tokens and found.score >= score:
                    best, score = found, found.score
        return best

    def _chain(self, place: _Child, match: int, size: int, budget: Budget) -> Draft:
        tokens: list[int] = []
        probs: list[float] = []
        size = min(size, self.depth - match)
        p = 1.0
        while len(tokens) < size:
            if isinstance(place, tuple):
                text, at = place
                rest = text.tokens[at + 1 : at + 1 + size - len(tokens)]
                tokens += rest
                probs += [p] * len(rest)
                break
            if place.best < 0:
                break
            child = place.children[place.best]
            p *= _count(child) / place.count
            if p < budget.least_prob:
                break
            tokens.append(place.best)
            probs.append(p)
            place = child
        return Draft(tokens, list(range(-1, len(tokens) - 1)), probs, match)

    def _tree(self, place: _Child, match: int, size: int, budget: Budget) -> Draft:
        tokens: list[int] = []
        parent: list[int] = []
        probs: list[float] = []
        heap: list[tuple[float, int, int, int, int]] = []  # -p, order of arrival, token, parent, depth
        places: list[_Child] = []  # by order of arrival

        def offer(place: _Child, p: float, above: int, depth: int) -> None:
            if depth >= self.depth:
                return
            if isinstance(place, tuple):
                text, at = place
                following: list[tuple[int, float, _Child]] = []
                if at + 1 < len(text.tokens):
                    following.append((text.tokens[at + 1], p, (text, at + 1)))
            else:
                least = budget.least_prob * place.count / p
                some = [(t, _count(child), child) for t, child in place.children.items() if _count(child) >= least]
                some.sort(key=lambda entry: (-entry[1], entry[0]))
                following = [(t, p * count / place.count, child) for t, count, child in some[:size]]
            for token, chance, child in following:
                if chance >= budget.least_prob:
                    heapq.heappush(heap, (-chance, len(places), token, above, depth + 1))
                    places.append(child)

        offer(place, 1.0, -1, match)
        while heap and len(tokens) < size:
            chance, arrival, token, above, depth = heapq.heappop(heap)
            tokens.append(token)
            parent.append(above)
            probs.append(-chance)
            offer(places[arrival], -chance, len(tokens) - 1, depth)
        return Draft(tokens, parent, probs, match)

    def strings(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Every string in the tree with its count; for tests and small trees."""
        stack: list[tuple[tuple[int, ...], _Child]] = [((t,), child) for t, child in self._root.children.items()]
        while stack:
            string, place = stack.pop()
            yield string, _count(place)
            if len(string) == self.depth:
                continue
            if isinstance(place, tuple):
                text, at = place
                if at + 1 < len(text.tokens):
                    stack.append(((*string, text.tokens[at + 1]), (text, at + 1)))
            else:
                stack += [((*string, t), child) for t, child in place.children.items()]


def _count(child: _Child) -> int:
    return 1 if isinstance(child, tuple) else child.count


def _choose(node: _Node, changed: int) -> None:
    """`best` after the count of a child fell (or it went)."""
    if node.best == changed:
        children = node.children
        node.best = min(children, key=lambda token: (-_count(children[token]), token)) if children else -1
