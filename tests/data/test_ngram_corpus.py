"""`draftsmith ngram`: tables and stores from documents and from the target's own outputs, served by decode."""

import json
from pathlib import Path

import pytest

from draftsmith.data.ngram_corpus import main
from draftsmith.inference.commands import decode
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.loader import load
from tests.tiny import TEXT, write_lm

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("lm") / "target")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)))
    return path


def text_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert decode.main([str(a) for a in (*arguments, "--max-new-tokens", 20, "--ignore-eos", "--json")]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    return str(outputs[0]["output_ids"])


@pytest.mark.parametrize("extra", [[], ["--bigrams"], ["--store"], ["--samples", "4", "--sample-length", "12"]])
def test_what_it_builds_is_served(
    extra: list[str], target: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(target), str(corpus), "--out", str(out), *extra]) == 0
    assert str(out) in capsys.readouterr().out
    manifest = load(out).manifest
    assert manifest is not None and manifest.couplings.vocab_map_hash is not None
    assert manifest.config["corpus"]["sources"] == [str(corpus)]
    want = text_of(capsys, target, "--prompt", PROMPT)
    name = "tree" if "--store" in extra else "aded"
    assert text_of(capsys, target, "--prompt", PROMPT, "--draft", out, "--decoder", name) == want


def test_bad_input_is_one_line(target: Path, corpus: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(InvalidValue, match="--k must be at least 1, got 0"):
        main([str(target), str(corpus), *out, "--k", "0"])
    bare = write_lm(tmp_path / "bare", tokenizer=False)
    with pytest.raises(InvalidValue, match="has no tokenizer"):
        main([str(bare), str(corpus), *out])
    with pytest.raises(InvalidValue, match="--bigrams counts for a table"):
        main([str(target), str(corpus), *out, "--store", "--bigrams"])
    with pytest.raises(InvalidValue, match="no document has 9999 tokens"):
        main([str(target), str(corpus), *out, "--samples", "2", "--prompt-length", "9999"])
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_tokenizer_is_refused(target: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([str(target), str(corpus), "--out", str(out)])
    other = write_lm(tmp_path / "other", text="something else entirely " * 9)
    with pytest.raises(InvalidValue, match=r"vocabularies differ.*vocabulary map hashes"):
        decode.main([str(other), "--draft", str(out), "--decoder", "aded", "--prompt", "x"])
