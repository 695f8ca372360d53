"""Which format a drafter's directory has, and by what evidence. Two formats at once are an error, never a guess."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats import eagle, hf_assistant, medusa, own, speculators
from draftsmith.inference.formats.files import MEDUSA_FILE, read_config, read_shapes
from draftsmith.inference.formats.specforge import ARCHITECTURE
from draftsmith.inference.formats.specforge import NAME as SPECFORGE


@dataclass(frozen=True)
class Detected:
    """A format and what speaks for it."""

    format: str  # a row of formats.FORMATS
    evidence: str


def detect(directory: Path, *, allow_pickle: bool = False) -> Detected:
    """The format of `directory`. Raises InvalidValue, with the evidence, where two formats fit or none does."""
    if not directory.is_dir():
        raise InvalidValue(f"no such directory: {directory} (drafters are read from local directories only)")
    config = read_config(directory)
    if isinstance(config.get("eagle"), dict):
        return Detected(own.NAME, "config.json has an object 'eagle'")
    kind = config.get("speculators_model_type")
    if kind is not None:
        return Detected(speculators.NAME, f"config.json has speculators_model_type {kind!r}")
    found = _candidates(config, read_shapes(directory, allow_pickle=allow_pickle), directory)
    names = {one.format for one in found}
    if len(names) == 1:
        return found[0]
    if not names:
        raise InvalidValue(
            f"{directory}: no known drafter format: config.json has architectures {config.get('architectures')}, "
            f"model_type {config.get('model_type')!r}, and its tensors are no EAGLE's, Medusa's or language model's"
        )
    evidence = "; ".join(f"{one.format}: {one.evidence}" for one in found)
    raise InvalidValue(f"{directory} fits several formats ({evidence}): say which with --from FORMAT")


def _candidates(config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], directory: Path) -> list[Detected]:
    found: list[Detected] = []
    architectures = config.get("architectures")
    stated = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if (directory / MEDUSA_FILE).is_file() or "medusa_num_heads" in config:
        found.append(Detected(medusa.NAME, f"{MEDUSA_FILE} or medusa_num_heads is there"))
    midlayer = any(name.startswith(eagle.MIDLAYER) for name in shapes)
    eagle3 = [name for name in stated if "Eagle3" in name]
    if eagle3 or midlayer:
        why = f"architectures {stated}" + (", midlayer.* tensors" if midlayer else ", but no midlayer.* tensors")
        found.append(Detected(SPECFORGE if ARCHITECTURE in stated else eagle.NAME, why))
    fc = shapes.get("fc.weight")
    if fc is not None and len(fc) == 2 and fc[1] == 2 * fc[0] and "layers.0.self_attn.q_proj.weight" in shapes:
        found.append(Detected(eagle.NAME, f"fc.weight {list(fc)} reads two states and layers.0 is there"))
    if "model.embed_tokens.weight" in shapes or "transformer.wte.weight" in shapes or "lm_head.weight" in shapes:
        whole = fc is None and not midlayer and "model_type" in config
        if whole:
            found.append(Detected(hf_assistant.NAME, f"a {config['model_type']} language model's tensors"))
    return found
