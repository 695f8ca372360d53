"""`draftsmith demo`: the whole path on a bare CPU: train a target, serve it while a draft learns, export, bench.

Every stage leaves its result under the demo's folder and a mark that names what it was made from; a second run goes on
after the last mark that still holds, a killed stage goes on from its own checkpoint. Training runs are subprocesses of
`draftsmith fit` (contract 7). demo_report.py makes the figures from the raw records.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from draftsmith.data import served_log
from draftsmith.data.served_log import Served
from draftsmith.inference import registry
from draftsmith.inference.checkpoint import read_header, weight_files
from draftsmith.inference.commands._args import parser
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.loader import load
from draftsmith.inference.metrics import count
from draftsmith.inference.prompts import read_prompts
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.trainers import demo_report, runs, shipped

_STEP = re.compile(r"^step (\d+)/(\d+)")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; part of every stage's mark, so that a changed setting is not answered with old results."""

    requests: int = 320  # per domain
    domains: tuple[str, ...] = ("code", "prose")
    prompt_length: int = 24
    max_new_tokens: int = 48
    temperature: float = 1.0  # of serving and of the bench
    g: int = 5  # draft length while serving
    in_flight: int = 16  # requests decoded together, and records per update
    steps: int = 8  # gradient steps per update
    bench_prompts: int = 6
    bench_tokens: int = 64
    bench_repetitions: int = 7
    seed: int = 0
    target_steps: int | None = None  # null: as the shipped configs say
    draft_steps: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage: its work, and about how long it takes on two cores (for the progress bar before it is measured)."""

    name: str
    title: str
    seconds: float
    work: Callable[["Demo"], None]


class Demo:
    """The demo's folder and what its stages share."""

    def __init__(self, folder: Path, settings: DemoSettings, progress: Progress) -> None:
        self.folder = folder
        self.settings = settings
        self.progress = progress
        self.task: TaskID | None = None

    # --- places

    def run(self, name: str) -> Path:
        return self.folder / name

    def export(self, name: str) -> Path:
        return self.folder / "exports" / name

    @property
    def requests_file(self) -> Path:
        return self.folder / "requests.jsonl"

    @property
    def prompts_file(self) -> Path:
        return self.folder / "prompts.jsonl"

    # --- progress

    def advance(self, share: float) -> None:
        """Say how much of the running stage is done, 0 to 1."""
        if self.task is not None:
            self.progress.update(self.task, completed=100 * share)

    # --- what stages do more than once

    def fit(self, name: str, config: str, overrides: dict[str, Any], start: float = 0.0, end: float = 1.0) -> None:
        """Run `draftsmith fit` on runs folder `name` (it resumes by itself) as a subprocess; its log goes to logs/.

        Raises InvalidState naming the log when it fails.
        """
        words = [f"--{key}={value}" for key, value in overrides.items()]
        command = ["fit", "-c", config, "--run", str(self.run(name)), *words]
        self.draftsmith(name, command, start, end)

    def draftsmith(self, name: str, words: Sequence[str], start: float = 0.0, end: float = 1.0) -> None:
        """Run a draftsmith command as a subprocess, its output in logs/<name>.log, its steps on our progress bar."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "draftsmith.inference.cli", *words]
        environment = os.environ | {"NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        with (
            log.open("a", encoding="utf-8") as file,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if found := _STEP.match(line):
                        step, last = int(found[1]), int(found[2])
                        self.advance(start + (end - start) * step / max(last, 1))
                code = process.wait()
            except BaseException:
                process.send_signal(signal.SIGINT)  # it saves a checkpoint
                process.wait(timeout=60)
                raise
        if code != 0:
            raise InvalidState(f"stage {name} failed (exit code {code}): the reason is at the end of {log}")

    def texts(self, tokenizer: str) -> dict[str, Any]:
        """Overrides of a text data module that all training stages share."""
        return {"data.text.tokenizer": tokenizer, "data.text.cache_dir": self.folder / "data"}

    def requests(self) -> list[TokenRequest]:
        """The traffic, in order; row_id keys the randomness of each."""
        s = self.settings
        return [
            TokenRequest(p.ids(None), max_new_tokens=s.max_new_tokens, row_id=i, tag=p.tag)
            for i, p in enumerate(read_prompts(self.requests_file))
        ]

    def last_quarters(self) -> list[int]:
        """Numbers of the requests in the last quarter of each domain."""
        return [n for quarter in demo_report.last_quarters(self.settings).values() for n in quarter]

    def replay(self, name: str, decoder: str, draft: Path | None, numbers: Sequence[int]) -> None:
        """Serve requests again with a fixed draft, in the groups and with the randomness of the online run."""
        s, path = self.settings, demo_report.rounds_file(self.folder, name)
        target = load(self.export("target"))
        parts: dict[str, Any] = {"target": target}
        requests = [replace(r, stop_ids=target.stop_ids) for r in self.requests()]
        if draft is not None:
            parts["draft"] = load(draft)
        made = registry.build(
            decoder,
            parts,
            sampling=SamplingParams(temperature=s.temperature),
            settings={"draft_length": s.g, "fallback": "never"},
            seed=s.seed,
        )
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was killed; redone, since it takes seconds
        for i in range(0, len(numbers), s.in_flight):
            group = numbers[i : i + s.in_flight]
            result = made.decode([requests[n] for n in group])
            lines = []
            for n, output, rounds in zip(group, result.output, result.rounds.by_row(len(group)), strict=True):
                seen = count(rounds)
                alpha = math.nan if seen.alpha is None else seen.alpha
                lines.append(Served(n, requests[n].tag, 0, 0, alpha, seen.examined, len(output), rounds))
            served_log.append(path, lines)
            self.advance((i + len(group)) / len(numbers))


# --- the stages


def make_target(demo: Demo) -> None:
    overrides = {**demo.texts("bpe:4096"), "trainer.precision": precision(), **_steps(demo.settings.target_steps)}
    demo.fit("target", "demo/target", overrides, end=0.96)
    demo.draftsmith("export-target", ["export", str(demo.run("target")), str(demo.export("target")), "--overwrite"])


def make_traffic(demo: Demo) -> None:
    """Requests of two domains in turn, and the bench's prompts, all from validation text and all different."""
    from draftsmith.data.text import TextDataModule
    from draftsmith.trainers.cli import data_from_config

    s = demo.settings
    data = data_from_config(demo.run("target") / runs.CONFIG)
    assert isinstance(data, TextDataModule)
    data.prepare_data()
    lines, bench = [], []
    for domain in s.domains:
        found = data.prompts(s.requests + s.bench_prompts, s.prompt_length, s.max_new_tokens, tag=domain)
        rows = [json.dumps({"prompt_ids": list(r.prompt), "tag": domain}) + "\n" for r in found]
        lines += rows[: s.requests]
        bench = rows[s.requests :]  # of the last domain: the traffic at the time of the bench
    demo.requests_file.write_text("".join(lines), encoding="utf-8")
    demo.prompts_file.write_text("".join(bench), encoding="utf-8")


