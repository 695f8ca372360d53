"""From documents to batches: no token lost, no leak across documents, exact resume, one clear line for bad input."""

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.corpus import CorpusConfig, Document
from draftsmith.data.stateful_loader import StatefulLoader, StatefulStreamLoader
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.token_store import EncodedDocument, PackedTokens, TokenStore, make_batch, write_store
from draftsmith.data.token_stream import TokenStream
from draftsmith.data.tokenizer import decode, train_bpe
from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue

PAD = 2


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([f"some words of package {i} and line {i * i}" for i in range(50)], 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "text": " ".join(f"w{n}" for n in rng.integers(0, 1000, rng.integers(5, 40))),
            "package": f"p{i % 20}",
            "tag": "even" if i % 3 == 0 else "odd",
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def module(rows: Path, cache: Path, **text: Any) -> TextDataModule:
    corpus = {"group_field": "package", "tag_field": "tag", "val_fraction": 0.2}
    corpus |= {"dedup": None} if text.get("streaming") else {}
    return TextDataModule(
        CorpusConfig(sources=(str(rows),), **corpus),  # type: ignore[arg-type]  # test shorthand
        TextConfig(**{"length": 16, "batch_size": 4, "cache_dir": str(cache), "tokenizer": "bpe:300", **text}),
    )


def ready(rows: Path, cache: Path, **text: Any) -> TextDataModule:
    data = module(rows, cache, **text)
    data.prepare_data()
    data.setup()
    return data


# --- batches ---


def batch_of(document: list[list[int]], separate: bool = True) -> TokenBatch:
    d = np.asarray(document)
    return make_batch(np.ones_like(d), np.ones_like(d, np.uint8), d, range(len(d)), separate=separate)


def test_labels_documents_positions_and_mask_by_hand() -> None:
    b = batch_of([[7, 7, 7, 9, 9, PADDING]])
    assert b.document.tolist() == [[0, 0, 0, 1, 1, -1]]
    assert b.loss_mask.tolist() == [[0, 1, 1, 0, 1, 0]]  # neither first tokens nor padding are labels
    assert b.positions().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert b.visible()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # padding sees itself: a row of nothing would be NaN in attention
    ]
    joined = batch_of([[7, 7, 7, 9, 9, PADDING]], separate=False)
    assert joined.document.tolist() == [[0, 0, 0, 0, 0, -1]]
    assert joined.loss_mask.tolist() == [[0, 1, 1, 1, 1, 0]]


def test_batches_are_integers_and_survive_what_lightning_does_to_them() -> None:
    b = batch_of([[0, 0, 1, 1]])
    kinds = [b.ids.dtype, b.loss_mask.dtype, b.document.dtype, b.sample_id.dtype]
    assert kinds == [torch.int64, torch.int8, torch.int32, torch.int64]
    for moved in (
        move_data_to_device(b, torch.device("cpu")),
        DeepSpeedPrecision("bf16-mixed").convert_input(b),  # type: ignore[no-untyped-call]  # Lightning's
        b.to("meta"),
    ):
        assert isinstance(moved, TokenBatch) and moved.separate
        assert [moved.ids.dtype, moved.loss_mask.dtype, moved.document.dtype, moved.sample_id.dtype] == kinds
    with pytest.raises(InvalidType, match=r"TokenBatch.loss_mask must be torch.int8, got torch.float32"):
        TokenBatch(b.ids, b.loss_mask.float(), b.document, b.sample_id)
    with pytest.raises(InvalidValue, match=r"TokenBatch.document must have shape \[1, 4\], got \[1, 3\]"):
        TokenBatch(b.ids, b.loss_mask, b.document[:, 1:], b.sample_id)


# --- packing ---


