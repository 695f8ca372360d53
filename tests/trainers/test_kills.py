"""A killed run learns exactly what an uninterrupted one learns; without the generators' states it does not."""

import random
import signal

import pytest

from draftsmith.trainers import runs
from tests import kills

STEPS = 24
TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.text.batch_size", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> kills.Place:
    return kills.Place(tmp_path_factory.mktemp("kills"), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("single", ()), ("ddp", TWO_RANKS)])
def test_a_killed_run_learns_what_an_uninterrupted_one_learns(
    place: kills.Place, name: str, words: tuple[str, ...]
) -> None:
    rng = random.Random(name)
    hits = place.survive(name, words, kills.plan_kills(3, rng), rng)
    assert [hit.phase for hit in hits].count(kills.SAVE) >= 1, hits
    assert {hit.signum for hit in hits} == {signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1}
    place.uninterrupted(f"{name}-whole", words)
    place.check_equal(name, f"{name}-whole")


@pytest.mark.slow
def test_without_the_generators_states_it_learns_something_else(place: kills.Place) -> None:
    rng = random.Random(0)
    blow = kills.Kill(signal.SIGTERM, kills.TRAIN)
    place.survive("forgetful", (), [blow], rng, forget=True)
    place.uninterrupted("remembering", ())
    with pytest.raises(AssertionError, match="weights differ"):
        place.check_equal("forgetful", "remembering")


@pytest.mark.slow
def test_a_kill_inside_a_save_leaves_the_previous_checkpoint(place: kills.Place) -> None:
    rng = random.Random(1)
    run = place.path / "runs" / "torn"
    killed = kills.Kill(signal.SIGKILL, kills.SAVE)
    found: list[int] = []

    def newest() -> None:
        path = runs.newest_checkpoint(run)
        found.append(-1 if path is None else runs.step_of(path))

    place.survive("torn", (), [killed, killed, killed], rng, after_each=newest)
    assert found == sorted(found) and found[-1] > 0