def make_draft(demo: Demo) -> None:
    overrides = {**demo.texts(str(demo.export("target"))), **_steps(demo.settings.draft_steps)}
    demo.fit("draft", "demo/draft", overrides, end=0.7)
    words = ["export", str(demo.run("draft")), str(demo.export("static")), "--kind", "drafter"]
    demo.draftsmith("export-draft", [*words, "--target", str(demo.export("target")), "--overwrite"])


def serve_online(demo: Demo) -> None:
    s = demo.settings
    overrides = {
        "model.draft.path": demo.export("static"),
        "data.target": demo.export("target"),
        "data.traffic.prompts": json.dumps([str(demo.requests_file)]),
        "data.traffic.max_new_tokens": s.max_new_tokens,
        "data.serve.in_flight": s.in_flight,
        "data.serve.steps": s.steps,
        "data.serve.sampling.temperature": s.temperature,
        "data.serve.decoder.draft_length": s.g,
        "data.buffer.interval": s.in_flight,
        "data.seed": s.seed,
    }
    demo.fit("online", "demo/online", overrides, end=0.94)
    words = ["export", str(demo.run("online")), str(demo.export("draft")), "--checkpoint", "last", "--overwrite"]
    demo.draftsmith("export-online", words)


def serve_static(demo: Demo) -> None:
    demo.replay("static", "speculative", demo.export("static"), range(len(demo.requests())))


