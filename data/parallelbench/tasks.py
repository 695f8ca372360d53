"""What a ParallelBench task is: samples as pure functions of (seed, n), the set of right answers, exact marginals.

Source: "ParallelBench" (arXiv 2510.04767); its generators walk through one generator's state, so no sample can be made
alone. In token-level form every item is ONE token and the answer Y = (y_1 .. y_n) is nothing but items, so that the
closed forms of theory.py hold literally. Answers are uniform on the task's set of right answers.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from draftsmith.inference.errors import InvalidValue

MOST_OUTCOMES = 1_000_000
SEED_OFFSET = 42
Answer = tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One question: what the prompt says, and one answer drawn uniformly from the right ones."""

    task: str
    items: Answer  # the list, symbols, clues or words that the prompt shows
    reference: Answer
    word: str | None = None  # to insert or to put in place of another
    index: int | None = None  # 0-based place; how often to repeat; None where the place is free


class Task(ABC):
    """One row of the benchmark. Frozen; everything about a sample follows from (seed, n)."""

    name: str
    kind: str  # "list", "puzzle", "number" or "text"
    instruction: str  # `str.format` fields: word, index (counted from 1), count, length
    lengths: tuple[int, ...] = (3, 4, 5, 6)  # the standard set's n, in equal shares
    smallest: int = 1
    skeleton: bool = False  # has an infilling form: the output's frame with masks at the items alone

    @property
    def max_new_tokens(self) -> int:
        """Of the text form."""
        return 32 if self.kind in ("list", "number") else 64

    @abstractmethod
    def draw(self, rng: random.Random, n: int) -> Sample:
        """One sample of size n, from rng alone."""

    @abstractmethod
    def num_outcomes(self, sample: Sample) -> int:
        """How many answers are right, without listing them."""

    @abstractmethod
    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        """Every right answer once."""

    @abstractmethod
    def alphabet(self) -> Answer:
        """Every token that items, words and answers are made of."""

    def valid(self, sample: Sample, answer: Sequence[str]) -> bool:
        """Whether the answer is a right one."""
        return tuple(answer) in _listed(self, sample)

    def sample(self, seed: int, n: int) -> Sample:
        """The sample of (seed, n). Raises InvalidValue for an n that the task does not have."""
        if n < self.smallest:
            raise InvalidValue(f"{self.name} needs n >= {self.smallest}, got {n}")
        return self.draw(random.Random(f"{self.name}/{seed}/{n}"), n)

    def marginals(self, sample: Sample, known: Mapping[int, str]) -> dict[int, dict[str, float]]:
        """Exact p(y_i | X, known) of every open position: {position: {token: probability}}.

        What is known may contradict itself (tokens committed together can): then the law without it is given, so that a
        decoder can go on; its answer is wrong already.
        """
        found = _listed(self, sample)
        kept = [answer for answer in found if all(answer[i] == token for i, token in known.items())] or found
        laws: dict[int, dict[str, float]] = {i: {} for i in range(len(sample.reference)) if i not in known}
        share = 1.0 / len(kept)
        for answer in kept:
            for i, law in laws.items():
                law[answer[i]] = law.get(answer[i], 0.0) + share
        return laws


@lru_cache(maxsize=64)
def _listing(task: Task, sample: Sample) -> tuple[Answer, ...]:
    return tuple(task.outcomes(sample))


def _listed(task: Task, sample: Sample) -> tuple[Answer, ...]:
    """All right answers. Raises InvalidValue when there are more than a million."""
    count = task.num_outcomes(sample)
    if count > MOST_OUTCOMES:
        raise InvalidValue(
            f"{task.name} has {count} right answers here, at most {MOST_OUTCOMES} are listed: use the closed form of "
            "theory.py, or sampling"
        )
    return _listing(task, sample)


def listed(task: Task, sample: Sample) -> tuple[Answer, ...]:
    """All right answers of a sample, cached. Raises InvalidValue when there are more than a million."""
    return _listed(task, sample)


class UniqueTask(Task):
    """One answer is right: no two tokens depend on each other, given the prompt."""

    def num_outcomes(self, sample: Sample) -> int:
        return 1

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        yield sample.reference

    def valid(self, sample: Sample, answer: Sequence[str]) -> bool:
        return tuple(answer) == sample.reference


def checked_words(task: str, words: Sequence[str], needed: int) -> tuple[str, ...]:
    """The word list of a list task. Raises InvalidValue, naming the task, for a short one or one with duplicates."""
    if len(set(words)) != len(words):
        twice = sorted({word for word in words if list(words).count(word) > 1})
        raise InvalidValue(f"{task}: the word list has duplicates ({', '.join(twice[:5])}); words must be distinct")
    if len(words) < needed:
        raise InvalidValue(f"{task}: the word list has {len(words)} words, this length needs {needed} distinct ones")
    return tuple(words)


def task_seed(name: str, offset: int = SEED_OFFSET) -> int:
    """The seed of a task's standard set: (sha256 of its name + offset) mod 65535."""
    return (int(hashlib.sha256(name.encode()).hexdigest(), 16) + offset) % 65535


def standard_set(
    task: Task, num_samples: int = 100, lengths: Sequence[int] | None = None, *, offset: int = SEED_OFFSET
) -> list[Sample]:
    """`num_samples` samples, their lengths in equal shares, shortest first (100 samples of n = 3..6: 25 each).

    Sample i is `task.sample(65536 * (i + 1) + task_seed, n)`; the one-shot example of the text form is i = -1.
    Raises InvalidValue for no sample.
    """
    if num_samples < 1:
        raise InvalidValue(f"a set has at least one sample, got {num_samples}")
    sizes = tuple(lengths) if lengths is not None else task.lengths
    if not sizes:
        raise InvalidValue(f"{task.name}: give at least one length")
    base = task_seed(task.name, offset)
    return [
        task.sample(65536 * (i + 1) + base, sizes[i * len(sizes) // num_samples % len(sizes)])
        for i in range(num_samples)
    ]


def example(task: Task, n: int, *, offset: int = SEED_OFFSET) -> Sample:
    """The one-shot example: a sample of the same generator that no standard set holds."""
    return task.sample(task_seed(task.name, offset), n)
