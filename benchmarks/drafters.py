"""Every way of drafting on one trained pair: tokens per target call and tokens/s, after a forecast from other prompts.

Run from the repository's root, alone on the machine, after `draftsmith demo` (about twenty minutes the first time):

    python -m benchmarks.drafters --demo runs/demo --place runs/drafters --json drafters.json

The pair is the demo's target and its online-distilled draft. What else drafts is made here, from the same target and
the same text: an EAGLE-3 head, Medusa heads, an n-gram table of the target's own samples, and the acceptance tables of
DySpec and Sequoia. All rows decode the same prompts in one process, interleaved; the forecast of each row comes from
other prompts and is frozen before anything is timed.

The table is made part by part (`PARTS`), each of them in two steps that are kept in PLACE/parts: what was interrupted
goes on where it stopped, and a forecast is on the disk before its measurement begins.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
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
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"  # beside the repository, or not
ON_GSM8K = ("plain", "speculative", "block", "sequoia", "eagle_chain", "aded", "prompt_lookup", "suffix")
SPARE = 16  # prompts beyond those needed, since some come twice
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
    """How much is trained and measured; the defaults are what is recorded.

    Every repetition decodes prompts of its own. How much a lookup gains differs by half from prompt to prompt, and in a
    batch the slowest row sets the pace: with eight prompts on either side the forecast of such a row was off by 17%,
    with these numbers the prompts leave a standard error of about 5%.
    """

    eagle_steps: int = 400
    samples: int = 300  # of the target, for the n-gram table
    calibration: int = 48  # requests decoded for the acceptance tables of DySpec and Sequoia
    tokens: int = 48
    repetitions: int = bench.ENOUGH
    prompts: tuple[tuple[int, int], ...] = ((1, 8), (8, 16))  # batch -> of one repetition, new ones each time
    pilot: tuple[tuple[int, int], ...] = ((1, 5), (8, 6))  # batch -> repetitions of the forecast

    @property
    def most(self) -> int:
        """Prompts on either side: for the forecasts, and for the measurements."""
        return max(n for _, n in self.prompts) * max(self.repetitions, *(n for _, n in self.pilot))


@dataclass(frozen=True)
class Part:
    """One table: all rows at one temperature and batch, on one kind of prompts."""

    temperature: float
    batch: int
    text: str = "stdlib"  # what the target was trained on; or "GSM8K", which it never saw

    @property
    def label(self) -> str:
        """How figures call it."""
        where = f"{'greedy' if self.temperature == 0 else 'T = 1'}, batch {self.batch}"
        return where if self.text == "stdlib" else f"{self.text}, {where}"

    @property
    def name(self) -> str:
        """As part of a file's name."""
        return f"{self.text}-{self.temperature:g}-{self.batch}"


PARTS = (
    *(Part(temperature, batch) for batch in BATCHES for temperature in TEMPERATURES),
    *(Part(temperature, 1, "GSM8K") for temperature in TEMPERATURES),
)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.drafters", description=__doc__)
    made.add_argument("--demo", type=Path, default=Path("runs/demo"))
    made.add_argument("--place", type=Path, default=Path("runs/drafters"), help="where what is trained here is kept")
    made.add_argument("--json", type=Path, required=True)
    given = made.parse_args(argv)
    commit = git(Path.cwd(), "rev-parse", "HEAD")
    table = Table(given.demo, given.place, Effort(), commit or "no repository")
    report = {
        "versions": versions(),
        "machine": machine(),
        "commit": commit,
        "runs": [table.run(part) for part in table.parts],
    }
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


