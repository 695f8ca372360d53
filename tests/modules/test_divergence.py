"""Row losses: hand-worked numbers, the tail category, exact zeros, gradients."""

import math

import pytest
import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.divergence import NEEDS_FULL_SUPPORT, ROW_LOSSES, FullLaw, aligned, overlap, row_loss

NAMES = sorted(ROW_LOSSES)
DIVERGENCES = sorted(set(NAMES) - {"ce"})

# p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2)
P = torch.tensor([[0.5, 0.25, 0.25]])
Q = torch.tensor([[0.25, 0.25, 0.5]])
LOG2 = math.log(2.0)
# KL(p||q) = 1/2 log 2 + 0 - 1/4 log 2; the pair is symmetric, so KL(q||p) is the same; m = (3/8, 1/4, 3/8)
HAND = {
    "ce": 0.5 * math.log(4) + 0.25 * math.log(4) + 0.25 * math.log(2),
    "forward_kl": 0.25 * LOG2,
    "reverse_kl": 0.25 * LOG2,
    "fkl_rkl_mix": 0.25 * LOG2,
    "jsd": 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375),
    "tvd": 0.25,
}


def law_of(probs: Tensor, k: int | None = None) -> TeacherLaw:
    return TeacherLaw.from_probs(probs, k or probs.shape[-1])


def random_pair(seed: int = 0, c: int = 7, v: int = 11, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(c, v, generator=g, dtype=torch.float64) for _ in range(2))
    return z, t


def coarse(probs: Tensor, ids: Tensor) -> Tensor:
    """Explicit probabilities of `ids` and one bucket for the rest."""
    head = probs.gather(-1, ids)
    return torch.cat([head, (1 - head.sum(-1, keepdim=True)).clamp_min(0)], -1)


@pytest.mark.parametrize("name", NAMES)
def test_hand_worked_numbers(name: str) -> None:
    for shift in (0.0, 5.0):  # logits are defined up to a constant
        out = ROW_LOSSES[name](Q.log() + shift, law_of(P))
        torch.testing.assert_close(out, torch.tensor([HAND[name]]), atol=1e-6, rtol=0)


def test_asymmetric_hand_worked_numbers() -> None:
    p, q = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]])
    forward = 0.8 * math.log(2) + 0.2 * math.log(1 / 3)
    reverse = 0.4 * math.log(0.5) + 0.6 * math.log(3)
    got = {name: float(ROW_LOSSES[name](q.log(), law_of(p))) for name in ("forward_kl", "reverse_kl", "fkl_rkl_mix")}
    assert got["forward_kl"] == pytest.approx(forward, abs=1e-6)
    assert got["reverse_kl"] == pytest.approx(reverse, abs=1e-6)
    assert got["fkl_rkl_mix"] == pytest.approx(0.9 * forward + 0.1 * reverse, abs=1e-6)
    # beta = 0.25: m = 0.25 p + 0.75 q = (0.5, 0.5)
    kl_p = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    kl_q = 0.4 * math.log(0.8) + 0.6 * math.log(1.2)
    assert float(row_loss("jsd", 0.25)(q.log(), law_of(p))) == pytest.approx(0.25 * kl_p + 0.75 * kl_q, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_a_one_hot_law(name: str) -> None:
    z, _ = random_pair()
    y = torch.arange(7) % 11
    if name in NEEDS_FULL_SUPPORT:
        with pytest.raises(InvalidValue, match="hard labels"):
            ROW_LOSSES[name](z, y)
        return
    one_hot = torch.nn.functional.one_hot(y, 11).double()
    torch.testing.assert_close(ROW_LOSSES[name](z, y), ROW_LOSSES[name](z, law_of(one_hot)), atol=1e-9, rtol=0)
    q_y = z.softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    expected = {"ce": -q_y.log(), "forward_kl": -q_y.log(), "tvd": 1 - q_y}
    if name in expected:
        torch.testing.assert_close(ROW_LOSSES[name](z, y), expected[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_k_equals_the_coarse_grained_formula(name: str) -> None:
    z, t = random_pair()
    for k in (1, 3, 10, 11):
        law = TeacherLaw.from_logits(t, k)
        p = coarse(t.softmax(-1), law.ids) if k < 11 else t.softmax(-1).gather(-1, law.ids)
        q = coarse(z.softmax(-1), law.ids) if k < 11 else z.softmax(-1).gather(-1, law.ids)
        m = 0.5 * (p + q)
        kl = {
            "forward_kl": (p * (p / q).log()).sum(-1),
            "reverse_kl": (q * (q / p).log()).sum(-1),
            "ce": -(p * q.log()).sum(-1),
            "jsd": 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1),
            "tvd": 0.5 * (p - q).abs().sum(-1),
        }
        kl["fkl_rkl_mix"] = 0.9 * kl["forward_kl"] + 0.1 * kl["reverse_kl"]
        torch.testing.assert_close(ROW_LOSSES[name](z, law), kl[name], atol=1e-6, rtol=1e-6)  # laws are stored in fp32


@pytest.mark.parametrize("name", NAMES)
def test_the_three_forms_of_a_full_law_agree(name: str) -> None:
    z, t = random_pair(seed=1)
    full = ROW_LOSSES[name](z, FullLaw.from_logits(t, 0.7))
    torch.testing.assert_close(ROW_LOSSES[name](z, TeacherLaw.from_logits(t, 11, 0.7)), full, atol=1e-6, rtol=1e-6)
    plain = ROW_LOSSES[name](z / 0.7, FullLaw.from_logits(t / 0.7))  # both laws at the law's temperature
    torch.testing.assert_close(plain, full)
    assert not torch.allclose(ROW_LOSSES[name](z, FullLaw.from_logits(t / 0.7)), full)  # negative control


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_if_and_only_if_equal(name: str) -> None:
    z, t = random_pair()
    for k in (3, 11):
        assert float(ROW_LOSSES[name](t + 3.0, TeacherLaw.from_logits(t, k)).abs().max()) < 1e-6
        assert float(ROW_LOSSES[name](z, TeacherLaw.from_logits(t, k)).min()) > 1e-3


def test_jsd_is_symmetric_and_bounded() -> None:
    z, t = random_pair(scale=20.0)
    one = ROW_LOSSES["jsd"](z, FullLaw.from_logits(t))
    other = ROW_LOSSES["jsd"](t, FullLaw.from_logits(z))
    torch.testing.assert_close(one, other)
    assert float(one.min()) >= 0 and float(one.max()) <= LOG2 + 1e-12
    disjoint = ROW_LOSSES["jsd"](torch.tensor([[100.0, -100.0]]), torch.tensor([1]))
    assert float(disjoint) == pytest.approx(LOG2, abs=1e-6)
    skewed = row_loss("jsd", 0.2)
    assert not torch.allclose(skewed(z, FullLaw.from_logits(t)), skewed(t, FullLaw.from_logits(z)))  # only beta = .5 is


def test_tail_mass_keeps_its_digits() -> None:
    """The student's tail holds 2e-20: as 1 - (mass on ids) it would be 0 in fp32 and the loss infinite."""
    z = torch.tensor([[46.0, 0.0, 0.0]])
    law = TeacherLaw(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]))
    logq_tail = math.log(2) - 46.0
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - logq_tail)
    assert float(ROW_LOSSES["forward_kl"](z, law)) == pytest.approx(expected, rel=1e-6)


