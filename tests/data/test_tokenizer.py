"""Byte-level BPE: any text comes back, training repeats itself in another process, bad input gives one line."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from draftsmith.data.tokenizer import (
    EOS,
    MIN_VOCAB,
    SPECIAL_TOKENS,
    decode,
    encode_texts,
    load_tokenizer,
    train_bpe,
)
from draftsmith.inference.errors import InvalidValue

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "The quick brown fox jumps over the lazy dog. ",
    "das Geschäft läuft 世界",
] * 20

TRAIN = f"""
import hashlib
from draftsmith.data.tokenizer import train_bpe
print(hashlib.sha256(train_bpe({TEXTS!r}, 310).backend_tokenizer.to_str().encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 310).save_pretrained(folder)
    return load_tokenizer(folder)


@settings(max_examples=300)
@given(text=st.text(max_size=80))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert decode(tokenizer, encode_texts(tokenizer, [text])[0]) == text


@given(parts=st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a", "<|", "|>"]), max_size=8))
def test_a_special_token_spelt_out_in_a_text_stays_text(tokenizer: PreTrainedTokenizerFast, parts: list[str]) -> None:
    text = "".join(parts)
    ids = encode_texts(tokenizer, [text])[0]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert decode(tokenizer, ids) == text


def test_negative_control_the_plain_call_takes_it_for_the_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id in tokenizer(f"a{EOS}b", add_special_tokens=False)["input_ids"]


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 310
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(encode_texts(tokenizer, [TEXTS[1]])[0]) < len(TEXTS[1]) * 0.7  # it has learned to merge
    assert encode_texts(tokenizer, []) == []
    assert encode_texts(tokenizer, ["", "x"])[0] == []


def test_training_repeats_itself_in_another_process() -> None:
    here = hashlib.sha256(train_bpe(TEXTS, 310).backend_tokenizer.to_str().encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "TOKENIZERS_PARALLELISM": "true"}
        out = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True, env=environment)
        assert out.stdout.strip() == here


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=f"at least {MIN_VOCAB}.*got 100"):
        train_bpe(TEXTS, 100)
    with pytest.raises(InvalidValue, match="no tokenizer directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InvalidValue, match="cannot load a tokenizer from") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)
    (tmp_path / "tokenizer.json").write_text("{ half")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InvalidValue, match="cannot load a tokenizer from") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXTS, 300).backend_tokenizer)
    bare.save_pretrained(tmp_path)
    with pytest.raises(InvalidValue, match="no eos_token"):
        load_tokenizer(tmp_path)
