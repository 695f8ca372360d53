"""Trees of a shape that is fixed before anything is drawn: the executor of chain, fixed widths and Sequoia.

A template lists its nodes level by level, siblings in the order of drawing; so the nodes that a row with less room
keeps are the first ones, whatever was drawn: lossless. Nothing waits for the device.
Shape letters: B batch, N nodes with the root, w nodes expanded at once, k children, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.drafters.tree_base import LawSource, TreePolicy, Uniforms
from draftsmith.inference.feeding import host_tensor
from draftsmith.inference.tree import NO_LAW, Tree
from draftsmith.inference.tree_drawing import NUMBERS, ROOT_SLOT, Children, draw_children, pick_children, slot


@dataclass(frozen=True)
class Template:
    """A tree's shape: for every node its parent, its rank among its siblings and its depth, the root first."""

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    depth: tuple[int, ...]

    @staticmethod
    def of(parent: Sequence[int]) -> "Template":
        """From parents alone, siblings in the order of their indices; nodes are renumbered level by level."""
        children: list[list[int]] = [[] for _ in parent]
        for i, p in enumerate(parent):
            if i:
                children[p].append(i)
        found, level = [(-1, 0, 0)], [(0, 0)]  # (parent, rank, depth); (new index, old index)
        depth = 0
        while level:
            depth += 1
            below = []
            for new, old in level:
                for rank, child in enumerate(children[old]):
                    below.append((len(found), child))
                    found.append((new, rank, depth))
            level = below
        return Template(*(tuple(column) for column in zip(*found, strict=True)))

    @property
    def nodes(self) -> int:
        """Root excluded."""
        return len(self.parent) - 1

    def cut(self, nodes: int, depth: int) -> "Template":
        """The first `nodes` nodes (root excluded) of the first `depth` levels."""
        n = 1 + self.size(nodes, depth)
        return Template(self.parent[:n], self.rank[:n], self.depth[:n])

    def size(self, nodes: int, depth: int) -> int:
        """How many nodes `cut` leaves, root excluded."""
        return min(nodes, sum(d <= depth for d in self.depth) - 1)


class TemplatePolicy(TreePolicy):
    """Grows a template: one network call a level."""

    sampled = True

    def __init__(self, template: Template, *, replacement: bool = False) -> None:
        """replacement: siblings are drawn independently (SpecInfer); equal ones then waste their nodes."""
        self.template = template
        self.nodes = template.nodes
        self.replacement = replacement
        self._cuts: dict[tuple[int, int], _Plan] = {}

    def columns(self, nodes: int) -> int:
        return len(set(self.template.cut(nodes, nodes).parent)) - 1  # -1, the root's, stands for the root

    def observe(self, accepted: Sequence[int | None]) -> None:
        """A fixed shape learns nothing."""

    def grow(
        self, source: LawSource, roots: Tensor, want: Sequence[int], depth: Sequence[int], u: Uniforms | None
    ) -> Tree:
        plan = self._plan(max(want), max(depth))
        batch, device = len(roots), roots.device
        sizes = host_tensor([[1 + self.template.size(n, d) for n, d in zip(want, depth, strict=True)]], device)[0]
        if not plan.levels:
            return Tree.bare(roots)
        tokens = [roots.unsqueeze(1)]
        share = [torch.ones(batch, 1, dtype=torch.float64, device=device)]
        laws: list[Tensor] = []
        for level in plan.levels:
            if not laws:
                law = source.root().unsqueeze(1)
            else:
                at = level.inside.to(device, non_blocking=True)
                law = source.expand(tokens[-1][:, at], level.parent.to(device, non_blocking=True).expand(batch, -1))
            laws.append(law)
            children = self._children(law, level, u)
            pick = level.pick.to(device, non_blocking=True)
            tokens.append(children.tokens.view(batch, -1)[:, pick])
            share.append(children.share.view(batch, -1)[:, pick])
        shape = plan.shape
        return Tree(
            torch.cat(tokens, 1),
            host_tensor([shape.parent], device).expand(batch, -1),
            host_tensor([shape.depth], device).expand(batch, -1),
            sizes,
            max(shape.depth),
            None if u is None else torch.cat(laws, 1) if len(laws) > 1 else laws[0],
            None if u is None else host_tensor([plan.law_row], device).expand(batch, -1),
            replacement=self.replacement and u is not None,
            fanout=plan.fanout,
            share=torch.cat(share, 1),
        )

    def _children(self, law: Tensor, level: "_Level", u: Uniforms | None) -> Children:
        """Children of a level's inner nodes, [B * w, k]. law: [B, w, V]."""
        flat = law.flatten(0, 1)
        if u is None:
            return pick_children(flat, level.most)
        return draw_children(flat, u(level.numbers).flatten(0, 1), replacement=self.replacement)

    def _plan(self, nodes: int, depth: int) -> "_Plan":
        if (nodes, depth) not in self._cuts:
            with torch.inference_mode(False):
                self._cuts[nodes, depth] = _Plan(self.template.cut(nodes, depth))
        return self._cuts[nodes, depth]


@dataclass(frozen=True)
class _Level:
    """One network call: the inner nodes of one depth."""

    inside: Tensor  # int64 [w]: which nodes of their level they are
    parent: Tensor  # int64 [1, w]: their parents, as numbered by the source
    most: int  # most children of one of them
    numbers: Tensor  # int64 [1, w, most, 2]: what keys the draws
    pick: Tensor  # int64 [c]: the children that the template has, among the w * most drawn


class _Plan:
    """What a template comes to, computed once."""

    def __init__(self, shape: Template) -> None:
        self.shape = shape
        children: list[list[int]] = [[] for _ in shape.parent]
        slots = [ROOT_SLOT]
        for i in range(1, len(shape.parent)):
            children[shape.parent[i]].append(i)
            slots.append(slot(slots[shape.parent[i]], shape.rank[i]))
        self.law_row = [NO_LAW] * len(shape.parent)
        self.levels: list[_Level] = []
        fanout = []
        inner = [i for i in range(len(shape.parent)) if children[i]]
        for depth in range(max(shape.depth)):
            first = shape.depth.index(depth)
            level = [i for i in inner if shape.depth[i] == depth]
            for i in level:
                self.law_row[i] = inner.index(i)  # which is also the source's number of the node
            most = max(len(children[i]) for i in level)
            fanout.append(most)
            numbers = [[[NUMBERS * slot(slots[i], r) + j for j in range(NUMBERS)] for r in range(most)] for i in level]
            self.levels.append(
                _Level(
                    torch.tensor([i - first for i in level]),
                    torch.tensor([[self.law_row[shape.parent[i]] if i else 0 for i in level]]),
                    most,
                    torch.tensor([numbers]),
                    torch.tensor([w * most + shape.rank[c] for w, i in enumerate(level) for c in children[i]]),
                )
            )
        self.fanout = tuple(fanout)
