"""What the checks look at: a config parsed as `fit` parses it, the run folder it would use, and the job around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from draftsmith.trainers import networks
from draftsmith.trainers.callbacks.checkpoint import CheckpointConfig
from draftsmith.trainers.checks.job import Job
from draftsmith.trainers.strategies import ZERO, read_config


@dataclass(frozen=True)
class Subject:
    """One training run before it starts."""

    trainer: Any  # the parsed `trainer:` part
    checkpoint: CheckpointConfig
    module: pl.LightningModule
    data: pl.LightningDataModule
    run: Path
    env: Mapping[str, str]
    job: Job | None  # the SLURM job, or the script that will start it
    starting: bool = False  # `fit` itself asks, about the process that it is

    @property
    def devices(self) -> int | None:
        """Ranks per node; None when that depends on GPUs that this machine does not have."""
        given = self.trainer.devices
        if isinstance(given, (list, tuple)):
            return len(given)
        if isinstance(given, str) and given.strip("-").isdecimal():
            given = int(given)
        if isinstance(given, int) and given >= 0:
            return given
        if isinstance(given, str) and "," in given:
            return len([part for part in given.split(",") if part.strip()])
        if self.trainer.accelerator == "cpu":
            return 1
        return torch.cuda.device_count() or None

    @property
    def nodes(self) -> int:
        return int(self.trainer.num_nodes)

    @property
    def world_size(self) -> int | None:
        return None if self.devices is None else self.devices * self.nodes

    @property
    def strategy(self) -> str:
        """The strategy's name: that of the config, or that of its class."""
        asked = self.trainer.strategy
        return asked if isinstance(asked, str) else str(_get(asked, "class_path")).rpartition(".")[2]

    @cached_property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed config; None for another strategy. Raises InvalidValue for one that cannot be used."""
        return deepspeed_config(self.trainer.strategy)

    @property
    def partition_teacher(self) -> bool:
        """Whether ZeRO shall share the teacher's body among the ranks."""
        asked = self.trainer.strategy
        return not isinstance(asked, str) and bool(_get(_get(asked, "init_args"), "partition_teacher"))

    def has_callback(self, name: str) -> bool:
        """Whether the config names a callback of this class."""
        return any(str(_get(callback, "class_path")).endswith(f".{name}") for callback in self.trainer.callbacks or ())

    @cached_property
    def nets(self) -> dict[str, nn.Module]:
        """The trained networks on the meta device, by the prefix of their keys in a checkpoint. Builds the module."""
        return networks.without_weights(self.module)

    @property
    def parameters(self) -> int:
        """Trained parameters, tied ones once."""
        return sum(networks.count(networks.trained_parameters(net)) for net in self.nets.values())

    @property
    def stored(self) -> int:
        """Parameters that a checkpoint holds: the trained ones, and what is frozen below adapters."""
        return sum(networks.parameter_count(net) for net in self.nets.values())


def deepspeed_config(strategy: Any) -> dict[str, Any] | None:
    """The DeepSpeed config that `trainer.strategy` means. Raises InvalidValue as `strategies.read_config`."""
    if isinstance(strategy, str):
        return read_config(f"deepspeed/{strategy}") if strategy in ZERO else None
    if not str(_get(strategy, "class_path")).endswith(".ZeRO"):
        return None
    return read_config(str(_get(_get(strategy, "init_args"), "config") or "deepspeed/zero2"))


def _get(holder: Any, key: str) -> Any:
    return None if holder is None else holder.get(key)
