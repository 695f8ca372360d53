"""The data module of online learning: every source of traffic, its order, its identity, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_data import OnlineDataModule, RouterConfig, TrafficConfig
from draftsmith.data.online_stream import OnlineStream
from draftsmith.data.request_logs import LoggedRequest
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.requests import TokenRequest
from tests.tiny import write_lm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("traffic")
    write_lm(place / "target", max_length=64)
    write_lm(place / "bare", max_length=64, tokenizer=False)
    (place / "text").mkdir()
    for i in range(20):
        words = ("def add" if i % 2 else "the quick brown fox") + f" {i}"
        (place / "text" / f"{i}.txt").write_text(f"{words} " * 20)
    rows = [{"prompt": f"def add {i}", "tag": "code" if i % 2 else "prose"} for i in range(12)]
    write_rows(place / "prompts.jsonl", rows)
    write_rows(place / "ids.jsonl", [{"prompt_ids": [5, 6, 7 + i]} for i in range(3)])
    write_rows(place / "logs.jsonl", [{"prompt": "def", "completion": " add"}, {"prompt": "The", "completion": " fox"}])
    return place


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(place: Path, target: str = "target", router: RouterConfig | None = None, **traffic: Any) -> OnlineDataModule:
    data = OnlineDataModule(str(place / target), TrafficConfig(**traffic), router=router or RouterConfig())
    data.setup("fit")
    return data


def items(data: OnlineDataModule) -> list[Any]:
    assert data.stream is not None
    return list(data.stream.source.read())


def test_prompts_in_file_order(place: Path) -> None:
    data = opened(place, prompts=(str(place / "prompts.jsonl"),), max_new_tokens=9)
    found = items(data)
    texts = [data.target.tokenizer.decode(list(r.prompt)) for r in found]
    assert texts == [f"def add {i}" for i in range(12)]
    assert all(r.max_new_tokens == 9 and r.stop_ids == (1,) for r in found)  # the target's own end of sequence
    assert [r.tag for r in found[:2]] == ["prose", "code"]


def test_orders(place: Path) -> None:
    given = [r.prompt for r in items(opened(place, prompts=(str(place / "prompts.jsonl"),)))]
    by_tag = items(opened(place, prompts=(str(place / "prompts.jsonl"),), order="by_tag"))
    assert [r.tag for r in by_tag] == ["code"] * 6 + ["prose"] * 6
    mixed = [r.prompt for r in items(opened(place, prompts=(str(place / "prompts.jsonl"),), order="shuffled"))]
    assert mixed != given and sorted(mixed) == sorted(given)
    again = [r.prompt for r in items(opened(place, prompts=(str(place / "prompts.jsonl"),), order="shuffled"))]
    other = [r.prompt for r in items(opened(place, prompts=(str(place / "prompts.jsonl"),), order="shuffled", seed=1))]
    assert again == mixed != other


def test_token_ids_need_no_tokenizer(place: Path) -> None:
    data = opened(place, target="bare", prompts=(str(place / "ids.jsonl"),))
    assert [r.prompt for r in items(data)] == [(5, 6, 7), (5, 6, 8), (5, 6, 9)]
    assert data.tokenizer_dir is None and data.vocab_size == 320


def test_prompts_without_room_for_an_answer_are_left_out_and_announced(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [{"prompt_ids": [5] * n} for n in (63, 64, 65)])
    with pytest.warns(UserWarning, match="2 of 3 prompts do not fit into the target's 64 positions"):
        assert [len(r.prompt) for r in items(opened(place, prompts=(str(tmp_path / "long.jsonl"),)))] == [63]
    write_rows(tmp_path / "long.jsonl", [{"prompt_ids": [5] * 70}])
    with pytest.raises(InvalidValue, match="1 of 1 prompts do not fit"):
        opened(place, prompts=(str(tmp_path / "long.jsonl"),))


def test_logs(place: Path) -> None:
    found = items(opened(place, logs=(str(place / "logs.jsonl"),)))
    assert len(found) == 2 and all(isinstance(x, LoggedRequest) for x in found)


def test_a_corpus_keeps_its_validation_documents_out(place: Path) -> None:
    corpus = CorpusConfig(sources=(f"file={place / 'text'}",), dedup=None, val_fraction=0.3)
    data = opened(place, corpus=corpus, prompt_length=5, val_requests=3)
    served = {r.prompt for r in items(data)}
    held_out = data.val_requests()
    assert 1 <= len(held_out) <= 3 and all(len(p) == 5 for p in served)
    assert len(items(data)) < 20 and {r.tag for r in held_out} == {"file"}


def endless(start: int, tokenizer: Any) -> Iterator[TokenRequest]:
    i = start
    while True:
        yield TokenRequest(tuple(tokenizer(f"def {i}")["input_ids"]), 4)
        i += 1


def test_a_factory(place: Path) -> None:
    data = opened(place, factory=f"{__name__}:endless")
    assert data.stream is not None
    assert next(data.stream.source.read(7)).prompt == next(endless(7, data.target.tokenizer)).prompt
    assert data.stream.source.length is None and len(data.stream) > 10**9


def test_validation_prompts_make_one_batch_without_labels(place: Path) -> None:
    path = str(place / "prompts.jsonl")
    data = opened(place, prompts=(path,), val_prompts=(path,), val_requests=5)
    assert len(data.val_requests()) == 5
    (batch,) = list(data.val_dataloader())
    assert batch.ids.shape[0] == 5 and int(batch.loss_mask.sum()) == 0
    assert opened(place, prompts=(path,)).val_dataloader() == []


def test_fingerprint_is_of_the_contents(place: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **changes: Any) -> str:
        return OnlineDataModule(
            str(place / "target"), TrafficConfig(prompts=(str(path),), **changes)
        ).data_fingerprint()

    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((place / "prompts.jsonl").read_bytes())
    assert fingerprint(copy) == fingerprint(place / "prompts.jsonl")
    assert fingerprint(copy, seed=1) != fingerprint(copy)
    copy.write_text(copy.read_text().replace("11", "12"))
    assert fingerprint(copy) != fingerprint(place / "prompts.jsonl")


def test_state_travels_with_the_module(place: Path) -> None:
    data = opened(place, prompts=(str(place / "prompts.jsonl"),))
    stream = data.train_dataloader()
    assert isinstance(stream, OnlineStream)
    stream.served, stream.position, stream.updates = 8, 8, 2
    state = data.state_dict()
    again = opened(place, prompts=(str(place / "prompts.jsonl"),))
    again.load_state_dict(state)
    loaded = again.train_dataloader()
    assert (loaded.served, loaded.position, loaded.updates) == (8, 8, 2)
    again.setup("fit")  # a new run forgets it
    assert again.train_dataloader().served == 0


def test_checkpoints_wait_for_an_empty_buffer_unless_records_may_be_stored(place: Path) -> None:
    data = opened(place, prompts=(str(place / "prompts.jsonl"),))
    assert data.stream is not None and data.may_checkpoint
    data.stream._at_rest = False
    assert not data.may_checkpoint
    data.come_to_rest()
    assert data.stream._resting
    data.buffer = BufferSettings(persist=True)
    assert data.may_checkpoint


def test_asking_too_early(place: Path) -> None:
    with pytest.raises(InvalidState, match="setup"):
        _ = OnlineDataModule(str(place / "target"), TrafficConfig()).target


def test_centroid_classes_are_learned_from_the_tagged_traffic(place: Path) -> None:
    router = RouterConfig(drafts=("code", "prose"), by="centroid", examples=2)
    data = opened(place, prompts=(str(place / "prompts.jsonl"),), router=router)
    assert data.stream is not None and data.stream.router is not None
    centroids = data.stream.router.key_of.centroids
    first = [r for r in items(data) if r.tag == "code"][:2]
    table = data._embeddings()
    expected = torch.stack([table[list(r.prompt)].mean(0) for r in first]).mean(0)
    assert torch.allclose(centroids[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ("a",), "logs": ("b",)}, "one of prompts, logs and factory, got prompts and logs"),
        ({"order": "random"}, "unknown traffic.order 'random'"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"val_requests": -1}, "val_requests"),
    ],
)
def test_traffic_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TrafficConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "magic"}, "unknown router.by 'magic'"),
        ({"by": "function"}, "router.function goes with"),
        ({"function": "os:getcwd"}, "router.function goes with"),
        ({"examples": 0}, "examples"),
    ],
)
def test_router_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        RouterConfig(**settings)


@pytest.mark.parametrize(
    ("target", "traffic", "router", "message"),
    [
        ("nowhere", {"prompts": ("prompts.jsonl",)}, None, "no such directory"),
        ("bare", {"prompts": ("prompts.jsonl",)}, None, "no tokenizer"),
        ("bare", {"logs": ("logs.jsonl",)}, None, "has no tokenizer and the traffic is text"),
        ("target", {"prompts": ("absent.jsonl",)}, None, "absent.jsonl"),
        ("target", {"logs": ("absent.jsonl",)}, None, "absent.jsonl"),
        ("target", {"factory": "no_such_module:f"}, None, "cannot import traffic.factory"),
        (
            "target",
            {"prompts": ("ids.jsonl",)},
            RouterConfig(drafts=("a", "b"), by="centroid"),
            "no prompts for the class",
        ),
        (
            "target",
            {"factory": f"{__name__}:endless"},
            RouterConfig(drafts=("a", "b"), by="centroid"),
            "needs tagged prompts or logs",
        ),
    ],
)
def test_what_cannot_be_opened(place: Path, target: str, traffic: Any, router: Any, message: str) -> None:
    traffic = {k: tuple(str(place / x) for x in v) if k != "factory" else v for k, v in traffic.items()}
    with pytest.raises(InvalidValue, match=message) as error:
        opened(place, target=target, router=router, **traffic)
    assert "\n" not in str(error.value)
