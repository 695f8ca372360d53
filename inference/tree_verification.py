"""Lossless verification of token trees: each row walks from its root along accepted nodes (rule: acceptance.py).

Sampled trees: "SpecInfer" (2024), algorithm 2, siblings tested one after the other; without replacement as in "Sequoia"
(2024), section 3.2, and "DySpec" (2024), algorithm 3: after a rejection the target law becomes the residual first, and
only then the draft law loses the token. Deterministic trees: one draw t ~ p a node, and the child t is followed if
there is one: the same law as testing the children one by one, with acceptance sum_{children} p.

Vocabulary-wide work is done at visited nodes only. On an accelerator nothing waits for the device when the tree knows
its `fanout`; on a CPU the walk ends with the last row.
Shape letters: B batch, N nodes with the root, P nodes of a path, V vocabulary. p target law, q draft law.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference import acceptance
from draftsmith.inference.acceptance import Fault
from draftsmith.inference.rng import sample_categorical
from draftsmith.inference.tree import Tree

Laws = Callable[[Tensor], Tensor]  # int64 [B] nodes -> [B, V]: the target's law at one node of each row
Choices = Callable[[Tensor], tuple[Tensor, Tensor]]  # nodes -> [B] argmax, [B] whether it won with a finite score


@dataclass(frozen=True)
class TreeVerdict:
    """What became of one round's trees."""

    path: Tensor  # int64 [B, P]: accepted nodes in order, the root first; 0 behind k
    k: Tensor  # int64 [B]: nodes accepted, root excluded
    y: Tensor  # int64 [B]: the token after the path
    examined: Tensor  # int64 [B]: tests made: one a drawn child, or one a set of children of a deterministic tree
    beta_sum: Tensor  # float64 [B]: sum over the tests of their probability to pass (sampled: 1 - TV of the test)
    underflow: Tensor  # int64 [B]: rejections that left no residual, where p itself was used
    fault: Tensor  # int64 [B], a `Fault`


