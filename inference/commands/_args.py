"""The argument parser that every command shares: an Example in the help, one-line errors, nearest option suggested."""

import argparse
import difflib
from typing import NoReturn

from draftsmith.inference.errors import InvalidValue

UNKNOWN = "unrecognized arguments: "  # how argparse begins that message; the first of them follows


class CommandParser(argparse.ArgumentParser):
    """argparse that raises InvalidValue (one line, exit code 2 in the CLI) where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(UNKNOWN):
            first = message.removeprefix(UNKNOWN).split()[0].partition("=")[0]
            options = [text for action in self._actions for text in action.option_strings]
            near = difflib.get_close_matches(first, options, n=1)
            message = f"unknown argument {first!r}" + (f"; did you mean {near[0]}?" if near else "")
        raise InvalidValue(f"{message}; see '{self.prog} --help'")


def parser(verb: str, summary: str, example: str) -> CommandParser:
    """The parser of `draftsmith VERB`; `example` is one or more command lines, shown in the help under Example."""
    lines = "\n".join(f"  {line.strip()}" for line in example.strip().splitlines())
    made = CommandParser(
        prog=f"draftsmith {verb}",
        description=summary,
        epilog=f"Example:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The CLI takes --debug out before the command sees it; it stands here for the help page.
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made
