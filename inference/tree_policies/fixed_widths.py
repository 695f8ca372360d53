"""Fixed widths a level, as "SpecInfer" (2024) expands its trees: every node of depth d has widths[d] children."""

from collections.abc import Sequence

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree_policies.template import Template, TemplatePolicy


class FixedWidthsPolicy(TemplatePolicy):
    """widths 4, 2, 1: 4 children of the root, 2 of each, 1 of each of those: 4 + 8 + 8 nodes."""

    def __init__(self, widths: Sequence[int], *, replacement: bool = False) -> None:
        """replacement: draw siblings independently, as SpecInfer does; without it they are distinct, which is better.

        Raises InvalidValue for no width or one below 1.
        """
        if not widths or min(widths) < 1:
            raise InvalidValue(f"widths must be one or more numbers from 1 on, got {list(widths)}: for example 4-2-1")
        parent, level = [-1], [0]
        for width in widths:
            below = []
            for node in level:
                for _ in range(width):
                    below.append(len(parent))
                    parent.append(node)
            level = below
        super().__init__(Template.of(parent), replacement=replacement)
