"""`draftsmith plan`: what a job needs before it is asked for: parameters, memory per rank, tokens, disk, hours.

Networks are built on the meta device and one step is traced there (trainers/meta.py), so planning a 70B takes seconds
and no memory. What each rank holds beside the step is in trainers/memory.py.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.inference.errors import InvalidState, InvalidValue

if TYPE_CHECKING:
    from draftsmith.trainers.checks.subject import Subject
    from draftsmith.trainers.cli import Given
    from draftsmith.trainers.memory import Rank

_MEASURED_STEPS = 8
_MEASURE_SECONDS = 1800
_WIDTH = 150  # of the table, which must not wrap
_PAGE = f"""usage: draftsmith plan -c CONFIG [--gpus N] [--nodes N] [--measure | --step-seconds X] [--json] [--KEY V]

What a training job needs: parameters, peak memory per rank for each way to share the state, tokens, disk, hours.
Weights are neither read nor made: a 70B is planned in seconds, on any machine. Figures for
GPUs are computed, not measured.

  -c, --config CONFIG   as for fit: a YAML file or a shipped name; repeat it to lay one over another
  --run ID              instead: the config of that run
  --gpus N              ranks per node, each with a GPU (default: trainer.devices)
  --nodes N             nodes (default: trainer.num_nodes)
  --measure             run {_MEASURED_STEPS} real steps of the config here, for the hours
  --step-seconds X      seconds of an optimizer step, as measured elsewhere
  --json                print one JSON object (bytes, seconds)
  --KEY VALUE           override any key of the config

examples:
  draftsmith plan -c lm/base --gpus 8 --nodes 2
  draftsmith plan -c lm/debug --measure --json"""


@dataclass(frozen=True)
class Options:
    """Our own options of the command line."""

    gpus: int | None = None
    nodes: int | None = None
    measure: bool = False
    step_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """Everything the command prints; bytes, seconds."""

    networks: dict[str, int]  # name -> parameters
    world_size: int
    device: str  # "cpu" or "cuda"
    strategy: str
    stage: int  # of the strategy; 0: no ZeRO
    ranks: list["Rank"]
    tokens_per_step: int
    steps: int | None
    checkpoint_bytes: int
    disk_bytes: int
    step_seconds: float | None
    notes: list[str]

    @property
    def tokens(self) -> int | None:
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def hours(self) -> float | None:
        return None if self.steps is None or self.step_seconds is None else self.steps * self.step_seconds / 3600

    def as_json(self) -> dict[str, Any]:
        return {
            "parameters": self.networks,
            "world_size": self.world_size,
            "device": self.device,
            "strategy": self.strategy,
            "stage": self.stage,
            "memory_per_rank": [
                {"stage": r.stage, "always": r.always, "phases": r.phases, "peak": r.peak, "peak_in": r.phase}
                for r in self.ranks
            ],
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "step_seconds": self.step_seconds,
            "hours": self.hours,
            "notes": self.notes,
        }


def main(argv: list[str]) -> int:
    """`draftsmith plan`. Returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(_PAGE)
        return 0
    from draftsmith.trainers.cli import parse

    words, options = _own(argv)
    given = parse("plan", words)
    from draftsmith.trainers import runs

    if not given.configs:
        if given.run is None:
            raise InvalidValue("nothing to plan: give -c CONFIG (see 'draftsmith plan --help'), or --run ID")
        given.configs.append(runs.existing(given.run) / runs.CONFIG)
    plan = make(given, options)
    if given.json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        _print(plan)
    return 0


def _own(argv: list[str]) -> tuple[list[str], Options]:
    """Our options out of the command line. Raises InvalidValue for a value that is none."""
    words: list[str] = []
    found: dict[str, Any] = {}
    rest = list(argv)
    kinds = {"--gpus": int, "--nodes": int, "--step-seconds": float}
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if word == "--measure":
            found["measure"] = True
        elif name in kinds:
            if not has_value:
                value = rest.pop(0) if rest else ""
            try:
                number = kinds[name](value)
            except ValueError:
                number = 0
            if not number > 0 or number == float("inf"):
                raise InvalidValue(f"{name} wants a number above 0, got {value!r}")
            found[name[2:].replace("-", "_")] = number
        else:
            words.append(word)
    if found.get("measure") and "step_seconds" in found:
        raise InvalidValue("--measure finds the seconds of a step that --step-seconds gives: leave one of them out")
    return words, Options(**found)


