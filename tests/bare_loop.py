"""A bare training step beside every step of a run: what does the trainer add? Named in a config overlay."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from draftsmith.modules.lm import LM
from draftsmith.modules.optim import parameter_groups


class Beside(pl.Callback):
    """After each step of the run, one on a twin of its module with the same batch; both times go into `path`.

    The run's step is everything between two bare steps: its data, hooks, logging and callbacks.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seconds: dict[str, list[float]] = {"bare": [], "lightning": []}
        self.since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.twin = LM(module.spec, module.optim)
        self.twin.configure_model()
        self.twin.load_state_dict(module.state_dict())
        config = module.optim
        groups = parameter_groups(self.twin.named_parameters(), config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        begin = time.perf_counter()
        out = self.twin.loss(batch, statistics=False)
        out.mean.backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), trainer.gradient_clip_val)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if self.since is not None:
            self.seconds["lightning"].append(begin - self.since)
            self.seconds["bare"].append(end - begin)
        self.since = end

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.path.write_text(json.dumps(self.seconds))
