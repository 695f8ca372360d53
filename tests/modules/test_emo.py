"""EMO: transport against the linear program, gradients, mixes, the chunked form against the equations, bad input."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.chunked_head import HeadLoss, HeadTarget, TeacherHead, chunked_head, naive_head
from draftsmith.modules.losses.costs import CostWarning, TokenCosts
from draftsmith.modules.losses.divergence import FullLaw
from draftsmith.modules.losses.emo import (
    EMO,
    MODES,
    RATIOS,
    FixedMix,
    Mix,
    emo_loss,
    label_cost,
    mixce,
    product_cost,
    residual_cost,
    tailr,
)
from tests import workers

N, D, V, M = 37, 8, 23, 6
LIMITS = {"mle_anchored": math.inf, "emo_anchored": 10.0}


def parts(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TokenCosts]:
    """hidden [N,D], weight [V,D], labels [N] with repetitions, costs."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype)
    labels = torch.randint(V, (N,), generator=g) // 2
    costs = TokenCosts.of(torch.randn(V, M, generator=g, dtype=dtype) + 0.7)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, costs


def soft_target(kind: str) -> HeadTarget:
    g = torch.Generator().manual_seed(1)
    teacher, head = (torch.randn(s, 5, generator=g, dtype=torch.float64) for s in (N, V))
    if kind == "live":
        return TeacherHead(teacher, head, 0.9)
    return TeacherLaw.from_logits(teacher @ head.T, V if kind == "whole" else 4, 0.9)


def grads(out: HeadLoss, *leaves: Tensor) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    (3.0 * out.mean).backward()
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def same(got: HeadLoss, want: HeadLoss, *leaves: Tensor, rtol: float | None = None) -> None:
    near: Any = {} if rtol is None else {"rtol": rtol, "atol": rtol}
    torch.testing.assert_close(got.total, want.total, **near)
    for a, b in zip(grads(got, *leaves), grads(want, *leaves), strict=True):
        torch.testing.assert_close(a, b, **near)


# --- transport


def exact_emd(q: np.ndarray, p: np.ndarray, cost: np.ndarray) -> float:
    """The transport linear program."""
    from scipy.optimize import linprog

    v = len(q)
    sums = np.zeros((2 * v, v * v))
    for i in range(v):
        sums[i, i * v : (i + 1) * v] = 1
        sums[v + i, i::v] = 1
    return float(linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([q, p]), method="highs").fun)


@pytest.mark.parametrize("seed", range(5))
def test_costs_against_the_transport_linear_program(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    costs = TokenCosts.of(torch.randn(8, 3, generator=g, dtype=torch.float64))
    matrix = costs.rows(torch.arange(8))
    q, p = (torch.randn(2, 8, generator=g, dtype=torch.float64) * 2).softmax(-1)
    for t in range(8):
        one_hot = torch.nn.functional.one_hot(torch.tensor(t), 8).double()
        exact = exact_emd(q.numpy(), one_hot.numpy(), matrix.numpy())
        assert float(label_cost(q[None], torch.tensor([t]), costs)) == pytest.approx(exact, abs=1e-6)
    exact = exact_emd(q.numpy(), p.numpy(), matrix.numpy())
    residual, product = (float(f(q[None], p[None], costs)) for f in (residual_cost, product_cost))
    assert exact - 1e-9 <= residual and exact - 1e-9 <= product
    assert residual < product  # what it is there for
    assert float(residual_cost(q[None], q[None], costs)) == 0 < float(product_cost(q[None], q[None], costs))


def test_cost_matrix_is_what_the_definition_says() -> None:
    _, _, _, costs = parts()
    matrix = costs.rows(torch.arange(V))
    torch.testing.assert_close(matrix, matrix.T)
    assert not matrix.diagonal().any() and float(matrix.min()) >= 0 and float(matrix.max()) <= 2
    off = matrix.sum() / (V * (V - 1))
    assert costs.mean == pytest.approx(float(off), abs=1e-6)


def test_the_cost_lies_in_its_range_and_is_zero_only_among_equal_embeddings() -> None:
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 4, generator=g, dtype=torch.float64)
    embedding[5] = 3 * embedding[2]  # a synonym of token 2
    costs, t = TokenCosts.of(embedding), torch.tensor([2])
    q = torch.zeros(1, 6).double()
    q[0, 2], q[0, 5] = 0.3, 0.7
    assert float(label_cost(q, t, costs)) == pytest.approx(0, abs=1e-12)
    mean = (q @ costs.unit).squeeze(0)
    q[0, 2], q[0, 1] = 0.2, 0.1
    mean = (q @ costs.unit).squeeze(0)
    cost = float(label_cost(q, t, costs))
    assert 0 < cost <= 2
    assert cost != pytest.approx(1 - float(mean @ costs.unit[2] / mean.norm()), abs=1e-3)  # the claim that is false
    opposite = TokenCosts.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert float(label_cost(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), opposite)) == 2


