"""`draftsmith forecast`: hand-worked rooflines, measured costs beside them, and bad input in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference.cli import main, run_main
from draftsmith.inference.commands import forecast as command
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.formats import own
from draftsmith.inference.roofline import GPUS, Overheads, Plan, speedup, terms
from tests.eagles import toy_record

TARGET = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
DRAFT = {**TARGET, "num_hidden_layers": 1, "draft_vocab_size": 200}
CURVE = CostCurve(batch=1, plain=1.0, draft_step=0.1, verify={1: 1.0, 9: 1.4})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name, config in (("target", TARGET), ("draft", DRAFT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path / "target", tmp_path / "draft"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert run_main(command.main, [str(a) for a in argv], "draftsmith forecast") == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *argv, "--json"))
    return found


def test_a_chain_of_given_length(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes by hand: 8 layers of 4 64 64 + 3 64 160 numbers, a head of 64 1000; the draft reads two states."""
    target, draft = pair
    big = 8 * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 1000
    small = 2 * 64 * 3 * 64 + 64 * 64 + 3 * 64 * 160 + 64 * 200
    assert (command.sizes(target).always, command.sizes(draft).always) == (big, small)
    found = document(capsys, target, "--draft", draft, "--accepted-length", 3, "--steps", 4, "--gpu", "a100")
    row, overheads = found["roofline"][0], dict(found["overheads"])
    assert "public rows" in overheads.pop("from")
    o = Overheads(**overheads)
    assert row["verify"] == pytest.approx(1.0) and row["draft"] == pytest.approx(4 * small / big)
    by_hand = 3 * (1 + o.call) / (1 + o.call + 4 * small / big + 4 * o.draft + o.round)
    assert row["speedup"] == pytest.approx(by_hand)
    assert found["measured"] == [] and found["warnings"] == []