class Table:
    """The table of one pair; its parts are made when they are asked for, and kept."""

    def __init__(self, demo: Path, place: Path, effort: Effort, stamp: str) -> None:
        """stamp: of the code that is measured; parts that were kept under another one are made anew."""
        self.target, self.draft = demo / "exports" / "target", demo / "exports" / "draft"
        self.place, self.effort, self.stamp = place, effort, stamp
        place.mkdir(parents=True, exist_ok=True)
        prepare(self.target, self.draft, place, effort)

    @property
    def parts(self) -> list[Part]:
        """What can be made here: GSM8K may not be at hand."""
        return [part for part in PARTS if part.text == "stdlib" or GSM8K.is_file()]

    @functools.cached_property
    def engines(self) -> tuple[Engine, Engine]:
        return load(self.target).part, load(self.draft).part

    def run(self, part: Part) -> dict[str, Any]:
        """Forecast, then measure, what is not there yet."""
        predicted = self._kept(f"forecast-{part.name}", lambda: {"forecast": self._forecast(part)})
        return self._kept(f"measured-{part.name}", lambda: self._measure(part) | predicted)

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self.place / "parts" / f"{name}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if found["stamp"] == self.stamp:
                return found
        made = {**make(), "stamp": self.stamp}
        file.parent.mkdir(exist_ok=True)
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
        return made

    def _settings(self, part: Part, repetitions: int) -> BenchSettings:
        return BenchSettings(
            max_new_tokens=self.effort.tokens,
            batches=(part.batch,),
            temperature=part.temperature,
            repetitions=repetitions,
        )

    def contestants(self, part: Part) -> list[Contestant]:
        """Our rows."""
        seed = self._settings(part, 1).seed
        return [
            Contestant(row.name, row.label, False, decode_of(row, self.engines[0], part.temperature, seed))
            for row in rows_of(self.place, *self.engines, part.temperature)
            if part.text == "stdlib" or row.name in ON_GSM8K
        ]

    def prompts(self, part: Part) -> tuple[list[Prompt], list[Prompt]]:
        """(held out for the forecast, measured): neighbours in the text, two of one and two of the other."""
        count = 2 * self.effort.most + SPARE
        every = prompts(self.target, count, self.effort) if part.text == "stdlib" else questions(self.target, count)
        every = list({prompt.ids: prompt for prompt in every}.values())  # files may begin alike
        held_out, measured = ([prompt for i, prompt in enumerate(every) if i // 2 % 2 == side] for side in (0, 1))
        size = dict(self.effort.prompts)[part.batch]
        return held_out[: size * dict(self.effort.pilot)[part.batch]], measured[: size * self.effort.repetitions]

    def _forecast(self, part: Part) -> dict[str, dict[str, float]]:
        settings = self._settings(part, dict(self.effort.pilot)[part.batch])
        return bench.pilot(Parts(*self.engines), self.prompts(part)[0], settings, part.batch, self.contestants(part))

    def _measure(self, part: Part) -> dict[str, Any]:
        settings = self._settings(part, self.effort.repetitions)
        peers = TransformersPeers(
            self.target, self.draft, dtype=self.engines[0].dtype, temperature=part.temperature, g=settings.g
        )
        table = self.contestants(part) + [
            Contestant(name, peers.label(name), True, bench.peer(peers, name))
            for name in PEERS
            if peers.why_not(name, part.batch) is None
        ]
        block = bench.measure_batch(
            Parts(*self.engines),
            self.prompts(part)[1],
            settings,
            part.batch,
            table,
            lambda share, what: print(what, file=sys.stderr),
            fresh=True,
        )
        return {"temperature": part.temperature, "text": part.text, **block}


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, counted and calibrated


def command(*words: str) -> None:
    """A draftsmith command in a process of its own."""
    subprocess.run([sys.executable, "-m", "draftsmith.inference.cli", *words], check=True, stdin=subprocess.DEVNULL)


def corpus() -> CorpusConfig:
    """The demo's text."""
    return CorpusConfig(sources=("stdlib",), val_fraction=0.12)


def prompts(target: Path, count: int, effort: Effort) -> list[Prompt]:
    """Validation prompts of both domains, in turn, that the demo's traffic did not hold."""
    data = TextDataModule(corpus(), TextConfig(tokenizer=str(target), length=128, batch_size=8))
    data.prepare_data()
    data.setup("fit")
    used = 330  # per domain, by the demo
    half = count // 2
    found = {tag: data.prompts(used + half, 24, effort.tokens, tag=tag)[used:] for tag in ("code", "prose")}
    return [Prompt(tuple(r.prompt), tag) for i in range(half) for tag, rs in found.items() for r in (rs[i],)]


def questions(target: Path, count: int) -> list[Prompt]:
    """How the first questions of GSM8K begin."""
    tokenizer = load(target).tokenizer
    with GSM8K.open(encoding="utf-8") as lines:
        ids = (tokenizer(json.loads(line)["question"])["input_ids"] for line in lines)
        return [Prompt(tuple(row[:24]), "math") for row in itertools.islice((r for r in ids if len(r) >= 24), count)]


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


def rows_of(place: Path, target: Engine, draft: Engine, temperature: float) -> list[Row]:
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


if __name__ == "__main__":
    sys.exit(main())
