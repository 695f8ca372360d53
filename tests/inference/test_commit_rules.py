"""Rules of the block sampler: hand-worked choices, Fast-dLLM's theorem by random joint laws, the quota, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference.commit_rules import (
    BlockView,
    EntropyBound,
    Factor,
    LearnedFilter,
    Oracle,
    Threshold,
    TopN,
    best,
    split_quota,
)
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.rng import key


def view(confidence: list[list[float]], masked: list[list[bool]] | None = None, **fields: Any) -> BlockView:
    conf = torch.tensor(confidence)
    rows, size = conf.shape
    hidden = torch.ones(rows, size, dtype=torch.bool) if masked is None else torch.tensor(masked)
    made: dict[str, Any] = {
        "confidence": torch.where(hidden, conf, 1.0),
        "predicted": torch.zeros(rows, size, dtype=torch.int64),
        "masked": hidden,
        "step": torch.zeros(rows, dtype=torch.int64),
        "position": torch.arange(size).expand(rows, -1),
        "row": torch.arange(rows),
        "block_start": torch.zeros(rows, dtype=torch.int64),
    }
    return BlockView(**made | fields)


def chosen(found: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in found]


def test_hand_worked_choices() -> None:
    """Column 1 is committed already: its confidence of 1 must not count."""
    seen = view([[0.95, 1.0, 0.80, 0.99], [0.30, 0.2, 0.10, 0.25]], [[True, False, True, True], [True] * 4])
    assert chosen(Threshold(0.9)(seen)) == [[0, 3], []]
    assert chosen(Threshold(1.0)(seen)) == [[], []]
    # row 0: 2 * 0.01 < 0.5, 3 * 0.05 < 0.5, 4 * 0.2 > 0.5
    assert chosen(Factor(0.5)(seen)) == [[0, 3], []]
    assert chosen(Factor(0.1)(seen)) == [[3], []]
    assert chosen(Factor(1.9)(seen)) == [[0, 2, 3], [0]]
    assert chosen(TopN(n=1)(seen)) == [[3], [0]]
    assert chosen(TopN(n=2)(seen)) == [[0, 3], [0, 3]]
    assert chosen(TopN()(view(seen.confidence.tolist(), seen.masked.tolist(), quota=torch.tensor([1, 3])))) == [
        [3],
        [0, 1, 3],
    ]
    assert chosen(TopN("left_to_right", 2)(seen)) == [[0, 2], [0, 1]]
    assert chosen(best(seen.confidence, seen.masked)) == [[3], [0]]
    assert chosen(best(seen.confidence, seen.masked & False)) == [[], []]


def test_scores_of_the_law() -> None:
    """margin and entropy rank apart from the confidence: (.5, .5) is surer of its pair than (.5, .3, .2) by entropy."""
    laws = torch.tensor([[0.5, 0.5 - 1e-7, 1e-7], [0.5, 0.3, 0.2], [0.48, 0.05, 0.47]])
    seen = view([[0.5, 1.0, 0.5, 0.48]], [[True, False, True, True]], packed=laws.log())
    assert seen.margin[0].tolist() == pytest.approx([0.0, 1.0, 0.2, 0.01], abs=1e-6)
    first, second, third = (-(laws * laws.log()).sum(-1)).tolist()
    assert seen.entropy[0].tolist() == pytest.approx([first, 0.0, second, third], abs=1e-5)
    assert chosen(TopN("margin", 1)(seen)) == [[2]]
    assert chosen(TopN("entropy", 1)(seen)) == [[0]]
    assert chosen(TopN("confidence", 1)(seen)) == [[0]]
    # entropies 0.69, 0.86, 1.03: the bound counts all but the largest of what is taken
    assert chosen(EntropyBound(0.0)(seen)) == [[0]]
    assert chosen(EntropyBound(0.70)(seen)) == [[0, 3]]
    assert chosen(EntropyBound(1.60)(seen)) == [[0, 2, 3]]
    assert seen.logits is not None and seen.logits.shape == (1, 4, 3)


def test_a_mask_of_probability_zero_spoils_no_entropy() -> None:
    logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    assert view([[0.7]], packed=logits).entropy.isfinite().all()


def test_random_order_is_uniform_and_belongs_to_the_row() -> None:
    """Each of 4 positions comes first equally often, and the same row draws the same whoever is beside it."""
    rows = 4000
    seen = view([[0.5] * 4] * rows, order_key=key(3, torch.arange(rows).unsqueeze(1)), passes=torch.zeros(rows).long())
    first = TopN("random", 1)(seen).double().mean(0)
    assert first.sub(0.25).abs().max() < 4 * (0.25 * 0.75 / rows) ** 0.5
    alone = view([[0.5] * 4], order_key=key(3, torch.tensor([[7]])), passes=torch.zeros(1).long())
    assert chosen(TopN("random", 1)(alone))[0] == chosen(TopN("random", 1)(seen))[7]


@pytest.mark.parametrize("count", range(0, 20))
def test_quota(count: int) -> None:
    """Guarantee 3: the quotas sum to the masks and differ by at most 1."""
    for steps in range(1, 12):
        quota = split_quota(count, steps)
        assert sum(quota) == count and len(quota) == steps and max(quota) - min(quota) <= 1


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 3, 3), (2, 3, 2)])
def test_factor_one_keeps_the_joint_argmax(sizes: tuple[int, ...]) -> None:
    """Guarantee 5 (Fast-dLLM, theorem 1), by 10^4 random joints whose marginals all exceed 1 - 1/(n + 1)."""
    n, found = len(sizes), 0
    generator = torch.Generator().manual_seed(sum(sizes))
    while found < 10_000:
        noise = torch.rand(20_000, *sizes, generator=generator, dtype=torch.float64) ** 8
        point = torch.rand(20_000, 1, 1, 1, generator=generator, dtype=torch.float64) * 30
        noise[:, :1, :1, :1] += point  # the law's mode is (0, 0, 0), or close to losing it
        joint = noise / noise.sum((1, 2, 3), keepdim=True)
        marginals = [joint.sum([d for d in (1, 2, 3) if d != i + 1]) for i in range(n)]
        conf = torch.stack([m.amax(-1) for m in marginals], 1)
        taken = Factor(1.0)(view(conf.tolist())).all(1)
        # the rule's condition on all three is the theorem's
        assert torch.equal(taken, ((n + 1) * (1 - conf.float().amin(1))) < 1.0)
        product = torch.stack([m.argmax(-1) for m in marginals], 1)[taken]
        flat = joint[taken].flatten(1).argmax(1)
        index = torch.stack(torch.unravel_index(flat, sizes), 1)
        assert torch.equal(product, index)
        epsilon = 1 - conf[taken].amin(1)
        outer = torch.einsum("bi,bj,bk->bijk", *[m[taken] for m in marginals])
        tv = (outer - joint[taken]).abs().sum((1, 2, 3)) / 2
        assert (tv <= (3 * n - 1) / 2 * epsilon + 1e-9).all()
        found += int(taken.sum())


def test_beyond_the_theorem_the_product_can_miss_the_joint() -> None:
    """Negative control: three marginals of 0.6 each agree with no mode of the joint."""
    joint = torch.zeros(2, 2, 2)
    joint[0, 0, 1] = joint[0, 1, 0] = joint[1, 0, 0] = 0.3
    joint[1, 1, 1] = 0.1
    marginal = joint.sum((1, 2))
    assert marginal.argmax() == 0 and marginal.amax() == pytest.approx(0.6)
    assert joint[0, 0, 0] < joint.max()
    assert chosen(Factor(1.0)(view([[0.6, 0.6, 0.6]]))) == [[0]]


def test_learned_filter_reads_its_threshold_as_a_probability() -> None:
    net = CommitFilter(FilterConfig(4, net="reference"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.layers[2].bias.copy_(torch.tensor([3.0, 0.0, -3.0, 3.0]))  # sigmoid 0.953, 0.5, 0.047, 0.953
    seen = view([[0.5, 0.5, 0.5, 0.5]], [[True, True, True, False]])
    with torch.no_grad():
        assert chosen(LearnedFilter(net, 0.9)(seen)) == [[0]]
        assert chosen(LearnedFilter(net, 0.4)(seen)) == [[0, 1]]
        assert chosen(LearnedFilter(net, 1.0)(seen)) == [[]]


def test_learned_filter_sees_the_law_and_the_pass_before() -> None:
    """The signals are those of the view, entropy as a share of log V, and a row in its first pass has no past."""
    net = CommitFilter(FilterConfig(4))
    before = view([[0.2, 0.3, 0.4, 0.5]] * 2)
    laws = torch.randn(6, 5)
    masked = [[True, False, True, True]] * 2
    seen = view([[0.5] * 4] * 2, masked, packed=laws, previous=before, step=torch.tensor([1, 0]))
    signals = LearnedFilter(net, 0.9).signals(seen)
    assert signals.has_previous is not None and signals.has_previous.tolist() == [True, False]
    assert signals.entropy is not None and signals.margin is not None
    assert torch.allclose(signals.entropy * torch.tensor(5.0).log(), seen.entropy, atol=1e-6)
    assert torch.allclose(signals.margin, seen.margin, atol=1e-6)
    assert LearnedFilter(net, 0.9)(seen).shape == (2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(0.0), "threshold must be above 0"),
        (lambda: Factor(0.0), "factor must be above 0"),
        (lambda: EntropyBound(-0.1), "entropy_bound must be at least 0"),
        (lambda: TopN("luck"), "unknown score 'luck'"),
        (lambda: TopN(n=0), "commits a pass must be at least 1"),
        (lambda: Oracle([]), "a finished canvas for every request"),
        (lambda: LearnedFilter(CommitFilter(FilterConfig(4)), 0.0), "must lie in"),
        (lambda: LearnedFilter(CommitFilter(FilterConfig(4)), 1.1), "must lie in"),
        (lambda: view([[0.5]]).entropy, "holds no logits"),
        (lambda: TopN("random", 1)(view([[0.5]])), "needs the rows' keys"),
        (lambda: TopN()(view([[0.5]])), "follows the schedule's quota"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()
