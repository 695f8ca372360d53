"""Set-up shared by every test: one thread a process, no network, fixed seeds. Works in the slim install too."""

import os

# Before torch is imported anywhere. A caller (make test) may have chosen the threads; the rest is not up for choice.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import random

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Derandomized: the same examples on each run, so that a red test is red again. No deadline: the machine may be busy.
hypothesis.settings.register_profile("draftsmith", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("draftsmith")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same global generators, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the workers of `make test` take whole files and should end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
