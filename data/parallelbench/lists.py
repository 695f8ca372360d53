"""List tasks: copy, sort, reverse, shuffle, replace, insert, remove, repeat. n is the number of items in the prompt."""

import math
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task, UniqueTask, checked_words
from draftsmith.data.parallelbench.words import NAMES
from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class ListTask:
    """A list task's names."""

    words: tuple[str, ...] = NAMES
    kind = "list"

    def alphabet(self) -> Answer:
        return self.words

    def _items(self, rng: random.Random, n: int, more: int = 0) -> list[str]:
        """n + more distinct words. Raises InvalidValue for a list with duplicates or fewer than n + 1 words."""
        name: str = self.name  # type: ignore[attr-defined]
        return rng.sample(checked_words(name, self.words, max(n + 1, n + more)), n + more)


@dataclass(frozen=True)
class Copy(ListTask, UniqueTask):
    """The same list."""

    name = "copy"
    instruction = "Copy the list."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = tuple(self._items(rng, n))
        return Sample(self.name, items, items)


@dataclass(frozen=True)
class Sort(ListTask, UniqueTask):
    """By the whole name. (The reference asks for an order by last name but scores one by the whole string.)"""

    name = "sort"
    instruction = "Sort the list in alphabetical order."

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = tuple(self._items(rng, n))
        return Sample(self.name, items, tuple(sorted(items)))


@dataclass(frozen=True)
class Reverse(ListTask, UniqueTask):
    """Last to first."""

    name = "reverse"
    instruction = "Reverse the order of the list."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = tuple(self._items(rng, n))
        return Sample(self.name, items, items[::-1])


@dataclass(frozen=True)
class Shuffle(ListTask, Task):
    """Any permutation of the items; as it is scored, the order of the prompt itself is wrong."""

    exclude_identity: bool = True
    name = "shuffle"
    instruction = "Shuffle the list: give the same items in another order."
    smallest = 2
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = tuple(self._items(rng, n))
        while True:
            answer = tuple(rng.sample(items, n))
            if answer != items or not self.exclude_identity:
                return Sample(self.name, items, answer)

    def num_outcomes(self, sample: Sample) -> int:
        return math.factorial(len(sample.items)) - self.exclude_identity

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        for answer in permutations(sample.items):
            if answer != sample.items or not self.exclude_identity:
                yield answer

    def valid(self, sample: Sample, answer: Sequence[str]) -> bool:
        same = tuple(answer) == sample.items and self.exclude_identity
        return sorted(answer) == sorted(sample.items) and not same

    def marginals(self, sample: Sample, known: Mapping[int, str]) -> dict[int, dict[str, float]]:
        """In closed form for any n: k! completions, less the identity where the known tokens allow it.

        Known tokens that repeat one, or spell the identity, leave the unused items equally likely.
        """
        n, items = len(sample.items), sample.items
        left = [item for item in items if item not in known.values()]
        opened = [i for i in range(n) if i not in known]
        k = len(opened)
        identity = self.exclude_identity and all(items[i] == token for i, token in known.items())
        if len(left) != k or k == 0 or math.factorial(k) == identity:
            return {i: {item: 1.0 / len(left) for item in left} for i in opened}
        total = math.factorial(k) - identity
        each = math.factorial(k - 1)
        return {i: {item: (each - (identity and item == items[i])) / total for item in left} for i in opened}


@dataclass(frozen=True)
class ReplaceIndex(ListTask, UniqueTask):
    """A new word at a given place."""

    name = "replace_index"
    instruction = "Replace the item at position {index} with {word}."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        *items, word = self._items(rng, n, 1)
        index = rng.randrange(n)
        return Sample(self.name, tuple(items), _replaced(items, word, index), word, index)


