"""Traversal verification: block verification for trees, from the leaves to the root; `verify_tree`'s second rule.

"Traversal Verification for Speculative Tree Decoding" (NeurIPS 2025, arXiv 2505.12398), algorithm 1 with its siblings
in drafting order. A node holds a weight w, the probability with which it is to survive, and the target's law P there. A
child is entered with weight min(1, w P(x) / q(x)) and its whole subtree is tried first; once that has failed, P becomes
the residual max(w P - q, 0) and w becomes R / (R + 1 - w). A node without untried children is kept with probability w.
On a chain this is the block rule, at depth 1 the token rule.

The walk is the same whatever fails, so rows walk side by side: a step enters a child or leaves a node. Two laws a depth
and row are kept. A CPU ends with the last row and skips halves of steps that no row needs; an accelerator takes 2N - 1
steps and waits for nothing.
Shape letters: B batch, N nodes with the root, P nodes of a path, V vocabulary. p target law, q draft law, w weight.
"""

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Fault, one_hot, overlap, residual
from draftsmith.inference.block_verification import keep_probability
from draftsmith.inference.rng import sample_categorical
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_verification import Laws, TreeVerdict

RULES = ("token", "traversal")  # of a tree


def verify_traversal(tree: Tree, laws: Laws, u: Tensor) -> TreeVerdict:
    """Accept a path of every row's tree and draw the token after it, so that each committed token has law p.

    Arguments and result are those of `tree_verification.verify_tree`: u[:, c] tests node c, u[:, 0] draws the token
    behind the path (the root is always kept). `examined` and `beta_sum` are taken along the accepted path, one entry a
    node with children: 1 - TV to its draft law, or the mass of its children in a deterministic tree. Greedy targets
    gain nothing from this rule: `verify_tree_greedy` serves them.
    """
    walk = _Tour(tree, laws)
    for _ in range(2 * tree.width - 1):
        child = walk.untried.gather(1, walk.node.unsqueeze(1)).squeeze(1)
        entering, leaving = walk.running & (child >= 0), walk.running & (child < 0)
        if walk.needed(entering):
            walk.enter(child, entering)
        if walk.needed(leaving):
            walk.leave(leaving, u)
        if not walk.needed(walk.running):
            break
    return walk.verdict(u[:, 0])


