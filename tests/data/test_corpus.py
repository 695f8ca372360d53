"""Sources, near-duplicates and the split: deterministic, counted, and one clear line for every bad input."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.corpus import CorpusConfig, Document, digest, load_corpus, read_documents, signature
from draftsmith.data.near_duplicates import jaccard, near_duplicates, shingles
from draftsmith.data.token_store import encode_documents
from draftsmith.data.tokenizer import MIN_VOCAB, train_bpe
from draftsmith.inference.errors import InvalidValue

WORDS = [f"word{i}" for i in range(500)]


def passage(rng: np.random.Generator, n: int) -> list[str]:
    return [WORDS[i] for i in rng.integers(0, len(WORDS), n)]


def config(*sources: str | Path, **settings: object) -> CorpusConfig:
    return CorpusConfig(sources=tuple(map(str, sources)), **settings)  # type: ignore[arg-type]  # test shorthand


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# --- the standard library ---


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(read_documents(CorpusConfig()))


def test_stdlib_has_two_domains_of_several_megabytes(stdlib: list[Document]) -> None:
    size = Counter[str]()
    for d in stdlib:
        size[d.tag] += len(d.text)
    assert set(size) == {"code", "prose"}
    assert size["code"] > 4e6 and size["prose"] > 1e6
    assert not [d.source for d in stdlib if re.search(r"/tests?/|site-packages", d.source)]


def test_stdlib_code_has_no_docstrings_and_still_parses(stdlib: list[Document]) -> None:
    bisect = next(d for d in stdlib if d.source == "stdlib/bisect.py")
    prose = next(d for d in stdlib if d.source == "stdlib/bisect.py:docstrings")
    assert "Insert item x in list a" in prose.text and "Insert item x in list a" not in bisect.text
    assert "def insort_right" in bisect.text and "def insort_right" not in prose.text
    assert bisect.group == prose.group == "bisect"
    for d in stdlib:
        if d.tag == "code":
            compile(d.text, d.source, "exec", dont_inherit=True)


def test_stdlib_is_the_same_in_another_process(stdlib: list[Document]) -> None:
    code = (
        "from draftsmith.data.corpus import *; c = CorpusConfig();"
        "print(digest(read_documents(c)), signature(c), [len(load_corpus(c).val)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    corpus = load_corpus(CorpusConfig())
    assert out == [digest(stdlib), signature(CorpusConfig()), f"[{len(corpus.val)}]"]
    groups = {d.group for d in corpus.train}, {d.group for d in corpus.val}
    assert groups[0] and groups[1] and not groups[0] & groups[1]


# --- near-duplicates ---


@given(st.lists(st.sampled_from("abcdefgh"), max_size=12), st.lists(st.sampled_from("abcdefgh"), max_size=12))
def test_jaccard_of_shingles_equals_the_definition(a: list[str], b: list[str]) -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        width = min(5, len(words))
        return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)} if words else set()

    x, y = runs(a), runs(b)
    expected = len(x & y) / len(x | y) if x | y else 1.0
    assert jaccard(shingles(" ".join(a)), shingles("\n".join(b))) == pytest.approx(expected)


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    originals = [passage(rng, 300) for _ in range(40)]
    rows: list[object] = [{"text": " ".join(p), "id": f"o{i}"} for i, p in enumerate(originals)]
    for i, p in enumerate(originals[:15]):  # 3 words changed: at most 15 of 296 shingles, Jaccard >= 0.90
        copy = list(p)
        for place in rng.choice(300, 3, replace=False):
            copy[place] = "changed"
        rows.append({"text": " ".join(copy), "id": f"copy{i}"})
    for i, p in enumerate(originals[15:25]):  # half of it is new: Jaccard about 1/3
        rows.append({"text": " ".join(p[:150] + passage(rng, 150)), "id": f"half{i}"})
    order = rng.permutation(len(rows))
    path = write_jsonl(tmp_path / "rows.jsonl", [rows[i] for i in order])
    corpus = load_corpus(config(path, group_field="id", val_fraction=0.3))
    assert (corpus.read, corpus.duplicates) == (65, 15)
    assert "65 documents read, 15 near-duplicates dropped" in corpus.summary()
    kept = [*corpus.train, *corpus.val]
    worst = max(jaccard(shingles(a.text), shingles(b.text)) for i, a in enumerate(kept) for b in kept[:i])
    assert worst < 0.8  # so none crosses the split either
    assert corpus.train and corpus.val
    everything = load_corpus(config(path, group_field="id", val_fraction=0.3, dedup=None))
    assert everything.duplicates == 0
    crossing = [  # negative control: without the search, copies do cross the split
        (a, b) for a in everything.train for b in everything.val if jaccard(shingles(a.text), shingles(b.text)) >= 0.8
    ]
    assert crossing


def test_the_first_of_a_family_is_kept_and_named() -> None:
    text = " ".join(WORDS[:100])
    assert near_duplicates([text, "other words entirely", text, text + " end"], 0.8) == [-1, -1, 0, 0]
    assert near_duplicates([text, text + " end"], 1.0) == [-1, -1]
    assert near_duplicates(["", "", "x"], 0.5) == [-1, 0, -1]
    with pytest.raises(InvalidValue, match=r"\(0, 1\].*got 0"):
        near_duplicates([text], 0)


# --- the split ---


def test_split_keeps_groups_whole_and_depends_on_nothing_else(tmp_path: Path) -> None:
    rows = [{"text": f"document {i} of package {i % 30}", "package": f"p{i % 30}"} for i in range(90)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"group_field": "package", "val_fraction": 0.3, "dedup": None}
    corpus = load_corpus(config(path, **settings))
    train, val = ({d.group for d in side} for side in (corpus.train, corpus.val))
    assert not train & val and len(train | val) == 30 and 3 <= len(val) <= 15
    more = write_jsonl(tmp_path / "b.jsonl", [*rows[::-1], {"text": "one more", "package": "new"}])
    grown = load_corpus(config(more, **settings))
    assert {d.group for d in grown.val} - {"new"} == val
    assert {d.group for d in load_corpus(config(path, **settings, split_seed=1)).val} != val
    assert load_corpus(config(path, dedup=None, val_fraction=0.0)).val == ()


def test_few_groups_still_leave_something_to_validate_on(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    corpus = load_corpus(config(tmp_path, val_fraction=0.01))
    assert (len(corpus.train), len(corpus.val)) == (2, 1)
    with pytest.raises(InvalidValue, match="all 1 groups of the corpus fall to validation"):
        load_corpus(config(tmp_path / "a.txt"))


# --- files ---


def test_files_folders_globs_and_tags(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfzwei\r\n")  # byte order mark; line ends are kept
    (tmp_path / "sub" / "a.md").write_text("eins")
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    docs = list(read_documents(config(tmp_path)))
    assert [d.text for d in docs] == ["zwei\r\n", "eins"]
    assert [d.text for d in read_documents(config(f"{tmp_path}/**/*.md"))] == ["eins"]
    tagged = list(read_documents(config(f"de={tmp_path}/b.txt", f"en={tmp_path}/sub")))
    assert [(d.tag, d.text) for d in tagged] == [("de", "zwei\r\n"), ("en", "eins")]
    odd = tmp_path / "year=2024"
    odd.mkdir()
    (odd / "x.txt").write_text("a path with =")
    assert [d.tag for d in read_documents(config(odd))] == [""]


def test_a_long_file_is_cut_at_blank_lines_and_its_pieces_are_divided(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" + ("\n" if i % 7 == 0 else "") for i in range(60_000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    docs = list(read_documents(config(path)))
    assert "".join(d.text for d in docs) == text and len(docs) > 5
    assert all(d.text.endswith("\n\n") for d in docs[:-1])
    assert len({d.group for d in docs}) == len(docs)
    (tmp_path / "other.txt").write_text("x")
    assert len({d.group for d in read_documents(config(tmp_path))}) == 2  # of several files, each is a group


def test_jsonl_fields(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl",
        [{"q": "2+2?", "a": "4", "topic": "maths"}, {"q": "Capital of France?", "a": "Paris", "topic": "places"}],
    )
    docs = list(read_documents(config(path, field="q", tag_field="topic")))
    assert [(d.text, d.tag) for d in docs] == [("2+2?", "maths"), ("Capital of France?", "places")]
    chat = next(iter(read_documents(config(path, prompt_field="q", answer_field="a"))))
    assert chat.messages == ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
    talk = [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl(tmp_path / "y.jsonl", [{"messages": talk}])
    assert next(iter(read_documents(config(path, field="messages")))).messages[1]["content"] == "ho"


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    rows = {"text": [f"row {i}" for i in range(5)], "n": list(range(5))}
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    for source in ("x.parquet", "saved", "splits"):
        for streaming in (False, True):
            docs = list(read_documents(config(tmp_path / source), streaming=streaming))
            assert [d.text for d in docs] == rows["text"]
            assert len({d.group for d in docs}) == 5
    assert signature(config(tmp_path / "saved")) != signature(config(tmp_path / "splits"))


def test_signature_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = signature(config(tmp_path))
    assert before == signature(config(tmp_path))
    assert before != signature(config(tmp_path, val_fraction=0.2))
    (tmp_path / "a.txt").write_text("other")
    assert before != signature(config(tmp_path))


BAD = {
    "missing": ("nowhere.txt", "no such file, folder or pattern.*hf:"),
    "empty folder": ("empty", "no text in folder"),
    "blank": ("blank.txt", "corpus is empty"),
    "latin1": ("latin1.txt", r"latin1.txt:2: not UTF-8 \(byte 0xe9 at column 4\)"),
    "latin1 rows": ("latin1.jsonl", "latin1.jsonl:1: not UTF-8"),
    "no field": ("field.jsonl", "field.jsonl:2: no field 'text'; the row has 'body'"),
    "wrong kind": ("kind.jsonl", "kind.jsonl:1: field 'text' is a int"),
    "bad message": ("message.jsonl", "message.jsonl:1: a message must be"),
    "not JSON": ("half.jsonl", "half.jsonl:1: not JSON"),
    "not an object": ("list.jsonl", "list.jsonl:1: a list where an object"),
    "not Parquet": ("broken.parquet", "broken.parquet is not a readable Parquet file"),
    "typo": ("stdlib:cod", "unknown corpus source 'stdlib:cod'.*did you mean 'stdlib:code'"),
    "offline": ("hf:nobody/nothing", "cannot load the Hugging Face data set 'nobody/nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.txt").write_text(" \n\n")
    Path("latin1.txt").write_bytes(b"fine\ncaf\xe9\n")
    Path("latin1.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    write_jsonl(Path("field.jsonl"), [{"text": "x"}, {"body": "y"}])
    write_jsonl(Path("kind.jsonl"), [{"text": 3}])
    write_jsonl(Path("message.jsonl"), [{"text": [{"role": "user"}]}])
    Path("half.jsonl").write_text('{"text": ')
    Path("list.jsonl").write_text("[1]\n")
    Path("broken.parquet").write_bytes(b"PAR1 not really")
    source, message = BAD[case]
    with pytest.raises(InvalidValue, match=message) as e:
        list(read_documents(config(source)))
    assert "\n" not in str(e.value)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "x.txt")
    with pytest.raises(InvalidValue):
        list(read_documents(config(tmp_path / "x.txt")))


def test_bad_settings() -> None:
    for settings, message in (
        ({"sources": ()}, "sources is empty"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"dedup": 1.5}, "dedup must lie in"),
        ({"prompt_field": "q"}, "go together"),
    ):
        with pytest.raises(InvalidValue, match=message):
            CorpusConfig(**settings)  # type: ignore[arg-type]  # the bad values are the point


# --- request logs ---


def served(tmp_path: Path, *rows: object) -> CorpusConfig:
    return config(f"log:{write_jsonl(tmp_path / 'served.jsonl', list(rows))}", val_fraction=0.0, dedup=None)


def test_a_request_log_is_a_source(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "add"}]
    log = served(
        tmp_path,
        {"prompt": "def add", "model": "m", "choices": [{"text": "(a, b)"}]},
        {"messages": chat, "choices": [{"message": {"role": "assistant", "content": "a + b"}}]},
        {"prompt": "x", "choices": [{"text": "y", "prompt_token_ids": [5, 6], "token_ids": [7]}]},
        {"prompt": "nothing came", "choices": [{"text": ""}]},
    )
    text, turns, ids = read_documents(log)
    assert (text.text, text.tag, text.ids, text.messages) == ("def add(a, b)", "m", (), ())
    assert turns.messages == (*chat, {"role": "assistant", "content": "a + b"})
    assert (ids.ids, ids.prompt_ids, ids.text) == ((5, 6, 7), 2, "5 6 7")
    assert len({d.group for d in (text, turns, ids)}) == 3
    before = signature(log)
    (tmp_path / "served.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    assert signature(log) != before
    assert digest([ids]) != digest([Document("5 6 7", ids.source, ids.group)])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "x"}, r"served.jsonl:1: no answer"),
        ({"prompt": [5, 6], "completion": "y"}, r"served.jsonl:1: token ids of only one of prompt and answer"),
    ],
)
def test_a_log_line_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidValue, match=why):
        list(read_documents(served(tmp_path, row)))


def test_served_tokens_are_learned_as_they_were_served(tmp_path: Path) -> None:
    tokenizer = train_bpe(["def add(a, b)"], MIN_VOCAB)
    row = {"prompt": "x", "choices": [{"text": "y", "prompt_token_ids": [5, 6], "token_ids": [7]}]}
    (document,) = read_documents(served(tmp_path, row))
    for answers_only, mask in ((False, [1, 1, 1]), (True, [0, 0, 1])):
        (found,) = encode_documents([document], tokenizer, add_bos=True, answers_only=answers_only)
        assert found.ids.tolist() == [5, 6, 7] and found.mask.tolist() == mask  # neither BOS nor EOS is put to them
    foreign = dataclasses.replace(document, ids=(5, 10**6))
    with pytest.raises(InvalidValue, match="token ids outside"):
        list(encode_documents([foreign], tokenizer, add_bos=False, answers_only=False))
