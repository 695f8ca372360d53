"""How a token tree grows from a tri-gram table: Monte-Carlo-like search, best-first, or one path.

"Adaptive Draft-Verification for Efficient Large Language Model Decoding" (AAAI 2025), section "Draft maker". The
formula and its constants are not in the stored sources; they are as in the specification, from memory, and settings.
Every function returns (tokens, parent) of at most `nodes` nodes and `depth` levels below the root, parents first,
-1 for the root, no two equal siblings.
"""

import heapq
import math
from collections.abc import Callable

Lookup = Callable[[int, int], tuple[list[int], list[float]]]  # key -> tokens and weights, by falling weight
Shape = tuple[list[int], list[int]]


def best_first(lookup: Lookup, a: int, b: int, nodes: int, depth: int) -> Shape:
    """The `nodes` nodes of highest path product: a subtree, since products only fall. Ties: shallower, smaller id."""
    tokens: list[int] = []
    parent: list[int] = []
    heap: list[tuple[float, int, int, int, int]] = []  # -product, depth, token, parent node, token before

    def offer(node: int, before: int, last: int, product: float, level: int) -> None:
        if level < depth:
            for token, weight in zip(*lookup(before, last), strict=True):
                heapq.heappush(heap, (-product * weight, level + 1, token, node, last))

    offer(-1, a, b, 1.0, 0)
    while heap and len(tokens) < nodes:
        product, level, token, above, before = heapq.heappop(heap)
        tokens.append(token)
        parent.append(above)
        offer(len(tokens) - 1, before, token, -product, level)
    return tokens, parent


def single_path(lookup: Lookup, a: int, b: int, nodes: int, depth: int) -> Shape:
    """The likeliest token at every step."""
    tokens: list[int] = []
    while len(tokens) < min(nodes, depth):
        following, _ = lookup(a, b)
        if not following:
            break
        tokens.append(following[0])
        a, b = b, following[0]
    return tokens, list(range(-1, len(tokens) - 1))


class _Node:
    __slots__ = ("children", "last", "tokens", "visits", "weights")

    def __init__(self, before: int, last: int, lookup: Lookup) -> None:
        self.last = last
        self.visits = 0
        self.tokens, self.weights = lookup(before, last)
        self.children: list[_Node | None] = [None] * len(self.tokens)


def monte_carlo(
    lookup: Lookup, a: int, b: int, nodes: int, depth: int, *, iterations: int = 150, c1: float = 1.0, c2: float = 100.0
) -> Shape:
    """The most visited nodes of `iterations` walks along the best score (ties: shallower, smaller id).

    score(s, u) = P + E P sqrt(N(s)) / (1 + N(s, u)) with P the table's weight, E = c1 + log((N(s) + c2 + 1) / c2).
    """
    root = _Node(a, b, lookup)
    for _ in range(iterations):
        node = root
        for _ in range(depth):
            if not node.tokens:
                break
            n = node.visits
            explore = (c1 + math.log((n + c2 + 1) / c2)) * math.sqrt(n)
            best, at = -1.0, 0
            for i, weight in enumerate(node.weights):
                child = node.children[i]
                score = weight + explore * weight / (1 + (child.visits if child is not None else 0))
                if score > best or (score == best and node.tokens[i] < node.tokens[at]):
                    best, at = score, i
            below = node.children[at]
            if below is None:
                below = node.children[at] = _Node(node.last, node.tokens[at], lookup)
            below.visits += 1
            node = below
        root.visits += 1
    return _most_visited(root, nodes)


def _most_visited(root: _Node, nodes: int) -> Shape:
    """Visits never grow downwards, so with ties to the shallower node the choice holds every parent."""
    tokens: list[int] = []
    parent: list[int] = []
    heap: list[tuple[int, int, int, int]] = []  # -visits, depth, token, arrival
    waiting: list[tuple[_Node, int]] = []

    def offer(node: _Node, index: int, level: int) -> None:
        for token, child in zip(node.tokens, node.children, strict=True):
            if child is not None:
                heapq.heappush(heap, (-child.visits, level + 1, token, len(waiting)))
                waiting.append((child, index))

    offer(root, -1, 0)
    while heap and len(tokens) < nodes:
        _, level, token, arrival = heapq.heappop(heap)
        child, above = waiting[arrival]
        tokens.append(token)
        parent.append(above)
        offer(child, len(tokens) - 1, level)
    return tokens, parent


def merged(shape: Shape, chain: list[int], nodes: int) -> Shape:
    """A chain put into a tree, common prefixes once; where room is short the tree's last nodes make way."""
    tokens, parent = shape
    chain = chain[:nodes]
    kept = max(0, nodes - len(chain))
    while True:  # what the chain shares with the tree leaves room for more of the tree
        at, shared = -1, 0
        children = {(p, t): i for i, (t, p) in enumerate(zip(tokens[:kept], parent[:kept], strict=True))}
        for token in chain:
            if (at, token) not in children:
                break
            at, shared = children[at, token], shared + 1
        room = nodes - (len(chain) - shared)
        if kept >= min(room, len(tokens)):
            break
        kept = min(room, len(tokens))
    tokens, parent = tokens[:kept], parent[:kept]
    for token in chain[shared:]:
        parent = [*parent, at]
        tokens = [*tokens, token]
        at = len(tokens) - 1
    return tokens, parent
