"""Export of several routed drafts: one folder per key, each a whole export, and router.json beside them."""

from pathlib import Path

from draftsmith.data.router import DraftRouter, write_router
from draftsmith.inference import checkpoint
from draftsmith.inference.errors import InvalidType
from draftsmith.inference.manifest import Manifest, Provenance
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers import export


def export_drafts(
    module: object,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> dict[str, Manifest]:
    """Write all drafts of a module below `out`, atomically as one; returns the manifests by key.

    A run that never served has no router yet: requests are then routed by their tag. Raises as `export.write`, and
    InvalidType for a module of another kind.
    """
    if not isinstance(module, OSDDrafter):
        raise InvalidType(f"{type(module).__name__} does not have several routed drafts")
    made: dict[str, Manifest] = {}

    def writer(directory: Path) -> None:
        for key in module.draft_keys:
            spec = module.export_spec(key)
            made[key] = export.write(spec, directory / key, dtype=dtype, provenance=provenance)
        write_router(module.router or DraftRouter(module.draft_keys).state_dict(), directory)

    checkpoint.write_export(Path(out), writer, overwrite=overwrite)
    return made