def test_orthonormal_embeddings_cost_the_missing_mass() -> None:
    hidden, weight, labels, _ = parts()
    out = emo_loss(hidden, weight, labels, TokenCosts.of(torch.eye(V, dtype=torch.float64)), mix=FixedMix(0, 1))
    q = (hidden @ weight.T).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    assert out.stats is not None
    torch.testing.assert_close(out.stats.loss, (1 - q).detach())


def test_zero_rows_cost_one_to_all_others() -> None:
    embedding = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    embedding[3] = 0
    costs = TokenCosts.of(embedding)
    expected = torch.ones(5)
    expected[3] = 0
    torch.testing.assert_close(costs.rows(torch.tensor([3]))[0], expected)
    mass = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(costs.against(mass), mass @ costs.rows(torch.arange(5)))


def test_gradient_of_the_cost_is_the_reinforce_form() -> None:
    _, _, labels, costs = parts()
    z = torch.randn(N, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    loss = EMO(costs, FixedMix(0, 1))(z, labels)
    (got,) = torch.autograd.grad(loss.sum(), z)
    q, matrix = z.detach().softmax(-1), costs.rows(labels)
    torch.testing.assert_close(got, q * (matrix - loss.detach().unsqueeze(-1)))
    torch.testing.assert_close(got.sum(-1), torch.zeros(N).double())


# --- the chunked form against the equations


@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("anchor", MODES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_labels_equal_the_equations(anchor: str, ratio: str, chunk_rows: int, mode: str) -> None:
    hidden, weight, labels, costs = parts()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    kept = torch.arange(N) % 3 > 0
    for limit in (None, LIMITS[anchor]):
        loss = EMO(costs, Mix(anchor, ratio, limit))
        want = naive_head(hidden, weight, labels, row_loss=loss, example_weight=kept, bias=bias)
        got = chunked_head(
            hidden, weight, labels, row_loss=loss, example_weight=kept, bias=bias, chunk_rows=chunk_rows, mode=mode
        )
        same(got, want, hidden, weight, bias)
        assert got.stats is not None and want.stats is not None
        for name in ("rows", "loss", "agree", "alpha", "entropy"):
            torch.testing.assert_close(getattr(got.stats, name), getattr(want.stats, name), check_dtype=False)
        q = (hidden @ weight.T + bias).detach().softmax(-1)[kept]
        torch.testing.assert_close(got.stats.more["cost"], label_cost(q, labels[kept], costs))
        torch.testing.assert_close(got.stats.more["nll"].exp(), 1 / q.gather(-1, labels[kept, None]).squeeze(-1))


@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("soft", ["residual", "product"])
@pytest.mark.parametrize("kind", ["live", "stored", "whole"])
def test_laws_equal_the_equations(kind: str, soft: str, mode: str) -> None:
    hidden, weight, _, costs = parts()
    target, w = soft_target(kind), torch.rand(N, generator=torch.Generator().manual_seed(2)).double()
    for mix in (Mix(), Mix("emo_anchored", "shift"), FixedMix(0, 1)):
        loss = EMO(costs, mix, soft)
        want = naive_head(hidden, weight, target, row_loss=loss, example_weight=w)
        got = chunked_head(hidden, weight, target, row_loss=loss, example_weight=w, chunk_rows=5, mode=mode)
        same(got, want, hidden, weight)
        assert got.stats is not None and want.stats is not None
        torch.testing.assert_close(got.stats.alpha, want.stats.alpha)
        torch.testing.assert_close(got.stats.agree, want.stats.agree)


@pytest.mark.parametrize("anchor", MODES)
def test_fp32_stays_within_the_bar(anchor: str) -> None:
    hidden, weight, labels, _ = (x.detach().float() if isinstance(x, Tensor) and x.is_floating_point() else x
                                 for x in parts())  # fmt: skip
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(labels, Tensor)
    costs = TokenCosts.of(torch.randn(V, M, generator=torch.Generator().manual_seed(5)) + 0.7)
    hidden.requires_grad_(), weight.requires_grad_()
    for rows in (1, 10, 64):
        loss = EMO(costs, Mix(anchor))
        got = chunked_head(hidden, weight, labels, row_loss=loss, chunk_rows=rows)
        want = naive_head(hidden, weight, labels, row_loss=loss)
        assert got.total.item() == pytest.approx(want.total.item(), rel=1e-5)
        for a, b in zip(grads(got, hidden, weight), grads(want, hidden, weight), strict=True):
            assert float((a - b).norm() / b.norm()) <= 1e-5


@pytest.mark.parametrize("kind", ["labels", "live", "stored"])
def test_gradcheck_with_fixed_weights(kind: str) -> None:
    hidden, weight, labels, costs = parts()
    target = labels if kind == "labels" else soft_target(kind)
    loss = EMO(costs, FixedMix(0.4, 1.3))

    def total(h: Tensor, w: Tensor) -> Tensor:
        return chunked_head(h, w, target, row_loss=loss, chunk_rows=8, retain_graph=True).mean

    if kind == "stored":  # the tail's proportions are the student's own, held constant: not a function to check
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(total, (hidden, weight), atol=1e-6)
    else:
        assert torch.autograd.gradcheck(total, (hidden, weight), atol=1e-6)


def test_frozen_head_makes_no_head_gradient() -> None:
    hidden, weight, labels, costs = parts()
    want = grads(emo_loss(hidden, weight, labels, costs), hidden, weight)[0]
    weight.requires_grad_(False)
    weight.grad = None
    got = grads(emo_loss(hidden, weight, labels, costs, chunk_rows=4), hidden)
    assert weight.grad is None
    torch.testing.assert_close(got[0], want)


def test_ignored_labels_are_dropped_before_the_head() -> None:
    hidden, weight, labels, costs = parts()
    labels[::2] = -100
    out = emo_loss(hidden, weight, labels, costs, chunk_rows=4)
    assert out.stats is not None and out.stats.rows.tolist() == list(range(1, N, 2)) and out.weight == N // 2
    want = naive_head(hidden[1::2], weight, labels[1::2], row_loss=EMO(costs))
    torch.testing.assert_close(out.mean, want.mean)
    out.mean.backward()
    assert hidden.grad is not None and not hidden.grad[::2].any() and bool(hidden.grad[1::2].any())


def test_all_labels_ignored_give_zero_and_zero_gradients() -> None:
    hidden, weight, labels, costs = parts()
    for mode in ("grad_in_forward", "recompute"):
        hidden.grad = weight.grad = None
        out = emo_loss(hidden, weight, torch.full_like(labels, -100), costs, mode=mode)
        out.mean.backward()
        assert out.mean.item() == 0
        assert hidden.grad is not None and not hidden.grad.any()
        assert weight.grad is not None and not weight.grad.any()


def test_unclamped_mle_anchored_has_the_value_of_the_likelihood() -> None:
    hidden, weight, labels, costs = parts()
    out = emo_loss(hidden, weight, labels, costs, mix=Mix(limit=math.inf))
    nll = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    assert out.mean.item() == pytest.approx(nll.item(), rel=1e-7)


def test_the_mixes_by_hand() -> None:
    nll, cost, mass = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.5])
    cases = [
        (Mix(), [0.5, 0.5], [1.5, 1.0]),  # 2 / 0.5 = 4 is clamped to 3
        (Mix(limit=math.inf), [0.5, 0.5], [2.0, 1.0]),
        (Mix(ratio="shift"), [0.5, 0.5], [1.0, 2 / 3]),
        (Mix("emo_anchored"), [0.25, 0.5], [1.0, 1.0]),
        (Mix("emo_anchored", "shift", 0.6), [0.5, 0.6], [1.0, 1.0]),
    ]
    for mix, a, b in cases:
        got = mix(nll, cost, mass)
        torch.testing.assert_close(got, (torch.tensor(a), torch.tensor(b)))


