"""A network's frozen config dataclass as plain JSON, read back strictly: the same form for every net of ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from draftsmith.inference.errors import InvalidValue, unknown_choice

Config = TypeVar("Config")


def read_config(kind: type[Config], fields: Mapping[str, Any], what: str, where: str = "config.json") -> Config:
    """A config of dataclass `kind` from the keys of a JSON object; lists become tuples.

    `what` names the network for people ("an EAGLE head"). Raises InvalidValue for keys that are unknown or missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass by contract
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise unknown_choice(f"key in {where}", unknown[0], known)
    needed = {n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(needed - set(fields))
    if missing:
        raise InvalidValue(f"{where} lacks {', '.join(missing)}: it does not describe {what}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
