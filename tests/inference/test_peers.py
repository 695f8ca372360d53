"""The transformers peers: same greedy tokens as a bare forward loop, batches padded, each setting as it says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference import peers as peers_module
from draftsmith.inference.peers import PEERS, TransformersPeers, quiet, without_refit
from tests import tiny

PROMPTS = [[5, 9, 40, 7], [3, 3, 60, 3, 3, 60, 3], [100, 8]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("peers")
    target = tiny.write_lm(folder / "target", tokenizer=False, seed=0, layers=2)
    draft = tiny.write_lm(folder / "draft", tokenizer=False, seed=0, layers=1)
    return target, draft


def make(pair: tuple[Path, Path], **settings: Any) -> TransformersPeers:
    return TransformersPeers(pair[0], pair[1], dtype=torch.float32, g=3, **settings)


def greedy(model: Any, prompt: list[int], n: int, stop: tuple[int, ...] = ()) -> list[int]:
    """The reference: no cache, one forward per token."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", PEERS)
def test_greedy_equals_a_bare_loop(pair: tuple[Path, Path], name: str) -> None:
    peers = make(pair)
    for prompt in PROMPTS:
        with quiet():
            assert peers.decode(name, [prompt], 24, seed=0) == [greedy(peers.target, prompt, 24)]


def test_batch_is_padded_on_the_left_with_a_mask(pair: tuple[Path, Path]) -> None:
    peers = make(pair)
    with quiet():
        together = peers.decode("hf_generate", PROMPTS, 16, seed=0)
    assert together == [greedy(peers.target, prompt, 16) for prompt in PROMPTS]


def test_stop_ids_cut_each_row(pair: tuple[Path, Path]) -> None:
    peers = make(pair)
    free = greedy(peers.target, PROMPTS[0], 16)
    stop = (free[5],)
    stopping = make(pair, stop_ids=stop)
    with quiet():
        rows = stopping.decode("hf_generate", PROMPTS, 16, seed=0)
        single = stopping.decode("hf_assisted_constant", PROMPTS[:1], 16, seed=0)
    assert rows == [greedy(peers.target, prompt, 16, stop) for prompt in PROMPTS]
    assert single == rows[:1] and len(rows[0]) == free.index(free[5]) + 1


def test_sampling_is_seeded_and_takes_the_whole_law(pair: tuple[Path, Path]) -> None:
    """transformers' default top_k of 50 would make the comparison unfair: rarer tokens must appear."""
    peers = make(pair, temperature=50.0)
    with quiet():
        first = peers.decode("hf_generate", [PROMPTS[0]], 200, seed=1)
        again = peers.decode("hf_generate", [PROMPTS[0]], 200, seed=1)
        other = peers.decode("hf_generate", [PROMPTS[0]], 200, seed=2)
    assert first == again != other
    assert len(set(first[0])) > 50


def test_the_refit_runs_at_the_defaults_and_not_in_the_constant_setting(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    from transformers.generation import candidate_generator

    original = candidate_generator.is_sklearn_available
    fits, lengths = [], []
    roc_curve = sklearn_metrics.roc_curve
    monkeypatch.setattr(sklearn_metrics, "roc_curve", lambda *a: fits.append(1) or roc_curve(*a))
    generate = candidate_generator.AssistedCandidateGenerator.get_candidates

    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        ids, logits = generate(self, input_ids, **kwargs)
        lengths.append(ids.shape[1] - input_ids.shape[1])
        return ids, logits

    monkeypatch.setattr(candidate_generator.AssistedCandidateGenerator, "get_candidates", counted)
    peers = make(pair, temperature=1.0)
    with quiet():
        peers.decode("hf_assisted_constant", PROMPTS[1:2], 40, seed=0)
    assert not fits
    assert set(lengths[:-2]) == {3}  # constant g, no confidence stop; the budget caps the last rounds
    assert candidate_generator.is_sklearn_available is original
    lengths.clear()
    with quiet():
        peers.decode("hf_assisted", PROMPTS[1:2], 60, seed=0)
    assert fits and max(lengths) <= 20 and set(lengths) != {3}


def test_refit_switch_is_restored_after_an_error() -> None:
    from transformers.generation import candidate_generator

    original = candidate_generator.is_sklearn_available
    with pytest.raises(ZeroDivisionError), without_refit():
        assert candidate_generator.is_sklearn_available() is False
        _ = 1 / 0
    assert candidate_generator.is_sklearn_available is original


def test_what_is_not_offered_says_why(pair: tuple[Path, Path], tmp_path: Path) -> None:
    peers = make(pair)
    assert peers.why_not("hf_generate", 8) is None
    assert "not offered at batch 8" in str(peers.why_not("hf_assisted", 8))
    assert peers.why_not("hf_assisted", 1) is None
    alone = TransformersPeers(pair[0], None, dtype=torch.float32)
    assert alone.why_not("hf_assisted", 1) == "needs a draft" and alone.why_not("hf_prompt_lookup", 1) is None
    padded = tiny.write_lm(tmp_path / "padded", tokenizer=False, vocab_size=328)
    assert "heads differ" in str(TransformersPeers(pair[0], padded, dtype=torch.float32).why_not("hf_assisted", 1))
    assert peers.label("hf_assisted_constant") == "transformers assisted, constant g = 3"
    assert peers_module.refit_installed() in (True, False)
