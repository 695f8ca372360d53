"""The accept/residual rule: hand-worked numbers, edge cases, exactness with the acceptance uniform integrated out."""

import pytest
import torch
from torch import Tensor

from draftsmith.inference import acceptance
from draftsmith.inference.acceptance import Fault, accept_or_residual, accepts, residual, verify, verify_greedy
from draftsmith.inference.rng import uniform
from draftsmith.inference.sampling import PenaltyState, SamplingParams, law


def halves(*shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float64)


def test_hand_worked_round() -> None:
    # p: 0.2 0.3 0.5, q: 0.6 0.3 0.1. x = 0 passes iff u < 1/3; the residual is (0, 0, 0.4), so y = 2 for sure
    p = torch.tensor([[[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]])
    q = torch.tensor([[[0.6, 0.3, 0.1]]])
    x, n = torch.tensor([[0]]), torch.tensor([1])
    no = verify(x, q, p, n, torch.tensor([[0.34]]).double(), halves(1))
    assert (no.k.item(), no.y.item(), no.fault.item()) == (0, 2, Fault.NONE)
    assert no.beta.item() == pytest.approx(0.2 + 0.3 + 0.1)
    yes = verify(x, q, p, n, torch.tensor([[0.33]]).double(), torch.tensor([0.45]).double())
    assert (yes.k.item(), yes.y.item()) == (1, 1), "the bonus token comes from p: 0.45 falls to token 1"


def test_a_token_after_a_rejection_is_never_accepted() -> None:
    p = torch.tensor([0.5, 0.5]).expand(1, 4, 2)
    q = p[:, :3]
    u = torch.tensor([[0.1, 0.999, 0.1]], dtype=torch.float64)
    q = torch.stack([q[0, 0], torch.tensor([1.0, 0.0]), q[0, 2]])[None]
    verdict = verify(torch.tensor([[0, 0, 0]]), q, p, torch.tensor([3]), u, halves(1))
    assert verdict.k.item() == 1 and verdict.y.item() == 1


def test_only_n_tokens_are_offered_and_the_bonus_row_follows_them() -> None:
    # p == q, so every offered token passes; row i of p is certain of token i, which tells the row that y came from
    p = torch.eye(4)[None].expand(5, 4, 4)
    x = torch.tensor([[0, 1, 2]]).expand(5, 3)
    n = torch.tensor([0, 1, 2, 3, 3])
    verdict = verify(x, p[:, :3], p, n, halves(5, 3), halves(5))
    assert verdict.k.tolist() == n.tolist() and verdict.y.tolist() == n.tolist()
    verdict = verify(x, None, p, n, halves(5, 3), halves(5))
    assert verdict.k.tolist() == n.tolist() and verdict.y.tolist() == n.tolist()
    greedy = verify_greedy(x, torch.arange(4).expand(5, 4), n)
    assert greedy.k.tolist() == n.tolist() and greedy.y.tolist() == n.tolist()


def test_strict_comparison_at_zero() -> None:
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert not accepts(zero, torch.zeros(1, 1), torch.ones(1, 1)), "an excluded token passes at u = 0 with <="
    verdict = verify(
        torch.tensor([[0]]),
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]),
        torch.tensor([1]),
        zero,
        halves(1),
    )
    assert verdict.k.item() == 0 and verdict.y.item() == 1


def test_residual_of_equal_laws_is_the_target() -> None:
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, torch.zeros(2)), p)


def test_deterministic_draft_equals_one_hot_law() -> None:
    p = torch.randn(200, 5, 9).softmax(-1)
    x = torch.randint(9, (200, 4))
    n = torch.randint(0, 5, (200,))
    u = torch.rand(200, 5, dtype=torch.float64)
    a = verify(x, None, p, n, u[:, :4], u[:, 4])
    b = verify(x, acceptance.one_hot(x, p[:, :4]), p, n, u[:, :4], u[:, 4])
    assert torch.equal(a.k, b.k) and torch.equal(a.y, b.y) and torch.equal(a.beta, b.beta)
    rejected = a.k < n
    assert rejected.any() and (a.y != x.gather(1, a.k.clamp_max(3)[:, None])[:, 0])[rejected].all()


