"""`draftsmith calibrate`, and `draftsmith decode --decoder tree` with and without what it wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.inference.cli import main
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.manifest import TargetCoupling
from draftsmith.inference.tree_calibration import CALIBRATION_FILE, Calibration
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a drafter with the same weights, exported with a draft length that a tree has no use for."""
    target = tiny.write_lm(tmp_path_factory.mktemp("calibrate") / "target")
    tiny.add_manifest(target)
    draft = Path(shutil.copytree(target, target.parent / "draft"))
    coupling = TargetCoupling(target_fingerprint(target), "target")
    tiny.add_manifest(draft, "drafter", target=coupling, decode_defaults={"draft_length": 3})
    (target.parent / "prompts.jsonl").write_text('{"prompt": "def add(a, b):"}\n{"prompt_ids": [5, 6, 7]}\n')
    return target, draft


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    assert main([*map(str, argv)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def decode(capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], *more: object) -> tuple[dict[str, Any], str]:
    target, draft = pair
    prompts = ("--prompts", target.parent / "prompts.jsonl", "--max-new-tokens", 12, "--json")
    out, err = run(capsys, "decode", target, "--draft", draft, "--decoder", "tree", *prompts, *more)
    return json.loads(out), err


def test_trees_from_the_command_line(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, _ = pair
    prompts = ("--prompts", target.parent / "prompts.jsonl", "--max-new-tokens", 12, "--json")
    plain, _ = run(capsys, "decode", target, *prompts)
    found, err = decode(capsys, pair, "--set", "policy=fixed", "--set", "widths=2-2")
    assert [o["output_ids"] for o in found["outputs"]] == [o["output_ids"] for o in json.loads(plain)["outputs"]]
    assert found["notes"]["residual_underflow"] == 0 and "tau" in err


def test_calibrate_then_decode(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = pair
    args = ("--prompts", target.parent / "prompts.jsonl", "--max-new-tokens", 20, "--widths", "3-2", "--batch", 2)
    out, err = run(capsys, "calibrate", target, draft, *args)
    path = draft / CALIBRATION_FILE
    assert str(path) in out and "2/2 prompts" in err
    found = Calibration.load(path)
    assert found.fingerprint == {
        "target": target_fingerprint(target),
        "draft": target_fingerprint(draft),
        "temperature": 1.0,
        "draft_temperature": 1.0,
        "drawn": True,
    }
    assert found.tests > 10 and found.sequoia[1] > 0.9, "the draft is the target: its first child is accepted"
    _, err = decode(capsys, pair, "--temperature", 1.0, "--set", "policy=dyspec")
    assert "not used" not in err
    _, err = decode(capsys, pair, "--temperature", 0.5)
    assert "not used" in err and "measured with temperature 1.0" in err
    moved = target.parent / "elsewhere.json"
    shutil.move(path, moved)
    _, err = decode(capsys, pair, "--temperature", 1.0, "--set", f"calibration={moved}", "--set", "policy=sequoia")
    assert "not used" not in err
    document = json.loads(moved.read_text())
    document["fingerprint"]["target"] = "another"
    moved.write_text(json.dumps(document))
    argv = ["decode", target, "--draft", draft, "--decoder", "tree", "--prompt", "x", "--temperature", 1.0]
    assert main([*map(str, argv), "--set", f"calibration={moved}"]) == 2
    assert "measured with target 'another'" in capsys.readouterr().err
    assert main(["calibrate", str(target), str(draft), "--prompts", str(moved), "--batch", "0"]) == 2
    assert "--batch must be at least 1" in capsys.readouterr().err
