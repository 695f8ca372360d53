"""Verification rules in rational arithmetic, by enumeration of every draft: the reference that shipped code is held to.

Laws depend on the whole prefix and are drawn as normalised integers 0..9, zeros included. A chain is a tree of one
child per node; a tree's drafts are enumerated by recursion, so any decision rule can be followed exactly.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

Law = tuple[Fraction, ...]
Table = dict[tuple[int, ...], Law]  # prefix -> law of the next token
ONE, ZERO = Fraction(1), Fraction(0)
MUTANTS = ("residual without w", "break at the first failure", "w as h", "product of clamped ratios")


def random_law(rng: random.Random, vocab: int) -> Law:
    while True:
        weights = [rng.randint(0, 9) for _ in range(vocab)]
        if sum(weights):
            return tuple(Fraction(w, sum(weights)) for w in weights)


def random_table(rng: random.Random, vocab: int, length: int) -> Table:
    """A law at every prefix of at most `length` tokens."""
    prefixes = (x for n in range(length + 1) for x in itertools.product(range(vocab), repeat=n))
    return {x: random_law(rng, vocab) for x in prefixes}


def normalised(weights: list[Fraction]) -> Law:
    total = sum(weights)
    return tuple(w / total for w in weights)


def excess(w: Fraction, p: Law, q: Law) -> list[Fraction]:
    return [max(w * a - b, ZERO) for a, b in zip(p, q, strict=True)]


def string_law(p: Table, vocab: int, length: int) -> dict[tuple[int, ...], Fraction]:
    """The law of `length` tokens sampled from the target."""
    laws = {(): ONE}
    for _ in range(length):
        laws = {(*x, t): mass * p[x][t] for x, mass in laws.items() for t in range(vocab)}
    return laws


def completed(emitted: dict[tuple[int, ...], Fraction], p: Table, vocab: int, length: int) -> dict:
    """The law of the first `length` tokens when what was emitted is continued by sampling from the target."""
    law = {}
    for z in itertools.product(range(vocab), repeat=length):
        total, free = ZERO, ONE
        for i in range(length, 0, -1):  # emitted z[:i], the rest sampled
            total += emitted.get(z[:i], ZERO) * free
            free *= p[z[: i - 1]][z[i - 1]]
        law[z] = total
    return law


def weights_of(x: tuple[int, ...], p: Table, q: Table, clamped: bool = False) -> list[Fraction]:
    """w_0..w_g of one draft; clamped: the wrong product, of ratios each clamped to 1."""
    w = [ONE]
    for i, token in enumerate(x):
        ratio = p[x[:i]][token] / q[x[:i]][token]
        w.append(w[-1] * min(ONE, ratio) if clamped else min(ONE, w[-1] * ratio))
    return w


def tests_of(x: tuple[int, ...], p: Table, q: Table, w: list[Fraction]) -> list[Fraction]:
    """h_0..h_g of one draft."""
    h = [ONE]
    for i in range(1, len(x)):
        mass = sum(excess(w[i], p[x[:i]], q[x[:i]]))
        h.append(mass / (mass + 1 - w[i]) if mass + 1 - w[i] else ONE)
    return [*h, w[-1]] if x else h


def block_rule(p: Table, q: Table, vocab: int, g: int, mutant: str | None = None) -> tuple[dict, Fraction]:
    """What the block rule emits (prefix and extra token -> probability) and its expected accepted length."""
    emitted: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    length = ZERO
    for x in itertools.product(range(vocab), repeat=g):
        drafted = ONE
        for i, token in enumerate(x):
            drafted *= q[x[:i]][token]
        if not drafted:
            continue
        w = weights_of(x, p, q, clamped=mutant == "product of clamped ratios")
        h = w if mutant == "w as h" else tests_of(x, p, q, w)
        for k in range(g + 1):
            chance = drafted * h[k]
            if mutant == "break at the first failure":
                for i in range(1, k):
                    chance *= h[i]
                if k < g:
                    chance *= 1 - h[k + 1]
            else:
                for i in range(k + 1, g + 1):
                    chance *= 1 - h[i]
            if not chance:
                continue
            law = p[x]
            if k < g:
                weight = ONE if mutant == "residual without w" else w[k]
                rest = excess(weight, p[x[:k]], q[x[:k]])
                law = normalised(rest) if sum(rest) else p[x[:k]]
            length += chance * k
            for t in range(vocab):
                emitted[*x[:k], t] += chance * (law[t] if k < g else p[x][t])
    return emitted, length


def token_rule_length(p: Table, q: Table, vocab: int, g: int) -> Fraction:
    """Expected accepted length of testing one token after the other."""
    length = ZERO
    for x in itertools.product(range(vocab), repeat=g):
        drafted = passed = ONE
        for i, token in enumerate(x):
            if not q[x[:i]][token]:
                break
            drafted *= q[x[:i]][token]
            passed *= min(ONE, p[x[:i]][token] / q[x[:i]][token])
            # the tokens behind i sum to one
            rest = vocab ** (g - i - 1)
            length += drafted * passed / rest
    return length


Shape = dict[int, list[int]]  # node -> children in drafting order; node 0 is the root
SHAPES: dict[str, Shape] = {
    "chain of 3": {0: [1], 1: [2], 2: [3]},
    "two siblings": {0: [1, 2]},
    "2x2": {0: [1, 2], 1: [3, 4], 2: [5, 6]},
    "spine with a sibling": {0: [1, 3], 1: [2]},
    "skewed": {0: [1, 2], 2: [3], 3: [4, 5]},
}


def drafts_of(shape: Shape, q: Table, replace: bool) -> list[tuple[dict[int, int], Fraction]]:
    """Every assignment node -> token of the shape with its probability, nodes drawn in the order of their indices."""
    parent = {c: v for v, children in shape.items() for c in children}

    def path(tokens: dict[int, int], v: int) -> tuple[int, ...]:
        return () if v == 0 else (*path(tokens, parent[v]), tokens[v])

    found: list[tuple[dict[int, int], Fraction]] = [({}, ONE)]
    for v in sorted(parent):
        grown = []
        for tokens, mass in found:
            law = list(q[path(tokens, parent[v])])
            earlier = [tokens[c] for c in shape[parent[v]] if c < v]
            if not replace:
                for t in earlier:
                    law[t] = ZERO
            total = sum(law)
            if not total:  # nothing is left to draw: the draft has no such sibling
                return []
            grown += [({**tokens, v: t}, mass * law[t] / total) for t in range(len(law)) if law[t]]
        found = grown
    return found


def sibling_laws(law: Law, tokens: list[int], replace: bool) -> list[Law]:
    """The law that each of the siblings was drawn from, given the earlier ones."""
    laws, left = [], list(law)
    for t in tokens:
        laws.append(normalised(left) if not replace else law)
        if not replace:
            left[t] = ZERO
    return laws


Outcome = Callable[[tuple[int, ...], Law, Fraction], None]  # accepted path, law of the extra token, probability


def traversal_rule(shape: Shape, tokens: dict[int, int], p: Table, q: Table, replace: bool, emit: Outcome) -> None:
    """Traversal verification of one draft (spec, "Trees"), reporting every way to succeed."""

    def verify(v: int, path: tuple[int, ...], w: Fraction, chance: Fraction) -> Fraction:
        """Runs the node with probability `chance` and returns the probability of its failing."""
        if not w:  # an impossible prefix: nothing below it survives
            return chance
        law = p[path]
        children = shape.get(v, [])
        drawn = [tokens[c] for c in children]
        for c, token, own in zip(children, drawn, sibling_laws(q[path], drawn, replace), strict=True):
            if not chance:
                return ZERO
            chance = verify(c, (*path, token), min(ONE, w * law[token] / own[token]), chance)
            rest = excess(w, law, own)
            mass = sum(rest)
            if not chance:
                return ZERO
            assert mass or w < 1, "at weight 1 something is left after a failure"
            if not mass:  # whatever was to survive here has gone to the child: the node itself is given up
                return chance
            law, w = normalised(rest), mass / (mass + 1 - w)
        emit(path, law, chance * w)
        return chance * (1 - w)

    assert verify(0, (), ONE, ONE) == 0, "the root accepts in the end"


def recursive_rule(shape: Shape, tokens: dict[int, int], p: Table, q: Table, replace: bool, emit: Outcome) -> None:
    """The token rule on a tree: recursive rejection from the root."""

    def walk(v: int, path: tuple[int, ...], chance: Fraction) -> None:
        law = p[path]
        children = shape.get(v, [])
        drawn = [tokens[c] for c in children]
        for c, token, own in zip(children, drawn, sibling_laws(q[path], drawn, replace), strict=True):
            accept = min(ONE, law[token] / own[token])
            if accept:
                walk(c, (*path, token), chance * accept)
            chance *= 1 - accept
            if not chance:
                return
            law = normalised(excess(ONE, law, own))
        emit(path, law, chance)

    walk(0, (), ONE)


def tree_rule(rule: Callable[..., None], shape: Shape, p: Table, q: Table, vocab: int, replace: bool) -> tuple:
    """What a tree rule emits over all drafts, and its expected accepted length; (None, None): no such draft exists."""
    emitted: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    lengths = []
    drafts = drafts_of(shape, q, replace)
    for tokens, mass in drafts:

        def emit(path: tuple[int, ...], law: Law, chance: Fraction, mass: Fraction = mass) -> None:
            lengths.append(mass * chance * len(path))
            for t in range(vocab):
                emitted[*path, t] += mass * chance * law[t]

        rule(shape, tokens, p, q, replace, emit)
    return (emitted, sum(lengths, ZERO)) if drafts else (None, None)
