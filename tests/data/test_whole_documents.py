"""Rows of whole documents: by hand, as properties, against the store, and attention that stays within a document."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.data.batches import PADDING
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.teacher_states import PackedStates, StatesConfig, TeacherStatesModule
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.token_store import EncodedDocument, TokenStore, write_store
from draftsmith.data.whole_documents import WholeDocuments, fill_rows
from draftsmith.inference.errors import InvalidValue
from tests.tiny import write_lm


def store(folder: Path, sizes: list[int]) -> TokenStore:
    """Documents whose tokens are all different; every second token is a label."""
    folder.mkdir(parents=True, exist_ok=True)
    first, documents = 2, []
    for n in sizes:
        ids = np.arange(first, first + n)
        documents.append(EncodedDocument(ids, (ids % 2).astype(np.uint8), "code"))
        first += n
    write_store(folder, documents, 60000)
    return TokenStore(folder)


def test_rows_by_hand() -> None:
    assert fill_rows(np.array([3, 5, 2, 7, 3]), 8).tolist() == [1, 1, 2, 0, 2]
    assert fill_rows(np.array([4, 4, 4]), 8).tolist() == [0, 0, 1]
    assert fill_rows(np.zeros(0, np.int64), 8).tolist() == []
    with pytest.raises(InvalidValue, match="9 tokens does not fit a row of 8"):
        fill_rows(np.array([9]), 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60), st.integers(16, 24))
def test_no_row_is_overfull_and_no_two_would_fit_into_one(sizes: list[int], length: int) -> None:
    rows = fill_rows(np.array(sizes, np.int64), length)
    filled = np.bincount(rows, weights=sizes) if sizes else np.zeros(0)
    assert (filled <= length).all() and (filled > 0).all()
    small = np.sort(filled)[:2]
    assert len(small) < 2 or small.sum() > length


def test_every_token_is_there_once_and_documents_are_whole(tmp_path: Path) -> None:
    sizes = [5, 0, 3, 20, 8, 1, 2, 7, 17]
    whole = WholeDocuments(store(tmp_path, sizes), 8, separate=True, pad_id=0)
    batch = whole.fetch([*range(len(whole)), PADDING])
    real = batch.document != PADDING
    assert sorted(batch.ids[real].tolist()) == list(range(2, 2 + sum(sizes)))
    assert not real[-1].any() and batch.separate and whole.divided == 2
    assert whole.fill == sum(sizes) / (8 * len(whole))
    first = 2
    for n in sizes:
        if 0 < n <= 8:
            row, place = (batch.ids == first).nonzero()[0].tolist()
            assert batch.ids[row, place : place + n].tolist() == list(range(first, first + n))
            assert len(batch.document[row, place : place + n].unique()) == 1
            assert int(batch.loss_mask[row, place]) == 0  # nothing before it predicts it
            assert batch.positions()[row, place : place + n].tolist() == list(range(n))
        first += n


def test_a_token_sees_its_own_document_alone(tmp_path: Path) -> None:
    whole = WholeDocuments(store(tmp_path, [3, 4, 20, 2]), 9, separate=True, pad_id=0)
    batch = whole.fetch(range(len(whole)))
    seen = batch.visible()[:, 0]
    same = batch.document.unsqueeze(2) == batch.document.unsqueeze(1)
    real = (batch.document != PADDING).unsqueeze(2)
    assert torch.equal(seen & real, same & real & torch.ones(9, 9, dtype=torch.bool).tril())


def test_documents_must_be_kept_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="separate_documents"):
        WholeDocuments(store(tmp_path, [3]), 8, separate=False, pad_id=0)
    for wrong in ({"packing": "half"}, {"packing": "whole"}, {"packing": "whole", "streaming": True}):
        with pytest.raises(InvalidValue, match="packing"):
            TextConfig(tokenizer="somewhere", **wrong)  # type: ignore[arg-type]


@pytest.fixture
def settings_of(tmp_path: Path) -> tuple[CorpusConfig, dict[str, Any]]:
    write_lm(tmp_path / "target", seed=1, layers=6, max_length=64)
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def add{i}(a, b):\n    return a + b * {i}\n" * (i % 3 + 1))
    corpus = CorpusConfig(sources=(str(tmp_path / "text"),), dedup=None, val_fraction=0.3)
    text = {"tokenizer": str(tmp_path / "target"), "length": 60, "batch_size": 2, "separate_documents": True}
    return corpus, {**text, "cache_dir": str(tmp_path / "cache")}


def test_the_data_module_packs_as_it_is_told(settings_of: tuple[CorpusConfig, dict[str, Any]]) -> None:
    corpus, text = settings_of
    found = {}
    for packing in ("cut", "whole"):
        data = TextDataModule(corpus, TextConfig(**text, packing=packing))
        data.prepare_data()
        data.setup()
        found[packing] = data
    assert found["cut"].directory == found["whole"].directory  # the same tokens, packed otherwise
    packed = found["whole"]._packed("train")
    assert isinstance(packed, WholeDocuments) and 0.5 < packed.fill <= 1.0
    assert f"{packed.fill:.1%} full" in found["whole"].summary() and "full" not in found["cut"].summary()
    loader = found["whole"].train_dataloader()
    assert sum(len(batch.ids) for batch in loader) == len(packed) // 2 * 2
    assert packed.fingerprint != found["cut"]._packed("train").fingerprint


def test_states_of_whole_documents_are_cached_apart(
    settings_of: tuple[CorpusConfig, dict[str, Any]], tmp_path: Path
) -> None:
    corpus, text = settings_of
    states = StatesConfig(target=str(tmp_path / "target"))
    cut, whole = (TeacherStatesModule(corpus, TextConfig(**text, packing=p), states) for p in ("cut", "whole"))
    assert cut.states_key() != whole.states_key()
    whole.prepare_data()  # compares samples with plain passes
    whole.setup()
    packed = whole._packed("train")
    assert isinstance(packed, PackedStates)
    plain = TextDataModule._packed(whole, "train")
    assert len(packed) == len(plain) and torch.equal(packed.fetch([0, 1]).ids, plain.fetch([0, 1]).ids)
