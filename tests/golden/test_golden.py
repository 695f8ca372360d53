"""The loss of every step of each debug config, as recorded: a refactor must reproduce it.

The configs are run as shipped, but for their text: Python's library differs between versions, this text does not.
After a change that is meant to move the numbers: DRAFTSMITH_RECORD_GOLDEN=1 pytest tests/golden, and say why in the
commit. Recorded on an x86 CPU in fp32; other processors round differently, hence the tolerance.
"""

import json
import os
from pathlib import Path

import pytest

from tests.commands import run
from tests.tiny import write_lm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = bool(os.environ.get("DRAFTSMITH_RECORD_GOLDEN"))
TOLERANCE = 1e-4


def numbers(count: int, below: int, state: int) -> list[int]:
    """A linear congruential generator (Knuth's MMIX constants): the same text on every Python."""
    found = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 33) % below)
    return found


def write_text(place: Path) -> None:
    """24 files of 400 words out of a vocabulary of 150, each word likely to be followed by few others."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters[i] for i in numbers(3 + n % 5, 26, n + 1)) for n in range(150)]
    (place / "text").mkdir()
    for file in range(24):
        word, text = file, []
        for jump in numbers(400, 4, 1000 + file):
            text.append(words[word])
            word = (7 * word + 31 * jump + 5) % len(words)
        (place / "text" / f"{file}.txt").write_text(" ".join(text))


def fit(place: Path, *arguments: str) -> dict[str, float]:
    """Step -> train/loss of `draftsmith fit`, from its TensorBoard events."""
    run(place, "fit", *arguments, "--run", "golden")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "runs" / "golden" / "tb"))
    events.Reload()
    return {str(event.step): round(event.value, 6) for event in events.Scalars("train/loss")}


def check(name: str, got: dict[str, float]) -> None:
    if RECORD:
        (HERE / f"{name}.json").write_text(json.dumps(got, indent=1) + "\n")
    compare(name, got)


def compare(name: str, got: dict[str, float]) -> None:
    expected = json.loads((HERE / f"{name}.json").read_text())
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_lm_debug(tmp_path: Path) -> None:
    write_text(tmp_path)
    losses = fit(tmp_path, "-c", "lm/debug", "--data.corpus.sources", "[text]", "--data.corpus.val_fraction", "0.2")
    assert len(losses) == 40 and losses["39"] < losses["0"] - 1
    check("lm_debug", losses)


@pytest.mark.slow
def test_emo_debug(tmp_path: Path) -> None:
    write_text(tmp_path)
    losses = fit(tmp_path, "-c", "emo/debug", "--data.corpus.sources", "[text]", "--data.corpus.val_fraction", "0.2")
    assert len(losses) == 40 and losses["39"] < losses["0"] - 1
    check("emo_debug", losses)


@pytest.mark.slow
def test_osd_debug(tmp_path: Path) -> None:
    write_lm(tmp_path / "exports" / "target", seed=1, max_length=64)
    write_lm(tmp_path / "exports" / "draft", seed=2, layers=1, width=16, max_length=64)
    rows = [{"prompt": f"{('def add(a, b)', 'The quick brown')[i % 2]} {i}", "tag": "ab"[i % 2]} for i in range(48)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ("--data.traffic.prompts", "[prompts.jsonl]", "--data.traffic.val_prompts", "[prompts.jsonl]")
    losses = fit(tmp_path, "-c", "osd/debug", *prompts)
    assert min(losses.values()) < losses["0"] - 0.08
    check("osd_debug", losses)


@pytest.mark.parametrize("name", ["lm_debug", "emo_debug", "osd_debug"])
def test_a_small_drift_is_noticed(name: str) -> None:
    """Negative control: one step off by 0.1%, or one step missing."""
    recorded = json.loads((HERE / f"{name}.json").read_text())
    last = max(recorded, key=int)
    for wrong in (recorded | {last: recorded[last] * 1.001}, {k: v for k, v in recorded.items() if k != last}):
        with pytest.raises(AssertionError):
            compare(name, wrong)
