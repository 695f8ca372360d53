"""The demo: its figures follow from the raw records, its stages are reused, an interrupted run goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data.served_log import Served
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import RoundStats
from draftsmith.trainers import demo, demo_report
from draftsmith.trainers.demo import STAGES, DemoSettings

SMALL = DemoSettings(
    requests=16,
    max_new_tokens=16,
    prompt_length=24,  # long enough for prompt lookup to find something
    in_flight=8,
    steps=1,
    bench_prompts=3,
    bench_tokens=8,
    bench_repetitions=1,
    target_steps=6,
    draft_steps=2,
)


def _served(number: int, tag: str, accepted: int, beta: float, g: int = 5) -> Served:
    rounds = RoundStats()
    rounds.append(0, drafted=g, accepted=accepted, committed=accepted + 1, beta_sum=beta, seconds=0.1)
    examined = min(accepted + 1, g)
    return Served(number, tag, 0, 0, beta / examined, examined, accepted + 1, rounds)


def _bench() -> dict[str, Any]:
    ratio = {"value": 2.0, "low": 1.9, "high": 2.1}
    entry = {f"speculative_auto_vs_{other}": ratio for other in ("plain", "transformers_generate")}
    entry |= {"speculative_auto_vs_transformers_assisted": {"value": 3.0, "low": 2.9, "high": 3.1}}
    entry |= {"plain_vs_transformers_generate": ratio, "forecast_speedup": ratio}
    return {"summary": {"batches": {"1": {**entry, "fastest_speculative": "speculative_auto"}}}}


def _records(settings: DemoSettings, early: tuple[int, float], late: tuple[int, float]) -> list[Served]:
    """Requests of which only those of the last quarter of each domain have (accepted, beta sum) `late`."""
    n = settings.requests
    return [
        _served(d * n + i, tag, *(late if i >= n - n // 4 else early))
        for d, tag in enumerate(settings.domains)
        for i in range(n)
    ]


def test_figures_are_those_of_the_last_quarter_of_each_domain() -> None:
    served = {
        "static": _records(SMALL, (5, 5.0), (0, 0.25)),
        "online": _records(SMALL, (0, 0.0), (4, 4.0)),
        "offline": _records(SMALL, (0, 0.0), (1, 1.0)),
        "prompt_lookup": _records(SMALL, (0, 0.0), (0, 0.1)),
    }
    report = demo_report.figures(served, _bench(), SMALL, {"target": 3.0, "bench": 4.0})
    # static: 1 examined position of beta 0.25 a request; online: 5 examined of sum 4; offline: 2 of sum 1
    assert report["alpha_static"] == pytest.approx(0.25)
    assert report["alpha_online"] == pytest.approx(0.8)
    assert report["alpha_offline"] == pytest.approx(0.5)
    assert report["alpha_prompt_lookup"] == pytest.approx(0.1)
    assert report["tau"] == pytest.approx(5.0)
    assert report["tau_static"] == pytest.approx(1.0)
    assert report["by_domain"]["online"]["prose"]["alpha"]["value"] == pytest.approx(0.8)
    assert report["speedup_vs_plain"] == 2.0
    assert report["speedup_vs_transformers_assisted"] == 3.0
    assert report["seconds_total"] == 7.0


def test_a_changed_setting_unmarks_every_stage() -> None:
    before, after = demo.marks(SMALL), demo.marks(replace(SMALL, g=4))
    assert list(before) == [stage.name for stage in STAGES]
    assert not set(before.values()) & set(after.values())
    assert len(set(before.values())) == len(STAGES)


def test_a_mark_of_other_settings_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    path = tmp_path / "stages" / "target.json"
    path.write_text(json.dumps({"mark": "abc", "seconds": 5.0}))
    assert demo.done(tmp_path, STAGES[0], "abc") == 5.0
    assert demo.done(tmp_path, STAGES[0], "abd") is None
    path.write_text('{"mark": "ab')
    assert demo.done(tmp_path, STAGES[0], "abc") is None


def test_fresh_does_not_remove_a_folder_that_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidValue, match="no demo folder"):
        demo.run(tmp_path, SMALL, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
def test_the_whole_path_survives_an_interruption_and_reuses_what_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    script = (
        "import sys; from pathlib import Path; from tests.trainers.test_demo import SMALL; "
        "from draftsmith.inference.cli import run_main; from draftsmith.trainers import demo; "
        "sys.exit(run_main(lambda argv: bool(demo.run(Path(argv[0]), SMALL)) - 1, sys.argv[1:], 'demo'))"
    )
    command = [sys.executable, "-c", script, str(folder)]
    root = Path(__file__).parents[2]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
        )

    first = start()
    deadline = time.monotonic() + 300
    while not (folder / "target" / "config.yaml").exists() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    assert demo.done(folder, STAGES[0], demo.marks(SMALL)["target"]) is None

    second = start()
    output, _ = second.communicate(timeout=500)
    assert second.returncode == 0, output
    report = json.loads((folder / "report.json").read_text())
    needed = "alpha_static alpha_online alpha_offline alpha_prompt_lookup tau speedup_vs_plain forecast_speedup"
    needed += " speedup_vs_transformers_generate speedup_vs_transformers_assisted seconds_total"
    for name in needed.split():
        assert isinstance(report[name], float) and math.isfinite(report[name]), name
    assert (folder / "report.png").stat().st_size > 10_000
    assert "draftsmith decode" in (folder / "report.md").read_text()

    kept = (folder / "exports" / "target" / "manifest.json").stat().st_mtime_ns
    third = start()
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0, output
    assert output.count("done before") == len(STAGES)
    assert (folder / "exports" / "target" / "manifest.json").stat().st_mtime_ns == kept