def test_greedy_accepts_the_argmax_prefix() -> None:
    x = torch.tensor([[4, 5, 6], [4, 5, 6], [0, 5, 6]])
    best = torch.tensor([[4, 5, 6, 7], [4, 9, 6, 7], [4, 5, 6, 7]])
    verdict = verify_greedy(x, best, torch.tensor([3, 3, 3]))
    assert verdict.k.tolist() == [3, 1, 0] and verdict.y.tolist() == [7, 9, 4]
    assert verdict.beta.tolist() == [[1, 1, 1], [1, 0, 1], [0, 1, 1]]


def test_faults_are_reported_only_where_they_matter() -> None:
    nan = torch.full((3,), float("nan"))
    p = torch.full((1, 3, 3), 1 / 3)
    q = p[:, :2]
    x = torch.tensor([[0, 1]])
    at_bonus = torch.cat([p[:, :2], nan[None, None]], 1)
    assert verify(x, q, at_bonus, torch.tensor([2]), halves(1, 2), halves(1)).fault.item() == Fault.TARGET
    assert verify(x, q, at_bonus, torch.tensor([1]), halves(1, 2), halves(1)).fault.item() == Fault.NONE
    first = torch.cat([nan[None, None], p[:, :2]], 1)
    verdict = verify(x, q, first, torch.tensor([2]), halves(1, 2), halves(1))
    assert verdict.k.item() == 0 and verdict.fault.item() == Fault.TARGET
    impossible = torch.tensor([[[0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    assert verify(x, impossible, p, torch.tensor([2]), halves(1, 2), halves(1)).fault.item() == Fault.DRAFT
    assert verify(x, impossible * float("nan"), p, torch.tensor([2]), halves(1, 2), halves(1)).fault == Fault.DRAFT
    assert verify(x, impossible, p, torch.tensor([0]), halves(1, 2), halves(1)).fault.item() == Fault.NONE
    finite = torch.tensor([[True, False, True]])
    best = torch.tensor([[0, 1, 2]])
    assert verify_greedy(torch.tensor([[0, 0]]), best, torch.tensor([2]), finite).fault.item() == Fault.TARGET
    assert verify_greedy(torch.tensor([[1, 0]]), best, torch.tensor([2]), finite).fault.item() == Fault.NONE


def test_acceptance_rate_is_one_minus_tv() -> None:
    """Spec: measured per-position acceptance within 0.5% of 1 - TV over 100k draws (the standard error is 0.15%)."""
    p, q = torch.randn(2, 7).mul(1.2).double().softmax(-1)
    draws = 100_000
    u = uniform(0, torch.arange(draws), 0, 2)
    x = torch.multinomial(q, draws, replacement=True)
    rate = accepts(u, p[x], q[x]).double().mean()
    assert float(rate) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=0.005)
    assert float(acceptance.overlap(p, q)) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1e-12)


def test_tree_node_siblings_keep_the_law() -> None:
    """Several children of one node, each tested against what the last rejection left: the node's token has law p."""
    p, q1, q2 = torch.randn(3, 5).double().softmax(-1)
    law_ = torch.zeros(5, dtype=torch.float64)
    for x1 in range(5):
        pass1 = float((p[x1] / q1[x1]).clamp_max(1))
        law_[x1] += q1[x1] * pass1
        _, rest = accept_or_residual(torch.tensor(x1), q1, p, torch.tensor(0.0).double())
        for x2 in range(5):
            pass2 = float((rest[x2] / q2[x2]).clamp_max(1))
            law_[x2] += q1[x1] * (1 - pass1) * q2[x2] * pass2
            _, last = accept_or_residual(torch.tensor(x2), q2, rest, torch.tensor(0.0).double())
            law_ += q1[x1] * (1 - pass1) * q2[x2] * (1 - pass2) * last
    torch.testing.assert_close(law_, p, rtol=0, atol=1e-12)


# Exactness, analytic -------------------------------------------------------------------------------------------------

SETTINGS = {
    "T=1": {"temperature": 1.0},
    "T=0.7 top-k 20": {"temperature": 0.7, "top_k": 20},
    "top-p 0.8": {"temperature": 1.0, "top_p": 0.8},
    "min-p 0.05": {"temperature": 1.2, "min_p": 0.05},
    "all filters": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
    "greedy": {"temperature": 0.0},
}


def realistic_logits(vocab: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [1, 2, V] of a target and a draft, shaped like a language model's: a Zipf-like bulk and a few spikes.

    The draft is the target plus noise of a standard deviation of 1, as between a model and its distilled draft.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(vocab, generator=generator).double() + 1
    base = -1.1 * rank.log() + 0.7 * torch.randn(2, vocab, generator=generator).double()
    base[:, torch.randint(vocab, (6,), generator=generator)] += 8 * torch.rand(6, generator=generator).double()
    noise = torch.randn(2, vocab, generator=generator).double()
    return base[None].to(dtype), (base + noise)[None].to(dtype)


def committed_law(p: Tensor, q: Tensor) -> Tensor:
    """The law [V] of the token committed at one position, with the uniform integrated out, from the shipped functions.

    accepts(u, p, q) is true on [0, a) with a = min(1, p/q); that the shipped test switches exactly there is asserted,
    then the integral over u is a itself.
    """
    p, q = p.double(), q.double()
    a = torch.where(q > 0, (p / q.clamp_min(1e-300)).clamp_max(1.0), 0.0)
    drafted = q > 0
    below, above = a * (1 - 1e-9), a * (1 + 1e-9)
    assert accepts(below, p, q)[drafted & (a > 0)].all(), "accepted below the threshold"
    assert not accepts(above, p, q)[drafted & (a < 1)].any(), "rejected above it"
    v = torch.arange(len(p))
    some = v[drafted][:1]
    _, rest = accept_or_residual(some, q[None], p[None], torch.zeros(1, dtype=torch.float64))
    return q * a + (1 - acceptance.overlap(p, q)) * rest[0]


@pytest.mark.parametrize("vocab", [2_000, 32_000, 152_000])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_committed_law_is_the_targets(vocab: int, name: str, dtype: torch.dtype) -> None:
    """Max deviation from p below 1e-6 (float64) on laws that the sampling block made, draft and bonus positions."""
    params = SamplingParams(**SETTINGS[name])
    target, draft = realistic_logits(vocab, 3, dtype)
    state = PenaltyState([[1, 2, 3]], vocab, "cpu")
    counts = state.counts(torch.tensor([[5]])) if params.has_penalties else None
    p, q = law(target, params, counts)[0], law(draft, params, counts)[0]
    for i in range(2):
        got = committed_law(p[i], q[i])
        assert float((got - p[i].double() / p[i].double().sum()).abs().max()) < 1e-6


@pytest.mark.parametrize("mutant", ["missing residual", "absolute residual", "q not the sampled law", "q tempered"])
def test_negative_control_analytic(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same computation must notice a broken rule."""
    target, draft = realistic_logits(2_000, 3, torch.float32)
    params = SamplingParams(temperature=1.0)
    p, q = law(target, params)[0, 0], law(draft, params)[0, 0]
    sampled = q.double()
    if mutant == "missing residual":
        monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    elif mutant == "absolute residual":
        monkeypatch.setattr(acceptance, "residual", lambda p, q: (p - q).abs())
    elif mutant == "q not the sampled law":
        q = law(draft, SamplingParams(temperature=1.0, top_k=100))[0, 0]
        q = 0.5 * q + 0.5 * sampled
    else:
        q = law(draft, SamplingParams(temperature=0.8))[0, 0]
    a = torch.where(q > 0, (p.double() / q.double().clamp_min(1e-300)).clamp_max(1.0), 0.0)
    got = committed_law(p, q) + (sampled - q.double()) * a
    assert float((got - p.double()).abs().max()) > 1e-4
