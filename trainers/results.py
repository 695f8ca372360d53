"""Render docs/results.md from docs/figures/*.json (contract 14): `python -m draftsmith.trainers.results [--check]`.

One table per system. A row is marked stale when a source file that the system's figures depend on has changed since
they were measured: the blob hash that git gives the file now differs from the one that the measurement recorded. The
output is a pure function of the figure files and those sources, so `--check` can compare it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.inference.environment import blob_hash
from draftsmith.inference.errors import InvalidValue, UserError

COMMAND = "python -m draftsmith.trainers.results"
HEAD = f"""# Measured figures

Rendered by `{COMMAND}` from `docs/figures/*.json`, which `make acceptance` writes; not edited by hand.
A row marked **stale** was measured before the named source files changed: measure it again before you quote it.
"""


def render(root: Path) -> str:
    """The text of docs/results.md for the repository at `root`. Raises InvalidValue for a broken figure file."""
    sections = [HEAD]
    for path in sorted((root / "docs" / "figures").glob("*.json")):
        try:
            data = json.loads(path.read_text())
            sections.append(_section(data["system"], data["runs"], root))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidValue(
                f"{path} is not a figure file: measure it again with `make acceptance` ({error!r})"
            ) from None
    if len(sections) == 1:
        sections.append("Nothing has been measured yet: run `make acceptance`.\n")
    return "\n".join(sections)


def changed_files(run: Mapping[str, Any], root: Path) -> list[str]:
    """The sources of a run whose content differs now (or that are gone), sorted."""
    now = {name: blob_hash(root / name) if (root / name).is_file() else None for name in run["files"]}
    return sorted(name for name, recorded in run["files"].items() if now[name] != recorded)


def flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"value": ..., ...}) of each figure in order; nested tables become dotted names, lists one value."""
    for name, value in sorted(figures.items()):
        if isinstance(value, Mapping) and "value" in value:
            yield prefix + name, dict(value)
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, {"value": value}


def _section(system: str, runs: Sequence[Mapping[str, Any]], root: Path) -> str:
    lines = [f"## {system}", ""]
    rows: list[tuple[str, str]] = []
    notes = []
    for number, run in enumerate(runs, 1):
        changed = changed_files(run, root)
        state = f"**stale**: {_some(changed)}" if changed else "current"
        for name, figure in flatten(run["figures"]):
            cells = (name, _value(figure), _interval(figure), figure.get("need", ""), f"[{number}]", state)
            rows.append((name, "| " + " | ".join(_cell(c) for c in cells) + " |"))
        notes.append(f"[{number}] {_provenance(run)}")
    lines += ["| Figure | Value | Interval | Needed | Run | State |", "|---|---|---|---|---|---|"]
    lines += [row for _, row in sorted(rows)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes), ""])


def _provenance(run: Mapping[str, Any]) -> str:
    place = run["machine"]
    dirty = " with uncommitted changes" if run["dirty"] else ""
    libraries = ", ".join(
        f"{name} {run['versions'][name]}" for name in ("torch", "transformers") if name in run["versions"]
    )
    seeds = ", ".join(str(seed) for seed in run["seeds"])
    commit = f"commit {run['commit'][:12]}{dirty}"
    return f"{run['date']}, {commit}, {place['cpu']}, {place['cores']} cores, {libraries}, seeds {seeds}"


def _value(figure: Mapping[str, Any]) -> str:
    value = figure["value"]
    unit = f" {figure['unit']}" if figure.get("unit") else ""
    return _number(value) + unit


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_number(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(figure: Mapping[str, Any]) -> str:
    low, high = figure.get("low"), figure.get("high")
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _some(names: Sequence[str], most: int = 2) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Write docs/results.md, or with --check compare it. Returns 0, 1 (differs), 2 (bad input)."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Render docs/results.md from docs/figures/*.json.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when docs/results.md is out of date"
    )
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: the current directory)")
    options = parser.parse_args(argv)
    target = options.root / "docs" / "results.md"
    try:
        if not target.parent.is_dir():
            raise InvalidValue(f"{target.parent} is not a folder: give the repository with --root")
        text = render(options.root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        target.write_text(text)
        return 0
    if target.is_file() and target.read_text() == text:
        return 0
    print(f"{target} is out of date: run `{COMMAND}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
