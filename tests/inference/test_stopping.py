"""Stops in the order of the text: ids, strings across token borders, length; the text is cut before a string."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.stopping import LENGTH, STOP_ID, STOP_STRING, StopScanner
from tests.fakes import MarkovEngine
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


def scanner(tokenizer: Any = None, max_output: int = 100, **request: Any) -> StopScanner:
    return StopScanner(TokenRequest([1], **request), tokenizer, max_output)


def test_stop_id_is_kept_and_what_follows_is_cut() -> None:
    scan = scanner(stop_ids=(7, 9))
    assert scan.push([1, 2]) == (2, None)
    assert scan.push([3, 9, 7, 4]) == (2, STOP_ID)
    assert scan.output == [1, 2, 3, 9]


def test_length_counts_all_rounds() -> None:
    scan = scanner(max_output=3)
    assert scan.push([5, 5]) == (2, None)
    assert scan.push([5, 5]) == (1, LENGTH)


def test_the_first_stop_in_order_wins_and_an_id_at_the_limit_is_an_id() -> None:
    assert scanner(max_output=2, stop_ids=(9,)).push([1, 2, 9]) == (2, LENGTH)
    assert scanner(max_output=2, stop_ids=(9,)).push([1, 9, 2]) == (2, STOP_ID)


@pytest.mark.parametrize("per_round", [1, 3, 100])
def test_stop_string_across_token_borders(tokenizer: Any, per_round: int) -> None:
    """The string ends in the middle of a token; tokens up to the completing one are kept, the text is cut before it."""
    text = "def add(a, b):\n    return a + b, naïve café 😀 and more"
    ids = tokenizer.encode(text)
    for stop in ("a + b", "ïve c", "😀", "n a", "\n  "):
        scan = scanner(tokenizer, stop_strings=("never there", stop))
        kept, reason = [], None
        for at in range(0, len(ids), per_round):
            count, reason = scan.push(ids[at : at + per_round])
            kept += ids[at : at + count]
            if reason:
                break
        assert reason == STOP_STRING
        assert kept == scan.output == ids[: len(kept)]
        assert stop in tokenizer.decode(kept) and stop not in tokenizer.decode(kept[:-1])
        assert scan.text() == text[: text.index(stop)]


def test_text_without_a_hit_is_the_whole(tokenizer: Any) -> None:
    scan = scanner(tokenizer, stop_strings=("zzz",))
    ids = tokenizer.encode("naïve 😀")
    assert scan.push(ids) == (len(ids), None) and scan.text() == "naïve 😀"


def test_bad_stop_strings() -> None:
    with pytest.raises(InvalidValue, match="need a tokenizer"):
        scanner(stop_strings=("x",))
    with pytest.raises(InvalidValue, match="empty stop string"):
        scanner(object(), stop_strings=("",))


def cycle(ids: list[int], vocab: int) -> MarkovEngine:
    """A target that goes on along `ids` for ever (all ids different)."""
    table = torch.zeros(vocab, vocab)
    for a, b in zip(ids, [*ids[1:], ids[0]], strict=True):
        table[a, b] = 10.0
    return MarkovEngine(table)


@pytest.mark.parametrize("batching", ["ragged", "lockstep"])
def test_decoders_cut_a_round_at_its_first_stop(tokenizer: Any, batching: str) -> None:
    """A perfect draft proposes past the stop; the output ends where plain decoding ends, whatever the stop is."""
    ids = list(dict.fromkeys(tokenizer.encode("return twice over 日 lazy dog")))
    target = cycle(ids, len(tokenizer))
    text = tokenizer.decode(ids)
    requests = [
        TokenRequest(ids[:1], 50, stop_ids=(ids[6],)),
        TokenRequest(ids[:2], 50, stop_strings=(text[9:12],)),
        TokenRequest(ids[:1], 7),
        TokenRequest(ids[:3], 2, stop_ids=(ids[4],)),
        TokenRequest(ids[:3], 1),
    ]
    plain = AutoregressiveDecoder(target, tokenizer=tokenizer).decode(requests)
    settings = SpeculativeSettings(draft_length=4, batching=batching, fallback="never")
    drafted = SpeculativeDecoder(target, ModelDrafter(target), tokenizer=tokenizer, settings=settings).decode(requests)
    assert plain.stop == [STOP_ID, STOP_STRING, LENGTH, STOP_ID, LENGTH]
    assert drafted.output == plain.output and drafted.stop == plain.stop and drafted.text == plain.text
    assert plain.output[0] == ids[1:7] and len(plain.output[2]) == 7
    assert plain.text is not None and text[9:12] not in plain.text[1]
    # committed tokens of the rounds are those that reached the output
    for row in range(len(requests)):
        rounds = [c for r, c in zip(drafted.rounds.row, drafted.rounds.committed, strict=True) if r == row]
        assert sum(rounds) == len(drafted.output[row])