def documents(lengths: list[int]) -> list[EncodedDocument]:
    numbers = iter(range(10**6))
    return [
        EncodedDocument(np.asarray([next(numbers) for _ in range(n)]), np.ones(n, np.uint8), f"t{n % 2}")
        for n in lengths
    ]


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), length=st.integers(2, 17), separate=st.booleans())
def test_packing_loses_no_token_and_leaks_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, separate: bool
) -> None:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, documents(lengths), vocab_size=10**6)
    store = TokenStore(folder)
    packed = PackedTokens(store, length, separate=separate, pad_id=PAD)
    b = packed.fetch(range(len(packed)))
    real = b.document != PADDING
    assert b.ids[real].tolist() == list(range(sum(lengths)))
    owner = np.repeat(np.arange(len(lengths)), lengths)  # token value -> document
    visible = b.visible()[:, 0]
    for row in range(len(packed)):
        for t in range(length):
            if not real[row, t]:
                assert b.loss_mask[row, t] == 0
                continue
            seen = [owner[i] for i in b.ids[row][visible[row, t] & real[row]].tolist()]
            mine = owner[int(b.ids[row, t])]
            if separate:
                assert set(seen) == {mine}
            else:
                assert len(seen) == t + 1
            predecessor_is_mine = t > 0 and owner[int(b.ids[row, t - 1])] == mine
            assert bool(b.loss_mask[row, t]) == (predecessor_is_mine if separate else t > 0)
    assert [d.ids.tolist() for d in map(store.document, range(store.num_documents))] == [
        d.ids.tolist() for d in documents(lengths)
    ]


def test_store_survives_pickling_and_notices_damage(tmp_path: Path) -> None:
    write_store(tmp_path, documents([3, 4]), vocab_size=300)
    store = TokenStore(tmp_path)
    assert store.ids.dtype == np.uint16 and len(pickle.dumps(store)) < 500
    assert pickle.loads(pickle.dumps(store)).ids.tolist() == list(range(7))  # noqa: S301  # our own bytes
    (tmp_path / "ids.bin").write_bytes((tmp_path / "ids.bin").read_bytes()[:-1])
    with pytest.raises(InvalidState, match=r"ids.bin has 13 bytes instead of 14.*delete it"):
        TokenStore(tmp_path)
    (tmp_path / "store.json").write_text('{"version": 0}')
    with pytest.raises(InvalidState, match="version 0"):
        TokenStore(tmp_path)


# --- streams ---


def stream(tokenizer: Any, window: int = 1, texts: int = 11, **change: Any) -> TokenStream:
    def pass_over() -> Iterator[Document]:
        return (Document(f"document {i} " + "x" * (i * 7 % 23), f"s{i}", f"g{i}") for i in range(texts))

    arguments: dict[str, Any] = {
        "separate": True, "add_bos": False, "answers_only": True, "window": window, "seed": 5, "fingerprint": "f",
    }  # fmt: skip
    return TokenStream(pass_over, tokenizer, 8, **{**arguments, **change})


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    from draftsmith.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_dir)


def test_a_stream_packs_as_the_store_does(tmp_path: Path, tokenizer: Any) -> None:
    from draftsmith.data.token_store import encode_documents

    source = stream(tokenizer)
    write_store(
        tmp_path, encode_documents(source.documents(), tokenizer, add_bos=False, answers_only=True), len(tokenizer)
    )
    packed = PackedTokens(TokenStore(tmp_path), 8, separate=True, pad_id=source.pad_id)
    samples = source.samples({})
    for _ in range(2):  # two passes
        b = source.collate([next(samples)[0] for _ in range(len(packed))])
        whole = packed.fetch(range(len(packed)))
        assert torch.equal(b.ids, whole.ids)
        assert torch.equal(b.loss_mask, whole.loss_mask) and torch.equal(b.document, whole.document)


@settings(max_examples=40)
@given(window=st.integers(1, 9), stop=st.integers(0, 60), texts=st.integers(1, 11))
def test_a_stream_goes_on_from_every_cursor(tokenizer: Any, window: int, stop: int, texts: int) -> None:
    whole = stream(tokenizer, window, texts).samples({})
    cursor: Any = {}
    for _ in range(stop):
        cursor = next(whole)[1]
    rest = stream(tokenizer, window, texts).samples(json.loads(json.dumps(cursor)))
    for _ in range(12):
        (a, a_cursor), (b, b_cursor) = next(whole), next(rest)
        assert a.sample_id == b.sample_id and a.ids.tolist() == b.ids.tolist() and a_cursor == b_cursor
        assert a.document.tolist() == b.document.tolist() and a.mask.tolist() == b.mask.tolist()


def test_windows_shuffle_within_themselves(tokenizer: Any) -> None:
    samples = stream(tokenizer, 4).samples({})
    order = [next(samples)[0].sample_id for _ in range(24)]
    assert order != sorted(order)
    for i in range(0, 24, 4):
        assert sorted(order[i : i + 4]) == list(range(i, i + 4))