def distil_offline(demo: Demo) -> None:
    """Distil on text of the first domain with the compute that learning cost online, in multiply-adds per parameter.

    Online a token costs three passes of the draft (forward, backward to inputs, to weights); the target's laws are
    those of the verification that serving needed anyway. Offline it also costs a forward pass of the teacher.
    """
    s = demo.settings
    served = served_log.read(demo_report.rounds_file(demo.folder, "online"))
    online = 3 * _parameters(demo.export("static"))
    offline = online + _parameters(demo.export("target"))
    tokens = s.steps * sum(s.prompt_length + request.tokens for request in served) * online / offline
    length, batch = s.prompt_length + s.max_new_tokens, s.in_flight
    overrides = {
        **demo.texts(str(demo.export("target"))),
        "model.draft.path": demo.export("static"),
        "model.teacher.path": demo.export("target"),
        "data.corpus.sources": json.dumps([f"stdlib:{s.domains[0]}"]),
        "data.text.length": length,
        "data.text.batch_size": batch,
        "trainer.max_steps": max(1, round(tokens / (length * batch))),
        "trainer.precision": precision(),
    }
    demo.fit("offline", "demo/offline", overrides, end=0.7)
    words = ["export", str(demo.run("offline")), str(demo.export("offline")), "--checkpoint", "last", "--overwrite"]
    demo.draftsmith("export-offline", words)
    demo.replay("offline", "speculative", demo.export("offline"), demo.last_quarters())


def serve_lookup(demo: Demo) -> None:
    demo.replay("prompt_lookup", "prompt_lookup", None, demo.last_quarters())


def run_bench(demo: Demo) -> None:
    s = demo.settings
    words = ["bench", str(demo.export("target")), "--draft", str(demo.export("draft"))]
    words += ["--prompts", str(demo.prompts_file), "--max-new-tokens", str(s.bench_tokens), "--batch", "1"]
    words += ["--temperature", str(s.temperature), "--g", str(s.g), "--seed", str(s.seed)]
    words += ["--repetitions", str(s.bench_repetitions)]
    words += ["--json", str(demo.folder / "bench.json"), "--png", str(demo.folder / "bench.png")]
    demo.draftsmith("bench", words)


STAGES = (
    Stage("target", "corpus, tokenizer, target", 150, make_target),
    Stage("traffic", "requests of two domains", 3, make_traffic),
    Stage("draft", "a weak draft", 20, make_draft),
    Stage("online", "serving while the draft learns", 60, serve_online),
    Stage("static", "the same requests, static draft", 18, serve_static),
    Stage("offline", "the same compute, offline", 30, distil_offline),
    Stage("prompt_lookup", "the same requests, prompt lookup", 4, serve_lookup),
    Stage("bench", "bench beside transformers", 50, run_bench),
)


def _parameters(export: Path) -> int:
    """How many numbers a model directory holds."""
    headers = [header for path in weight_files(export) for header in read_header(path).values()]
    return sum(math.prod(header.shape) for header in headers)


def _steps(steps: int | None) -> dict[str, Any]:
    """Overrides for another number of training steps (validated once, at the end)."""
    return {} if steps is None else {"trainer.max_steps": steps, "trainer.val_check_interval": steps}


def precision() -> str:
    """bf16 where the processor computes in it; elsewhere it would only be slower."""
    return "bf16-mixed" if "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags() else "32-true"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


# --- running them


