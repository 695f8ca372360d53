"""Block verification: one joint test of a drafted chain that accepts at least as many tokens as testing them in turn.

"Block Verification Accelerates Speculative Decoding" (ICLR 2025, arXiv 2403.10444), algorithm 2; a drop-in second rule
beside `acceptance.verify`. Its running product of ratios is clamped to 1 after every token, so a weak token is redeemed
by a strong later one, and length i is tested by itself: the LAST length that passes counts. There is no break at the
first failure (that is not a bug), and the residual carries the weight of the accepted prefix (the token rule's residual
would be wrong here). Trees: traversal_verification.py.

Shape letters: B batch, g draft length, V vocabulary. p target law, q draft law, k accepted, n offered, w prefix weight.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith.inference.acceptance import Fault, Verdict, overlap, residual
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import sample_categorical

RULES = ("token", "block")  # of a chain
_VOCAB_BLOCK = 8192  # entries summed at once, so that no second [B, g, V] block is made
_SUM_TOLERANCE = 1e-3
_HOST_ROWS = 4  # so few rows on a CPU are verified one by one, without a call into torch per step


def rule_used(verification: str, *, greedy: bool, law: bool) -> str:
    """The rule that a round is really verified by, for the result's notes.

    Greedy targets and deterministic drafts gain exactly nothing from the block rule: the cheaper rules serve them.
    Args: law: whether the drafts were sampled from a law that is at hand.
    """
    if greedy:
        return "greedy"
    if verification == "block" and not law:
        return "token (the drafts are deterministic: block verification would accept exactly the same)"
    return verification


def prefix_weights(p_x: Tensor, q_x: Tensor) -> Tensor:
    """w_0..w_g [B, g+1] in float64: w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)). p_x, q_x: [B, g].

    In logarithms a walk that is held at 0 from above: sum_{j<=i} log r_j minus its running maximum (with 0). A token
    that the target excludes, or whose probability is NaN, sets the weight to 0 for good.
    """
    possible = (p_x > 0) & (q_x > 0)
    step = torch.where(possible, p_x.double().log() - q_x.double().log(), float("-inf"))
    walk = torch.nn.functional.pad(step.cumsum(1), (1, 0))
    return (walk - walk.cummax(1).values).exp()


def residual_mass(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """R = sum_v max(w p(v) - q(v), 0), float64 [B, m]. p, q: [B, m, V]; w: [B, m]."""
    weight = w.to(p.dtype).unsqueeze(-1)
    mass = torch.zeros(w.shape, dtype=torch.float64, device=p.device)
    for some_p, some_q in zip(torch.split(p, _VOCAB_BLOCK, -1), torch.split(q, _VOCAB_BLOCK, -1), strict=True):
        mass += (weight * some_p - some_q).clamp_min_(0.0).sum(-1, dtype=torch.float64)
    return mass


def keep_probability(w: Tensor, mass: Tensor) -> Tensor:
    """R / (R + 1 - w): how probably a prefix of weight w is kept once everything longer has failed; 1 where 0 / 0."""
    denominator = mass + 1 - w
    return torch.where(denominator > 0, mass / denominator, 1.0)


def block_tests(x: Tensor, q: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix weights w and test probabilities h of the lengths 0..g: float64 [B, g+1] each.

    h_0 = 1, h_n = w_n, h_i = R_i / (R_i + 1 - w_i) between, 0 beyond n. Arguments as in `verify_block`.
    """
    g = x.shape[1]
    at = x.unsqueeze(-1)
    w = prefix_weights(p[:, :g].gather(-1, at).squeeze(-1), q.gather(-1, at).squeeze(-1))
    h = w.clone()
    h[:, 1:g] = keep_probability(w[:, 1:g], residual_mass(p[:, 1:g], q[:, 1:], w[:, 1:g]))
    length = torch.arange(g + 1, device=x.device)
    h = torch.where(length == n.unsqueeze(1), w, h)
    return w, h.masked_fill(length > n.unsqueeze(1), 0.0).nan_to_num(0.0)


def verify_block(x: Tensor, q: Tensor, p: Tensor, n: Tensor, u_accept: Tensor, u_next: Tensor) -> Verdict:
    """Accept a prefix of every row's draft and draw the token after it, so that each committed token has law p.

    Arguments and result are those of `acceptance.verify`, but that q is needed: a deterministic draft gains nothing
    here and belongs to the token rule. u_accept[:, i-1] tests length i. Every offered position is looked at, so a
    broken target law at any of them that the draft can reach is a fault, and k is then its position.
    Raises InvalidValue for vocabularies of different widths.
    """
    if p.shape[-1] != q.shape[-1]:
        raise InvalidValue(
            f"target and draft laws differ in width, {p.shape[-1]} and {q.shape[-1]} ids: scatter the draft's through "
            "its vocabulary map first"
        )
    if p.device.type == "cpu" and len(x) <= _HOST_ROWS:
        return _verify_on_host(x, q, p, n, u_accept, u_next)
    return _verify_on_device(x, q, p, n, u_accept, u_next)


