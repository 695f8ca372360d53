"""The log of served requests: a round trip, a killed writer, a run that resumes."""

import math
from pathlib import Path

import pytest

from draftsmith.data.served_log import Served, append, cut, pooled, read
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.metrics import count
from draftsmith.inference.requests import RoundStats


def _served(number: int, accepted: int = 2) -> Served:
    rounds = RoundStats()
    rounds.append(row=0, drafted=3, accepted=accepted, committed=accepted + 1, beta_sum=1.5, seconds=0.25)
    return Served(number, "code", 0, 1, 0.5 if number else math.nan, 3, accepted + 1, rounds)


def test_what_was_appended_is_read_back_in_the_order_of_the_requests(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    append(path, [_served(1), _served(0)])
    append(path, [_served(2)])
    found = read(path)
    assert [s.number for s in found] == [0, 1, 2]
    assert math.isnan(found[0].alpha)
    assert found[1:] == [_served(1), _served(2)]


def test_the_half_line_of_a_killed_writer_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    append(path, [_served(0), _served(1)])
    path.write_text(path.read_text()[:-9])
    assert [s.number for s in read(path)] == [0]


def test_a_resumed_run_finds_only_what_its_checkpoint_had_served(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    append(path, [_served(n) for n in range(5)])
    assert cut(path, before=3) == 3
    append(path, [_served(3)])
    assert [s.number for s in read(path)] == [0, 1, 2, 3]
    assert cut(tmp_path / "missing.jsonl", before=3) == 0


def test_pooled_rounds_belong_to_their_requests() -> None:
    rounds = pooled([_served(4, accepted=1), _served(7, accepted=3)])
    assert rounds.row == [0, 1]
    assert count(rounds).committed == 6


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    append(path, [_served(0)])
    with path.open("a") as file:
        file.write('{"number": 3}\n')
    with pytest.raises(InvalidValue, match=r"served\.jsonl:2: no record"):
        read(path)
