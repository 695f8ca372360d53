"""`draftsmith submit`: one SLURM script whose tasks, devices, nodes and strategy agree, written and submitted.

The config is parsed as `fit` will parse it, so that a wrong key costs seconds here instead of a night in the queue.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.trainers import runs, slurm_job
from draftsmith.trainers.cli import parse

SCRIPT = "submit.sbatch"
_EXAMPLE = """draftsmith submit -c lm/base --run my-target --gpus 4 --time 8:00:00
draftsmith submit -c lm/multinode --nodes 4 --gpus 8 --partition a100 --dry-run -- --model.optim.lr 3e-4
draftsmith submit -c osd/offline --run my-sweep --array 0-9%4"""
_MAX_GRACE = 65535  # seconds, what sbatch takes
# what `submit` derives, and the option that it derives it from
_DERIVED = {
    "--trainer.devices": "--gpus or --tasks-per-node",
    "--trainer.num_nodes": "--nodes",
    "--trainer.accelerator": "--gpus (0: CPU)",
    "--run": "--run, before the --",
    "--config": "-c, before the --",
    "-c": "-c, before the --",
}


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for. Raises InvalidValue for a number or text that sbatch would not take."""

    name: str
    folder: Path  # the run folder; of an array, the folder of its run folders
    nodes: int = 1
    gpus: int = 0  # per node, one task each; 0: tasks on CPUs
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    time: str = "24:00:00"
    signal_grace: int = 120
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    more: tuple[str, ...] = ()  # further sbatch options, as KEY=VALUE

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus", self.gpus, 0),
            ("--tasks-per-node", self.tasks_per_node, 1),
            ("--cpus-per-task", self.cpus_per_task, 1),
        ):
            if value < least:
                raise InvalidValue(f"{option} must be at least {least}, got {value}")
        if self.gpus and self.gpus != self.tasks_per_node:
            raise InvalidValue(
                f"every GPU has one task: --tasks-per-node {self.tasks_per_node} does not go with --gpus {self.gpus}; "
                "leave it out, or give --gpus 0 for tasks on CPUs"
            )
        limit = seconds(self.time)
        if not 1 <= self.signal_grace <= min(_MAX_GRACE, limit - 1):
            raise InvalidValue(
                f"--signal-grace must lie between 1 and {min(_MAX_GRACE, limit - 1)} seconds (within --time "
                f"{self.time}), got {self.signal_grace}"
            )
        if self.array is not None and not re.fullmatch(r"(\d+(-\d+(:\d+)?)?)(,\d+(-\d+(:\d+)?)?)*(%\d+)?", self.array):
            raise InvalidValue(f"--array wants numbers or ranges such as 0-2, 1,5,9 or 0-99%4, got {self.array!r}")
        if self.name in slurm_job.INTERACTIVE:
            raise InvalidValue(f"the job may not be named {self.name!r}: that means a shell, and fit would not requeue")
        if re.search(r"[\s%\\\"']", str(self.folder)):
            raise InvalidValue(f"--run may not hold spaces, quotes or %, which mean something to sbatch: {self.folder}")
        for option, text in (("--partition", self.partition), ("--account", self.account), ("--job-name", self.name)):
            if text is not None and not re.fullmatch(r"[^\s\"'\\]+", text):
                raise InvalidValue(f"{option} wants one word, got {text!r}")
        for option in self.more:
            key = option.partition("=")[0]
            if not re.fullmatch(r"[a-z][a-z0-9-]*(=[^\s\"'\\]+)?", option):
                raise InvalidValue(f"--sbatch wants KEY=VALUE as sbatch has it, without dashes or spaces: {option!r}")
            if key in {line.partition("=")[0].removeprefix("--") for line in self._own()}:
                raise InvalidValue(f"--sbatch {option}: submit sets --{key} itself")

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT

    @property
    def log(self) -> Path:
        """One file for all requeues of the run; %a is the task of an array."""
        return self.folder / ("slurm.log" if self.array is None else "seed-%a.log")

    def _own(self) -> list[str]:
        options: list[tuple[str, object]] = [
            ("job-name", self.name),
            ("nodes", self.nodes),
            ("ntasks-per-node", self.tasks_per_node),
            ("gpus-per-node", self.gpus or None),
            ("cpus-per-task", self.cpus_per_task),
            ("time", self.time),
            ("partition", self.partition),
            ("account", self.account),
            ("array", self.array),
        ]
        given = [f"--{key}={value}" for key, value in options if value is not None]
        # no "B:" before the signal: that would be for the batch shell alone
        return [*given, "--requeue", f"--signal=SIGUSR1@{self.signal_grace}", "--open-mode=append"]

    def lines(self) -> list[str]:
        """The options as sbatch takes them."""
        return [*self._own(), f"--output={self.log}", *(f"--{option}" for option in self.more)]


