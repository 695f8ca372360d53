"""What parallel commits cost at best: total correlation, the T-step bound, closed forms, accuracies of an ideal model.

Source: "ParallelBench" (arXiv 2510.04767), sections 2-3; remove_random, insert_random and domino are derived here.
Entropies are in bits, answers are uniform on the task's right ones, an ideal model has the exact marginals p(y_i | X,
what is committed). A partition is the ordered list of the position sets committed at each pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from draftsmith.data.parallelbench.tasks import Answer, Sample, Task, listed
from draftsmith.inference.errors import InvalidValue, UnknownKey

Partition = Sequence[Sequence[int]]


def entropy(counts: Mapping[object, int]) -> float:
    """H in bits of the law proportional to `counts`."""
    total = sum(counts.values())
    return math.log2(total) - sum(count * math.log2(count) for count in counts.values()) / total


def correlation_of(answers: Sequence[Answer], positions: Sequence[int]) -> float:
    """C(S) = sum_i H(y_i) - H(y_S) >= 0 in bits, y uniform on `answers`, S = positions."""
    alone = sum(entropy(Counter(answer[i] for answer in answers)) for i in positions)
    return alone - entropy(Counter(tuple(answer[i] for i in positions) for answer in answers))


def total_correlation(task: Task, sample: Sample) -> float:
    """C(Y | X) in bits, by listing. Raises InvalidValue for more than a million right answers: use `closed_form`."""
    return correlation_of(listed(task, sample), range(len(sample.reference)))


def partition_loss(task: Task, sample: Sample, partition: Partition) -> float:
    """L_T = sum_t E[C(S_t | X, y_{S_<t})] in bits: the least KL(data || model) of that many passes (guarantee 1).

    Raises InvalidValue unless every position stands in exactly one set.
    """
    _check(partition, len(sample.reference))
    answers = listed(task, sample)
    loss = 0.0
    done: list[int] = []
    for together in partition:
        groups: dict[Answer, list[Answer]] = {}
        for answer in answers:
            groups.setdefault(tuple(answer[i] for i in done), []).append(answer)
        loss += sum(len(group) / len(answers) * correlation_of(group, together) for group in groups.values())
        done.extend(together)
    return loss


def parallel_law(task: Task, sample: Sample, partition: Partition) -> dict[Answer, float]:
    """Probability that an ideal model, T = 1, committing the sets of `partition`, answers each of the right answers.

    One less the sum is how often it is wrong.
    """
    _check(partition, len(sample.reference))
    law = {}
    for answer in listed(task, sample):
        known: dict[int, str] = {}
        probability = 1.0
        for together in partition:
            marginals = task.marginals(sample, known)
            probability *= math.prod(marginals[i].get(answer[i], 0.0) for i in together)
            known |= {i: answer[i] for i in together}
        law[answer] = probability
    return law


def partitions(n: int, passes: int) -> Iterator[list[list[int]]]:
    """All ordered partitions of n positions into that many non-empty sets."""

    def assign(i: int, owner: list[int]) -> Iterator[list[list[int]]]:
        if i == n:
            if len(set(owner)) == passes:
                yield [[p for p in range(n) if owner[p] == t] for t in range(passes)]
            return
        for t in range(passes):
            yield from assign(i + 1, [*owner, t])

    return assign(0, [])


def best_loss(task: Task, sample: Sample, passes: int) -> float:
    """L*_T, the least loss over all partitions into `passes` sets. Raises InvalidValue for n > 6 (too many)."""
    n = len(sample.reference)
    if n > 6 or not 1 <= passes <= n:
        raise InvalidValue(f"best_loss lists partitions of at most 6 positions into 1..n passes, got n={n}, {passes}")
    return min(partition_loss(task, sample, partition) for partition in partitions(n, passes))


def _check(partition: Partition, n: int) -> None:
    if sorted(i for together in partition for i in together) != list(range(n)):
        raise InvalidValue(
            f"a partition holds each of the {n} positions once, got {[list(part) for part in partition]}"
        )


# --- closed forms of C(Y | X), n items in the prompt, one token each (guarantee 3) ---


def _binary(p: float) -> float:
    return _plogs(p, 1.0 - p)


def _plogs(*ps: float) -> float:
    return -sum(p * math.log2(p) for p in ps if p > 0.0)


def _zero(n: int) -> float:
    return 0.0


def _shuffle_all(n: int) -> float:
    return n * math.log2(n) - math.log2(math.factorial(n))


def _shuffle(n: int) -> float:
    """Identity excluded: item i stands at i with ((n-1)! - 1) / (n! - 1), elsewhere with (n-1)! / (n! - 1)."""
    total, each = math.factorial(n) - 1, math.factorial(n - 1)
    return n * _plogs((each - 1) / total, *[each / total] * (n - 1)) - math.log2(total)


def _replace(n: int) -> float:
    return (n - 1) * math.log2(n / (n - 1)) if n > 1 else 0.0


def _insert(n: int) -> float:
    return sum(_plogs(j / (n + 1), 1 / (n + 1), (n - j) / (n + 1)) for j in range(n + 1)) - math.log2(n + 1)


def _remove(n: int) -> float:
    return sum(_binary((j + 1) / n) for j in range(n - 1)) - math.log2(n)


def _domino(n: int) -> float:
    """n numbers, the first given: each of the others has two free digits alone, and together only n - 1 are free."""
    return (n - 2) * math.log2(9) if n > 1 else 0.0


CLOSED_FORMS: dict[str, Callable[[int], float]] = {
    **{name: _zero for name in ("copy", "sort", "reverse", "replace_index", "insert_index", "remove_index")},
    **{name: _zero for name in ("sudoku_n4_12", "repeat_each", "repeat_list", "arithmetic", "cumulative_sum")},
    "shuffle": _shuffle,
    "shuffle_all": _shuffle_all,
    "replace_random": _replace,
    "insert_random": _insert,
    "remove_random": _remove,
    "domino": _domino,
}


def closed_form(name: str, n: int) -> float:
    """C(Y | X) in bits of a task for n items ("shuffle_all" counts the identity too).

    Raises UnknownKey for a task without one (latin squares, words_to_sentence: use `total_correlation`).
    """
    if name not in CLOSED_FORMS:
        raise UnknownKey(f"no closed form for {name!r}: choose one of {', '.join(CLOSED_FORMS)}, or list the answers")
    return CLOSED_FORMS[name](n)


def shuffle_partition_loss(sizes: Sequence[int]) -> float:
    """L_T of shuffle (identity counted) for |S_t| = sizes: sum |S_t| log2 k_t - log2 n!, k_t items left at pass t."""
    n, loss, left = sum(sizes), 0.0, sum(sizes)
    for size in sizes:
        loss += size * math.log2(left)
        left -= size
    return loss - math.log2(math.factorial(n))


# --- accuracies of an ideal model (guarantee 5) ---


def shuffle_accuracy(n: int, k: int) -> float:
    """k per pass, any choice, sampled or greedy with ties at random: prod_i P(n_i, k_i) / n_i^k_i, n_i items left."""
    accuracy, left = 1.0, n
    while left:
        size = min(k, left)
        accuracy *= math.perm(left, size) / left**size
        left -= size
    return accuracy


def replace_accuracy(n: int) -> float:
    """replace_random in one pass at T = 1: ((n-1)/n)^(n-1)."""
    return ((n - 1) / n) ** (n - 1)
