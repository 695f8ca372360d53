"""Parameter groups, schedules as functions of the step, and the guard against non-finite losses."""

import math

import pytest
import torch
from torch import nn

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.modules.optim import FiniteGuard, OptimConfig, build_optimizer, lr_factor, parameter_groups


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    module = net()
    module[3].requires_grad_(False)
    decayed, kept = parameter_groups(module.named_parameters(), 0.1)
    assert {tuple(p.shape) for p in decayed["params"]} == {(5, 4), (3, 4)} and decayed["weight_decay"] == 0.1
    assert {tuple(p.shape) for p in kept["params"]} == {(3,)} and len(kept["params"]) == 3
    assert kept["weight_decay"] == 0.0
    assert len(parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.1)) == 1  # no empty group


def test_cosine_with_warm_up_by_hand() -> None:
    config = OptimConfig(warmup_steps=4, final_lr_ratio=0.2)
    got = [lr_factor(step, config, 12) for step in (0, 1, 3, 4, 8, 12, 1000)]
    # half way (step 8 of 4..12): 0.2 + 0.8 * 0.5
    assert got == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2])
    constant = OptimConfig(schedule="constant", warmup_steps=2)
    assert [lr_factor(step, constant, 5) for step in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(10**6, config, math.inf) == 1.0
    assert lr_factor(0, OptimConfig(), 0) == 1.0  # a run of no steps divides by nothing


def test_the_optimizer_follows_the_schedule_and_total_steps_overrides_the_trainer() -> None:
    module = net()
    built = build_optimizer(module.named_parameters(), OptimConfig(lr=0.5, warmup_steps=2, total_steps=6), math.inf)
    rates = []
    for _ in range(8):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    config = OptimConfig(warmup_steps=2)
    assert rates == pytest.approx([0.5 * lr_factor(step, config, 6) for step in range(8)])
    assert [g["weight_decay"] for g in built["optimizer"].param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr > 0"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"schedule": "cosin"}, "unknown optim.schedule 'cosin'.*did you mean 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps >= 0"),
        ({"final_lr_ratio": 1.5}, "final_lr_ratio in"),
        ({"total_steps": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        OptimConfig(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_finite_guard_counts_and_gives_up() -> None:
    guard = FiniteGuard(patience=3)
    bad, good = torch.tensor(math.nan), torch.tensor(1.0)
    assert [guard(x) for x in (good, bad, torch.tensor(math.inf), good, bad, bad)] == [1, 0, 0, 1, 0, 0]
    assert guard.skipped == 4
    with pytest.raises(InvalidState, match="not finite 3 steps in a row"):
        guard(bad)
