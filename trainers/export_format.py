"""`draftsmith export RUN OUT --format FORMAT`: a run's drafter straight into the format of another engine."""

import tempfile
from pathlib import Path
from typing import Any

from draftsmith.inference import checkpoint, manifest
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats.convert import WRITABLE, convert
from draftsmith.inference.manifest import Manifest

__all__ = ["WRITABLE", "export_as"]


def export_as(
    run: str | Path, out: Path, to: str, *, target: str | None = None, overwrite: bool = False, **options: Any
) -> dict[Path, Manifest]:
    """Export a run, sealed as ever, into a temporary directory, and convert that into `out`.

    The manifest goes along: the seal speaks of the same numbers under other names. options: of `export.export_run`.
    Raises InvalidValue for a run of several drafts, and with every reason why the format cannot hold the drafter.
    """
    from draftsmith.trainers.export import export_run  # which offers this as an option

    checkpoint.check_destination(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="draftsmith-export-") as scratch:
        made = export_run(run, Path(scratch) / "export", target=target, **options)
        if len(made) != 1:
            raise InvalidValue(f"--format writes one draft, this run has {len(made)}: name it with --draft KEY")
        convert(next(iter(made)), out, to, target=target, overwrite=overwrite)
    written = manifest.read(out)
    assert written is not None
    return {out: written}
