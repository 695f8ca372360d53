"""`draftsmith doctor`: what would go wrong with a run, before GPUs are billed for finding out.

The config is parsed and its classes are built as `fit` does it; no network is built (sizes come from the meta device).
Each check is one line: the value, what is allowed, the fix.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.inference.errors import InvalidValue, UserError

if TYPE_CHECKING:
    from draftsmith.trainers.checks.finding import Finding
    from draftsmith.trainers.checks.subject import Subject
    from draftsmith.trainers.cli import Given
    from draftsmith.trainers.training import TrainingCLI

_PAGE = """usage: draftsmith doctor -c CONFIG [--run ID] [--script FILE] [--no-data] [--json] [--KEY VALUE ...]

Check a training run before it starts: SLURM's tasks, signal and requeue against the config, DeepSpeed's config, number
formats, tokenizer and labels, room for checkpoints, ports, resume, the run folder. Exit code 2 when there is an error.

  -c, --config CONFIG   as for fit: a YAML file or a shipped name; repeat it to lay one over another
  --run ID              the run folder; with --run alone, the run's own config.yaml is checked
  --script FILE         a batch script that will start the run: its #SBATCH lines are checked, not the job around us
  --no-data             leave out the checks that prepare the data (which takes its time once, then it is cached)
  --json                print one JSON object
  --KEY VALUE           override any key of the config

examples:
  draftsmith doctor -c lm/base --run my-target --trainer.devices 4 --trainer.strategy zero2
  draftsmith doctor -c lm/base --script runs/my-target/submit.sbatch --trainer.devices 4"""


def main(argv: list[str]) -> int:
    """`draftsmith doctor`. Returns 2 when a check found an error, else 0."""
    if "--help" in argv or "-h" in argv:
        print(_PAGE)
        return 0
    from draftsmith.trainers.cli import parse

    words, script, with_data = _own(argv)
    given = parse("doctor", words)
    from draftsmith.trainers import runs

    if not given.configs:
        if given.run is None:
            raise InvalidValue("nothing to check: give -c CONFIG (see 'draftsmith doctor --help'), or --run ID")
        given.configs.append(runs.existing(given.run) / runs.CONFIG)
    found = examine(given, script=script, with_data=with_data)
    if given.json:
        print(json.dumps([{"check": f.check, "verdict": f.verdict, "text": f.text} for f in found], indent=1))
    else:
        _print(found)
    from draftsmith.trainers.checks.finding import ERROR

    return 2 if any(f.verdict == ERROR for f in found) else 0


def _own(argv: list[str]) -> tuple[list[str], Path | None, bool]:
    """Our two options out of the command line."""
    words, script, with_data = [], None, True
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if name == "--script":
            if not has_value:
                if not rest:
                    raise InvalidValue("--script wants a file: see 'draftsmith doctor --help'")
                value = rest.pop(0)
            script = Path(value)
        elif word == "--no-data":
            with_data = False
        else:
            words.append(word)
    return words, script, with_data


def examine(given: "Given", *, script: Path | None = None, with_data: bool = True) -> "list[Finding]":
    """All findings about the run that `given` describes. A config that cannot be built is itself the only finding."""
    from draftsmith.trainers import runs
    from draftsmith.trainers.checks import job
    from draftsmith.trainers.checks.finding import error
    from draftsmith.trainers.one_line import one_line
    from draftsmith.trainers.training import ParseCLI, quiet

    quiet()
    around = job.from_environment(os.environ) if script is None else job.from_script(script)
    try:
        with one_line():
            cli = ParseCLI(given)
            run = runs.folder(given.run, given.name)
            subject = build(cli, run, around, os.environ)
    except UserError as e:
        return [error("config", str(e))]
    return [*cheap(subject), *(_data(subject) if with_data else [])]


def build(cli: "TrainingCLI", run: Path, around: Any, env: Mapping[str, str], starting: bool = False) -> "Subject":
    """The subject of the checks from a parsed config. Raises as the classes of the config do."""
    from draftsmith.trainers.checks.subject import Subject

    config = cli.config.clone()
    config.trainer.strategy = "auto"  # what a class refuses of its settings is for the checks to say
    made = cli.parser.instantiate(config)
    return Subject(cli.config.trainer, made.checkpoint, made.model, made.data, run, env, around, starting)


def cheap(subject: "Subject") -> "list[Finding]":
    """The checks that take no data and seconds at most."""
    from draftsmith.trainers.checks import batches, slurm, storage, strategy

    found: list[Finding] = []
    for check in (slurm.checks, strategy.checks, storage.checks, batches.online):
        found += _mended(check, subject)
    return found


def _data(subject: "Subject") -> "list[Finding]":
    from draftsmith.trainers.checks import batches

    print("preparing the data", file=sys.stderr)
    return _mended(batches.checks, subject)


def _mended(check: "Callable[[Subject], list[Finding]]", subject: "Subject") -> "list[Finding]":
    """A group of checks; what the user can mend and no check foresaw is a finding too."""
    from draftsmith.trainers.checks.finding import error

    try:
        return check(subject)
    except UserError as e:
        return [error(check.__module__.rpartition(".")[2], str(e))]


def warn_under_slurm(cli: "TrainingCLI", run: Path) -> None:
    """At the start of `fit` in a SLURM job: what doctor would have said, on stderr. Stops nothing; for rank 0."""
    from draftsmith.trainers import slurm_job
    from draftsmith.trainers.checks import job
    from draftsmith.trainers.checks.finding import OK

    if slurm_job.name() is None:
        return
    for finding in cheap(build(cli, run, job.from_environment(os.environ), os.environ, starting=True)):
        if finding.verdict != OK:
            print(f"doctor: {finding.check}: {finding.text}", file=sys.stderr, flush=True)


def _print(found: "list[Finding]") -> None:
    width = max(len(f.check) for f in found)
    for finding in found:
        print(f"{finding.verdict:<8} {finding.check:<{width}}  {finding.text}")
    counts = {verdict: sum(f.verdict == verdict for f in found) for verdict in ("error", "warning")}
    print(", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in counts.items()))