def seconds(time: str) -> int:
    """A time limit as sbatch writes it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S). Raises InvalidValue for another form."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    total = 0
    if match is not None:
        days, *rest = match.groups()
        parts = [int(part) for part in rest if part is not None]
        if days is None and len(parts) < 3:  # minutes come first
            parts.insert(0, 0)
        hours, minutes, secs = [*parts, 0, 0][:3]
        total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs
    if total == 0:
        raise InvalidValue(f"--time wants minutes, H:MM:SS or D-HH:MM:SS, more than zero, got {time!r}")
    return total


def script(job: Job, configs: list[str], strategy: str | None, overrides: list[str], typed: str) -> str:
    """The text of the script. `strategy`: None leaves that of the config."""
    fit = [*_program(), "fit"]
    for config in configs:
        fit += ["-c", config]
    fit += overrides
    fit += [f"--trainer.devices={job.tasks_per_node}", f"--trainer.num_nodes={job.nodes}"]
    fit += [f"--trainer.accelerator={'gpu' if job.gpus else 'cpu'}"]
    if strategy is not None:
        fit += [f"--trainer.strategy={strategy}"]
    words = [shlex.quote(word) for word in fit]
    if job.array is None:
        words.append(f"--run={job.folder}")
    else:
        words += ['--seed_everything="$SLURM_ARRAY_TASK_ID"', f'--run="{job.folder}/seed-$SLURM_ARRAY_TASK_ID"']
    options = "\n".join(f"#SBATCH {line}" for line in job.lines())
    return f"""#!/bin/bash
# Written by: {typed}
# Once more, or on from its newest checkpoint: sbatch {job.script}
{options}

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \\
    {" ".join(words)}
