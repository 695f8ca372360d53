"""The filter's training: its loss by hand, thresholds for a budget, calibration, what an export says, bad input."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.batches import TraceBatch
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.commit_filter import FilterConfig
from draftsmith.modules.learn2pd_filter import Learn2PDFilter, Reliability, reliability_plot, signals

W = 4


def batch(rows: int = 6, seed: int = 0) -> TraceBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(rows, W, generator=generator) for _ in range(6)]
    bits = [x.half().view(torch.int16) for x in draw[:4]]
    return TraceBatch(
        confidence=bits[0],
        entropy=bits[1],
        margin=bits[2],
        predicted=(draw[4] * 9).int(),
        masked=(draw[4] < 0.7).byte(),
        label=(draw[5] < 0.5).byte(),
        before_confidence=bits[3],
        before_predicted=(draw[5] * 9).int(),
        before_masked=torch.ones(rows, W, dtype=torch.uint8),
        follows=torch.ones(rows, dtype=torch.uint8),
        sample_id=torch.arange(rows),
    )


def module(**settings: Any) -> Learn2PDFilter:
    torch.manual_seed(0)
    made = Learn2PDFilter(FilterConfig(W, settings.pop("net", "equivariant")), **settings)
    made.configure_model()
    return made


@pytest.mark.parametrize("net", ["reference", "equivariant"])
def test_the_loss_is_that_of_masked_positions_with_weighted_negatives(net: str) -> None:
    made, given = module(net=net, negative_weight=3.0), batch()
    total, weight, logits = made.loss(given)
    by_hand = counted = 0.0
    for row in range(6):
        for i in range(W):
            if not given.masked[row, i]:
                continue
            p = 1 / (1 + math.exp(-float(logits[row, i].detach())))
            by_hand += -math.log(p) if given.label[row, i] else -3 * math.log(1 - p)
            counted += 1 if given.label[row, i] else 3
    assert float(total.detach()) == pytest.approx(by_hand, rel=1e-4) and float(weight) == counted
    given.label[given.masked == 0] ^= 1
    assert torch.equal(made.loss(given)[0], total)  # what is committed is not learned


def test_batches_are_read_as_they_were_traced() -> None:
    given = batch()
    seen = signals(given)
    assert seen.previous is not None and seen.entropy is not None
    assert torch.equal(seen.entropy, given.entropy.view(torch.float16).float())
    assert torch.equal(seen.previous.predicted, given.before_predicted)


def test_the_threshold_keeps_to_the_budget() -> None:
    scores = Reliability(0.1)
    # accepted above 0.9: 1 wrong of 10; above 0.5: 6 wrong of 20
    p = torch.cat((torch.full((10,), 0.95), torch.full((10,), 0.6)))
    label = torch.tensor([True] * 9 + [False] + [True] * 5 + [False] * 5)
    scores.update(torch.logit(p), label, torch.tensor(2.0), torch.tensor(4.0))
    found = scores.compute()
    assert float(found["loss"]) == 0.5
    assert 0.6 < float(found["threshold"]) <= 0.95
    assert float(found["false_accepts"]) == pytest.approx(0.1) and float(found["accepted"]) == pytest.approx(9 / 14)
    loose = Reliability(0.4)
    loose.update(torch.logit(p), label, torch.tensor(2.0), torch.tensor(4.0))
    assert float(loose.compute()["threshold"]) < 0.6 and float(loose.compute()["accepted"]) == 1


def test_no_threshold_keeps_to_the_budget() -> None:
    scores = Reliability(0.01)
    scores.update(torch.full((5,), 3.0), torch.zeros(5, dtype=torch.bool), torch.tensor(1.0), torch.tensor(1.0))
    assert float(scores.compute()["threshold"]) == pytest.approx(0.999)


def test_calibration_by_hand() -> None:
    scores = Reliability(0.5)
    p = torch.tensor([0.2005] * 4 + [0.8005] * 4)
    scores.update(torch.logit(p), torch.tensor([True, False, False, False] + [True] * 4), *torch.ones(2))
    mean, share, count = scores.bars()
    assert count[[2, 8]].tolist() == [4, 4] and share[[2, 8]].tolist() == [0.25, 1.0]
    assert float(scores.compute()["ece"]) == pytest.approx((0.05 + 0.2) / 2, abs=2e-3)
    figure = reliability_plot(mean, share, count)
    assert figure.axes[0].get_xlabel() == "score"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"negative_weight": 0.0}, "negative_weight"), ({"false_accepts": 1.0}, "false_accepts")],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        module(**settings)


def test_what_was_not_trained_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InvalidState, match="seen no traces"):
        module().export_spec()
