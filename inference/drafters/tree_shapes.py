"""Trees of drafters without laws: n-gram tables, retrieval stores, suffixes. A row's tree is made afresh each round."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from draftsmith.inference.drafters.tree_base import Accepted, TreeTask, Uniforms
from draftsmith.inference.ngram_search import Shape
from draftsmith.inference.sampling import PenaltyState
from draftsmith.inference.tree import Tree


class ShapeSession(ABC):
    """One decode call's trees, each from its row's text alone."""

    def __init__(self, task: TreeTask) -> None:
        self.calls = 0  # no network stands behind it
        self._task = task

    @abstractmethod
    def shape(self, row: int, text: Sequence[int], nodes: int, depth: int) -> Shape:
        """At most `nodes` nodes behind the text, both numbers at least 1; what is deeper than `depth` is left out."""

    def room(self, length: int) -> int:
        return self._task.nodes

    def propose(
        self,
        tokens: Sequence[Sequence[int]],
        want: Sequence[int],
        depth: Sequence[int],
        u: Uniforms | None,
        penalties: PenaltyState | None,
    ) -> Tree | None:
        shapes: list[Shape] = [
            self.shape(b, text, n, d) if n > 0 and d > 0 else ([], [])
            for b, (text, n, d) in enumerate(zip(tokens, want, depth, strict=True))
        ]
        return self._pack(shapes, tokens, depth)

    def commit(self, accepted: Accepted) -> None:
        return  # nothing was kept of the rejected nodes

    def select(self, rows: Sequence[int]) -> None:
        return  # a session that keeps something of its rows says so

    def _pack(self, shapes: Sequence[Shape], texts: Sequence[Sequence[int]], depth: Sequence[int]) -> Tree | None:
        """Trees behind the texts' last tokens; None when all are empty. Ids the target does not know are left out."""
        ids, parents = [], []
        for (tokens, parent), text, most in zip(shapes, texts, depth, strict=True):
            node, level = {-1: 0}, {-1: 0}  # by index in the shape: node of the tree, and its level
            row, above = [text[-1]], [-1]
            for i, (token, p) in enumerate(zip(tokens, parent, strict=True)):
                if p in node and level[p] < most and token < self._task.vocab_size:
                    node[i], level[i] = len(row), level[p] + 1
                    row.append(token)
                    above.append(node[p])
            ids.append(row)
            parents.append(above)
        return Tree.from_rows(ids, parents, self._task.device) if max(map(len, ids)) > 1 else None