def marks(settings: DemoSettings) -> dict[str, str]:
    """The mark of every stage: a hash of its settings, of the shipped configs, and of the stage before."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for name in sorted(n for n in shipped.names() if n.startswith("demo/")):
        digest.update(shipped.resolve(name).read_bytes())
    found = {}
    for stage in STAGES:
        digest.update(stage.name.encode())
        found[stage.name] = digest.hexdigest()[:16]
    return found


def done(folder: Path, stage: Stage, mark: str) -> float | None:
    """Seconds that a finished stage took, if its mark still holds; None else."""
    try:
        content = json.loads((folder / "stages" / f"{stage.name}.json").read_text())
    except (OSError, ValueError):
        return None
    return float(content["seconds"]) if content.get("mark") == mark else None


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def run(folder: Path, settings: DemoSettings, fresh: bool = False) -> dict[str, Any]:
    """Run what is not done yet, then report. Raises InvalidState when a stage fails or another demo is running."""
    if fresh and folder.exists():
        if not (folder / "stages").is_dir() and any(folder.iterdir()):
            raise InvalidValue(f"{folder} is no demo folder: --fresh would remove it; give another --run")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages").mkdir(exist_ok=True)
    console = Console(stderr=True)
    with runs.RunLock(folder), _bars(console) as progress:
        demo = Demo(folder, settings, progress)
        total = sum(stage.seconds for stage in STAGES)
        overall = progress.add_task("demo", total=total)
        valid = True
        for stage, mark in zip(STAGES, marks(settings).values(), strict=True):
            seconds = done(folder, stage, mark) if valid else None
            if seconds is None:
                if not valid or (folder / "stages" / f"{stage.name}.json").exists():
                    _forget(demo, stage)
                valid = False
                seconds = _run_stage(demo, stage, mark, console)
            elif not console.is_terminal:
                console.print(f"{stage.title}: done before ({seconds:.0f} s)")
            progress.advance(overall, stage.seconds)
        report = demo_report.write(folder, settings, {s.name: done(folder, s, m) or 0.0 for s, m in _marked(settings)})
    return report


def _marked(settings: DemoSettings) -> list[tuple[Stage, str]]:
    return list(zip(STAGES, marks(settings).values(), strict=True))


def _run_stage(demo: Demo, stage: Stage, mark: str, console: Console) -> float:
    if not console.is_terminal:
        console.print(f"{stage.title} ...")
    demo.task = demo.progress.add_task(stage.title, total=100)
    spent_file = demo.folder / "stages" / f"{stage.name}.spent"
    spent = float(spent_file.read_text()) if spent_file.exists() else 0.0
    begin = time.monotonic()
    try:
        stage.work(demo)
    except BaseException:
        spent_file.write_text(str(spent + time.monotonic() - begin))
        raise
    seconds = spent + time.monotonic() - begin
    spent_file.unlink(missing_ok=True)
    demo.progress.update(demo.task, completed=100)
    runs.write_json(demo.folder / "stages" / f"{stage.name}.json", {"mark": mark, "seconds": seconds})
    return seconds


def _forget(demo: Demo, stage: Stage) -> None:
    """Remove a stage's mark and run folder: they belong to other settings."""
    (demo.folder / "stages" / f"{stage.name}.json").unlink(missing_ok=True)
    (demo.folder / "stages" / f"{stage.name}.spent").unlink(missing_ok=True)
    shutil.rmtree(demo.run(stage.name), ignore_errors=True)


def main(argv: list[str]) -> int:
    """`draftsmith demo`. Returns the exit code."""
    p = parser(
        "demo",
        "Train a target and a draft on Python's own library, serve two domains while the draft learns, export, decode "
        "and bench: about six minutes on two CPU cores, no download. Finished stages are reused; Ctrl-C is safe.",
        "draftsmith demo\ndraftsmith demo --run /tmp/demo --fresh",
    )
    p.add_argument("--run", type=Path, default=runs.ROOT / "demo", help="folder of the demo (default: runs/demo)")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on")
    p.add_argument("--json", action="store_true", help="print report.json on stdout instead of the summary")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2, what the figures are made for)")
    args = p.parse_args(argv)
    if args.threads < 1:
        raise InvalidValue(f"--threads must be at least 1, got {args.threads}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the subprocesses
    torch.set_num_threads(args.threads)
    report = run(args.run, DemoSettings(), args.fresh)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print((args.run / "report.md").read_text(encoding="utf-8"))
    return 0
