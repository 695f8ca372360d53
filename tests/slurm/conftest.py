"""One cluster for all tests of this folder, and the working directory of the tests of `fit`."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, missing
from tests.tiny_run import make_place
from tests.trainers.test_fit import STEPS


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.fail(reason, pytrace=False)
    # pytest ends without teardown at a SIGTERM (timeout, CI): the daemons would stay
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", 143))
    try:
        with cluster() as running:
            yield running
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("slurm"), STEPS)