def test_a_tiny_missing_mass_keeps_its_digits() -> None:
    """q_t = 1 - 1e-10 in fp32: D is its true 1e-10 and not 0, nor negative."""
    costs = TokenCosts.of(torch.eye(3))
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [-23.7], [-23.7]])
    out = emo_loss(hidden, weight, torch.tensor([0]), costs)
    assert out.stats is not None
    assert float(out.stats.more["cost"]) == pytest.approx(2 * math.exp(-23.7), rel=1e-4)


def test_the_cost_alone_prefers_a_group_and_the_mix_does_not() -> None:
    """Labels .6 / .4 on two groups of synonyms: D goes all to one group, the mix keeps both."""
    groups = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    law = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    mass = {}
    for name, mix in (("alone", FixedMix(0, 1)), ("mix", Mix())):
        z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        optimizer, loss = torch.optim.Adam([z], lr=0.05), EMO(TokenCosts.of(groups), mix)
        for _ in range(400):
            optimizer.zero_grad()
            (loss(z.expand(4, 4), torch.arange(4)) * law).sum().backward()
            optimizer.step()
        mass[name] = float(z.detach().softmax(-1)[0, :2].sum())
    assert mass["alone"] > 0.99 and 0.6 <= mass["mix"] < 0.95


# --- costs