"""


def _program() -> list[str]:
    """`draftsmith` of this environment by its full path: the job must not depend on what is activated."""
    beside = Path(sys.executable).with_name("draftsmith")
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", "draftsmith.inference.cli"]


def main(argv: list[str]) -> int:
    """`draftsmith submit`. Returns the exit code."""
    end = argv.index("--") if "--" in argv else len(argv)
    given = _parser().parse_args(argv[:end])
    overrides = argv[end + 1 :]
    for word in overrides:
        source = _DERIVED.get(word.partition("=")[0])
        if source is not None:
            raise InvalidValue(f"{word.partition('=')[0]} follows from {source}; leave it out of the overrides")
        if given.array is not None and word.partition("=")[0] == "--seed_everything":
            raise InvalidValue("the seeds of an array are its task numbers; leave --seed_everything out")
    name = given.config[-1].removesuffix(".yaml") if given.config else "run"
    folder = runs.folder(given.run, name) if given.run is not None else runs.new_folder(name)
    configs = given.config or [str(runs.existing(str(folder)) / runs.CONFIG)]
    trainer = _trainer_settings(configs, overrides)
    gpus = given.gpus
    if gpus is None:
        gpus = 0 if given.tasks_per_node is not None or trainer["accelerator"] == "cpu" else 1
    job = Job(
        name=given.job_name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name),
        folder=folder,
        nodes=given.nodes,
        gpus=gpus,
        tasks_per_node=given.tasks_per_node if given.tasks_per_node is not None else max(1, gpus),
        cpus_per_task=given.cpus_per_task if given.cpus_per_task is not None else (8 if gpus else 1),
        time=given.time,
        signal_grace=given.signal_grace,
        partition=given.partition,
        account=given.account,
        array=given.array,
        more=tuple(given.sbatch),
    )
    text = script(
        job, configs, _strategy(trainer["strategy"], job), overrides, shlex.join(["draftsmith", "submit", *argv])
    )
    command = ["sbatch", "--parsable", str(job.script)]
    if given.dry_run:
        print(f"{text}\n# would be written to {job.script} and submitted by: {shlex.join(command)}")
        return 0
    _report(job, _submit(job, text, command))
    return 0


def _parser() -> CommandParser:
    made = parser(
        "submit",
        "Write a SLURM script for a training run, in its run folder, and submit it. Overrides follow a --.",
        _EXAMPLE,
    )
    add = made.add_argument
    add("-c", "--config", metavar="CONFIG", action="append", help="as for fit; without it, the run's own config.yaml")
    add("--run", metavar="ID", help="run folder; of an array: the folder of its runs (default: config name and time)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs per node, one task each; 0: CPU (default: 0 for a CPU config, else 1)",
    )
    add("--tasks-per-node", type=int, metavar="N", help="without GPUs: ranks per node (default: 1)")
    add("--cpus-per-task", type=int, metavar="N", help="cores of a rank and its loader (default: 8 with a GPU, else 1)")
    add("--time", default="24:00:00", metavar="T", help="limit of one stay in the queue (default: 24:00:00)")
    add("--partition", metavar="P", help="partition (default: the cluster's)")
    add("--account", metavar="A", help="account to bill (default: the cluster's)")
    add("--array", metavar="A", help="an array, the task number being the seed: 0-2, 0-9%%4")
    add(
        "--signal-grace",
        type=int,
        default=120,
        metavar="S",
        help="seconds before the limit at which the run saves and requeues; more than a save takes (default: 120)",
    )
    add("--job-name", metavar="NAME", help="name in squeue (default: the run's)")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any further sbatch option: qos=long")
    add("--dry-run", action="store_true", help="print the script and the command; write and submit nothing")
    return made


def _trainer_settings(configs: list[str], overrides: list[str]) -> dict[str, Any]:
    """Parse as `fit` does, nothing built. Raises InvalidValue for what `fit` would not take."""
    words = [word for config in configs for word in ("-c", config)]
    given = parse("fit", [*words, *overrides])
    from lightning.pytorch.strategies import StrategyRegistry

    from draftsmith.trainers.one_line import one_line
    from draftsmith.trainers.strategies import NAMES
    from draftsmith.trainers.training import ParseCLI, quiet

    quiet()
    with one_line():
        trainer = ParseCLI(given).config.trainer
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy not in NAMES and strategy not in StrategyRegistry:
        raise unknown_choice("trainer.strategy", strategy, NAMES)
    return {"accelerator": trainer.accelerator, "strategy": strategy}


def _strategy(asked: Any, job: Job) -> str | None:
    if job.world_size == 1:
        return None
    if asked == "auto":
        return "ddp"
    if isinstance(asked, str) and asked.startswith("single"):
        raise InvalidValue(
            f"trainer.strategy {asked!r} is for one process, and the job has {job.world_size}: choose ddp or zero2, "
            "or give -- --trainer.strategy auto"
        )
    return None


def _submit(job: Job, text: str, command: list[str]) -> str:
    if shutil.which("sbatch") is None:
        raise InvalidState("no sbatch on PATH: submit from a login node of a SLURM cluster, or look with --dry-run")
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.script.write_text(text, encoding="utf-8")
    except OSError as e:
        raise InvalidState(f"cannot write {job.script}: {e.strerror}") from e
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.replace("sbatch: error:", "").split()) or f"exit code {done.returncode}"
        raise InvalidState(f"sbatch refused {job.script}: {said}")
    return done.stdout.strip().partition(";")[0]


def _report(job: Job, number: str) -> None:
    print(f"job   {number}")
    print(f"run   {job.folder}")
    print(f"log   {job.log}")
    print(f"save and requeue now   scancel --signal=USR1 {number}")