def test_an_empty_stream_says_so(tokenizer: Any) -> None:
    with pytest.raises(InvalidValue, match="no training text"):
        next(stream(tokenizer, texts=0).samples({}))


# --- the data module ---


def test_module_prepares_once_and_finds_it_again(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(rows, tmp_path)
    assert data.vocab_size == 300 and data.tokenizer_dir.is_dir()
    assert oct(data.directory.stat().st_mode)[-3:] == "700"
    monkeypatch.setattr("draftsmith.data.text.load_corpus", lambda _: pytest.fail("prepared twice"))
    again = ready(rows, tmp_path, batch_size=2, length=8)  # neither changes what is kept
    assert again.directory == data.directory
    assert again.data_fingerprint() == data.data_fingerprint() and len(data.data_fingerprint()) == 64
    assert module(rows, tmp_path, add_bos=True).directory != data.directory
    assert "training tokens" in data.summary()
    assert [p.name for p in tmp_path.iterdir()] == [data.directory.name]  # no temporary remains


def test_loaders_cover_the_text(rows: Path, tmp_path: Path) -> None:
    data = ready(rows, tmp_path)
    loader = data.train_dataloader()
    assert isinstance(loader, StatefulLoader)
    batches = list(loader)
    assert all(b.ids.shape == (4, 16) for b in batches) and len(batches) == len(loader)
    first = [b.sample_id.tolist() for b in batches]
    assert first != [b.sample_id.tolist() for b in loader]  # another epoch, another order
    assert first == [b.sample_id.tolist() for b in ready(rows, tmp_path).train_dataloader()]
    validation = data.val_dataloader()
    assert isinstance(validation, StatefulLoader)
    val = list(validation)
    text = "".join(
        decode(data.tokenizer, row[document != PADDING].tolist())
        for b in val
        for row, document in zip(b.ids, b.document, strict=True)
    )
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    pieces = text.split("<|eos|>")
    assert pieces.pop() == ""
    assert pieces == [r["text"] for r in kept if r["text"] in pieces]
    packages = {r["package"] for r in kept if r["text"] in pieces}
    assert packages and not [r for r in kept if r["package"] in packages and r["text"] not in pieces]
    assert all(b.loss_mask[b.sample_id == PADDING].sum() == 0 for b in val)


def test_prompts_are_real_beginnings_and_the_tags_take_turns(rows: Path, tmp_path: Path) -> None:
    data = ready(rows, tmp_path)
    prompts = data.prompts(12, length=8)
    assert [p.tag for p in prompts] == ["even", "odd"] * 6
    assert [p.row_id for p in prompts] == list(range(12))
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    for p in prompts:
        assert len(p.prompt) == 8 and any(decode(data.tokenizer, p.prompt) in t for t in texts)
    assert len({tuple(p.prompt) for p in prompts}) == 12
    assert {p.tag for p in data.prompts(5, length=8, tag="odd")} == {"odd"}
    with pytest.raises(InvalidValue, match=r"no validation text with tag 'none': there is \['even', 'odd'\]"):
        data.prompts(1, tag="none")
    with pytest.raises(InvalidValue, match=r"validation text has only \d+ prompts of 8 tokens, 10000 were asked for"):
        data.prompts(10_000, length=8)


def test_conversations_learn_the_answers_only(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"q": f"What is {i}+{i}?", "a": f"It is {2 * i}."}) + "\n" for i in range(40)))
    corpus = CorpusConfig((str(path),), prompt_field="q", answer_field="a", val_fraction=0.2, dedup=None)
    for answers_only in (True, False):
        data = TextDataModule(
            corpus, TextConfig("bpe:300", length=64, batch_size=1, cache_dir=str(tmp_path), answers_only=answers_only)
        )
        data.prepare_data()
        data.setup()
        b = next(iter(data.train_dataloader()))
        learned = decode(data.tokenizer, b.ids[b.loss_mask.bool()].tolist())
        assert ("What" in learned) != answers_only and ".<|end|>" in learned
    # where every token is a label a conversation is text like any other, and its prompt is cut by length
    assert decode(data.tokenizer, data.prompts(1, length=6)[0].prompt).startswith("<|user|>What")


