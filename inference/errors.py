"""Errors that a user can mend: one clear line each (value, what is allowed, the fix); exit code 2 in the CLI.

Each class also is the builtin that the specs name (`ValueError`, `TypeError`, ...), so library users may catch either.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line and says what to do; the CLI prints it without a traceback."""


class InvalidValue(UserError, ValueError):
    """A value outside what is allowed."""


class InvalidType(UserError, TypeError):
    """An object of a kind that cannot do what was asked (for example a cache without roll-back)."""


class InvalidState(UserError, RuntimeError):
    """A right object in a wrong state (for example a model in train mode)."""


class UnknownKey(UserError, KeyError):
    """A name that is not among the known ones."""

    def __str__(self) -> str:  # KeyError shows repr(message), which would put quotes around a sentence
        return str(self.args[0]) if self.args else ""


class MissingExtra(UserError, ImportError):
    """A command or feature whose optional dependencies are not installed."""


def unknown_choice(what: str, value: object, choices: Iterable[str]) -> InvalidValue:
    """The error for a name that is not among `choices`: lists them and suggests the nearest."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InvalidValue(f"unknown {what} {value!r}: choose one of {', '.join(names)}{hint}")
