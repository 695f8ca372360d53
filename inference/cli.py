"""The `draftsmith` command: finds the verb, loads it by name, and turns errors into one line and an exit code.

Imports nothing heavy, so that `draftsmith --help` answers at once and the slim install knows which verbs it lacks.
Verbs are entry points of the group `draftsmith.commands`, each a `main(argv: list[str]) -> int` (contract 8).
Exit codes: 0 done, 1 a bug (traceback), 2 something the user can mend, 130 interrupted, 141 the reader of stdout left.
"""

import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from draftsmith.inference.errors import InvalidState, MissingExtra, UserError, unknown_choice

GROUP = "draftsmith.commands"
STDOUT = 1  # the file descriptor

# Heading -> verb -> one line of help, in the order of the help page.
VERBS: dict[str, dict[str, str]] = {
    "Train": {
        "fit": "train a part from a config; --run ID resumes it",
        "validate": "run the validation of a config on a checkpoint",
        "test": "run the test of a config on a checkpoint",
        "submit": "write a SLURM script for a training run, and submit it",
        "doctor": "check a run before it starts: SLURM, DeepSpeed, precision, data, disk, ports, resume",
        "trace": "make training data: a target's answers to prompts, or a diffusion model's oracle passes (learn2pd)",
        "plan": "what a run needs: memory per rank for each ZeRO stage, tokens, disk, hours",
        "demo": "see the whole path on this machine: train, serve, distil online, export, measure",
    },
    "Export and serve": {
        "export": "turn a run into a directory that loads anywhere, with its manifest and parity seal",
        "ngram": "count an n-gram table, or order a retrieval store, to draft from",
        "convert": "write an existing drafter in another engine's format: vLLM, SGLang, EAGLE, Medusa, transformers",
        "decode": "generate text with a target and, if given, a draft; prints the acceptance",
    },
    "Measure": {
        "forecast": "say what drafting will gain from sizes alone, and from measured costs where there are any",
        "calibrate": "measure how often drawn tokens are accepted, for the policies of the tree decoder",
        "bench": "time decoders and their peers side by side in one process",
    },
    "Look": {
        "inspect": "show the tokens, masks and labels that a config will train on",
        "show": "describe an export: kind, couplings, provenance, seal",
        "diagnose": "find the wrong coupling that makes a drafter accepted too little",
    },
}

# Extra -> the modules (import names) that it brings; a missing one of them means that the extra is missing.
EXTRA_MODULES: dict[str, frozenset[str]] = {
    "train": frozenset(
        {
            "lightning",
            "datasets",
            "torchmetrics",
            "omegaconf",
            "jsonargparse",
            "tensorboard",
            "rich",
            "matplotlib",
            "sklearn",
            "scipy",
            "torchdiffeq",
        }
    ),
    "deepspeed": frozenset({"deepspeed"}),
    "lora": frozenset({"peft"}),
    "mauve": frozenset({"mauve"}),
}
EXTRA_TITLES = {"train": "training", "deepspeed": "DeepSpeed", "lora": "LoRA", "mauve": "MAUVE"}

Main = Callable[[list[str]], int | None]


class _BugReport:
    """Adds to an unexpected error, which passes on with its traceback, the line that asks to report it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            error.add_note("This is a bug in draftsmith: please report it with the command line and this traceback.")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Within, a warning of a class of ours is one line on stderr, like an error; others show as Python shows them."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("draftsmith."):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def help_page() -> str:
    """The text of `draftsmith --help`; verbs that another package adds to the group come last, by name."""
    from importlib.metadata import entry_points

    known = [verb for verbs in VERBS.values() for verb in verbs]
    others = sorted(set(entry_points(group=GROUP).names) - set(known))
    width = max(map(len, [*known, *others])) + 2
    lines = ["usage: draftsmith COMMAND [options]", "", "Train what makes decoding fast, and serve it losslessly.", ""]
    for heading, verbs in VERBS.items():
        lines += [f"{heading}:", *(f"  {verb:<{width}}{text}" for verb, text in verbs.items()), ""]
    if others:
        lines += ["From other packages:", *(f"  {verb}" for verb in others), ""]
    lines += [
        "Options:",
        f"  {'--help':<{width + 2}}this page; 'draftsmith COMMAND --help' for a command's options and an example",
        f"  {'--version':<{width + 2}}the version",
        f"  {'--debug':<{width + 2}}with any command: show the traceback of an error",
    ]
    return "\n".join(lines)


def load_verb(verb: str) -> Main:
    """The `main` of a verb. Raises InvalidValue for an unknown one, ModuleNotFoundError when its extra is missing."""
    from importlib.metadata import entry_points

    found = entry_points(group=GROUP, name=verb)
    known = {name for verbs in VERBS.values() for name in verbs}
    if found:
        main: Main = next(iter(found)).load()
        return main
    if verb in known:
        raise InvalidState(
            f"'draftsmith {verb}' is not registered in this installation: reinstall draftsmith (pip install -e .)"
        )
    raise unknown_choice("command", verb, known | set(entry_points(group=GROUP).names))


def missing_extra(prog: str, error: ModuleNotFoundError) -> MissingExtra | None:
    """The one-line answer when `error` names a module that one of our extras brings; None for any other module."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRA_MODULES.items():
        if module in modules:
            title = EXTRA_TITLES[extra]
            return MissingExtra(f"'{prog}' needs the {title} extra: pip install 'draftsmith[{extra}]'")
    return None


def run_main(main: Main, argv: list[str], prog: str) -> int:
    """Runs `main` on `argv` and returns the exit code; every entry point (console script, `python -m`) ends here.

    `--debug` anywhere before a lone `--` is taken out and adds the traceback to one-line errors. Unexpected errors pass
    through, with a note that asks to report them, so that the interpreter prints the traceback and exits with 1.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    argv = [arg for arg in argv[:end] if arg != "--debug"] + argv[end:]
    with _BugReport(), _one_line_warnings():
        return _answer(main, argv, prog, debug)


def _answer(main: Main, argv: list[str], prog: str, debug: bool) -> int:
    try:
        code = main(argv) or 0
        sys.stdout.flush()  # a reader that left shows here, not at interpreter exit
        return code
    except UserError as error:
        return _one_line(error, debug)
    except ModuleNotFoundError as error:
        answer = missing_extra(prog, error)
        if answer is None:
            raise
        return _one_line(answer, debug)
    except SystemExit as stop:  # argparse (--help) and LightningCLI end this way
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise  # some other pipe broke, that of a worker process for example
        return 141


def _one_line(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _stdout_is_gone() -> bool:
    """Whether the reader of stdout left (`draftsmith show X | head`); if so, stdout is pointed at the null device."""
    watch = select.poll()
    watch.register(STDOUT, 0)  # errors and hang-ups are always reported
    gone = bool(watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # else the interpreter complains at exit
    return gone


def _dispatch(argv: list[str]) -> int | None:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(help_page(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if verb == "--version":
        from importlib.metadata import version

        print(f"draftsmith {version('draftsmith')}")
        return 0
    return load_verb(verb)(rest)


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = next((arg for arg in argv if not arg.startswith("-")), None)
    return run_main(_dispatch, argv, f"draftsmith {verb}" if verb else "draftsmith")


if __name__ == "__main__":
    sys.exit(main())