def verify_tree(tree: Tree, laws: Laws, u: Tensor) -> TreeVerdict:
    """Accept a path of every row's tree and draw the token after it, so that each committed token has law p.

    Args: laws: the target's law at given nodes. u: float64 [B, N] uniform on [0, 1), one a node: of a sampled tree
    u[:, c] tests node c and u[:, 0] draws the last token; of a deterministic one u[:, i] draws the token after node i.
    """
    if tree.law is not None:
        return _verify_sampled(tree, laws, u)

    def draw(node: Tensor, rows: Tensor, children: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = laws(node)
        beta = (p.gather(1, tree.tokens) * children).sum(1, dtype=torch.float64).clamp_max_(1.0)
        return sample_categorical(p, u[rows, node]), beta, p[:, 0].isnan()

    return _follow(tree, draw)


def verify_tree_greedy(tree: Tree, choices: Choices) -> TreeVerdict:
    """The rule at temperature 0: follow the child that is the target's argmax. No randomness; q does not matter."""

    def choose(node: Tensor, rows: Tensor, children: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best, finite = choices(node)
        return best, ((tree.tokens == best.unsqueeze(1)) & children).any(1).double(), ~finite

    return _follow(tree, choose)


class _Walk:
    """Where each row stands."""

    def __init__(self, tree: Tree) -> None:
        device = tree.tokens.device
        self.waits_for_nothing = device.type != "cpu"  # the walk then makes as many steps as the tree could need
        self.rows = torch.arange(tree.batch, device=device)
        zero = torch.zeros(tree.batch, dtype=torch.int64, device=device)
        self.node, self.k, self.examined, self.underflow, self.fault = (zero.clone() for _ in range(5))
        self.beta_sum = torch.zeros(tree.batch, dtype=torch.float64, device=device)
        self.running = torch.ones(tree.batch, dtype=torch.bool, device=device)
        self.path = [zero]

    def go_on(self, still: Tensor) -> bool:
        return self.waits_for_nothing or bool(still.any())

    def move(self, node: Tensor, moved: Tensor) -> None:
        """Rows that `moved` step to `node`; the others have ended."""
        self.node = torch.where(moved, node, self.node)
        self.path.append(torch.where(moved, node, 0))
        self.k = self.k + moved
        self.running = moved

    def verdict(self, y: Tensor) -> TreeVerdict:
        path = torch.stack(self.path, 1)
        return TreeVerdict(path, self.k, y, self.examined, self.beta_sum, self.underflow, self.fault)


def _follow(tree: Tree, choose: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> TreeVerdict:
    """Walk down along chosen tokens. choose: (node [B], rows [B], its children bool [B, N]) -> token, beta, broken."""
    walk = _Walk(tree)
    offered = tree.real()
    offered[:, 0] = False
    y = torch.zeros_like(walk.node)
    for level in range(tree.height + 1):
        children = (tree.parent == walk.node.unsqueeze(1)) & offered
        t, beta, broken = choose(walk.node, walk.rows, children)
        y = torch.where(walk.running, t, y)
        walk.fault = torch.where(walk.running & broken, int(Fault.TARGET), walk.fault)
        if level == tree.height:
            break
        tested = walk.running & children.any(1)
        walk.examined = walk.examined + tested
        walk.beta_sum = walk.beta_sum + torch.where(tested, beta, 0.0)
        hit = children & (tree.tokens == t.unsqueeze(1))
        moved = walk.running & hit.any(1)
        walk.move(hit.byte().argmax(1), moved)
        if not walk.go_on(moved):
            break
    return walk.verdict(y)


def _verify_sampled(tree: Tree, laws: Laws, u: Tensor) -> TreeVerdict:
    assert tree.law is not None and tree.law_row is not None
    walk = _Walk(tree)
    rows, first_child, next_sibling = walk.rows, *tree.kin()
    fanout = tree.fanout or _fanout(tree)
    p = laws(walk.node)
    for level in range(tree.height + 1):
        walk.fault = torch.where(walk.running & p[:, 0].isnan(), int(Fault.TARGET), walk.fault)
        if level == tree.height:
            break
        child = first_child[rows, walk.node]
        testing = walk.running & (child >= 0)
        q = tree.law[rows, tree.law_row[rows, walk.node].clamp_min(0)]
        moved = torch.zeros_like(testing)
        for rank in range(fanout[level]):
            if not walk.go_on(testing):
                break
            at = child.clamp_min(0)
            x = tree.tokens[rows, at]
            impossible = testing & ~(q[rows, x] > 0)
            walk.fault = torch.where(impossible & (walk.fault == 0), int(Fault.DRAFT), walk.fault)
            test = acceptance.examine(x, q, p, u[rows, at])
            accepted, rejected = testing & test.accepted, testing & ~test.accepted
            walk.examined = walk.examined + testing
            walk.beta_sum = walk.beta_sum + torch.where(testing, test.beta.double(), 0.0)
            walk.underflow = walk.underflow + (rejected & test.underflow)
            p = torch.where(rejected.unsqueeze(1), test.rest, p)
            walk.node = torch.where(accepted, child, walk.node)
            moved = moved | accepted
            child = next_sibling[rows, at]
            testing = rejected & (child >= 0)
            if rank + 1 < fanout[level] and not tree.replacement and walk.go_on(testing):
                q, left = _without(q, x)
                testing = testing & left  # else there was nothing to draw the next sibling from
        walk.move(walk.node, moved)
        if not walk.go_on(moved):
            break
        p = torch.where(moved.unsqueeze(1), laws(walk.node), p)
    return walk.verdict(sample_categorical(p, u[:, 0]))


def _without(q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, V] without the token x [B], renormalised, and whether anything is left [B]."""
    rest = q.scatter(1, x.unsqueeze(1), 0.0)
    mass = rest.sum(1, keepdim=True)
    left = mass > torch.finfo(rest.dtype).tiny
    return rest / torch.where(left, mass, 1.0), left.squeeze(1)


def _fanout(tree: Tree) -> tuple[int, ...]:
    """`Tree.fanout` of a tree that does not know it; waits for the device."""
    offered = tree.real()
    offered[:, 0] = False
    counts = torch.zeros_like(tree.parent).scatter_add_(1, tree.parent.clamp_min(0), offered.long())
    most = torch.zeros(tree.height + 1, dtype=torch.int64, device=counts.device)
    most.scatter_reduce_(0, tree.depth.clamp_max(tree.height).flatten(), counts.flatten(), "amax")
    return tuple(most[: tree.height].tolist())
