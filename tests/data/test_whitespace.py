"""Whitespace as tokens of an XLNet-like tokenizer: texts come back as they are, three spaces are one token."""

import json
from pathlib import Path

import pytest

from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.tokenizer import decode, encode_texts, load_tokenizer
from draftsmith.data.whitespace import keep_whitespace
from draftsmith.inference.errors import InvalidValue
from tests.tiny import write_tokenizer

CODE = "def a(b):\n    if b:\n\treturn a(  b)\n   b = 1\n\n      return a b"
SPECIALS = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")  # with XLNet's ids
CLS, SEP, PAD, UNK = 3, 4, 5, 0


@pytest.fixture
def xlnet(tmp_path: Path) -> Path:
    """A directory with XLNet's layout: Unigram, Metaspace, runs of spaces squeezed, special tokens first."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [(token, 0.0) for token in SPECIALS] + [("\u2581", -2.0)]
    pieces += [(c, -4.0) for c in "abcdefghijklmnopqrstuvwxyz()=:<>0123456789"] + [("\u2581return", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = ("unk", "bos", "eos", "cls", "sep", "pad", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, SPECIALS, strict=False)}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path / "xlnet")
    return tmp_path / "xlnet"


def test_code_comes_back_as_it_was(xlnet: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(xlnet)
    assert decode(plain, encode_texts(plain, [CODE])[0]) != CODE  # why the map is there
    keep_whitespace(xlnet, tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    (ids,) = encode_texts(kept, [CODE])
    assert decode(kept, ids) == CODE
    assert len(kept) == len(plain) and kept.mask_token_id == 6 and kept.eos_token_id == 2
    assert {CLS, SEP, PAD, UNK} <= set(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a   b", [PAD]), ("a  b", [UNK]), ("a     b", [PAD, UNK]), ("a\n\tb", [CLS, SEP]), ("a      b", [PAD, PAD])],
)
def test_the_longest_run_is_one_token(xlnet: Path, tmp_path: Path, text: str, expected: list[int]) -> None:
    keep_whitespace(xlnet, tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    (ids,) = encode_texts(kept, [text])
    assert [i for i in ids if i in (CLS, SEP, PAD, UNK)] == expected and decode(kept, ids) == text


def test_a_spelt_special_token_is_text(xlnet: Path, tmp_path: Path) -> None:
    keep_whitespace(xlnet, tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    (ids,) = encode_texts(kept, ["a <cls> b"])
    assert CLS not in ids and decode(kept, ids) == "a <cls> b"


def test_the_data_module_keeps_it_for_exports(xlnet: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(CODE * 4)
    corpus = CorpusConfig(sources=[str(tmp_path / "text")], dedup=None, val_fraction=0.3)
    text = TextConfig(tokenizer=str(xlnet), whitespace="xlnet", length=32, batch_size=1, cache_dir=str(tmp_path / "c"))
    data = TextDataModule(corpus, text)
    data.prepare_data()
    data.setup()
    assert data.tokenizer_dir != xlnet and (data.tokenizer_dir / "tokenizer.json").is_file()
    plain = TextDataModule(corpus, TextConfig(tokenizer=str(xlnet), length=32, cache_dir=str(tmp_path / "c")))
    assert plain.directory != data.directory
    batches = list(data.train_dataloader())
    assert CLS in batches[0].ids
    texts = [decode(data.tokenizer, batch.ids[0].tolist()) for batch in batches]
    assert any(text.startswith("def a(b):\n    if b:\n\t") for text in texts)  # a document's beginning


def test_other_tokenizers_are_refused(xlnet: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "bpe")
    with pytest.raises(InvalidValue, match="not like XLNet's"):
        keep_whitespace(tmp_path / "bpe", tmp_path / "kept")
    content = json.loads((xlnet / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<sep>"]
    (xlnet / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidValue, match="it lacks <sep>"):
        keep_whitespace(xlnet, tmp_path / "kept")
    with pytest.raises(InvalidValue, match="cannot read"):
        keep_whitespace(tmp_path, tmp_path / "kept")
    with pytest.raises(InvalidValue, match=r"unknown text\.whitespace"):
        TextConfig(whitespace="python")
    with pytest.raises(InvalidValue, match="keeps whitespace anyway"):
        TextConfig(whitespace="xlnet")
