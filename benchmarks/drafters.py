"""Every way of drafting on one trained pair: tokens per target call and tokens/s, after a forecast from other prompts.

Run from the repository's root, alone on the machine, after `draftsmith demo` (about twelve minutes the first time):

    python -m benchmarks.drafters --demo runs/demo --place runs/drafters --json drafters.json

The pair is the demo's target and its online-distilled draft. What else drafts is made here, from the same target and
the same text: an EAGLE-3 head, Medusa heads, an n-gram table of the target's own samples, and the acceptance tables of
DySpec and Sequoia. All rows decode the same prompts in one process, interleaved; the forecast of each row comes from
other prompts and is frozen before anything is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.inference import bench, registry
from draftsmith.inference.bench import BenchSettings, Contestant, Decode, Parts, Prompt
from draftsmith.inference.drafters.medusa import MedusaTreeDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.environment import git, machine, versions
from draftsmith.inference.loader import load
from draftsmith.inference.nets.medusa import MedusaConfig, MedusaHeads, load_heads
from draftsmith.inference.peers import PEERS, TransformersPeers
from draftsmith.inference.requests import RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy
from draftsmith.modules.medusa import medusa_loss
from draftsmith.trainers.demo import precision

HEADS = 4  # of Medusa
MEDUSA_STEPS = 300
TEMPERATURES = (0.0, 1.0)
BATCHES = (1, 8)
CHAIN = "speculative"  # the row that trees are measured against


@dataclass(frozen=True)
class Row:
    """One way of drafting."""

    name: str
    label: str
    decoder: str  # of the registry
    settings: dict[str, Any]
    draft: Any = None  # an engine, a drafter or a table


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured; the defaults are what is recorded."""

    eagle_steps: int = 400
    samples: int = 300  # of the target, for the n-gram table
    calibration: int = 48  # requests decoded for the acceptance tables of DySpec and Sequoia
    prompts: int = 16  # half of them make the forecasts
    tokens: int = 48
    repetitions: int = bench.ENOUGH


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.drafters", description=__doc__)
    made.add_argument("--demo", type=Path, default=Path("runs/demo"))
    made.add_argument("--place", type=Path, default=Path("runs/drafters"), help="where what is trained here is kept")
    made.add_argument("--json", type=Path, required=True)
    given = made.parse_args(argv)
    given.json.write_text(json.dumps(run(given.demo, given.place, Effort()), indent=1) + "\n", encoding="utf-8")
    return 0


def run(
    demo: Path, place: Path, effort: Effort, each: Callable[[dict[str, Any]], None] = lambda part: None
) -> dict[str, Any]:
    """Make what is missing in `place`, forecast, measure; the report. each: gets every part as soon as it is there."""
    target, draft = demo / "exports" / "target", demo / "exports" / "draft"
    place.mkdir(parents=True, exist_ok=True)
    prepare(target, draft, place, effort)
    engines = load(target).part, load(draft).part
    every = prompts(target, effort)
    held_out, measured = every[: len(every) // 2], every[len(every) // 2 :]
    report: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "commit": git(Path.cwd(), "rev-parse", "HEAD"),
        "forecast_prompts": len(held_out),
        "measured_prompts": len(measured),
        "runs": [],
    }
    for batch in BATCHES:
        for temperature in TEMPERATURES:
            settings = BenchSettings(
                max_new_tokens=effort.tokens, batches=(batch,), temperature=temperature, repetitions=effort.repetitions
            )
            rows = table(place, *engines, temperature)
            report["runs"].append(measure(target, draft, engines, rows, held_out, measured, settings, batch))
            each(report["runs"][-1])
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, counted and calibrated


def command(*words: str) -> None:
    """A draftsmith command in a process of its own."""
    subprocess.run([sys.executable, "-m", "draftsmith.inference.cli", *words], check=True, stdin=subprocess.DEVNULL)


def corpus() -> CorpusConfig:
    """The demo's text."""
    return CorpusConfig(sources=("stdlib",), val_fraction=0.12)


def prompts(target: Path, effort: Effort) -> list[Prompt]:
    """Validation prompts of both domains that the demo's traffic did not hold."""
    data = TextDataModule(corpus(), TextConfig(tokenizer=str(target), length=128, batch_size=8))
    data.prepare_data()
    data.setup("fit")
    used = 330  # per domain, by the demo
    half = effort.prompts // 2
    found = {tag: data.prompts(used + half, 24, effort.tokens, tag=tag)[used:] for tag in ("code", "prose")}
    return [Prompt(tuple(r.prompt), tag) for i in range(half) for tag, rs in found.items() for r in (rs[i],)]


