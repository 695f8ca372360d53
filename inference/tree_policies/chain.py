"""A chain as the narrowest tree: the baseline of every other shape."""

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree_policies.template import Template, TemplatePolicy


class ChainPolicy(TemplatePolicy):
    """One node a level."""

    def __init__(self, nodes: int) -> None:
        if nodes < 1:
            raise InvalidValue(f"a chain has at least one node, got {nodes}")
        super().__init__(Template.of(range(-1, nodes)))
