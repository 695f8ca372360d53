"""The two masked diffusion models that rules of parallel decoding are judged on, with a Learn2PD filter for each.

Run from the repository's root; what is there is kept, what is missing is trained (segments: about two minutes of one
core; code: about ten, half of them for the autoregressive model that it starts from, and a few for traces and filter):

    python -m benchmarks.masked_models segments
    python -m benchmarks.masked_models code

A model lies in runs/masked-NAME (a run folder of `draftsmith fit`), its exports in runs/masked-NAME/exports/base and
exports/filter. Filters learn from prompts of the training text; tuning and judging are left the validation text.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.data import segments
from draftsmith.data.canvases import CanvasDataModule
from draftsmith.data.stateful_loader import permutation
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.errors import InvalidState
from draftsmith.inference.loader import load
from draftsmith.inference.nets.commit_filter import CommitFilter
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.trainers import shipped
from draftsmith.trainers.training import build_data

ROOT = Path(__file__).resolve().parents[1]
CODE_PROMPT, CODE_ANSWER = 32, 128
CODE_TRACED = 32  # holes of a traced prompt: one block, so that hundreds of prompts are traced in minutes
TRACED = {"segments": 3000, "code": 384}  # prompts
LIMIT = 3600.0  # seconds of one command


@dataclass(frozen=True)
class Models:
    """Where everything of one name lies."""

    name: str  # "segments" or "code"
    run: Path

    @property
    def base(self) -> Path:
        return self.run / "exports" / "base"

    @property
    def traces(self) -> Path:
        return self.run / "traces"

    @property
    def filter(self) -> Path:
        return self.run / "exports" / "filter"

    @property
    def block_length(self) -> int:
        return 8 if self.name == "segments" else 32

    def net(self) -> MaskedLM:
        """The base, ready to decode."""
        part = load(self.base).part
        assert isinstance(part, MaskedLM)
        return part

    def commit_filter(self) -> CommitFilter:
        part = load(self.filter).part
        assert isinstance(part, CommitFilter)
        return part

    def requests(self, count: int, part: str) -> list[CanvasRequest]:
        """Prompts with empty canvases: "val" to tune on, "test" to judge on; never seen by base or filter.

        Raises InvalidState for another part.
        """
        if part not in ("val", "test"):
            raise InvalidState(f"requests are of part val or test, got {part!r}")
        if self.name == "segments":
            return segments.requests(count, part=part)
        data = code_data()
        # prompts come in one fixed order: the even ones are for tuning, the odd ones for judging
        both = data.canvases(2 * count, prompt=CODE_PROMPT, answer=CODE_ANSWER, mask_id=data.vocab_size)
        return both[part == "test" :: 2]


def code_data() -> CanvasDataModule:
    """The text of the code model, tokenised."""
    data = build_data(shipped.resolve("masked_lm/code"))
    assert isinstance(data, CanvasDataModule)
    data.prepare_data()
    data.setup()
    return data


def make(name: str, place: Path = ROOT / "runs", *, filters: bool = True) -> Models:
    """Train and export what is missing of "segments" or "code". Raises InvalidState unless `place` is named runs."""
    if place.name != "runs":
        raise InvalidState(f"run folders lie below a folder named runs, got {place}")
    models = Models(name, place / f"masked-{name}")
    if not models.base.is_dir():
        command(place, "fit", "-c", f"masked_lm/{name}", "--run", models.run.name, *_start(models))
        command(place, "export", str(models.run), str(models.base))
    if filters and not models.filter.is_dir():
        make_traces(models)
        make_filter(models)
    return models


def _start(models: Models) -> list[str]:
    """Of the code model: the autoregressive one that it starts from, trained if it is missing."""
    if models.name != "code":
        return []
    run = models.run.parent / "masked-code-ar"
    export = run / "exports" / "lm"
    if not export.is_dir():
        command(run.parent, "fit", "-c", "lm/code", "--run", run.name)
        command(run.parent, "export", str(run), str(export))
    return [f"--model.init_from={export}"]


def make_traces(models: Models) -> float:
    """Trace the base's oracle on fresh prompts; seconds that it took. Goes on where an earlier call stopped."""
    begin = time.perf_counter()
    words = ["--block-length", str(models.block_length)]
    if models.name == "segments":
        words += ["--segments", str(TRACED["segments"]), "--batch", "200"]
    else:
        prompts = models.run / "trace-prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in training_prompts()), "utf-8")
        words += ["--prompts", str(prompts), "--answer-length", str(CODE_TRACED), "--batch", "32"]
    command(models.run.parent, "trace", "learn2pd", str(models.base), str(models.traces), *words)
    return time.perf_counter() - begin


def training_prompts() -> list[list[int]]:
    """Beginnings of training samples of the code model, spread over all of them."""
    source = code_data().source("train")
    order = permutation(len(source), 1, 0)[: TRACED["code"]]
    ids = source.fetch([int(i) for i in order]).ids  # type: ignore[attr-defined]  # a CanvasBatch
    return [row[:CODE_PROMPT] for row in ids.tolist()]


def make_filter(models: Models, *overrides: str, run: str = "filter", out: Path | None = None) -> float:
    """Train a filter on the traces and export it; seconds of the training alone, reading the traces included."""
    folder = models.run.parent / f"{models.run.name}-{run}"
    begin = time.perf_counter()
    words = ["-c", f"learn2pd/{models.name}", "--run", folder.name, f"--data.traces.path={models.traces}", *overrides]
    command(models.run.parent, "fit", *words)
    seconds = time.perf_counter() - begin
    command(models.run.parent, "export", str(folder), str(out or models.filter), "--overwrite")
    return seconds


def command(place: Path, *arguments: str) -> str:
    """`draftsmith ARGUMENTS` beside `runs`, in a process of its own. Raises InvalidState with its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_JOB_ID"):
        environment.pop(name, None)
    place.mkdir(parents=True, exist_ok=True)
    words: Sequence[str] = [sys.executable, "-m", "draftsmith.inference.cli", *arguments]
    done = subprocess.run(words, cwd=place.parent, env=environment, text=True, capture_output=True, timeout=LIMIT)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise InvalidState(f"draftsmith {arguments[0]} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("segments", "code"))
    parser.add_argument("--place", type=Path, default=ROOT / "runs", help="where run folders are (default: runs)")
    given = parser.parse_args(argv)
    models = make(given.name, given.place)
    print(f"base {models.base}\nfilter {models.filter}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