def test_prompts_of_conversations_end_before_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"q": f"Question {i}?", "a": f"Answer {i}."}) + "\n" for i in range(20)))
    corpus = CorpusConfig((str(path),), prompt_field="q", answer_field="a", val_fraction=0.3, dedup=None)
    data = TextDataModule(corpus, TextConfig("bpe:300", length=32, batch_size=1, cache_dir=str(tmp_path)))
    data.prepare_data()
    data.setup()
    for p in data.prompts(3):
        text = decode(data.tokenizer, p.prompt)
        assert text.startswith("<|user|>Question") and text.endswith("?<|end|><|assistant|>")


def test_streaming_module(rows: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    data = ready(rows, tmp_path, streaming=True, tokenizer=str(tokenizer_dir), batches_per_epoch=3, shuffle_window=4)
    loader = data.train_dataloader()
    assert isinstance(loader, StatefulStreamLoader) and len(loader) == 3
    whole = [b.ids.tolist() for _ in range(3) for b in loader]
    workers = module(
        rows,
        tmp_path,
        streaming=True,
        tokenizer=str(tokenizer_dir),
        batches_per_epoch=3,
        shuffle_window=4,
        num_workers=2,
    )
    second = workers.train_dataloader()
    first_four: list[Any] = []
    while len(first_four) < 4:
        for b in second:
            first_four.append(b.ids.tolist())
            if len(first_four) == 4:
                break
    assert first_four == whole[:4]
    third = module(
        rows, tmp_path, streaming=True, tokenizer=str(tokenizer_dir), batches_per_epoch=3, shuffle_window=4
    ).train_dataloader()
    third.load_state_dict(second.state_dict())
    assert [b.ids.tolist() for b in third] == whole[4:6]
    assert data.data_fingerprint().startswith("stream:")
    assert len(data.prompts(2, length=4)) == 2


class Watcher(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: TokenBatch, _: int) -> Tensor:
        self.seen.append(batch.ids.tolist())
        return self.layer(batch.ids.float().mean().view(1, 1)).sum() * 0.0

    def validation_step(self, batch: TokenBatch, _: int) -> None:
        assert batch.ids.dtype == torch.int64

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextDataModule, folder: Path, ckpt: Path | None = None, **save: Any) -> list[list[list[int]]]:
    watcher = Watcher()
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **save)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            accelerator="cpu", max_epochs=3, limit_train_batches=5, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[saving],
        ).fit(watcher, datamodule=data, ckpt_path=ckpt)  # fmt: skip
    return watcher.seen


@pytest.mark.parametrize("streaming", [False, True], ids=["store", "stream"])
@pytest.mark.parametrize(
    "save",
    [{"every_n_train_steps": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}],
    ids=["steps", "epochs"],
)
def test_a_run_resumes_exactly(
    rows: Path, tmp_path: Path, tokenizer_dir: Path, streaming: bool, save: dict[str, Any]
) -> None:
    def data() -> TextDataModule:
        return module(
            rows, tmp_path, streaming=streaming, tokenizer=str(tokenizer_dir), batches_per_epoch=7, shuffle_window=8
        )

    whole = fit(data(), tmp_path / "whole", **save)
    assert len(whole) == 15
    steps = range(1, 15) if "every_n_train_steps" in save else (5, 10)
    for step in steps:
        rest = fit(data(), tmp_path / "rest", tmp_path / "whole" / f"step={step}.ckpt", **save)
        assert rest == whole[step:], f"resumed after step {step}"


