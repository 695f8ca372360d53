"""Code infilling: an any-subset model against left-to-right sampling by an autoregressive model of the same size.

Both are trained here, on the same text of Python's own library with the same tokenizer, for as many tokens; holes are
whole lines of files that neither has seen. Greedy, one hole at a time. The any-subset model sees what stands behind a
hole, the other one does not; both are told the hole's length in tokens (a bias that favours neither). About 10 minutes:
`make acceptance SYSTEM=as-arm-infilling`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from draftsmith.data.corpus import CorpusConfig, load_corpus
from draftsmith.data.orderings import MaskSchedule
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.inference import load, registry
from draftsmith.inference.any_subset_score import score
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.loader import LoadedPart
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig
from draftsmith.inference.requests import TokenRequest
from draftsmith.modules.any_subset_lm import AnySubset
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.optim import OptimConfig
from draftsmith.trainers.export import export_module
from tests.code_holes import Hole, edit_similarity, holes
from tests.figures import record

VOCAB, WIDTH, LAYERS, CANVAS = 2048, 192, 4, 128
STEPS, BATCH = 300, 16
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.05)
CORPUS = CorpusConfig(sources=["stdlib:code"], val_fraction=0.08, dedup=0.8)
KINDS = {"single line": (1, 80, 4, 24), "multi line": (3, 40, 12, 48)}  # lines, holes, least and most tokens
FILES = (
    *("data/orderings.py", "data/text.py", "modules/any_subset_lm.py", "modules/lm.py", "modules/optim.py"),
    *("inference/nets/any_subset*.py", "inference/any_subset_score.py", "inference/decoders/any_subset*.py"),
    *("inference/decoders/autoregressive.py", "tests/code_holes.py", "tests/acceptance/test_as_arm_infilling.py"),
)

pytestmark = pytest.mark.acceptance


@dataclass(frozen=True)
class Models:
    filler: LoadedPart  # any-subset
    writer: LoadedPart  # left to right
    parameters: dict[str, int]
    seconds: dict[str, float]  # of training


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return trained(tmp_path_factory.mktemp("infilling"))


def trained(place: Path) -> Models:
    text = TextConfig(tokenizer=f"bpe:{VOCAB}", length=CANVAS, batch_size=BATCH, cache_dir=str(place / "cache"))
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    arch = {"model_type": "llama", "vocab_size": VOCAB + 1, "intermediate_size": 512, "tie_word_embeddings": True}
    made = {
        "any-subset": AnySubset(
            AnySubsetConfig(VOCAB + 1, WIDTH, LAYERS, 4, 4 * WIDTH, CANVAS, VOCAB, tied=True),
            masking=MaskSchedule(0.05, 0.6, start=0.05, warmup_steps=100),
            optim=OPTIM,
        ),
        "left to right": LM(HFModel(arch=arch | sizes | {"max_position_embeddings": 2 * CANVAS}), optim=OPTIM),
    }
    parts, parameters, seconds = {}, {}, {}
    for name, module in made.items():
        pl.seed_everything(0)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            **quiet,
        )
        begin = time.perf_counter()
        trainer.fit(module, datamodule=TextDataModule(CORPUS, text))
        seconds[name] = time.perf_counter() - begin
        parameters[name] = sum(p.numel() for p in module.parameters())
        export_module(module, place / name)
        parts[name] = load(place / name)
    return Models(parts["any-subset"], parts["left to right"], parameters, seconds)


@cache
def documents() -> Any:
    return load_corpus(CORPUS).val


@dataclass
class Tally:
    """Over the holes of one kind."""

    exact: float = 0.0
    similar: float = 0.0
    calls: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    count: int = 0

    def add(self, hole: Hole, text: str, calls: int, seconds: float) -> None:
        self.exact += text.strip() == hole.text.strip()
        self.similar += edit_similarity(text, hole.text)
        self.calls += calls
        self.tokens += len(hole.middle)
        self.seconds += seconds
        self.count += 1


def canvas_of(hole: Hole, mask: int, row: int) -> CanvasRequest:
    tokens = [*hole.before, *[mask] * len(hole.middle), *hole.behind]
    first = len(hole.before)
    return CanvasRequest(tokens, range(first, first + len(hole.middle)), row_id=row)


def fill(tasks: list[Hole], tokenizer: Any, decode: Callable[[Hole, int], tuple[list[int], int]]) -> Tally:
    tally = Tally()
    decode(tasks[0], 0)  # warm
    for i, hole in enumerate(tasks):
        begin = time.perf_counter()
        ids, calls = decode(hole, i)
        seconds = time.perf_counter() - begin
        tally.add(hole, tokenizer.decode(ids[: len(hole.middle)]), calls, seconds)
    return tally


def nll_left_to_right(writer: LoadedPart, tasks: list[Hole]) -> float:
    """Nats per token of the true middles after what stands before them."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for hole in tasks:
            ids = torch.tensor([[*hole.before, *hole.middle]])
            hidden, _ = writer.part.forward(ids, cache=writer.part.new_cache(1, ids.shape[1]))
            logp = writer.part.head(hidden)[0, len(hole.before) - 1 : -1].float().log_softmax(-1)
            total -= float(logp.gather(1, torch.tensor(hole.middle).unsqueeze(1)).sum())
            count += len(hole.middle)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_table(models: Models, kind: str) -> None:
    lines, count, least, most = KINDS[kind]
    tokenizer = models.filler.tokenizer
    tasks = holes(documents(), tokenizer, lines=lines, count=count, canvas=CANVAS, least=least, most=most)
    assert len(tasks) == count
    net: Any = models.filler.part
    mask = net.config.mask_id
    fillers = {
        "any-subset, one at a time": ("any_subset_sequential", {}),
        "any-subset, ASSD k=5": ("any_subset", {"k": 5}),
        "any-subset, ASSD n-gram k=5": ("any_subset", {"draft": "ngram", "k": 5}),
        "any-subset, one-shot parallel": ("any_subset_parallel", {}),
    }
    found: dict[str, Tally] = {}
    for name, (method, settings) in fillers.items():
        decoder = registry.build_canvas(method, {"target": models.filler}, settings=settings)

        def by_canvas(hole: Hole, row: int, decoder: Any = decoder) -> tuple[list[int], int]:
            result = decoder.decode([canvas_of(hole, mask, row)])
            return result.output[0], sum(result.nfe.values())

        found[name] = fill(tasks, tokenizer, by_canvas)
    plain = registry.build("autoregressive", {"target": models.writer})

    def left_to_right(hole: Hole, row: int) -> tuple[list[int], int]:
        result = plain.decode([TokenRequest(hole.before, len(hole.middle), row_id=row)])
        return result.output[0], sum(result.nfe.values())

    found["left to right"] = fill(tasks, tokenizer, left_to_right)
    truth = [list(hole.middle) for hole in tasks]
    scored = score(net, [canvas_of(hole, mask, i) for i, hole in enumerate(tasks)], truth)
    nll = {
        "any-subset": -sum(s.total for s in scored) / sum(map(len, truth)),
        "left to right": nll_left_to_right(models.writer, tasks),
    }
    figures: dict[str, Any] = {}
    for name, tally in found.items():
        head = f"{kind}: {name}"
        figures[f"{head}: exact match"] = tally.exact / tally.count
        figures[f"{head}: edit similarity"] = tally.similar / tally.count
        figures[f"{head}: calls per token"] = tally.calls / tally.tokens
        figures[f"{head}: seconds per hole"] = tally.seconds / tally.count
    for name, value in nll.items():
        figures[f"{kind}: {name}: nll of the true lines, nats per token"] = value
        figures[f"training: {name}: parameters"] = models.parameters[name]
        figures[f"training: {name}: seconds"] = models.seconds[name]
    figures[f"{kind}: holes, tokens"] = f"{count}, {sum(map(len, truth))}"
    record("as-arm-infilling", figures, seeds=[0], files=FILES)
    # greedy ASSD is the sequential decoder's text, in fewer calls
    assert found["any-subset, ASSD k=5"].similar == pytest.approx(found["any-subset, one at a time"].similar, abs=1e-9)
    assert all(found[name].calls <= found["any-subset, one at a time"].calls for name in fillers)
    assert nll["any-subset"] < nll["left to right"]  # it sees both sides