def prepare(target: Path, draft: Path, place: Path, effort: Effort) -> None:
    """Each part once; what is there is kept."""
    if not (place / "eagle").is_dir():
        words = ["-c", "eagle/base", "--model.teacher.path", str(target), "--data.text.tokenizer", str(target)]
        words += ["--data.corpus.val_fraction", "0.12", "--data.text.length", "128", "--data.text.batch_size", "8"]
        words += ["--trainer.accumulate_grad_batches", "1", "--trainer.max_steps", str(effort.eagle_steps)]
        words += ["--trainer.max_epochs", "-1", "--trainer.check_val_every_n_epoch", "null"]
        words += ["--trainer.val_check_interval", str(effort.eagle_steps), "--trainer.limit_val_batches", "4"]
        words += ["--model.steps", "5", "--model.optim.lr", "2e-3", "--model.optim.warmup_steps", "40"]
        words += ["--model.head.draft_vocab_size", "2048"]
        words += ["--trainer.precision", precision()]
        command("fit", *words, "--run", str(place / "eagle-run"))
        command("export", str(place / "eagle-run"), str(place / "eagle"))
    traffic = place / "traffic.jsonl"  # what the draft learned online; the table's prompts are others
    lines = (target.parent.parent / "requests.jsonl").read_text("utf-8").splitlines()
    traffic.write_text("\n".join(lines[:: len(lines) // effort.calibration]) + "\n", encoding="utf-8")
    if not (place / "table").is_dir():
        words = ["--samples", str(effort.samples), "--sample-length", "64", "--out", str(place / "table")]
        command("ngram", str(target), "stdlib", *words)
    for temperature in TEMPERATURES:
        path = calibration(place, temperature)
        if not path.is_file():
            words = ["--prompts", str(traffic), "--batch", "8", "--temperature", str(temperature), "--out", str(path)]
            command("calibrate", str(target), str(draft), *words)
    if not (place / "medusa.safetensors").is_file():
        save_file(train_medusa(target).state_dict(), place / "medusa.safetensors")


def calibration(place: Path, temperature: float) -> Path:
    return place / f"calibration-{temperature:g}.json"


def medusa_config(engine: Engine) -> MedusaConfig:
    return MedusaConfig(HEADS, 1, engine.spec.hidden_size, engine.spec.vocab_size)


def train_medusa(target: Path) -> MedusaHeads:
    """Medusa-1 on the demo's text: the target is frozen."""
    engine = load(target).part
    data = TextDataModule(corpus(), TextConfig(tokenizer=str(target), length=128, batch_size=8))
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    heads = MedusaHeads(medusa_config(engine))
    weight = load_file(target / "model.safetensors")
    heads.start_from(weight.get("lm_head.weight", weight["model.embed_tokens.weight"]).float())
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.0)
    for step, batch in enumerate(data.train_dataloader()):
        if step == MEDUSA_STEPS:
            break
        with torch.no_grad():
            hidden, _ = engine.forward(batch.ids)
        loss = medusa_loss(heads, hidden.clone(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(place: Path, target: Engine, draft: Engine, temperature: float) -> list[Row]:
    """The rows, in the order of the report."""
    calibrated = {"calibration": str(calibration(place, temperature))}
    eagle = load(place / "eagle").part
    heads = load_heads(medusa_config(target), load_file(place / "medusa.safetensors"))
    medusa = MedusaTreeDrafter(heads, Eagle2Policy(16, 4), target=target)
    few: dict[str, Any] = {"nodes": 16, "depth": 6}
    many: dict[str, Any] = {"nodes": 48, "depth": 8}
    # the same prompts come again and again: what was decoded before must not be remembered
    forgets: dict[str, Any] = {"max_cached_requests": 0, "fallback": "never"}
    return [
        Row("plain", "plain", "autoregressive", {}),
        Row(CHAIN, "chain, g = 5", "speculative", {"draft_length": 5, **bench.CONSTANT}, draft),
        Row("block", "chain, block verification", "speculative",
            {"draft_length": 5, "verification": "block", **bench.CONSTANT}, draft),
        Row("dyspec", "DySpec tree, 16 nodes", "tree", {**few, "policy": "dyspec", **calibrated}, draft),
        Row("dyspec_48", "DySpec tree, 48 nodes", "tree", {**many, "policy": "dyspec", **calibrated}, draft),
        Row("dyspec_threshold", "DySpec tree by threshold, 48 nodes", "tree",
            {**many, "policy": "dyspec_threshold", **calibrated}, draft),
        Row("sequoia", "Sequoia tree, 16 nodes", "tree", {**few, "policy": "sequoia", **calibrated}, draft),
        Row("sequoia_48", "Sequoia tree, 48 nodes", "tree", {**many, "policy": "sequoia", **calibrated}, draft),
        Row("eagle_chain", "EAGLE-3 chain, g = 5", "tree", {"policy": "chain", "nodes": 5, "depth": 5}, eagle),
        Row("eagle2", "EAGLE-3, EAGLE-2 tree of 48", "tree", {**many, "policy": "eagle2"}, eagle),
        Row("eagle_dyspec", "EAGLE-3, DySpec tree of 48, uncalibrated", "tree", {**many, "policy": "dyspec"}, eagle),
        Row("medusa", "Medusa heads", "tree", {"policy": "auto", "nodes": 16, "depth": HEADS}, medusa),
        Row("aded", "ADED", "aded", {"nodes": 16, "adapt": "call"}, load(place / "table").part),
        Row("prompt_lookup", "prompt lookup", "prompt_lookup", {"draft_length": 10, **bench.CONSTANT}),
        Row("suffix", "suffix decoding", "suffix", forgets),
        Row("suffix_hybrid", "suffix beside the draft", "suffix_hybrid", forgets, draft),
    ]  # fmt: skip


def decode_of(row: Row, target: Engine, temperature: float, seed: int) -> Decode:
    parts = {"target": target} | ({} if row.draft is None else {"draft": row.draft})
    decoder = registry.build(
        row.decoder, parts, sampling=SamplingParams(temperature=temperature), settings=row.settings, seed=seed
    )

    def decode(requests: Sequence[TokenRequest], _: int) -> tuple[list[list[int]], RoundStats | None]:
        result = decoder.decode(requests)
        return result.output, result.rounds

    return decode


def measure(
    target: Path,
    draft: Path,
    engines: tuple[Engine, Engine],
    rows: Sequence[Row],
    held_out: Sequence[Prompt],
    measured: Sequence[Prompt],
    settings: BenchSettings,
    batch: int,
) -> dict[str, Any]:
    """One temperature and batch: the forecast of every row, then all rows and transformers' own, interleaved."""
    temperature = settings.temperature
    contestants = [
        Contestant(row.name, row.label, False, decode_of(row, engines[0], temperature, settings.seed)) for row in rows
    ]
    predicted = {c.name: forecast(c.decode, contestants[0].decode, held_out, settings, batch) for c in contestants}
    peers = TransformersPeers(target, draft, dtype=engines[0].dtype, temperature=temperature, g=settings.g)
    contestants += [
        Contestant(name, peers.label(name), True, bench.peer(peers, name))
        for name in PEERS
        if peers.why_not(name, batch) is None
    ]
    block = bench.measure_batch(
        Parts(*engines), measured, settings, batch, contestants, lambda share, what: print(what, file=sys.stderr)
    )
    return {"temperature": temperature, "forecast": predicted, **block}


def forecast(
    decode: Decode, plain: Decode, held_out: Sequence[Prompt], settings: BenchSettings, batch: int, turns: int = 2
) -> dict[str, float]:
    """Tokens per round, and tokens/s over plain decoding's, both on the held-out prompts: the pilot of a row."""
    chunks = [[held_out[(i + j) % len(held_out)] for j in range(batch)] for i in range(0, len(held_out), batch)]
    rates: dict[str, list[float]] = {"row": [], "plain": []}
    committed: list[int] = []
    for turn in range(turns + 1):  # the first one warms up
        tokens = dict.fromkeys(rates, 0)
        spent = dict.fromkeys(rates, 0.0)
        for i, chunk in enumerate(chunks):
            first = 10_000 + (turn * len(chunks) + i) * batch
            requests = [
                TokenRequest(p.ids, settings.max_new_tokens, row_id=first + j, tag=p.tag) for j, p in enumerate(chunk)
            ]
            for name, run_it in (("row", decode), ("plain", plain)):
                begin = time.perf_counter()
                output, stats = run_it(requests, settings.seed)
                spent[name] += time.perf_counter() - begin
                tokens[name] += sum(map(len, output))
                if name == "row" and turn:
                    assert stats is not None
                    committed += stats.committed
        if turn:
            for name in rates:
                rates[name].append(tokens[name] / spent[name])
    speedup = statistics.median(row / plain for row, plain in zip(rates["row"], rates["plain"], strict=True))
    return {"tau": statistics.fmean(committed), "speedup": speedup}


if __name__ == "__main__":
    sys.exit(main())
