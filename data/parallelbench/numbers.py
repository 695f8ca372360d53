"""Number tasks of the reference's repository: domino chains, arithmetic chains, cumulative sums."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task, UniqueTask
from draftsmith.inference.errors import InvalidValue

DIGITS = tuple("123456789")


@dataclass(frozen=True)
class Domino(Task):
    """A chain of n two-digit numbers without zeros from a given one on; each begins with the last digit before it."""

    name = "domino"
    kind = "number"
    instruction = (
        "Start with the given number and make a list of {length} two-digit numbers without zeros, "
        "in which every number begins with the last digit of the number before it."
    )
    smallest = 2

    def draw(self, rng: random.Random, n: int) -> Sample:
        digits = [rng.choice(DIGITS) for _ in range(n + 1)]
        chain = tuple(a + b for a, b in itertools.pairwise(digits))
        return Sample(self.name, chain[:1], chain, None, n)

    def num_outcomes(self, sample: Sample) -> int:
        return int(len(DIGITS) ** (len(sample.reference) - 1))

    def outcomes(self, sample: Sample) -> Iterator[Answer]:
        n = len(sample.reference)

        def grow(chain: Answer) -> Iterator[Answer]:
            if len(chain) == n:
                yield chain
                return
            for digit in DIGITS:
                yield from grow((*chain, chain[-1][1] + digit))

        return grow(sample.items)

    def valid(self, sample: Sample, answer: Sequence[str]) -> bool:
        if len(answer) != len(sample.reference) or tuple(answer[:1]) != sample.items:
            return False
        two_digits = all(len(number) == 2 and set(number) <= set(DIGITS) for number in answer)
        return two_digits and all(a[1] == b[0] for a, b in itertools.pairwise(answer))

    def marginals(self, sample: Sample, known: Mapping[int, str]) -> dict[int, dict[str, float]]:
        """In closed form for any n: the digits are independent, so a neighbour fixes one of a number's two."""
        n = len(sample.reference)
        chain = {0: sample.items[0], **known}
        fits = chain[0] == sample.items[0] and all(
            i + 1 not in chain or chain[i][1] == chain[i + 1][0] for i in range(n) if i in chain
        )
        chain = chain if fits else {0: sample.items[0]}
        laws: dict[int, dict[str, float]] = {}
        for i in range(n):
            if i in known:
                continue
            if i in chain:
                laws[i] = {chain[i]: 1.0}
                continue
            first = DIGITS if i - 1 not in chain else (chain[i - 1][1],)
            last = DIGITS if i + 1 not in chain else (chain[i + 1][0],)
            laws[i] = {a + b: 1.0 / (len(first) * len(last)) for a in first for b in last}
        return laws

    def alphabet(self) -> Answer:
        return tuple(a + b for a in DIGITS for b in DIGITS)


@dataclass(frozen=True)
class Arithmetic(UniqueTask):
    """The value of a chain of sums and differences, read left to right; the answer is its n digits, one token each."""

    operations: int = 3
    name = "arithmetic"
    kind = "number"
    instruction = "Calculate the value. Answer with the number alone."

    def draw(self, rng: random.Random, n: int) -> Sample:
        low, high = 10 ** (n - 1), 10**n - 1
        values = [rng.randint(low, high)]  # every value on the way has n digits, so the answer has too
        shown = list(str(values[0]))
        for _ in range(self.operations):
            value = rng.randint(low, high)
            shown += ["+" if value >= values[-1] else "-", *str(abs(value - values[-1]))]
            values.append(value)
        return Sample(self.name, tuple(shown), tuple(str(values[-1])))

    def alphabet(self) -> Answer:
        return (*"0123456789", "+", "-")


@dataclass(frozen=True)
class CumulativeSum(UniqueTask):
    """The running totals of n digits."""

    longest: int = 24
    name = "cumulative_sum"
    kind = "number"
    instruction = "Give the list of cumulative sums."

    def draw(self, rng: random.Random, n: int) -> Sample:
        if n > self.longest:
            raise InvalidValue(f"{self.name} has n <= {self.longest}, got {n}")
        digits = [rng.randint(1, 9) for _ in range(n)]
        sums = [sum(digits[: i + 1]) for i in range(n)]
        return Sample(self.name, tuple(map(str, digits)), tuple(map(str, sums)))

    def alphabet(self) -> Answer:
        return tuple(str(value) for value in range(1, 9 * self.longest + 1))
