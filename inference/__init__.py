"""Load what was trained and decode with it. Nothing heavy is imported before it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import draftsmith.inference.registry as registry
    from draftsmith.inference.loader import load

__all__ = ["load", "registry"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("draftsmith.inference.loader").load
    if name == "registry":
        return importlib.import_module("draftsmith.inference.registry")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