def test_removed_tokens_are_exact_zeros() -> None:
    """top-k removed the tail: forward KL ignores it, JSD and TVD charge it, reverse KL is infinite; no NaN gradient."""
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)  # q uniform
    law = TeacherLaw.from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), 2)
    assert law.tail_logmass.item() == -math.inf
    wide = TeacherLaw.from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), 3)  # one explicit zero and a tail
    expected = {"forward_kl": LOG2, "ce": 2 * LOG2, "tvd": 0.5, "reverse_kl": math.inf, "fkl_rkl_mix": math.inf}
    # m = (3/8, 3/8, 1/8, 1/8)
    expected["jsd"] = 0.5 * math.log(0.5 / 0.375) + 0.5 * (0.5 * math.log(0.25 / 0.375) + 0.5 * math.log(2))
    for name, value in expected.items():
        for variant in (law, wide):
            z.grad = None
            out = ROW_LOSSES[name](z, variant)
            out.sum().backward()
            assert out.item() == pytest.approx(value, abs=1e-6), name
            assert z.grad is not None and bool(z.grad.isfinite().all()), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [2, 6])
def test_gradients_are_finite_at_extreme_logits(name: str, k: int) -> None:
    z = torch.tensor([[3e4, -3e4, 0, 1, 2, 3], [0, 0, 0, 0, 0, 3e4], [-1e38, 0, 0, 0, 0, 0]]).requires_grad_()
    t = torch.tensor([[-3e4, 3e4, 0, 1, 2, 3], [3e4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1e30]])
    out = ROW_LOSSES[name](z, TeacherLaw.from_logits(t, k))
    assert not bool(out.isnan().any())
    out.masked_fill(out.isinf(), 0).sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["full", "tail", "labels"])
def test_gradcheck(name: str, kind: str) -> None:
    z, t = random_pair(c=3, v=5, scale=1.0)
    if kind == "labels":
        if name in NEEDS_FULL_SUPPORT:
            pytest.skip("infinite against labels")
        target: Tensor | FullLaw | TeacherLaw = torch.tensor([0, 4, 2])
    else:
        target = FullLaw.from_logits(t, 0.8) if kind == "full" else TeacherLaw.from_logits(t, 2, 0.8)
    assert torch.autograd.gradcheck(lambda x: ROW_LOSSES[name](x, target), z.requires_grad_())


def test_forward_kl_gradient_is_q_minus_p() -> None:
    z, t = random_pair()
    z.requires_grad_()
    ROW_LOSSES["forward_kl"](z, FullLaw.from_logits(t)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, z.detach().softmax(-1) - t.softmax(-1))


def test_overlap_is_one_minus_tvd_and_a_tail_only_raises_it() -> None:
    z, t = random_pair()
    alpha = torch.minimum(z.softmax(-1), t.softmax(-1)).sum(-1)
    torch.testing.assert_close(overlap(*aligned(z, FullLaw.from_logits(t))), alpha)
    torch.testing.assert_close(1 - ROW_LOSSES["tvd"](z, FullLaw.from_logits(t)), alpha)
    assert bool((overlap(*aligned(z, TeacherLaw.from_logits(t, 3))) >= alpha - 1e-6).all())


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_logits_are_read_in_fp32(name: str) -> None:
    z, t = random_pair()
    low = z.bfloat16()
    out = ROW_LOSSES[name](low, FullLaw.from_logits(t.float()))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, ROW_LOSSES[name](low.float(), FullLaw.from_logits(t.float())))


def test_unknown_names_and_betas_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"unknown loss 'foward_kl'.*forward_kl.*did you mean 'forward_kl'"):
        row_loss("foward_kl")
    for beta in (0.0, 1.0, -0.5):
        with pytest.raises(InvalidValue, match="strictly between 0 and 1"):
            row_loss("jsd", beta)
