"""Streamed text joins to the text of the whole, whatever the bytes and wherever a stop string falls."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.inference.detokenize import TextStream
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    return [stream.push(i) for i in ids] + [stream.finish()]


def test_characters_of_several_tokens_appear_whole(tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(t) for t in "ðŁĺ¢"]  # four bytes of one emoji, one token each
    assert tokenizer.decode(ids) == "😢"
    assert pieces(tokenizer, ids) == ["", "", "", "😢", ""]
    assert pieces(tokenizer, ids[:2]) == ["", "", "\ufffd"]  # never completed: shown at the end, as in the whole


@given(st.text(max_size=30))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_join_to_the_decode_of_the_whole(tokenizer: Any, ids: list[int]) -> None:
    """Special tokens and broken UTF-8 included."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.text("ab", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokenizer: Any, text: str, stops: list[str]) -> None:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    stream = TextStream(tokenizer, stops)
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)  # nothing has to be taken back
    assert shown + stream.finish() == (text[: min(found)] if found else text)


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(t) for t in "xaaby"]
    assert pieces(tokenizer, ids, ("aab",)) == ["x", "", "", "", "", ""]
    assert pieces(tokenizer, ids, ("aac",)) == ["x", "", "", "aab", "y", ""]
    assert pieces(tokenizer, ids[:3], ("aac",)) == ["x", "", "", "aa"]
