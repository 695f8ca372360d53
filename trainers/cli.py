"""`draftsmith fit | validate | test`: typed YAML in, a run folder out.

Heavy libraries are imported by the work, not by this file, so that `--help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.inference.errors import InvalidValue
from draftsmith.trainers.slurm_job import notice_held

if TYPE_CHECKING:
    import lightning.pytorch as pl

_PAGE = {
    "fit": """usage: draftsmith fit -c CONFIG [--run ID] [--KEY VALUE ...]

Train a part. The run goes to runs/ID; the same command with the same --run resumes it from its newest checkpoint.

  -c, --config CONFIG   a YAML file, or the name of a shipped config; repeat it to lay one over another
  --run ID              run folder: an id below runs/, or a path; default: SLURM job id, else config name and time
                        (with --run alone, the run's own config.yaml is used)
  --ckpt_path FILE      start from this checkpoint instead of the run's newest
  --KEY VALUE           override any key of the config: --trainer.max_steps 100 --model.optim.lr 1e-3
  --print_config        print the resulting config and stop
  --model.help CLASS, --data.help CLASS, --help-all       what may be set

examples:
  draftsmith fit -c lm/debug
  draftsmith fit -c lm/base --run my-target --trainer.max_steps 20000
  draftsmith fit --run my-target""",
    "validate": """usage: draftsmith validate [--run ID] [-c CONFIG] [--ckpt_path WHICH] [--json] [--KEY VALUE ...]

Run the validation of a config on a checkpoint; the figures go to stdout.

  --run ID              run folder: its config.yaml and its best checkpoint (else its newest) are used
  -c, --config CONFIG   another config
  --ckpt_path WHICH     best or last of the run, or a file
  --json                print one JSON object
  --KEY VALUE           override any key of the config

example:
  draftsmith validate --run my-target --ckpt_path last --json""",
    "test": """usage: draftsmith test [--run ID] [-c CONFIG] [--ckpt_path WHICH] [--json] [--KEY VALUE ...]

Run the test of a config on a checkpoint; the figures go to stdout. Options as for `draftsmith validate`.

example:
  draftsmith test --run my-target --ckpt_path best""",
}


def fit_main(argv: list[str]) -> int:
    """`draftsmith fit`. Returns the exit code; 130 and 143 after Ctrl-C and SIGTERM."""
    return _main("fit", argv)


def validate_main(argv: list[str]) -> int:
    """`draftsmith validate`. Returns the exit code."""
    return _main("validate", argv)


def test_main(argv: list[str]) -> int:
    """`draftsmith test`. Returns the exit code."""
    return _main("test", argv)


test_main.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test, whatever its name


def module_from_config(config: Path) -> "pl.LightningModule":
    """The module that a run's config.yaml describes: its `model:` part only, the network not yet built.

    Raises InvalidValue for a file that is missing or describes none.
    """
    from draftsmith.trainers.training import build_module

    return build_module(config)


def data_from_config(config: str | Path) -> "pl.LightningDataModule":
    """The data module that a config (a file or a shipped name) describes: its `data:` part only, nothing prepared.

    Raises InvalidValue for a file that is missing or describes none.
    """
    from draftsmith.trainers import shipped
    from draftsmith.trainers.training import build_data

    return build_data(shipped.resolve(str(config)))


@dataclass
class Given:
    """The command line, our own options taken out of it."""

    verb: str
    configs: list[Path] = field(default_factory=list)
    name: str = "run"  # what a new run is called after: the last config's name
    run: str | None = None
    ckpt_path: str | None = None
    json: bool = False
    rest: list[str] = field(default_factory=list)  # for jsonargparse

    @property
    def asks(self) -> bool:
        """Whether it only asks what may be set: `--help-all`, `--model.help CLASS`."""
        return any(word.partition("=")[0].endswith((".help", "--help")) for word in self.rest)


def parse(verb: str, argv: list[str]) -> Given:
    """Take our own options out of the command line. Raises InvalidValue for one without its value."""
    from draftsmith.trainers import shipped

    given = Given(verb)
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        if name in ("-c", "--config", "--run", "--ckpt_path"):
            if not has_value:
                if not words:
                    raise InvalidValue(f"{name} wants a value: see 'draftsmith {verb} --help'")
                value = words.pop(0)
            if name == "--run":
                given.run = value
            elif name == "--ckpt_path":
                given.ckpt_path = value
            else:
                given.configs.append(shipped.resolve(value))
                given.name = value.removesuffix(".yaml")
        elif word == "--help-all":
            given.rest.append("--help")
        elif word == "--json" and verb != "fit":
            given.json = True
        elif name.startswith(("--model.", "--data.")) and (value or " ".join(words[:1])) == "null":
            if not has_value:
                words.pop(0)
            given.rest.append(_null(name))
        else:
            given.rest.append(word)
    return given


def _null(name: str) -> str:
    """`--data.a.b null` as `--data.a={"b": null}`: jsonargparse turns a null below a class into the text "None"."""
    owner, _, key = name.replace(".init_args.", ".").rpartition(".")
    inner = f'{{"{key}": null}}'
    return f"{owner}={inner}" if "." in owner else f'{owner}={{"init_args": {inner}}}'


def _main(verb: str, argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        from draftsmith.trainers import shipped

        print(f"{_PAGE[verb]}\n\nshipped configs: {', '.join(shipped.names())}")
        return 0
    given = parse(verb, argv)
    if verb != "fit":
        from draftsmith.trainers.training import evaluate

        return evaluate(given)
    with notice_held():
        from draftsmith.trainers.training import fit

        return fit(given)
