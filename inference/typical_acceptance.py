"""Medusa's typical acceptance: keep what the target finds plausible, whether it would have drawn it or not. LOSSY.

"Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (arXiv 2401.10774), section 2.3.1: a
node of token x is accepted behind an accepted parent if p(x) > min(epsilon, delta exp(-H(p))), H the entropy of p; the
longest accepted path is taken (ties: the likelier one), and the token behind it is the target's argmax.
Shape letters: B batch, N nodes with the root, V vocabulary. p target law.
"""

import torch
from torch import Tensor

from draftsmith.inference.acceptance import Fault
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.tree import Tree
from draftsmith.inference.tree_verification import Laws, TreeVerdict

EPSILON, DELTA = 0.3, 0.09  # of FasterDecoding/Medusa (posterior_threshold, posterior_alpha)


def check_typical(epsilon: float, delta: float) -> None:
    """Raises InvalidValue for values outside (0, 1)."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0.0 < value < 1.0:
            raise InvalidValue(f"{name} of typical acceptance lies between 0 and 1, got {value}")


def threshold(p: Tensor, epsilon: float, delta: float) -> Tensor:
    """min(epsilon, delta exp(-H(p))) [...] of laws p [..., V]; H in nats."""
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return (delta * (-entropy).exp()).clamp_max(epsilon)


def verify_typical(tree: Tree, laws: Laws, epsilon: float = EPSILON, delta: float = DELTA) -> TreeVerdict:
    """The longest path of plausible nodes of every row's tree; nothing is drawn.

    A law is made at every node with children: any of them may lie on the longest path. `examined` counts the children
    of accepted nodes. Raises InvalidValue for epsilon or delta outside (0, 1).
    """
    check_typical(epsilon, delta)
    device, batch = tree.tokens.device, tree.batch
    rows = torch.arange(batch, device=device)
    offered = tree.real()
    offered[:, 0] = False
    passed = torch.zeros(batch, tree.width, dtype=torch.bool, device=device)
    log_p = torch.zeros(batch, tree.width, dtype=torch.float64, device=device)
    for i in range(tree.width):
        children = (tree.parent == i) & offered
        if device.type == "cpu" and not bool(children.any()):  # elsewhere asking would be one more wait
            continue
        p = laws(torch.full_like(rows, i))
        p_x = p.gather(1, tree.tokens)
        passed |= children & (p_x > threshold(p, epsilon, delta).unsqueeze(1))
        log_p = torch.where(children, p_x.double().log(), log_p)
    above = tree.ancestors()
    passed[:, 0] = True
    accepted = (passed.unsqueeze(1) | ~above).all(-1) & tree.real()
    score = torch.where(above, log_p.unsqueeze(1), 0.0).sum(-1)
    depth = torch.where(accepted, tree.depth, -1)
    deepest = accepted & (depth == depth.amax(1, keepdim=True))
    last = score.masked_fill(~deepest, float("-inf")).argmax(1)
    k = tree.depth[rows, last]
    tested = offered & accepted.gather(1, tree.parent.clamp_min(0))
    p = laws(last)
    return TreeVerdict(
        path=_path(tree, above, last),
        k=k,
        y=p.argmax(1),
        examined=tested.sum(1),
        beta_sum=(tested & passed).sum(1).double(),
        underflow=torch.zeros_like(k),
        fault=p[:, 0].isnan() * int(Fault.TARGET),
    )


def _path(tree: Tree, above: Tensor, last: Tensor) -> Tensor:
    """int64 [B, height + 1]: the nodes from the root to `last` [B] in order, 0 behind them."""
    rows = torch.arange(tree.batch, device=last.device)
    index = torch.arange(tree.width, device=last.device).expand(tree.batch, -1)
    path = torch.zeros(tree.batch, tree.height + 1, dtype=torch.int64, device=last.device)
    place = torch.where(above[rows, last], tree.depth, 0)
    return path.scatter_reduce_(1, place, torch.where(above[rows, last], index, 0), "amax")
