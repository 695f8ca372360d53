"""How many processes train: what Lightning's strategies leave to us.

`trainer.strategy` takes Lightning's names: "auto" (one process), "ddp" (NCCL on GPUs, gloo on CPUs).
"""

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only


def global_rank() -> int:
    """This process's rank as the environment tells it, before any Trainer exists."""
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank


def shut_down() -> None:
    """Leave the process group, if there is one: a rank that exits inside it aborts at interpreter exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
