"""A callback that measures the most memory a rank ever held beyond what it held before its networks were built."""

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn


def status(key: str) -> int:
    """A line of /proc/self/status in bytes (VmRSS: resident now, VmHWM: the most since `reset`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def reset() -> None:
    """Let VmHWM begin again from now."""
    Path("/proc/self/clear_refs").write_text("5")


class MemoryProbe(Callback):
    """Writes memory-RANK.json into the run folder: {"baseline", "peak", "above"} in bytes.

    The baseline is taken when data and process group stand and nothing is built, after a step of a tiny network, so
    that the kernels' own pages are in it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(8, 64)).logsumexp(-1).sum().backward()
        optimizer.step()
        del net, optimizer
        reset()
        self.baseline = status("VmRSS")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peak = status("VmHWM")
        found: dict[str, Any] = {"baseline": self.baseline, "peak": peak, "above": peak - self.baseline}
        path = Path(trainer.default_root_dir) / f"memory-{trainer.global_rank}.json"
        path.write_text(json.dumps(found | {"pid": os.getpid()}))