class _Tour:
    """Where each row stands, and what it keeps of the nodes above."""

    def __init__(self, tree: Tree, laws: Laws) -> None:
        device = tree.tokens.device
        self._tree, self._laws = tree, laws
        self._eager = device.type != "cpu"
        self._rows = torch.arange(tree.batch, device=device)
        self.untried, self._sibling = tree.kin()  # per node: the next child to try
        self._children = self.untried >= 0
        self.untried = self.untried.clone()
        self.node = torch.zeros(tree.batch, dtype=torch.int64, device=device)
        self.running = torch.ones(tree.batch, dtype=torch.bool, device=device)
        p = laws(self.node)
        self._p = p.new_zeros(tree.batch, tree.height + 1, p.shape[-1])  # what is left of the target's law, by depth
        self._q = torch.zeros_like(self._p)  # what the next child was drawn from
        self._w = torch.zeros(tree.batch, tree.height + 1, dtype=torch.float64, device=device)
        self.fault = torch.zeros_like(self.node)
        self.underflow = torch.zeros_like(self.node)
        self._open(self.node, torch.ones_like(self._w[:, 0]), self.running)

    def needed(self, rows: Tensor) -> bool:
        return self._eager or bool(rows.any())

    def _depth(self, node: Tensor) -> Tensor:
        return self._tree.depth.gather(1, node.unsqueeze(1)).squeeze(1)

    def _open(self, node: Tensor, w: Tensor, rows: Tensor) -> None:
        """Rows come to `node` with weight w."""
        tree, at = self._tree, self._depth(node)
        p = self._laws(node)
        self.fault = torch.where(rows & p[:, 0].isnan() & (w > 0) & (self.fault == 0), int(Fault.TARGET), self.fault)
        self._p[self._rows, at] = torch.where(rows.unsqueeze(1), p, self._p[self._rows, at])
        self._w[self._rows, at] = torch.where(rows, w, self._w[self._rows, at])
        if tree.law is not None and tree.law_row is not None:
            q = tree.law[self._rows, tree.law_row.gather(1, node.unsqueeze(1)).squeeze(1).clamp_min(0)]
            self._q[self._rows, at] = torch.where(rows.unsqueeze(1), q.to(p.dtype), self._q[self._rows, at])

    def enter(self, child: Tensor, rows: Tensor) -> None:
        """Rows step down to a child."""
        tree, at = self._tree, self._depth(self.node)
        child = child.clamp_min(0)
        x = tree.tokens.gather(1, child.unsqueeze(1)).squeeze(1)
        p_x = self._p[self._rows, at, x].double()
        if tree.law is None:
            ratio = p_x
        else:
            q_x = self._q[self._rows, at, x].double()
            left = self._q[self._rows, at].sum(-1) > 0  # else nothing was left to draw a later sibling from
            impossible = rows & left & ~(q_x > 0)
            self.fault = torch.where(impossible & (self.fault == 0), int(Fault.DRAFT), self.fault)
            ratio = torch.where(q_x > 0, p_x / q_x, 0.0)
        w = (self._w[self._rows, at] * ratio).clamp_max(1.0).nan_to_num(0.0)
        self._open(child, w, rows)
        self.node = torch.where(rows, child, self.node)

    def leave(self, rows: Tensor, u: Tensor) -> None:
        """Rows whose children have all failed keep their node, or give it up and change what its parent holds."""
        tree, node = self._tree, self.node
        w = self._w[self._rows, self._depth(node)]
        kept = (node == 0) | (u.gather(1, node.unsqueeze(1)).squeeze(1) < w)
        self.running = self.running & ~(rows & kept)
        failed = rows & ~kept
        parent = tree.parent.gather(1, node.unsqueeze(1)).squeeze(1).clamp_min(0)
        at = self._depth(parent)
        x = tree.tokens.gather(1, node.unsqueeze(1)).squeeze(1)
        p, weight = self._p[self._rows, at], self._w[self._rows, at]
        q = one_hot(x, p) if tree.law is None else self._q[self._rows, at]
        scaled = p * weight.to(p.dtype).unsqueeze(1)
        mass = (scaled - q).clamp_min(0.0).sum(-1, dtype=torch.float64)
        # below weight 1 an empty residual is no accident: the child had all that was to survive, and w becomes 0
        self.underflow = self.underflow + (failed & ~(mass > 0) & (weight >= 1))
        rest = residual(scaled, q)
        rest = rest / rest.sum(-1, keepdim=True)
        some = failed.unsqueeze(1)
        self._p[self._rows, at] = torch.where(some & rest.isfinite().all(-1, keepdim=True), rest, p)
        self._w[self._rows, at] = torch.where(failed, keep_probability(weight, mass), weight)
        if tree.law is not None and not tree.replacement:
            fewer = q.scatter(1, x.unsqueeze(1), 0.0)
            total = fewer.sum(1, keepdim=True)
            fewer = fewer / torch.where(total > torch.finfo(fewer.dtype).tiny, total, float("inf"))
            self._q[self._rows, at] = torch.where(some, fewer, q)
        following = self._sibling.gather(1, node.unsqueeze(1)).squeeze(1)
        self.untried[self._rows, parent] = torch.where(failed, following, self.untried[self._rows, parent])
        self.node = torch.where(failed, parent, node)

    def verdict(self, u_next: Tensor) -> TreeVerdict:
        tree, node = self._tree, self.node
        k = self._depth(node)
        y = sample_categorical(self._p[self._rows, k], u_next)
        path = torch.zeros(tree.batch, tree.height + 1, dtype=torch.int64, device=node.device)
        examined, beta_sum = torch.zeros_like(k), torch.zeros(tree.batch, dtype=torch.float64, device=node.device)
        offered = tree.real()
        offered[:, 0] = False
        for level in range(tree.height, -1, -1):
            on = k >= level
            path[:, level] = torch.where(on, node, 0)
            tested = on & self._children.gather(1, node.unsqueeze(1)).squeeze(1)
            if self.needed(tested):
                p = self._laws(node)
                if tree.law is None or tree.law_row is None:
                    children = (tree.parent == node.unsqueeze(1)) & offered
                    beta = (p.gather(1, tree.tokens) * children).sum(1, dtype=torch.float64).clamp_max_(1.0)
                else:
                    row = tree.law_row.gather(1, node.unsqueeze(1)).squeeze(1).clamp_min(0)
                    beta = overlap(p, tree.law[self._rows, row].to(p.dtype)).double()
                examined = examined + tested
                beta_sum = beta_sum + torch.where(tested, beta, 0.0)
            parent = tree.parent.gather(1, node.unsqueeze(1)).squeeze(1).clamp_min(0)
            node = torch.where(on, parent, node)
        return TreeVerdict(path, k, y, examined, beta_sum, self.underflow, self.fault)