def _verify_on_device(x: Tensor, q: Tensor, p: Tensor, n: Tensor, u_accept: Tensor, u_next: Tensor) -> Verdict:
    """All rows and positions at once, without waiting for the device."""
    g = x.shape[1]
    w, h = block_tests(x, q, p, n)
    length = torch.arange(g + 1, device=x.device)
    # strictly less, as in `accepts`: a length of probability 0 never passes, even at u = 0
    passed = (u_accept < h[:, 1:]) * length[1:]
    k = passed.amax(1) if g else torch.zeros_like(n)
    rows = torch.arange(len(k), device=k.device)
    p_next = p[rows, k] * w.gather(1, k.unsqueeze(1)).to(p.dtype)
    q_next = q[rows, k.clamp_max(g - 1)] if g else torch.zeros_like(p_next)
    q_next = torch.where((k < n).unsqueeze(1), q_next, torch.zeros_like(q_next))
    # at the bonus position (k = n, nothing offered) the weight only scales p, and drawing normalises
    y = sample_categorical(residual(p_next, q_next), u_next)
    offered = length[1:] <= n.unsqueeze(1)
    broken = p[..., 0].isnan() & (w > 0) & (length <= n.unsqueeze(1))
    fault = broken.any(1).long() * int(Fault.TARGET)
    k = torch.where(broken.any(1), broken.long().argmax(1), k)
    q_x = q.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    fault = torch.where((offered & ~(q_x > 0)).any(1), int(Fault.DRAFT), fault)
    return Verdict(k, y, overlap(p[:, :g], q), fault)


def _verify_on_host(x: Tensor, q: Tensor, p: Tensor, n: Tensor, u_accept: Tensor, u_next: Tensor) -> Verdict:
    """Row by row on the CPU, from the longest length down: behind the first that passes no residual has to be summed.

    The same verdict as `_verify_on_device` (beta up to rounding). Between two network calls every call into torch is a
    cold one of about ten microseconds, and the other form makes fifty.
    """
    laws_p, laws_q = p.numpy(), q.numpy()
    size, number = p.shape[-1], laws_p.dtype.type
    kept, token, fault = [], [], []
    for b, (draft, offered, u) in enumerate(zip(x.tolist(), n.tolist(), u_accept.tolist(), strict=True)):
        p_x = laws_p[b, range(offered), draft[:offered]].tolist()
        q_x = laws_q[b, range(offered), draft[:offered]].tolist()
        w = [1.0]
        for top, bottom in zip(p_x, q_x, strict=True):
            w.append(min(1.0, w[-1] * top / bottom) if top > 0 and bottom > 0 else 0.0)
        k = next((i for i in range(offered, 0, -1) if u[i - 1] < _test(laws_p[b], laws_q[b], w, i, offered)), 0)
        weighted = laws_p[b, k] * number(w[k])
        rest = np.maximum(weighted - laws_q[b, k], 0) if k < offered else weighted
        cdf = (rest if rest.sum() > np.finfo(number).tiny else weighted).cumsum(dtype=np.float64)
        token.append(min(int(cdf.searchsorted(float(u_next[b]) * cdf[-1], side="right")), size - 1))
        broken = next((i for i in range(offered + 1) if w[i] > 0 and math.isnan(laws_p[b, i, 0])), None)
        kept.append(k if broken is None else broken)
        impossible = not all(bottom > 0 for bottom in q_x)
        fault.append(Fault.DRAFT if impossible else Fault.NONE if broken is None else Fault.TARGET)
    beta = torch.from_numpy(np.minimum(laws_p[:, : x.shape[1]], laws_q).sum(-1))
    k_, y, faults = torch.tensor([kept, token, fault], dtype=torch.int64)
    return Verdict(k_, y, beta, faults)


def _test(p: Any, q: Any, w: Sequence[float], i: int, n: int) -> float:
    """h_i of one row, for 1 <= i <= n. p: [g+1, V]; q: [g, V]."""
    if i == n:
        return w[n]
    mass = float(np.maximum(p[i] * p.dtype.type(w[i]) - q[i], 0).sum(dtype=np.float64))
    denominator = mass + 1 - w[i]
    return mass / denominator if denominator > 0 else 1.0


def expected_accepted(p_x: Tensor, q_x: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted tokens of each draft, the uniforms integrated out: under the block rule and under the token rule.

    E[k] = sum_i E_q[w_i] (block) and sum_i E_q[prod_{j<=i} min(1, r_j)] (token): averaged over drafts sampled from q
    these are the rules' expected lengths. p_x, q_x: [B, g] probabilities of the drafted tokens. Returns [B], [B].
    """
    block = prefix_weights(p_x, q_x)[:, 1:].sum(1)
    token = (p_x.double() / q_x.double()).clamp_max(1.0).cumprod(1).sum(1)
    return block, token


def check_laws(x: Tensor, q: Tensor, p: Tensor, n: Tensor) -> None:
    """Look at the laws handed over before any sampling; waits for the device, so it is no part of a decoding round.

    Raises InvalidValue naming row and position: a NaN or infinite entry, a sum that is off by more than 1e-3, a drafted
    token without probability. Arguments as in `verify_block`.
    """
    for name, laws in (("p", p), ("q", q)):
        counted = torch.arange(laws.shape[1], device=n.device) < n.unsqueeze(1) + (laws is p)
        sums = laws.sum(-1, dtype=torch.float64)
        for bad, what in (
            (~laws.isfinite().all(-1), "holds a NaN or an infinity"),
            (~((sums - 1).abs() <= _SUM_TOLERANCE), "does not sum to 1"),
        ):
            if (bad & counted).any():
                row, position = (bad & counted).nonzero()[0].tolist()
                raise InvalidValue(
                    f"{name} at row {row}, position {position} {what} (sum {float(sums[row, position]):g}): hand over "
                    "normalised probabilities in float32 or better"
                )
    q_x = q.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    impossible = ~(q_x > 0) & (torch.arange(x.shape[1], device=n.device) < n.unsqueeze(1))
    if impossible.any():
        row, position = impossible.nonzero()[0].tolist()
        raise InvalidValue(
            f"row {row}, position {position}: the draft token has zero probability under the q handed over; hand over "
            "the law that was sampled"
        )
