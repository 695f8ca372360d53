"""`draftsmith bench EXPORT --suite parallelbench`: what it reports in each form, and what it refuses.

Nothing is trained: the figures are those of random weights, which the checks do not depend on.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from draftsmith.data.parallelbench.registry import with_names
from draftsmith.data.parallelbench.tasks import example
from draftsmith.data.parallelbench.token_form import TokenForm
from draftsmith.inference.cli import main, run_main
from draftsmith.inference.commands.bench import split_suite
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.commit_filter import CommitFilter, FilterConfig
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig
from draftsmith.trainers import parallelbench

FORM = TokenForm(with_names(["copy", "shuffle"], 8))


def part(vocabulary: int, tokenizer: Any, length: int) -> SimpleNamespace:
    torch.manual_seed(0)
    config = MaskedLMConfig(vocabulary + 1, 16, 1, 2, 16, length, mask_id=vocabulary, eos_id=1)
    return SimpleNamespace(path=Path("somewhere"), kind="masked-lm", part=MaskedLM(config).eval(), tokenizer=tokenizer)


@pytest.fixture
def words(tmp_path: Path) -> SimpleNamespace:
    """An export that speaks the token form."""
    FORM.save_tokenizer(tmp_path / "tokenizer")
    return part(FORM.mask_id, AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer")), 32)


@pytest.fixture(scope="module")
def letters() -> SimpleNamespace:
    """An export that speaks bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return part(len(alphabet), PreTrainedTokenizerFast(tokenizer_object=made), 512)


def measured(found: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> dict[str, Any]:
    filters = SimpleNamespace(kind="filter", part=CommitFilter(FilterConfig(8, hidden=4)))
    monkeypatch.setattr(parallelbench, "load", lambda path, **_: filters if path == "filter" else found)
    monkeypatch.setattr(parallelbench, "check_role", lambda *_: None)
    out = tmp_path / "report.json"
    assert parallelbench.main(["somewhere", "--num-samples", "4", "--quiet", "--json", str(out), *more]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_the_report_of_the_token_form(
    words: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "curves.png"
    report = measured(words, monkeypatch, tmp_path, "--filter", "filter", "--png", str(png))
    assert report["export"]["form"] == "token"
    assert list(report["tasks"]) == ["copy", "shuffle"]
    for task in report["tasks"].values():
        assert {row["rule"] for row in task["rows"]} == {*parallelbench.RULES, "learned_filter"}
        for row in task["rows"]:
            assert row["samples"] == 4
            assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
            assert row["strict"] == row["score"]["value"]  # token form: the two are one
            if row["rule"].startswith("top_n"):
                assert row["passes"] == sum(-(-n // row["strength"]) for n in (3, 4, 5, 6)) / 4
            if row["rule"] == "threshold" and row["strength"] == 1.0:
                assert row["tokens_per_pass"]["value"] == 1.0
        assert task["oracle_threshold"]["passes"] <= 4.5
    assert report["tasks"]["copy"]["correlation_bits"] == 0.0
    assert report["tasks"]["shuffle"]["correlation_bits"] > 3.0
    assert png.stat().st_size > 10_000
    said = capsys.readouterr()
    assert "shuffle  (" in said.out
    assert not said.err


def test_text_and_infilling(letters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = ("--rules", "top_n_confidence", "threshold")
    report = measured(
        letters, monkeypatch, tmp_path, *few, "--tasks", "copy", "--lengths", "2", "--max-new-tokens", "8"
    )
    assert report["export"]["form"] == "text"
    rows = report["tasks"]["copy"]["rows"]
    assert all(row["unparsed"] == 4 and row["strict"] == 0.0 for row in rows)  # random letters hold no list
    assert report["tasks"]["copy"]["order_preference"] is not None
    report = measured(letters, monkeypatch, tmp_path, *few, "--form", "infill", "--tasks", "copy", "--lengths", "2")
    assert all(row["unparsed"] == 0 for row in report["tasks"]["copy"]["rows"])  # the frame is given


def test_an_infilled_frame_holds_the_items_places_alone(letters: SimpleNamespace) -> None:
    maker = parallelbench._maker("infill", letters, None, None)
    task = maker.tasks["copy"]
    question = maker(task, example(task, 3), 0)
    sample, request = question.sample, question.request
    items = [letters.tokenizer(item, add_special_tokens=False)["input_ids"] for item in sample.reference]
    assert len(request.holes) == sum(map(len, items))
    answer = [i for ids in items for i in ids]
    assert question.read(answer).strict
    assert letters.tokenizer.decode(request.filled(answer)).endswith(f'["{sample.items[0]}", "{sample.items[1]}", '
                                                                     f'"{sample.items[2]}"]')  # fmt: skip


def test_the_command_is_found_by_its_suite() -> None:
    assert split_suite(["x", "--suite", "parallelbench", "--quiet"]) == ("parallelbench", ["x", "--quiet"])
    assert split_suite(["--suite=parallelbench", "x"]) == ("parallelbench", ["x"])
    assert split_suite(["x", "--draft", "y"]) == (None, ["x", "--draft", "y"])
    with pytest.raises(InvalidValue, match="--suite needs a name"):
        split_suite(["x", "--suite"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "x", "--suite", "parallelbnch"], "unknown suite 'parallelbnch'"),
        (["bench", "x", "--suite", "parallelbench", "--tasks", "cpy"], "unknown task 'cpy': choose one of copy"),
        (["bench", "x", "--suite", "parallelbench", "--rules", "treshold"], "did you mean 'threshold'"),
        (["bench", "x", "--suite", "parallelbench", "--num-samples", "0"], "must be at least 1"),
        (["bench", "x", "--suite", "parallelbench", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["bench", "x", "--suite", "parallelbench", "--grammar", "languagetool"], "pip install language-tool-python"),
        (["bench", "/nowhere", "--suite", "parallelbench"], "/nowhere"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_export_that_does_not_speak_the_form(
    letters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallelbench, "load", lambda *_, **__: letters)
    monkeypatch.setattr(parallelbench, "check_role", lambda *_: None)
    assert run_main(parallelbench.main, ["x", "--form", "token"], "draftsmith bench") == 2
    assert "does not speak the token form" in capsys.readouterr().err
    letters_without = SimpleNamespace(**{**vars(letters), "tokenizer": None})
    monkeypatch.setattr(parallelbench, "load", lambda *_, **__: letters_without)
    assert run_main(parallelbench.main, ["x"], "draftsmith bench") == 2
    assert "has no tokenizer" in capsys.readouterr().err
