"""Canvases of text: packed samples and prompts with answers, padded with EOS."""

import json
from pathlib import Path

import numpy as np
import pytest

from draftsmith.data.batches import PADDING
from draftsmith.data.canvases import AnswerCanvases, CanvasConfig, CanvasDataModule
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.text import TextConfig
from draftsmith.data.token_store import EncodedDocument, TokenStore, write_store
from draftsmith.inference.errors import InvalidValue

EOS = 1


def store(folder: Path, *documents: tuple[list[int], list[int]]) -> TokenStore:
    encoded = [EncodedDocument(np.array(ids), np.array(mask, np.uint8), "chat") for ids, mask in documents]
    write_store(folder, encoded, 100)
    return TokenStore(folder)


def test_answers_end_with_eos_and_pad_with_it(tmp_path: Path) -> None:
    known = store(
        tmp_path,
        ([10, 11, 12, 13], [0, 0, 1, 1]),
        ([20, 21, 22, 23, 24, 25], [0, 1, 1, 0, 0, 1]),  # two answers: the first is taken
        ([30] * 9, [0] * 8 + [1]),  # the prompt does not fit
        ([40, 41], [0, 0]),  # no answer
    )
    with pytest.warns(UserWarning, match="2 of 4 documents have no answer"):
        source = AnswerCanvases(known, 8, EOS)
    batch = source.fetch([0, 1, PADDING])
    assert batch.ids.tolist() == [[10, 11, 12, 13, EOS], [20, 21, 22, EOS, EOS], [EOS] * 5]
    assert batch.prompt.tolist() == [2, 1, 0]
    assert batch.least.tolist() == [5, 4, 0]  # a crop never takes the answer's own EOS
    assert batch.length.tolist() == [5, 5, 0]


def test_an_answer_that_does_not_fit_is_cut(tmp_path: Path) -> None:
    batch = AnswerCanvases(store(tmp_path, ([5, 6, 7, 8, 9], [0, 1, 1, 1, 1])), 4, EOS).fetch([0])
    assert batch.ids.tolist() == [[5, 6, 7, 8]] and batch.length.tolist() == batch.least.tolist() == [4]


def test_texts_without_any_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="none of 1 documents has an answer"):
        AnswerCanvases(store(tmp_path, ([5, 6], [1, 1])), 8, EOS)


def module(folder: Path, field: str = "text", **canvas: object) -> CanvasDataModule:
    text = TextConfig("bpe:300", length=24, batch_size=2, cache_dir=str(folder / "cache"))
    corpus = CorpusConfig(sources=[str(folder / "text")], dedup=None, val_fraction=0.3, field=field)
    data = CanvasDataModule(corpus, text, CanvasConfig(**canvas))  # type: ignore[arg-type]  # fields by name
    data.prepare_data()
    data.setup()
    return data


def test_packed_text_is_maskable_throughout(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def add{i}(a, b):\n    return a + b * {i}\n" * 6)
    data = module(tmp_path, shortest=5)
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.shape == (2, 24)
    assert batch.prompt.tolist() == [0, 0] and batch.least.tolist() == [5, 5] and batch.length.tolist() == [24, 24]
    asked = data.canvases(2, prompt=8, answer=16, mask_id=300)
    assert asked[0].tokens[8:] == [300] * 16 and list(asked[0].holes) == list(range(8, 24))


def test_conversations_become_prompts_with_answers(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho ho"}]
    rows = [json.dumps({"messages": [{**t, "content": f"{t['content']} {i}"} for t in turns]}) for i in range(30)]
    (tmp_path / "text" / "chat.jsonl").write_text("\n".join(rows))
    data = module(tmp_path, "messages", answers=True)
    batch = next(iter(data.train_dataloader()))
    eos = data.special_ids["eos_id"]
    row = batch.ids[0].tolist()
    answer = row[int(batch.prompt[0]) :]
    assert "ho ho" in data.tokenizer.decode(answer) and answer[-1] == eos


@pytest.mark.parametrize("name", ["streaming", "separate_documents"])
def test_what_canvases_cannot_be(name: str, tmp_path: Path) -> None:
    text = TextConfig(str(tmp_path), **{name: True})
    with pytest.raises(InvalidValue, match=f"set data.text.{name} to false"):
        CanvasDataModule(CorpusConfig(dedup=None), text)