def test_half_precision_costs_are_near() -> None:
    hidden, weight, labels, costs = parts(torch.float32)
    half = TokenCosts.of(costs.unit, dtype=torch.bfloat16)
    exact, low = emo_loss(hidden, weight, labels, costs), emo_loss(hidden, weight, labels, half)
    assert half.unit.dtype == torch.bfloat16 and low.mean.item() == pytest.approx(exact.mean.item(), rel=0.01)
    assert not half.rows(labels).gather(-1, labels[:, None]).any()


def test_projection_reports_its_error_and_refuses_a_large_one() -> None:
    g = torch.Generator().manual_seed(0)
    low_rank = torch.randn(200, 4, generator=g) @ torch.randn(4, 32, generator=g)
    costs = TokenCosts.of(low_rank + 1e-3 * torch.randn(200, 32, generator=g), project=4)
    everything = torch.arange(200)
    true = TokenCosts.of(low_rank).rows(everything)
    worst = float((costs.rows(everything) - true).abs().max())
    assert costs.unit.shape == (200, 4) and 0 < costs.projection_error <= worst + 1e-2 < 0.05
    with pytest.raises(InvalidValue, match=r"8 principal directions move a token cost by 0\.\d+, allowed are 0.1"):
        TokenCosts.of(torch.randn(200, 64, generator=g), project=8)
    with pytest.raises(InvalidValue, match=r"project must lie in 1\.\.32"):
        TokenCosts.of(low_rank, project=33)


