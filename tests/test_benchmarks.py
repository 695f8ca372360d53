"""The scripts in benchmarks/: acceptance is what was set, peers meet the same draft, memory is what the draft owns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import losses, memory, profile, sizes
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.metrics import count
from draftsmith.inference.peers import TransformersPeers, quiet
from draftsmith.inference.requests import TokenRequest

TINY = sizes.SIZES["tiny"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with quiet():
        return sizes.write_models(tmp_path_factory.mktemp("sizes"), "tiny")


def prompts(rows: int) -> list[list[int]]:
    return [[(17 * row + 5 * i + row * i) % TINY.vocab for i in range(32)] for row in range(rows)]


def scripts(target: Any, rows: int, new: int, alpha: float) -> sizes.Scripts:
    requests = [TokenRequest(p, max_new_tokens=new, row_id=i) for i, p in enumerate(prompts(rows))]
    return sizes.Scripts(prompts(rows), AutoregressiveDecoder(target).decode(requests).output, alpha, TINY.vocab)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_measured_acceptance_is_the_set_one_and_the_output_is_exact(pair: tuple[Path, Path], alpha: float) -> None:
    target, draft = load_engine(pair[0]), load_engine(pair[1])
    table = scripts(target, 8, 160, alpha)
    requests = [TokenRequest(p, max_new_tokens=160, row_id=i) for i, p in enumerate(prompts(8))]
    result = sizes._constant(target, draft, table, 4).decode(requests)
    assert result.output == AutoregressiveDecoder(target).decode(requests).output
    found = count(result.rounds)
    assert found.accepted_rate == pytest.approx(alpha, abs=0.05)
    assert result.nfe["draft"] > 0  # the network was paid for


def test_transformers_assistant_meets_the_same_corruptions(pair: tuple[Path, Path]) -> None:
    """Same script, same g: as many target calls as ours, and the same tokens."""
    target, draft = load_engine(pair[0]), load_engine(pair[1])
    table = scripts(target, 2, 64, 0.7)
    peers = TransformersPeers(pair[0], pair[1], dtype=torch.float32, g=4)
    peers.draft = sizes.scripted_assistant(pair[1], table)
    calls = []
    peers.target.register_forward_hook(lambda *_: calls.append(1))
    for row, prompt in enumerate(prompts(2)):
        request = [TokenRequest(prompt, max_new_tokens=64, row_id=row)]
        ours = sizes._constant(target, draft, table, 4).decode(request)
        calls.clear()
        with quiet():
            theirs = peers.decode("hf_assisted_constant", [prompt], 64, seed=0)
        assert theirs == ours.output
        assert abs(len(calls) - ours.nfe["target"]) <= 1


def test_sizes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sizes.json"
    line = ["--sizes", "tiny", "--alpha", "0.8", "--batch", "1,2", "--max-new-tokens", "24", "--repetitions", "1"]
    assert sizes.main([*line, "--prompts", "2", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    made = json.loads(out.read_text())["sizes"][0]
    assert made["size"] == "tiny" and made["parameters"]["target"] > made["parameters"]["draft"]
    table = made["tables"][0]
    assert set(table["summary"]["batches"]) == {"1", "2"} and table["forecast"]["batches"]["2"]["costs"]["batch"] == 2
    for block in table["batches"]:
        rows = {row["name"]: row for row in block["rows"]}
        assert {"plain", "speculative", "speculative_auto", "hf_generate"} <= set(rows)
        assert all(row["same_as_plain"]["equal"] == row["same_as_plain"]["of"] for row in rows.values())
    spent = table["milliseconds_per_round"]
    assert spent["plain"]["draft"] == 0.0 and min(spent["speculative"].values()) > 0.0
    assert "speculative, ms per round: target" in shown


@pytest.mark.slow
def test_peak_memory_is_what_the_draft_owns(tmp_path: Path) -> None:
    """Beyond the draft's weights and caches at most 5% of plain decoding's peak (kernels of new shapes)."""
    with quiet():
        target = sizes.write_model(tmp_path / "target", 2048, 256, 4, 512, 4, seed=0)
        draft = sizes.write_model(tmp_path / "draft", 2048, 512, 6, 1408, 8, seed=1)
    found = memory.compare(target, draft, batch=2, prompt=32, new=16, g=4, give_back=True, repetitions=1)
    assert found["draft_weights"] > 60 * memory.MIB
    assert found["extra"] > 0.9 * found["draft_weights"]  # the control: the draft is seen
    assert found["extra_beyond_owned_of_plain"] <= 0.05, found
    assert found["extra_over_owned"] <= 1.25, found


def test_the_profile_counts_the_weights_that_a_call_reads(pair: tuple[Path, Path]) -> None:
    found = profile.profile(*pair, n=(1, 4))
    calls = found["calls"]
    engine = load_engine(pair[0], frozen=False)
    weights = sum(p.numel() for p in engine.net.parameters())  # tied: the head is the embedding
    assert calls["target, 1 tokens"]["weights, MiB"] == calls["target, 4 tokens"]["weights, MiB"]
    assert calls["target, 1 tokens"]["weights, MiB"] * profile.MIB == 4 * weights
    assert calls["draft, 1 tokens"]["calls into torch"] < calls["target, 1 tokens"]["calls into torch"]
    assert sorted(found["kernels"], key=int) == [str(n) for n in range(1, 9)]


def test_an_untied_embedding_is_not_read_by_a_call(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with quiet():
        model.save_pretrained(tmp_path)
    assert profile.read_per_call(tmp_path) == sum(p.numel() for p in model.parameters()) - 50 * 16


def test_the_losses_that_are_timed_are_the_same_loss() -> None:
    found = {row: losses.step(row, losses.make(row, 300, 24, 160, chunk_rows=7)) for row in losses.ROWS}
    for row in ("ce", *losses.TORCH):
        assert found[row] == pytest.approx(found["naive-ce"], rel=1e-5)
    for row in ("emo", "emo-again", "emo-frozen"):
        assert found[row] == pytest.approx(found["naive-emo"], rel=1e-5)
    assert found["emo-128"] == pytest.approx(found["emo"], rel=0.1)
    table = losses.compare(
        300, 24, 160, ("naive-emo", *losses.TORCH, "ce", "emo"), repetitions=2, tell=lambda line: None
    )
    assert set(table["over_torch"]) == {"naive-emo", "ce", "emo"} and set(table["over_naive"]) == {"emo"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in table["raw"].values())


@pytest.mark.slow
def test_peak_memory_of_a_loss_is_that_of_its_buffers() -> None:
    vocab, tokens, width = 20_000, 512, 64
    chunked = losses.memory("ce", vocab, tokens, width, chunk_rows=16)
    naive = losses.memory("naive-ce", vocab, tokens, width)
    assert chunked["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert naive["extra"] > 1.5 * tokens * vocab * 4  # logits and their gradient
    assert chunked["extra"] < 3 * (vocab * width + 16 * vocab) * 4 + 8 * 2**20
