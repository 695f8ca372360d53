"""Do a draft and its target mean the same by an id? Asked of their settings, before anything is built."""

from pathlib import Path

from draftsmith.inference import manifest
from draftsmith.inference.checkpoint import read_json
from draftsmith.inference.couplings import Side, shared_vocabulary, tokenizer_identity
from draftsmith.modules.hf_model import HFModel


def check_vocabulary(draft: HFModel, teacher: HFModel | None) -> None:
    """Refuse, before anything is built, a draft whose ids are not the target's.

    Raises InvalidValue naming both vocabularies. What lies on the hub instead of in a directory is checked when loaded.
    """
    sides = [_side(spec) for spec in (teacher, draft) if spec is not None]
    if len(sides) < 2 or sides[0] is None or sides[1] is None:
        return
    shared_vocabulary(sides[0], sides[1])


def _side(spec: HFModel) -> Side | None:
    if spec.arch is not None:
        size = spec.arch.get("vocab_size")
        return None if size is None else Side(Path("model.draft"), None, int(size), None)
    directory = Path(str(spec.path)).expanduser()
    if not (directory / "config.json").is_file():
        return None
    size = read_json(directory / "config.json").get("vocab_size")
    return None if size is None else Side(directory, manifest.read(directory), int(size), tokenizer_identity(directory))
