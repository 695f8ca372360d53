"""Text metrics: hand-worked numbers, and what the network helpers read."""

import math
from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.text_metrics import (
    continuation_nll,
    distinct_n,
    features,
    frontier_area,
    matched_temperature,
    mean_entropy,
)
from tests.tiny import lm

TEXTS = [[5, 6, 7, 8, 9], [5, 6, 7], [11]]


@pytest.fixture(scope="module")
def net() -> Any:
    return lm(vocab_size=40, width=16, layers=1)


def test_distinct_n_by_hand() -> None:
    texts = [[1, 2, 1, 2], [1, 2]]  # 1-grams: 2 of 6; 2-grams: 12 21 12 | 12: 2 of 4
    assert distinct_n(texts, 1) == 2 / 6 and distinct_n(texts, 2) == 2 / 4 and distinct_n(texts, 5) == 0
    with pytest.raises(InvalidValue, match="n=0"):
        distinct_n(texts, 0)


def test_frontier_area() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    assert frontier_area(p, p) == pytest.approx(1.0, abs=1e-6)
    assert 0.01 < frontier_area(p, q) < 0.9 and frontier_area(p, q) == pytest.approx(frontier_area(q, p), abs=1e-9)
    # disjoint laws: x = (1 - w)^5 and y = w^5, whose area is 5 B(6, 5)
    exact = 5 * math.factorial(5) * math.factorial(4) / math.factorial(10)
    assert frontier_area(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(exact, rel=0.1)
    near = torch.tensor([0.45, 0.5, 0.05])
    assert frontier_area(p, q) < frontier_area(p, near)
    with pytest.raises(InvalidValue, match="one set of clusters"):
        frontier_area(p, q[:2])
    with pytest.raises(InvalidValue, match="laws"):
        frontier_area(p, 2 * q)


def test_continuation_nll_reads_the_continuation_only(net: Any) -> None:
    prompts = [[1, 2, 3], [4], [9, 8]]
    total, count = continuation_nll(net, prompts, TEXTS, batch=2)
    expected = 0.0
    for p, t in zip(prompts, TEXTS, strict=True):
        logp = net(torch.tensor([[*p, *t]])).logits[0].detach().log_softmax(-1)
        expected -= float(sum(logp[len(p) - 1 + i, token] for i, token in enumerate(t)))
    assert count == 9 and total == pytest.approx(expected, rel=1e-5)


def test_features_and_entropy_do_not_depend_on_the_padding(net: Any) -> None:
    together, alone = features(net, TEXTS, batch=3), features(net, TEXTS, batch=1)
    torch.testing.assert_close(together, alone)
    assert mean_entropy(net, TEXTS, batch=3) == pytest.approx(mean_entropy(net, TEXTS, batch=1), rel=1e-5)
    with torch.no_grad():
        laws = net(torch.tensor([TEXTS[1]])).logits[0].softmax(-1)
    assert mean_entropy(net, [TEXTS[1]]) == pytest.approx(float(-(laws * laws.log()).sum(-1).mean()), rel=1e-5)


def test_the_matched_temperature_has_the_entropy_that_was_asked_for(net: Any) -> None:
    for true in (0.6, 1.4):
        found = matched_temperature(net, TEXTS, mean_entropy(net, TEXTS, true))
        assert found == pytest.approx(true, abs=0.01)
