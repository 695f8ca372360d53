"""AdamW with parameter groups, and learning-rate schedules as plain functions of the step.

A schedule here has no state: the rate of step n is a function of n (samples seen / global batch), so a resumed run and
a run on another number of ranks with the same global batch read the same curve.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 3e-4  # peak rate
    weight_decay: float = 0.1  # on matrices and embeddings; never on norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: str = "cosine"  # "cosine" falls to final_lr_ratio at total_steps; "constant" stays
    warmup_steps: int = 0  # linear from lr / warmup_steps
    final_lr_ratio: float = 0.1
    total_steps: int | None = None  # length of the cosine; null: the trainer's max_steps (or epochs)

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.eps <= 0 or not all(0 <= b < 1 for b in self.betas):
            raise InvalidValue(
                f"optim wants lr > 0, weight_decay >= 0, eps > 0 and betas in [0, 1); got lr={self.lr}, "
                f"weight_decay={self.weight_decay}, eps={self.eps}, betas={tuple(self.betas)}"
            )
        if self.schedule not in SCHEDULES:
            raise unknown_choice("optim.schedule", self.schedule, SCHEDULES)
        if self.warmup_steps < 0 or not 0 <= self.final_lr_ratio <= 1:
            raise InvalidValue(
                f"optim wants warmup_steps >= 0 and final_lr_ratio in [0, 1]; got {self.warmup_steps} and "
                f"{self.final_lr_ratio}"
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise InvalidValue(f"optim.total_steps must be at least 1, got {self.total_steps}")

    @classmethod
    def of(cls, spec: "OptimConfig | Mapping[str, Any]") -> "OptimConfig":
        """From itself, or from the plain dict that a checkpoint's hyper-parameters hold."""
        return spec if isinstance(spec, OptimConfig) else cls(**spec)


def lr_factor(step: int, config: OptimConfig, total_steps: float) -> float:
    """The share of the peak rate that step `step` (0, 1, ...) uses.

    Step 0 of a warm-up of w steps has 1/w; the cosine starts at 1 right after the warm-up, reaches `final_lr_ratio` at
    `total_steps` and stays there. An endless run (total_steps = inf) keeps the peak rate.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant" or math.isinf(total_steps):
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape over all ranks: ZeRO-3 leaves an empty tensor between steps."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups of the trainable parameters: matrices and embeddings decay; vectors (norms, biases) do not."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if len(full_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, total_steps: float
) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW and a schedule stepped once per optimizer step.

    Args: total_steps: the trainer's `estimated_stepping_batches` (may be inf); `config.total_steps` overrides it.
    """
    total = total_steps if config.total_steps is None else config.total_steps
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class FiniteGuard:
    """Says whether a loss may be learned from: a non-finite one is skipped and counted; too many in a row end the run.

    Feed it a loss that is equal on all ranks (reduced), so that all skip together. Costs one device synchronisation.
    Raises InvalidState after `patience` non-finite losses in a row.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.skipped = 0  # in the whole run
        self.row = 0

    def __call__(self, loss: Tensor) -> bool:
        if math.isfinite(loss.item()):
            self.row = 0
            return True
        self.skipped += 1
        self.row += 1
        if self.row >= self.patience:
            raise InvalidState(
                f"the loss was not finite {self.row} steps in a row: lower optim.lr, lengthen optim.warmup_steps or "
                "check the data, then resume from the last checkpoint"
            )
        return False


def spoilt(scale: Tensor) -> Tensor:
    """NaN in place of a loss's scale: every gradient of a step that is to be skipped is then NaN on every rank.

    Strategies that own the gradients (DeepSpeed) leave a step out whose gradient norm is not finite; elsewhere the
    module drops the gradients itself.
    """
    return torch.full_like(scale, math.nan)
