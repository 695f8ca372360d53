"""Render docs/results.md from docs/figures/*.json (contract 14), and the README's table of decoders from the registry.

    python -m draftsmith.trainers.results [--check]

One table per system. A row is marked stale when a source file that the system's figures depend on has changed since
they were measured: the blob hash that git gives the file now differs from the one that the measurement recorded. The
output is a pure function of the figure files and those sources, so `--check` can compare it.
"""

import argparse
import json
import operator
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.inference import registry
from draftsmith.inference.environment import blob_hash
from draftsmith.inference.errors import InvalidValue, UserError

COMMAND = "python -m draftsmith.trainers.results"
HEAD = f"""# Measured figures

Rendered by `{COMMAND}` from `docs/figures/*.json`, which `make acceptance` writes; not edited by hand.
A row marked **stale** was measured before the named source files changed: measure it again before you quote it.
A row marked **missed** is outside what was needed of it.
"""
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
BEGIN = f"<!-- decoders: rendered by {COMMAND} -->\n"
END = "<!-- end of decoders -->"


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


def render_readme(text: str) -> str:
    """The README with its table of decoders, between two marking lines, made from the registry; unchanged without them.

    Raises InvalidValue when only one of the lines is there.
    """
    if BEGIN not in text and END not in text:
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidValue(f"README.md needs the line {BEGIN.strip()!r} and, after it, {END!r}")
    return "".join((before, begin, _decoders(), end, after))


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


def misses(figure: Mapping[str, Any]) -> bool:
    """Whether a number is outside a need of the form ">= 1.3" (or >, <, <=); needs in words are not judged."""
    found = re.fullmatch(r"(>=|<=|>|<) *([-+.0-9e]+)", str(figure.get("need", "")))
    if found is None or isinstance(figure["value"], bool) or not isinstance(figure["value"], int | float):
        return False
    return not COMPARE[found[1]](figure["value"], float(found[2]))


def _decoders() -> str:
    lines = ["| Decoder | What it does | Keeps the target's law | Parts |", "|---|---|---|---|"]
    for entry in map(registry.get, (*registry.names(), *registry.names("canvas"))):
        unless = " or ".join(f"`{name}`" for name in entry.lossy_settings)
        lossless = ("yes" + (f", unless {unless} is set" if unless else "")) if entry.lossless else "no"
        cells = (f"`{entry.name}`", entry.summary, lossless, ", ".join(entry.needs))
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section(system: str, runs: Sequence[Mapping[str, Any]], root: Path) -> str:
    lines = [f"## {system}", ""]
    rows: list[tuple[str, str]] = []
    notes = []
    for number, run in enumerate(runs, 1):
        changed = changed_files(run, root)
        age = f"**stale**: {_some(changed)}" if changed else "current"
        for name, figure in flatten(run["figures"]):
            state = f"**missed**, {age}" if misses(figure) else age
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
    """Write the rendered files, or with --check compare them. Returns 0, 1 (one differs), 2 (bad input)."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Render docs/results.md and the README's decoders.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a rendered file is out of date"
    )
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: the current directory)")
    options = parser.parse_args(argv)
    results, readme = options.root / "docs" / "results.md", options.root / "README.md"
    try:
        if not results.parent.is_dir():
            raise InvalidValue(f"{results.parent} is not a folder: give the repository with --root")
        wanted = {results: render(options.root)}
        if readme.is_file():
            wanted[readme] = render_readme(readme.read_text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    old = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in old:
        if options.check:
            print(f"{path} is out of date: run `{COMMAND}`", file=sys.stderr)
        else:
            path.write_text(wanted[path])
    return 1 if options.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