def make(given: "Given", options: Options) -> Plan:
    """The plan of the run that `given` describes. Raises as its config's classes do."""
    from draftsmith.trainers import doctor, workload
    from draftsmith.trainers.checks import storage
    from draftsmith.trainers.memory import rank
    from draftsmith.trainers.one_line import one_line
    from draftsmith.trainers.training import ParseCLI, quiet

    quiet()
    with one_line():
        subject = doctor.build(ParseCLI(given), Path("runs/plan"), None, {})
    notes: list[str] = []
    device, world_size = _device(subject, options), _world_size(subject, options)
    load = workload.load(subject, device)
    zero = (subject.deepspeed or {}).get("zero_optimization", {})
    ranks = [rank(load, stage, world_size, _settings(stage, zero)) for stage in range(4)]
    counts = workload.parameters(subject)
    steps, why = workload.steps(subject, world_size)
    if why:
        notes.append(why)
    seconds = options.step_seconds
    if options.measure:
        seconds = _measure(given, subject)
        notes.append(f"a step took {seconds:.3g} s here ({_MEASURED_STEPS} batches of the config as it stands)")
    elif seconds is None:
        notes.append("hours are left out: --measure runs a few steps here, --step-seconds X takes what you measured")
    if device != "cpu":
        notes.append("memory on a GPU is computed, not measured; add about 1 GiB for CUDA, NCCL and its allocator")
    one, best = storage.checkpoint_bytes(subject), storage.best_bytes(subject)
    return Plan(
        networks=counts,
        world_size=world_size,
        device=device,
        strategy=subject.strategy,
        stage=int(zero.get("stage", 0)),
        ranks=ranks,
        tokens_per_step=workload.tokens_per_step(subject, world_size),
        steps=steps,
        checkpoint_bytes=one,
        disk_bytes=(subject.checkpoint.keep + 1) * one + 2 * best,
        step_seconds=seconds,
        notes=notes,
    )


def _settings(stage: int, own: dict[str, Any]) -> dict[str, Any] | None:
    """The `zero_optimization` of a stage: the config's own, else the shipped one."""
    from draftsmith.trainers.strategies import read_config

    if stage == 0:
        return None
    return own if own.get("stage") == stage else dict(read_config(f"deepspeed/zero{stage}")["zero_optimization"])


def _device(subject: "Subject", options: Options) -> str:
    import torch

    asked = subject.trainer.accelerator
    if options.gpus is not None or asked in ("gpu", "cuda"):
        return "cuda"
    return "cuda" if asked == "auto" and torch.cuda.is_available() else "cpu"


def _world_size(subject: "Subject", options: Options) -> int:
    devices = options.gpus or subject.devices
    if devices is None:
        raise InvalidValue(
            f"trainer.devices is {subject.trainer.devices!r}, which only a machine with the GPUs can count: give --gpus"
        )
    return devices * (options.nodes or subject.nodes)


def _measure(given: "Given", subject: "Subject") -> float:
    """Seconds of an optimizer step, from a real `draftsmith fit` of a few batches in a process of its own."""
    words = [word for config in given.configs for word in ("-c", str(config))]
    accumulate = int(subject.trainer.accumulate_grad_batches)
    print(f"measuring {_MEASURED_STEPS} batches", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="draftsmith-plan-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "draftsmith.inference.cli", "fit", *words, *given.rest, f"--run={run}"]
        command += [f"--trainer.max_steps={-(-_MEASURED_STEPS // accumulate)}", "--trainer.limit_val_batches=0"]
        command += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
        command += ["--trainer.enable_progress_bar=false"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MEASURE_SECONDS
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise InvalidState(f"cannot measure: 'draftsmith fit' ended with code {done.returncode}: {said[0]}")
        metrics = json.loads((run / "provenance.json").read_text("utf-8"))["metrics"]
    return accumulate / float(metrics["perf/steps_per_s"])


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from draftsmith.trainers.checks.finding import size

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _WIDTH)  # a table cut to a narrow pipe says nothing
    for name, count in plan.networks.items():
        console.print(f"{name:<22} {count / 1e6:,.1f} M parameters")
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    kinds = ["weights", "masters", "optimizer", "gradients", "activations", "gathered", "buffers", "temporaries"]
    kinds += ["costs", "teacher", "serving"]
    shown = [kind for kind in kinds if any(_part(r, kind) for r in plan.ranks)]
    for column in ("", *shown, "peak", "in the"):
        table.add_column(column, justify="right" if column not in ("", "in the") else "left")
    for r in plan.ranks:
        name = ("no ZeRO" if r.stage == 0 else f"ZeRO-{r.stage}") + (" *" if r.stage == plan.stage else "")
        cells = [size(_part(r, kind)) if _part(r, kind) else "-" for kind in shown]
        table.add_row(name, *cells, size(r.peak), r.phase)
    where = "GPU" if plan.device == "cuda" else "CPU"
    console.print(f"\nmemory of each of {plan.world_size} {where} ranks at its peak (*: this config)")
    console.print(table)
    lines = [("tokens per step", f"{plan.tokens_per_step:,}")]
    if plan.steps is not None:
        lines += [("steps", f"{plan.steps:,}"), ("tokens", f"{plan.tokens:,}")]
    lines += [("a checkpoint", size(plan.checkpoint_bytes)), ("disk in all", size(plan.disk_bytes))]
    if plan.hours is not None:
        lines.append(("hours", f"{plan.hours:.2f}, evaluations and saves not counted"))
    console.print()
    for name, text in lines:
        console.print(f"{name:<22} {text}")
    for note in plan.notes:
        console.print(f"note: {note}")


def _part(rank: "Rank", kind: str) -> int:
    """Bytes of a kind at the peak."""
    return rank.always.get(kind, 0) + rank.phases[rank.phase].get(kind, 0)
