"""A SLURM job as a check sees it: from the environment of the job around us, or from the #SBATCH lines of a script."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers.slurm_job import INTERACTIVE

_SHORT = {"-N": "nodes", "-n": "ntasks", "-J": "job-name", "-t": "time"}
_SCONTROL_SECONDS = 20


@dataclass(frozen=True)
class Job:
    """What SLURM was asked for; None where that is not known."""

    name: str | None = None
    nodes: int | None = None
    ntasks: int | None = None
    tasks_per_node: int | None = None
    signal: str | None = None  # as --signal has it: SIGUSR1@120
    requeue: bool | None = None
    script_known: bool = True  # whether signal and requeue could be read at all
    inside: bool = False  # we run in it
    in_step: bool = False  # ... as a task that srun started
    number: str | None = None

    @property
    def interactive(self) -> bool:
        return self.name in INTERACTIVE

    @property
    def total(self) -> int | None:
        """Tasks in all."""
        if self.ntasks is not None:
            return self.ntasks
        if self.tasks_per_node is None:
            return None
        return self.tasks_per_node * (self.nodes or 1)

    @property
    def signal_name(self) -> str | None:
        """USR1 of "B:SIGUSR1@120"."""
        if self.signal is None:
            return None
        return self.signal.rpartition(":")[2].partition("@")[0].upper().removeprefix("SIG")

    @property
    def grace(self) -> int | None:
        """Seconds between the signal and the end; sbatch takes 60 where none are given."""
        if self.signal is None:
            return None
        seconds = self.signal.partition("@")[2]
        return int(seconds) if seconds.isdecimal() else 60


def from_script(path: Path) -> Job:
    """The job of a batch script. Raises InvalidValue for a file that cannot be read or has no #SBATCH line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidValue(f"cannot read the script {path}: {e}") from e
    options = sbatch_options(text)
    if not options:
        raise InvalidValue(f"{path} has no #SBATCH line: is it a batch script?")
    return _job(options)


def sbatch_options(text: str) -> dict[str, str]:
    """The #SBATCH lines of a script, by the long names of the options (the last one of a name counts)."""
    options: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        while words:
            word = words.pop(0)
            name, has_value, value = word.partition("=")
            if name in _SHORT or (len(word) > 2 and word[:2] in _SHORT and not word.startswith("--")):
                options[_SHORT[word[:2]]] = word[2:] or (words.pop(0) if words else "")
            elif name.startswith("--"):
                if not has_value and words and not words[0].startswith("-"):
                    value = words.pop(0)
                options[name[2:]] = value
    return options


def from_environment(env: Mapping[str, str]) -> Job | None:
    """The job that we run in; None outside."""
    number = env.get("SLURM_JOB_ID")
    if number is None:
        return None
    script = _batch_script(number)
    asked = sbatch_options(script) if script is not None else {}
    return Job(
        name=env.get("SLURM_JOB_NAME"),
        nodes=_number(env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES")),
        ntasks=_number(env.get("SLURM_NTASKS")),
        tasks_per_node=_number(env.get("SLURM_NTASKS_PER_NODE")),
        signal=asked.get("signal"),
        requeue=_requeue(asked),
        script_known=script is not None,
        inside=True,
        in_step="SLURM_STEP_ID" in env,
        number=number,
    )


def _job(asked: Mapping[str, str]) -> Job:
    return Job(
        name=asked.get("job-name"),
        nodes=_number(asked.get("nodes")),
        ntasks=_number(asked.get("ntasks")),
        tasks_per_node=_number(asked.get("ntasks-per-node")),
        signal=asked.get("signal"),
        requeue=_requeue(asked),
    )


def _requeue(asked: Mapping[str, str]) -> bool | None:
    """None: the cluster's own rule holds."""
    return False if "no-requeue" in asked else True if "requeue" in asked else None


def _number(text: str | None) -> int | None:
    """The first number: SLURM_NTASKS_PER_NODE may read 4(x2), --nodes 2-4."""
    match = re.match(r"\d+", text or "")
    return int(match.group()) if match else None


def _batch_script(job: str) -> str | None:
    """The script of a job, from SLURM itself; None for a job without one (salloc), or where scontrol cannot tell."""
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return None
    try:
        done = subprocess.run(
            [scontrol, "write", "batch_script", job, "-"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
