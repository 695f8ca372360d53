"""DySpec: a tree grown at run time where the draft says that acceptance is likely.

"DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure" (2024), algorithm 1 (greedy) and algorithm 2
(threshold, layer by layer; its listing prints the test v >= C the wrong way round). A slot is a place where a child may
be drawn; its value v estimates the probability that verification comes to test that child. The acceptance of a drawn
token is estimated by its draft probability R[y], or by a table of measured acceptance (tree_calibration.py).

Whatever is drawn is kept, and whether a slot is drawn depends on what was drawn before it alone, so the tree keeps the
law. Draws are keyed by their place in the tree: laws and children may be made early, batched, without any effect on it.
Shape letters: B batch, N nodes with the root, w nodes expanded at once, V vocabulary.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import LawSource, TreePolicy, Uniforms
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.tree import NO_LAW, Tree
from draftsmith.inference.tree_calibration import AcceptanceTable, EstimateWatch
from draftsmith.inference.tree_drawing import NUMBERS, ROOT_SLOT, draw_children, pick_children, slot

_CHUNK = 4  # children drawn at once for a node, used or not; as many again as it has whenever it runs out
_AHEAD = 4  # nodes expanded at once by greedy growth: the next one popped and those most likely to follow; and
_PARTS = 8  # of a large tree an eighth of its nodes, as every call has its price
_LAYER = 32  # nodes of a layer expanded at once
_C_RANGE = (1e-5, 0.5)  # of the adaptive threshold


@dataclass
class _Row:
    """One growing tree. A heap entry is (-log v, order, node, rank)."""

    want: int
    depth_cap: int
    tokens: list[int]
    parent: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [0])
    slots: list[int] = field(default_factory=lambda: [ROOT_SLOT])
    number: list[int] = field(default_factory=lambda: [0])  # in the source's tree; -1: not expanded
    drawn: list[list[tuple[int, float]]] = field(default_factory=lambda: [[]])  # (token, R[y]) of children made so far
    heap: list[tuple[float, int, int, int]] = field(default_factory=lambda: [(0.0, 0, 0, 0)])
    below: list[tuple[float, int, int, int]] = field(default_factory=list)  # the next layer's slots
    values: list[float] = field(default_factory=list)  # v of every slot drawn, in order
    forecast: float = 0.0  # sum of v times acceptance over the drawn slots: expected accepted nodes
    pushed: int = 1

    def path(self, node: int) -> list[int]:
        """The tokens from the root to a node."""
        tokens = []
        while node >= 0:
            tokens.append(self.tokens[node])
            node = self.parent[node]
        return tokens[::-1]


class DySpecPolicy(TreePolicy):
    """Greedy growth: always draw the slot of the largest value, until the budget is spent."""

    sampled = True
    layered = False

    def __init__(self, nodes: int, depth: int, *, table: AcceptanceTable | None = None, min_value: float = 0.0) -> None:
        """min_value: stop at slots of a smaller value; t_draft / t_target of one more node is where they stop paying.

        Raises InvalidValue for nodes or depth below 1 and min_value outside [0, 1).
        """
        for name, value in (("nodes", nodes), ("depth", depth)):
            if value < 1:
                raise InvalidValue(f"{name} of a DySpec tree must be at least 1, got {value}")
        if not 0.0 <= min_value < 1.0:
            raise InvalidValue(f"min_value must be at least 0 and below 1, got {min_value}")
        self.nodes = nodes
        self.depth = depth
        self.table = table
        self.min_value = min_value
        self.watch = EstimateWatch()
        self._forecasts: list[float] = []

    def columns(self, nodes: int) -> int:
        return 2 * nodes  # see `_width`

    def grow(
        self, source: LawSource, roots: Tensor, want: Sequence[int], depth: Sequence[int], u: Uniforms | None
    ) -> Tree:
        rows = [_Row(n, min(d, self.depth), [t]) for n, d, t in zip(want, depth, roots.tolist(), strict=True)]
        laws = [source.root().unsqueeze(1)]
        fresh = [[0] if row.want else [] for row in rows]
        columns = 0
        while True:
            self._make(laws, rows, fresh, u)
            while any(short := [self._advance(row) for row in rows]):
                self._make(laws, rows, short, u)
            width = self._width(columns)
            fresh = [self._choose(row, width) for row in rows]
            if not any(fresh):
                break
            width = max(map(len, fresh))
            tokens, parent = [], []
            for row, nodes in zip(rows, fresh, strict=True):
                fill = [0] * (width - len(nodes))
                tokens.append([*(row.tokens[i] for i in nodes), *fill])
                parent.append([*(row.number[row.parent[i]] for i in nodes), *fill])
                for j, node in enumerate(nodes):
                    row.number[node] = 1 + columns + j
            laws.append(source.expand(host_tensor(tokens, roots.device), host_tensor(parent, roots.device)))
            columns += width
        self._forecasts = [row.forecast for row in rows]
        self.grown(rows)
        return _tree(rows, laws, u is not None)

    def grown(self, rows: Sequence[_Row]) -> None:
        """A hook behind every growth; greedy growth needs nothing."""

    def observe(self, accepted: Sequence[int | None]) -> None:
        for forecast, k in zip(self._forecasts, accepted, strict=True):
            if k is not None:
                self.watch.add(forecast, k, calibrated=self.table is not None)

    def _width(self, columns: int) -> int:
        """Nodes to expand next: several until as many were as the tree has nodes, then one by one.

        Every call serves the next slot of each row that still grows, so it takes at most `nodes` calls of one.
        """
        ahead = max(_AHEAD, self.nodes // _PARTS)
        return ahead if columns + ahead <= self.nodes else 1

    def _choose(self, row: _Row, width: int) -> list[int]:
        """The node whose slot comes next and, behind it, the most valuable ones without a law; none: it is finished."""
        if self._top(row) is None:
            return []
        fresh = (entry for entry in row.heap if entry[3] == 0 and row.number[entry[2]] < 0)
        return [entry[2] for entry in heapq.nsmallest(width, fresh)]

    def _top(self, row: _Row) -> tuple[float, int, int, int] | None:
        """The next slot to draw; None when the tree is finished."""
        if len(row.tokens) > row.want:
            return None
        if not row.heap and row.below:
            row.heap, row.below = row.below, []
            heapq.heapify(row.heap)
        if not row.heap or (self.min_value > 0 and row.heap[0][0] > -math.log(self.min_value)):
            return None
        return row.heap[0]

    def _advance(self, row: _Row) -> list[int]:
        """Draw slots until the tree is finished or waits for a law, or for more children made of the node returned."""
        while (top := self._top(row)) is not None:
            cost, _, node, rank = top
            if row.number[node] < 0:
                return []
            if rank >= len(row.drawn[node]):
                return [node]
            heapq.heappop(row.heap)
            token, share = row.drawn[node][rank]
            if not share > 0.0:
                if share == 0.0 and rank > 0:  # nothing was left to draw
                    continue
                raise InvalidValue(
                    f"the draft law at the node {row.path(node)} is none: it holds a NaN or no mass (check the draft's "
                    "weights and dtype)"
                )
            a = share if self.table is None else self.table.acceptance(rank, share)
            child = len(row.tokens)
            row.tokens.append(token)
            row.parent.append(node)
            row.depth.append(row.depth[node] + 1)
            row.slots.append(slot(row.slots[node], rank))
            row.number.append(-1)
            row.drawn.append([])
            value = math.exp(-cost)
            row.values.append(value)
            row.forecast += value * a
            if share < 1.0 and a < 1.0:
                self._push(row, row.heap, cost - math.log1p(-a), node, rank + 1)
            if row.depth[child] < row.depth_cap and a > 0.0:
                self._push(row, row.below if self.layered else row.heap, cost - math.log(a), child, 0)
        return []

    def _push(self, row: _Row, heap: list[tuple[float, int, int, int]], cost: float, node: int, rank: int) -> None:
        if self.min_value > 0 and cost > -math.log(self.min_value):
            return
        heapq.heappush(heap, (cost, row.pushed, node, rank))
        row.pushed += 1

    def _make(
        self, laws: Sequence[Tensor], rows: Sequence[_Row], short: Sequence[Sequence[int]], u: Uniforms | None
    ) -> None:
        """Make the next chunk of children of `short[b]`, nodes of each row that have a law; one read by the host."""
        places = [(b, j, node) for b, nodes in enumerate(short) for j, node in enumerate(nodes)]
        if not places:
            return
        law = _pick(laws, [(b, rows[b].number[node]) for b, _, node in places])
        made = [len(rows[b].drawn[node]) for b, _, node in places]
        chunk = max(_CHUNK, *made)
        if u is None:
            found, first = pick_children(law, max(made) + chunk), made
        else:
            wide, most = max(map(len, short)), max(made)
            numbers = [[[[0] * NUMBERS] * chunk] * wide for _ in rows]
            for (b, j, node), n in zip(places, made, strict=True):
                keys = (NUMBERS * slot(rows[b].slots[node], n + r) for r in range(chunk))
                numbers[b][j] = [[key, key + 1] for key in keys]
            index = host_tensor([[b for b, _, _ in places], [j for _, j, _ in places]], law.device)
            taken = None
            if most:
                before = [[t for t, _ in rows[b].drawn[node]] for b, _, node in places]
                taken = host_tensor([[*t, *[law.shape[1]] * (most - len(t))] for t in before], law.device)
            found = draw_children(law, u(torch.tensor(numbers))[index[0], index[1]], taken=taken)
            first = [0] * len(places)
        read = torch.stack([found.tokens.double(), found.share], -1).tolist()  # ids are exact in float64
        for (b, _, node), start, children in zip(places, first, read, strict=True):
            rows[b].drawn[node] += [(int(token), share) for token, share in children[start : start + chunk]]


class DySpecThresholdPolicy(DySpecPolicy):
    """Growth layer by layer: every slot of value C or more is drawn; a network call serves a whole layer."""

    layered = True

    def __init__(
        self,
        budget: int,
        depth: int,
        *,
        threshold: float | None = None,
        most: int | None = None,
        adaptive: bool = False,
        table: AcceptanceTable | None = None,
    ) -> None:
        """threshold: C, default 1 / budget. most: N_max, default the budget, or twice of it where C adapts.

        adaptive: after each round C <- C (size / budget)^0.5, so that the mean size meets the budget; a row's trees
        then depend on its batch-mates. Raises InvalidValue for C outside (0, 1), N_max below the budget.
        """
        most = budget * (2 if adaptive else 1) if most is None else most
        super().__init__(most, depth, table=table)
        if budget < 1 or most < budget:
            raise InvalidValue(f"a threshold tree needs 1 <= budget <= most nodes, got {budget} and {most}")
        threshold = min(1.0 / budget, 0.5) if threshold is None else threshold
        if not 0.0 < threshold < 1.0:
            raise InvalidValue(f"the threshold C must lie between 0 and 1, got {threshold}")
        self.min_value = threshold
        self.budget = budget
        self.adaptive = adaptive

    def columns(self, nodes: int) -> int:
        return nodes + _LAYER * self.depth  # every node of a layer is needed; the last call of each may be part filled

    def _width(self, columns: int) -> int:
        return _LAYER

    def grown(self, rows: Sequence[_Row]) -> None:
        sizes = [len(row.tokens) - 1 for row in rows if row.want > 0]
        if self.adaptive and sizes:
            scale = (sum(sizes) / len(sizes) / self.budget) ** 0.5
            self.min_value = min(max(self.min_value * scale, _C_RANGE[0]), _C_RANGE[1])


def _pick(laws: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """Laws [n, V] of nodes given by row and number; laws: [B, w, V] of each network call in turn."""
    calls = [(i, j) for i, part in enumerate(laws) for j in range(part.shape[1])]  # by number
    found = [(*calls[number], b) for b, number in places]
    if len({call for call, _, _ in found}) == 1:
        part = laws[found[0][0]]
        if [(b, j) for _, j, b in found] == [(b, j) for b in range(part.shape[0]) for j in range(part.shape[1])]:
            return part.flatten(0, 1)  # all of a call: nothing to copy
        index = host_tensor([[b for _, _, b in found], [j for _, j, _ in found]], part.device)
        return part[index[0], index[1]]
    return torch.stack([laws[call][b, j] for call, j, b in found])


def _tree(rows: Sequence[_Row], laws: Sequence[Tensor], sampled: bool) -> Tree:
    device = laws[0].device
    tokens, parent = [row.tokens for row in rows], [row.parent for row in rows]
    if not sampled:
        return Tree.from_rows(tokens, parent, device)
    # laws that were made ahead and never drawn from are left out: a law is a row of the vocabulary to copy
    law_row, places = [], []
    inner = [sorted({i for i in row.parent if i >= 0}) for row in rows]
    most = max([1, *map(len, inner)])
    for b, (row, nodes) in enumerate(zip(rows, inner, strict=True)):
        at = dict(zip(nodes, range(len(nodes)), strict=True))
        law_row.append([at.get(i, NO_LAW) for i in range(len(row.tokens))])
        places += [(b, row.number[i]) for i in nodes] + [(b, 0)] * (most - len(nodes))
    return Tree.from_rows(tokens, parent, device, _pick(laws, places).view(len(rows), most, -1), law_row)
