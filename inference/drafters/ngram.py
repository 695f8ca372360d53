"""Trees from a tri-gram table (ADED), if wished merged with what the row's own text repeats.

"Adaptive Draft-Verification for Efficient Large Language Model Decoding" (AAAI 2025). Drafts are deterministic: the
table never changes the law, only how much is accepted. Who decodes feeds the table (decoders/aded.py); here it is read.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from draftsmith.inference.drafters.base import DraftTask
from draftsmith.inference.drafters.prompt_lookup import PromptLookupSession
from draftsmith.inference.drafters.tree_base import TreeTask
from draftsmith.inference.drafters.tree_shapes import ShapeSession
from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.ngram_search import Shape, best_first, merged, monte_carlo, single_path
from draftsmith.inference.ngram_table import AdaptiveTable, NgramTable

SEARCHES = ("heap", "mcts", "path")
_LOOKUP_ORDERS = range(3, 0, -1)

Grow = Callable[[int, int, int, int], Shape]  # (a, b, nodes, depth) -> tree


class NgramDrafter:
    """Proposes trees out of a table; a tree drafter for decoder `tree` (frozen), and what decoder `aded` adapts."""

    aux_layers: tuple[int, ...] = ()
    tokenizer: Any | None = None

    def __init__(
        self,
        table: NgramTable | AdaptiveTable,
        *,
        search: str = "heap",
        iterations: int = 150,
        explore: tuple[float, float] = (1.0, 100.0),
        lookup_length: int = 0,
        pad: int | None = None,
    ) -> None:
        """iterations, explore: of search 'mcts' (c1, c2). lookup_length: tokens copied from the row's own text and
        merged into the tree; 0: none. pad: stands before a text of one token (the tokenizer's BOS).

        Raises InvalidValue for an unknown search and for numbers out of their range.
        """
        if search not in SEARCHES:
            raise unknown_choice("search", search, SEARCHES)
        if iterations < 1:
            raise InvalidValue(f"iterations must be at least 1, got {iterations}")
        if not (explore[0] >= 0 and explore[1] > 0):
            raise InvalidValue(f"explore_c1 must be at least 0 and explore_c2 above 0, got {explore[0]}, {explore[1]}")
        if lookup_length < 0:
            raise InvalidValue(f"lookup_length must be at least 0, got {lookup_length}")
        self.table = table
        self.lookup_length = lookup_length
        self._search = search
        self._iterations, self._explore = iterations, explore
        self._pad = pad

    @property
    def spec(self) -> EngineSpec:
        """Its vocabulary, for the couplings; no network stands behind it."""
        base = self.table.base if isinstance(self.table, AdaptiveTable) else self.table
        return EngineSpec("ngram-table", base.vocab_size, hidden_size=0, num_layers=0, max_length=1 << 31)

    @property
    def vocab_size(self) -> int | None:
        return self.spec.vocab_size

    def start(self, task: TreeTask) -> "NgramSession":
        return NgramSession(self._grow(), task, self.lookup_length, self._pad)

    def _grow(self) -> Grow:
        if self._search == "heap":
            return functools.partial(best_first, self.table.lookup)
        if self._search == "path":
            return functools.partial(single_path, self.table.lookup)
        c1, c2 = self._explore
        return functools.partial(monte_carlo, self.table.lookup, iterations=self._iterations, c1=c1, c2=c2)


class NgramSession(ShapeSession):
    """One decode call's trees."""

    def __init__(self, grow: Grow, task: TreeTask, lookup_length: int, pad: int | None) -> None:
        super().__init__(task)
        self._grow = grow
        self._pad = pad
        self._copy = None
        if lookup_length:
            chain = DraftTask(
                task.rows, task.capacity, lookup_length, task.vocab_size, task.sampling, task.device, False, None
            )
            self._copy = PromptLookupSession(_LOOKUP_ORDERS, chain)
            self._length = lookup_length

    def shape(self, row: int, text: Sequence[int], nodes: int, depth: int) -> Shape:
        before = text[-2] if len(text) > 1 else self._pad
        shape: Shape = ([], []) if before is None else self._grow(before, text[-1], nodes, depth)
        if self._copy is not None:
            shape = merged(shape, self._copy.find(row, text, min(self._length, depth)), nodes)
        return shape

    def select(self, rows: Sequence[int]) -> None:
        if self._copy is not None:
            self._copy.select(rows)
