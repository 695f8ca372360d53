"""Configs by name: `lm/debug` is a file if there is one, else the config of that name that came with the package."""

import difflib
from importlib.resources import files
from pathlib import Path

from draftsmith.inference.errors import InvalidValue


def names(suffix: str = ".yaml") -> list[str]:
    """Shipped configs with that suffix, as one writes them after -c: `lm/debug`."""
    root = Path(str(files("draftsmith.configs")))
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob(f"*{suffix}"))


def resolve(name: str, suffix: str = ".yaml") -> Path:
    """The file that `name` means: a path, or a shipped config. Raises InvalidValue, naming the nearest one."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = names(suffix)
    stem = name.removesuffix(suffix)
    if stem in known:
        return Path(str(files("draftsmith.configs"))) / f"{stem}{suffix}"
    near = difflib.get_close_matches(stem, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidValue(
        f"no config file {name!r}, and none of that name is shipped ({', '.join(known) or 'none'}){hint}"
    )
