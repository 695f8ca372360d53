"""The accept/residual rule of speculative sampling, written once, on the device, without waiting for it.

"Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1 and appendix A.1; "Accelerating LLM
Decoding with Speculative Sampling" (2023), algorithm 2. Chains use `verify`, which looks at all positions at once and
makes the residual only where it is needed; trees test one node at a time with `accept_or_residual`. Both are built
from the same two primitives, `accepts` and `residual`.

Shape letters: B batch, g draft length, V vocabulary. p target law, q draft law, k accepted, n offered.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from draftsmith.inference.rng import sample_categorical


class Fault(IntEnum):
    """Why a verdict must not be used; read by the decoder together with the verdict."""

    NONE = 0
    TARGET = 1  # the target's scores at the position of y are no law: NaN, +inf, or every token excluded
    DRAFT = 2  # a drafted token has no positive probability under the draft law it was said to be sampled from


@dataclass(frozen=True)
class Verdict:
    """What became of one round's drafts."""

    k: Tensor  # int64 [B], leading accepts, 0..n
    y: Tensor  # int64 [B], the correction (k < n) or the bonus token (k == n)
    beta: (
        Tensor  # [B, g] 1 - TV(p, q) at each drafted position; meaningful where examined, i.e. at the first min(k+1, n)
    )
    fault: Tensor  # int64 [B], a `Fault`


def accepts(u: Tensor, p_x: Tensor, q_x: Tensor) -> Tensor:
    """Whether drafted tokens of probabilities p_x and q_x pass the test with uniform u; no division.

    Strictly less: u is drawn from [0, 1), so a token that the target excludes (p_x = 0) never passes, even at u = 0.
    """
    return u * q_x < p_x


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The law (not normalised) of the token that replaces a rejected one: max(p - q, 0). p, q: [..., V].

    Where p and q agree up to rounding nothing is left; a rejection then has probability of the order of the rounding,
    and p itself is used. q = 0 gives p: that is the bonus position.
    """
    rest = (p - q).clamp_min(0.0)
    return torch.where(rest.sum(-1, keepdim=True) > torch.finfo(rest.dtype).tiny, rest, p)


def one_hot(x: Tensor, like: Tensor) -> Tensor:
    """The law of a deterministic draft: all mass on x. x: int64 [...]; like: [..., V]."""
    return torch.zeros_like(like).scatter_(-1, x.unsqueeze(-1), 1.0)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """beta = sum_v min(p_v, q_v) = 1 - TV(p, q): the probability that a draft from q is accepted. [..., V] -> [...]."""
    return torch.minimum(p, q).sum(-1)


@dataclass(frozen=True)
class NodeTest:
    """What became of one drafted token at one node."""

    accepted: Tensor  # bool [...]
    rest: Tensor  # [..., V] normalised: the law of the node's token if it was not accepted
    beta: Tensor  # [...] probability that a token from the draft law passes
    underflow: Tensor  # bool [...]: p <= q up to rounding, so that a rejection leaves nothing and `rest` is p itself


def examine(x: Tensor, q: Tensor | None, p: Tensor, u: Tensor) -> NodeTest:
    """Test one token at one node; arguments as of `accept_or_residual`."""
    law = one_hot(x, p) if q is None else q
    at = x.unsqueeze(-1)
    p_x = p.gather(-1, at).squeeze(-1)
    accepted = accepts(u, p_x, law.gather(-1, at).squeeze(-1))
    rest = residual(p, law)
    beta = p_x if q is None else overlap(p, law)
    return NodeTest(accepted, rest / rest.sum(-1, keepdim=True), beta, (p <= law).all(-1))


def accept_or_residual(x: Tensor, q: Tensor | None, p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One test at one node: whether x passes, and the law of the node's token if it does not.

    In a tree the siblings of x are tested one after the other, each against the law that the last rejection left.
    Args: x: int64 [...]; q: [..., V], the law that x was sampled from, None for a deterministic draft; p: [..., V];
    u: [...] uniform on [0, 1).
    Returns: bool [...], and [..., V] normalised.
    """
    test = examine(x, q, p, u)
    return test.accepted, test.rest


def _leading(ok: Tensor, n: Tensor) -> Tensor:
    """How many of the first n entries are true before the first false one. ok: bool [B, g], n: [B]."""
    offered = torch.arange(ok.shape[1], device=ok.device) < n.unsqueeze(1)
    return (ok & offered).cumprod(1).sum(1)


def verify(x: Tensor, q: Tensor | None, p: Tensor, n: Tensor, u_accept: Tensor, u_next: Tensor) -> Verdict:
    """Accept a prefix of every row's draft and draw the token after it, so that each committed token has law p.

    Args:
        x: int64 [B, g] drafted tokens.
        q: [B, g, V] the laws they were sampled from; None for a deterministic draft (q one-hot at x: a token passes
            with probability p(x), and the residual is p without x).
        p: [B, g+1, V] target laws after every processor.
        n: int64 [B] tokens offered, 0..g; the rest is never accepted, and a row that keeps all n gets its bonus token
            from p at position n. n may depend on the drafted tokens before position n, not on later ones.
        u_accept: float64 [B, g]; u_next: float64 [B]; uniform on [0, 1).
    """
    g = x.shape[1]
    at = x.unsqueeze(-1)
    p_drafted = p[:, :g]
    p_x = p_drafted.gather(-1, at).squeeze(-1)
    q_x = torch.ones_like(p_x) if q is None else q.gather(-1, at).squeeze(-1)
    k = _leading(accepts(u_accept, p_x, q_x), n)
    rows = torch.arange(len(k), device=k.device)
    p_next = p[rows, k]
    # the draft law where a token was rejected; zero at the bonus position, where none was offered
    last = k.clamp_max(g - 1)
    q_next = one_hot(x[rows, last], p_next) if q is None else q[rows, last]
    q_next = torch.where((k < n).unsqueeze(1), q_next, torch.zeros_like(q_next))
    y = sample_categorical(residual(p_next, q_next), u_next)
    beta = p_x if q is None else overlap(p_drafted, q)
    # A broken target law is NaN throughout and fails the test at its position, so it can only stand at k.
    fault = p_next[:, 0].isnan().long() * int(Fault.TARGET)
    if q is not None:
        offered = torch.arange(g, device=k.device) < n.unsqueeze(1)
        fault = torch.where((offered & ~(q_x > 0)).any(1), int(Fault.DRAFT), fault)
    return Verdict(k, y, beta, fault)


def verify_greedy(x: Tensor, argmax: Tensor, n: Tensor, finite: Tensor | None = None) -> Verdict:
    """The rule at temperature 0, where laws are one-hot: accept while the draft is the target's argmax. No randomness.

    Args: x: int64 [B, g]; argmax: int64 [B, g+1]; n: int64 [B], 0..g; finite: bool [B, g+1], False where the largest
    score is NaN or infinite, None when nobody asks.
    """
    same = x == argmax[:, : x.shape[1]]
    k = _leading(same, n)
    at = k.unsqueeze(1)
    fault = torch.zeros_like(k) if finite is None else (~finite.gather(1, at)).squeeze(1).long() * int(Fault.TARGET)
    return Verdict(k, argmax.gather(1, at).squeeze(1), same.double(), fault)
