"""Training any-subset models: acceptance B of specs/as-arm.md, two ZeRO ranks against one process, and exact resume.

A Markov chain whose conditionals are known exactly (tests/markov_chain.py): what the network learned against them, and
what its decoders draw. About five minutes: `make acceptance SYSTEM=as-arm-training` (ARGS="-k chain" for acceptance B).
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.data.batches import TokenBatch
from draftsmith.data.orderings import MaskSchedule
from draftsmith.inference.any_subset_score import score
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.decoders.any_subset import AnySubsetDecoder, AnySubsetSettings, SequentialCanvasDecoder
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM
from draftsmith.inference.requests import DecodeResult
from draftsmith.inference.sampling import SamplingParams
from draftsmith.modules.any_subset_lm import AnySubset
from draftsmith.modules.optim import OptimConfig
from tests import kills
from tests.acceptance.test_scale import worst
from tests.figures import record
from tests.markov_chain import N, V, batch_of, bigram_log_likelihood, exact_nll, sample
from tests.tiny import write_tokenizer
from tests.tiny_run import make_place
from tests.zero_runs import curve, fit, ranks_of, samples, watch, zero

STEPS, BATCH, ROWS = 500, 64, 4000
SEEN = N // 4  # 25% visible
FILES = (
    *("data/orderings.py", "modules/any_subset_lm.py", "modules/optim.py", "modules/losses/*.py"),
    *("inference/nets/any_subset*.py", "inference/orders.py", "inference/any_subset_score.py"),
    *("inference/decoders/any_subset*.py", "tests/markov_chain.py", "tests/acceptance/test_as_arm_training.py"),
)
TRAINING = (
    *("data/orderings.py", "data/stateful_loader.py", "data/text.py", "modules/any_subset_lm.py", "modules/optim.py"),
    *("inference/nets/any_subset*.py", "trainers/strategies.py", "trainers/callbacks/checkpoint.py"),
)

pytestmark = pytest.mark.acceptance


# --- acceptance B


@dataclass(frozen=True)
class Trained:
    net: AnySubsetLM
    tokens: Tensor  # int64 [ROWS, N], fresh chains
    visible: Tensor  # bool [ROWS, N], SEEN of each


@cache
def trained() -> Trained:
    """d=64, 3 layers, 4 heads; rates 0.15 -> [0.60, 0.95]; 500 steps x 64, AdamW 3e-3, cosine."""
    pl.seed_everything(0)
    generator = torch.Generator().manual_seed(0)
    batches = [batch_of(sample(BATCH, generator), BATCH * step) for step in range(STEPS)]
    module = AnySubset(
        AnySubsetConfig(V + 1, 64, 3, 4, 256, N, V),
        masking=MaskSchedule(0.60, 0.95, start=0.15, warmup_steps=250),
        embedding_std=0.5,
        optim=OptimConfig(lr=3e-3, weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.0),
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", gradient_clip_val=1.0, enable_model_summary=False, **quiet)
    loader: DataLoader[TokenBatch] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list will do
    trainer.fit(module, loader)
    assert module.net is not None
    visible = torch.rand(ROWS, N, generator=generator).argsort(1).argsort(1) < SEEN
    return Trained(module.net.eval().requires_grad_(False), sample(ROWS, generator), visible)


def requests() -> list[CanvasRequest]:
    t = trained()
    canvases = torch.where(t.visible, t.tokens, V).tolist()
    return [CanvasRequest.from_mask(row, V, row_id=i) for i, row in enumerate(canvases)]


@cache
def drawn(name: str, k: int = 5) -> DecodeResult:
    sampling = SamplingParams(temperature=1.0)
    if name == "assd":
        return AnySubsetDecoder(trained().net, sampling=sampling, settings=AnySubsetSettings(k=k)).decode(requests())
    decoder = SequentialCanvasDecoder(trained().net, sampling=sampling, parallel=name == "parallel", seed=1)
    return decoder.decode(requests())


def filled(result: DecodeResult) -> Tensor:
    """int64 [ROWS, N]."""
    rows = zip(requests(), result.output, strict=True)
    return torch.tensor([request.filled(tokens) for request, tokens in rows])


def test_chain_conditionals_are_learned() -> None:
    t = trained()
    truth = [row[~seen].tolist() for row, seen in zip(t.tokens, t.visible, strict=True)]
    found = -sum(s.mean for s in score(t.net, requests(), truth)) / ROWS
    exact = float(exact_nll(t.tokens, t.visible).mean())
    figures = {
        "chain: nll at 25% visible, nats per token": {"value": found, "need": f"<= {exact + 0.1:.3f}"},
        "chain: exact value (forward algorithm)": exact,
    }
    record("as-arm-training", figures, seeds=[0], files=FILES)
    assert found <= exact + 0.10


@pytest.mark.parametrize("k", [3, 5, 8])
def test_chain_calls_per_token(k: int) -> None:
    result = drawn("assd", k)
    calls = torch.tensor(result.notes["nfe_per_row"], dtype=torch.float64) / (N - SEEN)
    tested = [(a, n) for a, n in zip(result.rounds.accepted, result.rounds.drafted, strict=True) if n > 0]
    first = sum(a >= 1 for a, _ in tested) / len(tested)
    need = {"need": "<= 0.70"} if k == 5 else {}
    figures = {
        f"chain: ASSD, k={k}: calls per token, mean": {"value": float(calls.mean()), **need},
        f"chain: ASSD, k={k}: calls per token, worst row": {"value": float(calls.max()), "need": "<= 1"},
        f"chain: ASSD, k={k}: share of first drafts accepted": {"value": first, "need": ">= 1"},
    }
    record("as-arm-training", figures, seeds=[0], files=FILES)
    assert first == 1.0 and float(calls.max()) <= 1.0
    if k == 5:
        assert float(calls.mean()) <= 0.70


def test_chain_samples() -> None:
    likelihood = {name: bigram_log_likelihood(filled(drawn(name))) for name in ("assd", "sequential", "parallel")}
    apart, lower = abs(likelihood["assd"] - likelihood["sequential"]), likelihood["sequential"] - likelihood["parallel"]
    figures: dict[str, Any] = {f"chain: bigram log-likelihood, {name}": value for name, value in likelihood.items()}
    figures["chain: bigram log-likelihood of the chain's own samples"] = bigram_log_likelihood(trained().tokens)
    figures["chain: |ASSD - sequential|"] = {"value": apart, "need": "<= 0.03"}
    figures["chain: sequential - one-shot parallel"] = {"value": lower, "need": ">= 0.5"}
    record("as-arm-training", figures, seeds=[0, 1], files=FILES)
    assert apart <= 0.03 and lower >= 0.5


# --- two ranks, and resume


def small(place: Path, dropout: float, **trainer: Any) -> None:
    """tiny.yaml of `place` with a one-layer any-subset model instead of its language model."""
    config = yaml.safe_load((place / "tiny.yaml").read_text())
    net = {"vocab_size": 301, "mask_id": 300, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    net |= {"num_heads": 2, "max_length": 32, "tied": True, "dropout": dropout}
    masking = {"min_rate": 0.3, "max_rate": 0.9, "start": 0.1, "warmup_steps": 10}
    init = {"net": net, "masking": masking, "optim": {"lr": 0.01, "warmup_steps": 3}}
    config["model"] = {"class_path": "draftsmith.modules.any_subset_lm.AnySubset", "init_args": init}
    config["trainer"] |= trainer
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_learn_as_one_process_does(tmp_path: Path, stage: int) -> None:
    steps, batch = 30, 4
    place = make_place(tmp_path, steps)
    small(place, dropout=0.0, gradient_clip_val=1.0)
    fit(place, "one", *watch(place, "one"), *ranks_of(1, batch))
    fit(place, "two", *zero(place, stage, 2, batch), *watch(place, "two"))
    assert samples(place, "one") == samples(place, "two")
    difference = worst(curve(place, "one"), curve(place, "two"))
    name = f"zero{stage}, 2 ranks: largest relative difference of the loss over {steps} steps"
    record("as-arm-training", {name: {"value": difference, "need": "<= 1e-4"}}, seeds=[3], files=TRAINING)
    assert difference <= 1e-4


RUNS: dict[str, Sequence[str]] = {
    "single": (),
    "zero2, 2 ranks": ("--trainer.devices", "2", "--data.text.batch_size", "2", "--trainer.strategy", "zero2"),
    "a stream, 2 workers": (
        *("--data.text.streaming", "true", "--data.text.tokenizer", "tokenizer", "--data.text.num_workers", "2"),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_as_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    rng, count = random.Random(name), 4
    place = kills.Place(tmp_path / "place", 30)
    small(place.path, dropout=0.2)
    write_tokenizer(place.path / "tokenizer")
    run = name.replace(", ", "-").replace(" ", "-")
    hits = place.survive(run, RUNS[name], kills.plan_kills(count, rng), rng)
    place.uninterrupted(f"{run}-whole", RUNS[name])
    place.check_equal(run, f"{run}-whole")
    phases = Counter(hit.phase for hit in hits)
    figures = {
        f"{name}: kills survived, weights and sample ids equal to the bit": {"value": len(hits), "need": f">= {count}"},
        f"{name}: of them inside a save": phases[kills.SAVE],
    }
    record("as-arm-training", figures, seeds=[0], files=TRAINING)
