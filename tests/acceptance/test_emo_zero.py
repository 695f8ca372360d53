"""EMO under ZeRO-2 and ZeRO-3 on two CPU ranks: the losses of one process (issue 4); the head is gathered once a step.

About a minute: `make acceptance SYSTEM=emo-zero`.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.acceptance.test_scale import worst
from tests.figures import record
from tests.tiny_run import make_place
from tests.zero_runs import curve, fit, ranks_of, watch, zero

pytestmark = pytest.mark.acceptance

STEPS, BATCH = 20, 4
FILES = ("trainers/strategies.py", "modules/lm.py", "modules/emo_lm.py", "modules/losses/*.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("emo"), STEPS)
    config: dict[str, Any] = yaml.safe_load((place / "tiny.yaml").read_text())
    config["model"]["class_path"] = "draftsmith.modules.emo_lm.EMOLM"
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    return place


@pytest.mark.parametrize("costs", ["head", "adaptive"])
def test_two_ranks_learn_as_one_process_does(place: Path, costs: str) -> None:
    source = ("--model.emo.costs", costs)
    one = f"one-{costs}"
    fit(place, one, *watch(place, one), *ranks_of(1, BATCH), *source)
    found = {}
    for stage in (2, 3):
        name = f"zero{stage}-{costs}"
        fit(place, name, *zero(place, stage, 2, BATCH), *watch(place, name), *source)
        found[stage] = worst(curve(place, one), curve(place, name))
    what = f"2 ranks, costs {costs}: largest relative difference of the loss over {STEPS} steps"
    figures = {f"zero{stage}, {what}": {"value": value, "need": "<= 1e-4"} for stage, value in found.items()}
    record("emo", figures, seeds=[3], files=FILES)
    assert max(found.values()) <= 1e-4