TWO_RANKS = """
import json, sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.text import TextConfig, TextDataModule

rows, cache, tokenizer, streaming, folder, ckpt = sys.argv[1:]
streaming = bool(int(streaming))

class Watcher(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, _):
        self.seen.append(batch.sample_id.tolist())
        return self.layer(batch.ids.float().mean().view(1, 1)).sum() * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        with open(f"{folder}/rank{self.global_rank}.json", "w") as file:
            json.dump(self.seen, file)

data = TextDataModule(
    CorpusConfig((rows,), group_field="package", val_fraction=0.2, dedup=None),
    TextConfig(tokenizer, length=16, batch_size=3, cache_dir=cache, streaming=streaming, batches_per_epoch=6,
               shuffle_window=8, num_workers=1))
warnings.simplefilter("ignore")
pl.Trainer(
    accelerator="cpu", strategy="ddp", devices=2, max_epochs=2, limit_train_batches=6, limit_val_batches=0,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)],
).fit(Watcher(), datamodule=data, ckpt_path=ckpt or None)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["store", "stream"])
def test_two_real_ranks_share_the_data_and_resume(
    rows: Path, tmp_path: Path, tokenizer_dir: Path, streaming: bool
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)

    def run(name: str, ckpt: str) -> list[list[list[int]]]:
        folder = tmp_path / name
        folder.mkdir()
        command = [script, rows, tmp_path / "cache", tokenizer_dir, int(streaming), folder, ckpt]
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, timeout=300)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    whole = run("whole", "")
    assert [len(rank) for rank in whole] == [12, 12]
    for epoch in range(2):
        seen = [i for rank in whole for b in rank[epoch * 6 : epoch * 6 + 6] for i in b]
        assert len(set(seen)) == len(seen) == 36  # two ranks, six batches of three, no sample twice
    step = 8  # in the middle of the second epoch
    assert run("rest", str(tmp_path / "whole" / f"step={step}.ckpt")) == [rank[step:] for rank in whole]


def test_a_second_fit_starts_anew(rows: Path, tmp_path: Path) -> None:
    data = module(rows, tmp_path)
    save = {"every_n_epochs": 9}
    assert fit(data, tmp_path / "a", **save) == fit(data, tmp_path / "b", **save)


def test_a_run_without_validation(rows: Path, tmp_path: Path) -> None:
    data = TextDataModule(
        CorpusConfig((str(rows),), val_fraction=0.0), TextConfig("bpe:300", length=16, cache_dir=str(tmp_path))
    )
    assert len(fit(data, tmp_path / "a", every_n_epochs=9)) == 15
    with pytest.raises(InvalidValue, match="only 0 prompts"):
        data.prompts(1)


def test_resume_on_other_text_is_refused(rows: Path, tmp_path: Path) -> None:
    fit(module(rows, tmp_path), tmp_path / "a", every_n_train_steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows.read_text().splitlines()[::-1]))
    with pytest.raises(InvalidState, match=r"fingerprint.*resume with the data"):
        fit(module(other, tmp_path), tmp_path / "b", tmp_path / "a" / "step=3.ckpt")


def test_configuration_from_the_command_line(rows: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    parsed = parser.parse_args(
        [f"--data.corpus.sources=['{rows}']", "--data.corpus.dedup=null", "--data.text.tokenizer=bpe:400"]
    )
    data = parser.instantiate(parsed).data
    assert isinstance(data, TextDataModule) and data.text.bpe_size == 400
    assert data.corpus.sources == (str(rows),) and data.corpus.dedup is None
    with pytest.raises(Exception, match="lenght"):
        parser.parse_args(["--data.text.lenght=3"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"length": 1}, "text.length must be at least 2.*got 1"),
    ({"batch_size": 0}, "text.batch_size must be at least 1, got 0"),
    ({"num_workers": -1}, "text.num_workers must be at least 0"),
    ({"tokenizer": "bpe:many"}, "write bpe:N with a number"),
    ({"tokenizer": "bpe:10"}, "size must be at least 263"),
    ({"streaming": True}, "streaming needs a tokenizer directory"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TextConfig(**change)


def test_bad_modules(rows: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(InvalidValue, match=r"set corpus.dedup to null"):
        TextDataModule(text=TextConfig(str(tokenizer_dir), streaming=True))
    with pytest.raises(InvalidState, match="call prepare_data first"):
        module(rows, tmp_path).setup()
    with pytest.raises(InvalidValue, match="no tokenizer directory"):
        module(rows, tmp_path, tokenizer=str(tmp_path / "nowhere")).prepare_data()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InvalidValue, match=r"cannot write to .*set text.cache_dir"):
        module(rows, blocked / "cache").prepare_data()
    with pytest.raises(InvalidValue, match="do not fill one global batch of 4000"):
        ready(rows, tmp_path, batch_size=4000).train_dataloader()


def test_a_failed_preparation_leaves_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("draftsmith.data.text.write_store", full)
    with pytest.raises(OSError, match="No space left"):
        module(rows, tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert ready(rows, tmp_path).vocab_size == 300