@dataclass(frozen=True)
class InsertIndex(ListTask, UniqueTask):
    """A new word before the item at a given place, or at the end."""

    name = "insert_index"
    instruction = "Insert {word} so that it stands at position {index}."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        *items, word = self._items(rng, n, 1)
        index = rng.randrange(n + 1)
        return Sample(self.name, tuple(items), _inserted(items, word, index), word, index)


@dataclass(frozen=True)
class RemoveIndex(ListTask, UniqueTask):
    """The list without the item at a given place."""

    name = "remove_index"
    instruction = "Remove the item at position {index}."

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = self._items(rng, n)
        index = rng.randrange(n)
        return Sample(self.name, tuple(items), _removed(items, index), None, index)


class _AnyPlace(ListTask, Task):
    """The place is free: one right answer for each."""

    def num_outcomes(self, sample: Sample) -> int:
        return len(self.places(sample))

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        for index in self.places(sample):
            yield self.done(sample, index)

    def places(self, sample: Sample) -> range:
        return range(len(sample.items))

    @abstractmethod
    def done(self, sample: Sample, index: int) -> Answer:
        """The answer that takes place `index`."""


@dataclass(frozen=True)
class ReplaceRandom(_AnyPlace):
    """A new word at any one place."""

    name = "replace_random"
    instruction = "Replace one item of your choice with {word}."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        *items, word = self._items(rng, n, 1)
        return Sample(self.name, tuple(items), _replaced(items, word, rng.randrange(n)), word)

    def done(self, sample: Sample, index: int) -> Answer:
        return _replaced(sample.items, _word(sample), index)


@dataclass(frozen=True)
class InsertRandom(_AnyPlace):
    """A new word at any of n + 1 places; everything behind it shifts, so its token-level dependence is not mild."""

    name = "insert_random"
    instruction = "Insert {word} at a position of your choice."
    skeleton = True

    def draw(self, rng: random.Random, n: int) -> Sample:
        *items, word = self._items(rng, n, 1)
        return Sample(self.name, tuple(items), _inserted(items, word, rng.randrange(n + 1)), word)

    def places(self, sample: Sample) -> range:
        return range(len(sample.items) + 1)

    def done(self, sample: Sample, index: int) -> Answer:
        return _inserted(sample.items, _word(sample), index)


@dataclass(frozen=True)
class RemoveRandom(_AnyPlace):
    """The list without any one item. Items are distinct, so the scorer may tell which one is missing."""

    name = "remove_random"
    instruction = "Remove one item of your choice."

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = self._items(rng, n)
        return Sample(self.name, tuple(items), _removed(items, rng.randrange(n)))

    def done(self, sample: Sample, index: int) -> Answer:
        return _removed(sample.items, index)


@dataclass(frozen=True)
class Repeat(ListTask, UniqueTask):
    """Every item `count` times: one after the other (each), or the whole list again and again."""

    each: bool = True
    counts: tuple[int, ...] = (2, 3)

    @property
    def name(self) -> str:  # type: ignore[override]
        return "repeat_each" if self.each else "repeat_list"

    @property
    def instruction(self) -> str:  # type: ignore[override]
        if self.each:
            return "Repeat each item {count} times, one after the other."
        return "Repeat the whole list {count} times."

    def draw(self, rng: random.Random, n: int) -> Sample:
        items = tuple(self._items(rng, n))
        count = rng.choice(self.counts)
        answer = tuple(item for item in items for _ in range(count)) if self.each else items * count
        return Sample(self.name, items, answer, None, count)


def _word(sample: Sample) -> str:
    if sample.word is None:
        raise InvalidValue(f"a sample of {sample.task} has a word, this one has none")
    return sample.word


def _replaced(items: Sequence[str], word: str, index: int) -> Answer:
    return (*items[:index], word, *items[index + 1 :])


def _inserted(items: Sequence[str], word: str, index: int) -> Answer:
    return (*items[:index], word, *items[index:])


def _removed(items: Sequence[str], index: int) -> Answer:
    return (*items[:index], *items[index + 1 :])