def test_the_best_chain_a_tree_and_other_devices(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = pair
    args = (target, "--draft", draft, "--alpha", 0.9, "--batch", "1,64")
    one, many = document(capsys, *args)["roofline"]
    every = [document(capsys, *args, "--steps", n)["roofline"][0]["speedup"] for n in (1, 4, one["steps"], 16)]
    assert max(every) == one["speedup"] and 4 < one["steps"] <= 16 and many["batch"] == 64
    tree = ("--accepted-length", 4, "--steps", 3, "--topk", 4, "--nodes", 20, "--batch", 8)
    found = document(capsys, target, "--draft", draft, *tree)
    assert found["roofline"][0]["num_draft_tokens"] == 21
    assert found["warnings"] == ["batch 8: 168 tokens a target call, checked up to 64 only"]
    slow = document(capsys, target, "--draft", draft, *tree, "--tflops", 0.01)
    assert slow["roofline"][0]["verify"] > 5 and slow["warnings"][-1] == "batch 8: plain decoding is faster"
    free = document(capsys, target, "--alpha", 0.5, "--steps", 4)["roofline"][0]
    assert (free["draft"], free["draft_calls"]) == (0.0, 0), "n-grams draft without a network"


def test_heads_of_our_own_form(tmp_path: Path) -> None:
    record = toy_record()
    (tmp_path / "head").mkdir()
    own.write(record, tmp_path / "head")
    fields: Any = record.fields
    found = command.sizes(tmp_path / "head")
    assert found.layers == 1
    heads, kv, hd = fields.num_heads, fields.num_kv_heads, fields.head_dim
    attention = 2 * fields.hidden_size * (heads + 2 * kv) * hd + heads * hd * fields.hidden_size
    assert found.always == (
        attention + 3 * fields.hidden_size * fields.intermediate_size + fields.hidden_size * fields.draft_vocab_size
    )


def test_measured_costs_beside_it(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bench report's curve and acceptance: at g = 4 and alpha 0.5, 1.9375 tokens in 1.2 + 0.4 plain calls."""
    target, draft = pair
    alpha = {"value": 0.5, "low": 0.4, "high": 0.6}
    report = {"forecast": {"acceptance": {"alpha": alpha}, "batches": {"1": {"g": 4, "costs": CURVE.to_json()}}}}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    args = (target, "--draft", draft, "--bench", tmp_path / "bench.json")
    (found,) = document(capsys, *args, "--steps", 4)["measured"]
    assert found["speedup"]["value"] == pytest.approx(1.9375 / 1.6) and found["c"] == pytest.approx(0.1)
    assert found["speedup"]["low"] < found["speedup"]["value"] < found["speedup"]["high"]
    page = run(capsys, *args)
    assert re.search(r"^roofline  batch 1, chain of \d+: speed-up \d", page, re.M)
    assert re.search(r"^measured  batch 1, chain of \d+: speed-up 1\.\d+ \[", page, re.M)
    CURVE.save(tmp_path / "costs.json")
    (alone,) = document(capsys, target, "--alpha", 0.5, "--steps", 4, "--costs", tmp_path / "costs.json")["measured"]
    assert alone["speedup"]["value"] == found["speedup"]["value"] and alone["speedup"]["low"] is None


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "sizes do not tell how well a draft guesses: give --accepted-length, --alpha or --bench"),
        (("--alpha", "0.7", "--topk", "4", "--steps", "3"), "--alpha tells it of chains alone"),
        (("--alpha", "1.5"), "--alpha is an acceptance probability, between 0 and 1, got 1.5"),
        (("--accepted-length", "3"), "it was measured at some draft length|was measured at some draft length"),
        (("--accepted-length", "0.5", "--steps", "2"), "at least one token"),
        (("--alpha", "0.7", "--steps", "4", "--nodes", "9"), "for a tree give topk"),
        (("--alpha", "0.7", "--batch", "0"), "batch sizes are numbers from 1 on"),
        (("--alpha", "0.7", "--bandwidth", "-1"), "--bandwidth and --tflops are above 0"),
        (("--alpha", "0.7", "--costs", "nowhere.json"), "cannot read costs from nowhere.json"),
        (("--bench", "{target}/config.json"), "is no report of 'draftsmith bench --json' with a draft"),
        (("--alpha", "0.7", "--overheads", "{target}/config.json"), "holds no overheads"),
        (("--alpha", "0.7", "--draft", "{target}/none"), "there is no .*none: give a directory with a config.json"),
    ],
)
def test_bad_input_is_one_line(
    argv: tuple[str, ...], said: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = pair
    filled = [a.format(target=target) for a in argv]
    assert run_main(command.main, [str(target), *filled], "draftsmith forecast") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err), err


def test_a_config_that_tells_no_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"n_embd": 3}')
    assert run_main(command.main, [str(tmp_path), "--alpha", "0.5"], "draftsmith forecast") == 2
    assert "does not tell the sizes" in capsys.readouterr().err


def test_shipped_overheads_are_those_of_the_recorded_check() -> None:
    root = Path(__file__).resolve().parents[2]
    figures = root / "docs" / "figures" / "roofline.json"
    if not figures.is_file():
        pytest.skip("no docs beside the installed package")
    recorded = json.loads(figures.read_text())["runs"][-1]["figures"]["roofline"]["overheads_in_plain_roofline_steps"]
    shipped, _ = command._overheads(None)
    assert shipped.to_json() == pytest.approx(recorded, rel=1e-3)


def test_the_formulas_are_the_librarys(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = pair
    found = document(capsys, target, "--draft", draft, "--alpha", 0.8, "--steps", 3, "--batch", 4)
    overheads, _ = command._overheads(None)
    plan = Plan(4, 3, 1, 4)
    t = terms(command.sizes(target), command.sizes(draft), plan, GPUS["h100"])
    assert found["roofline"][0]["speedup"] == pytest.approx(speedup(1 + 0.8 + 0.64 + 0.512, t, overheads))


def test_the_verb_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--help"]) == 0
    assert "Example:\n  draftsmith forecast" in capsys.readouterr().out
