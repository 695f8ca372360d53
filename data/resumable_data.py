"""Data modules whose training position survives the end of an epoch, too."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningDataModule

from draftsmith.data.stateful_loader import StatefulLoader, StatefulStreamLoader


class ResumableData(LightningDataModule, ABC):
    """Keeps the training loader's position: Lightning keeps loader states, but forgets those of an epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self._loader: StatefulLoader | StatefulStreamLoader | None = None
        self._resume: dict[str, Any] | None = None

    @abstractmethod
    def _train_loader(self) -> StatefulLoader | StatefulStreamLoader:
        """A fresh loader over the training samples."""

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position."""
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state.get("train")

    def train_dataloader(self) -> StatefulLoader | StatefulStreamLoader:
        """Training batches; an incomplete last global batch is left out. Goes on where this run's last loader stood."""
        position = self._resume if self._loader is None else self._loader.state_dict()
        self._loader = self._train_loader()
        if position is not None:
            self._loader.load_state_dict(position)
        return self._loader

    def _ranks(self) -> tuple[int | None, int | None]:
        """(rank, ranks) of the trainer; None: as torch.distributed says."""
        return (None, None) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
