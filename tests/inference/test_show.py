"""`draftsmith show`: the summary names everything that a user must know, and bad input is one line."""

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.inference import manifest as manifests
from draftsmith.inference.cli import main
from draftsmith.inference.manifest import TargetCoupling
from tests import tiny


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.write_lm(tmp_path_factory.mktemp("show") / "draft", width=8)
    tiny.add_manifest(
        directory,
        "drafter",
        target=TargetCoupling("ab" * 32, "big-target"),
        trained={"max_length": 256},
        decode_defaults={"draft_length": 5},
    )
    return directory


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that must end with exit code 2 and print nothing else."""
    assert main(["show", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_summary(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(export)]) == 0
    out, err = capsys.readouterr()
    found = manifests.read(export)
    assert found is not None and found.couplings.tokenizer_hash is not None
    assert err == ""
    for part in (
        str(export),
        "drafter: a draft trained for one target",
        "LlamaForCausalLM, float32",
        f"300 ids, tokenizer {found.couplings.tokenizer_hash[:12]}",
        "big-target, fingerprint abababababab",
        "max_length 256",
        "draft_length 5",
        "float32: differs by 0 from a test, tolerance 0.0001",
    ):
        assert part in out


def test_json_is_the_manifest(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(export), "--json"]) == 0
    assert manifests.loads(capsys.readouterr().out) == manifests.read(export)


def test_an_export_without_tokenizer_or_seal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    tiny.add_manifest(copy)
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": None}))
    assert main(["show", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "none: 320 bare ids" in out and "none: this export did not finish" in out


def test_bad_input(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in fails(capsys, str(tmp_path / "nowhere"))
    assert "has no manifest.json" in fails(capsys, str(tmp_path))
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    message = fails(capsys, str(copy))
    assert "model.safetensors is damaged" in message and "expected sha256" in message and "(100 bytes)" in message
    (copy / "manifest.json").write_text('{"schema_version": 3}')
    assert "schema version 3, this draftsmith reads version 1" in fails(capsys, str(copy))
    assert "unknown argument '--jsn'; did you mean --json?" in fails(capsys, str(copy), "--jsn")
