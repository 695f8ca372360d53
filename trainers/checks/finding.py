"""What a check of `draftsmith doctor` says."""

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One line of the report: the value, what is allowed, and the fix."""

    check: str  # name of the check
    verdict: str  # OK, WARNING (the run starts, and may disappoint) or ERROR (it fails, or loses work)
    text: str


def ok(check: str, text: str) -> Finding:
    return Finding(check, OK, text)


def warning(check: str, text: str) -> Finding:
    return Finding(check, WARNING, text)


def error(check: str, text: str) -> Finding:
    return Finding(check, ERROR, text)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