def test_costs_warn_where_emo_will_work_badly() -> None:
    g = torch.Generator().manual_seed(0)
    cone = torch.randn(50, 16, generator=g) * 0.05 + 1.0
    with pytest.warns(CostWarning, match="mean cost between two tokens is 0.0"):
        narrow = TokenCosts.of(cone)
    centred = TokenCosts.of(cone, center=True)
    assert narrow.mean < 0.05 < 0.8 < centred.mean
    with pytest.warns(CostWarning, match="needs trained embeddings"):
        TokenCosts.of(torch.randn(500, 512, generator=g), pretrained=False)
    with pytest.warns(CostWarning, match="requires a gradient"):
        assert not TokenCosts.of(torch.randn(5, 3, requires_grad=True)).unit.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TokenCosts.of(torch.randn(500, 512, generator=g))


# --- baselines


@pytest.mark.parametrize("loss", [mixce(0.3), tailr(0.1)], ids=["mixce", "tailr"])
def test_baselines_equal_their_equations(loss: Any) -> None:
    hidden, weight, labels, _ = parts()
    same(
        chunked_head(hidden, weight, labels, row_loss=loss, chunk_rows=5),
        naive_head(hidden, weight, labels, row_loss=loss),
        hidden,
        weight,
    )
    with pytest.raises(InvalidValue, match="learns from labels"):
        loss(torch.zeros(1, 3), FullLaw.from_logits(torch.zeros(1, 3)))


def test_baselines_by_hand() -> None:
    z = torch.tensor([[0.5, 0.25, 0.25]]).log()
    label, nll = torch.tensor([0]), math.log(2)
    assert float(mixce(0.4)(z, label)) == pytest.approx((0.4 + 0.6 * 0.5) * nll)
    assert float(tailr(0.5)(z, label)) == pytest.approx(0.5 / 0.75 * nll)
    assert float(tailr(1.0)(z, label)) == pytest.approx(nll)
    rare = torch.tensor([[0.01, 0.99]]).log()
    assert float(tailr(0.0)(rare, label)) == pytest.approx(-0.2 * math.log(0.01))


# --- vocabulary in parts


def test_two_ranks_that_share_the_vocabulary_equal_one(tmp_path: Any) -> None:
    spawn(workers.emo_vocabulary_parallel, args=(str(tmp_path / "store"),), nprocs=2)


# --- bad input


def test_bad_input() -> None:
    hidden, weight, labels, costs = parts()
    with pytest.raises(ValueError, match="cost embedding has 23 rows, logits have 22"):
        emo_loss(hidden, weight[:22], labels, costs)
    for wrong in (V, -1):
        bad = labels.clone()
        bad[5] = wrong
        with pytest.raises(InvalidValue, match=rf"label id {wrong} lies outside the vocabulary 0..22"):
            emo_loss(hidden, weight, bad, costs)
    embedding = torch.randn(6, 3)
    embedding[4, 1], embedding[5, 0] = math.nan, math.inf
    with pytest.raises(InvalidValue, match="row 4 holds NaN"):
        TokenCosts.of(embedding)
    with pytest.raises(InvalidValue, match="matrix"):
        TokenCosts.of(torch.randn(3))
    with pytest.raises(InvalidValue, match="unknown EMO mode 'mle'"):
        Mix("mle")
    with pytest.raises(InvalidValue, match="unknown EMO ratio"):
        Mix(ratio="both")
    with pytest.raises(InvalidValue, match="above 0"):
        Mix(limit=0.0)
    with pytest.raises(InvalidValue, match="limit of at most 10"):
        Mix("emo_anchored", "shift", math.inf)
    with pytest.raises(InvalidValue, match="unknown soft"):
        EMO(costs, soft="exact")
    with pytest.raises(InvalidValue, match="share"):
        mixce(1.5)
    with pytest.raises(InvalidValue, match="gamma"):
        tailr(-1)
