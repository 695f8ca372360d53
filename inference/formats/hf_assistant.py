"""Format of transformers' assisted generation: a plain causal language model with a generation_config.json.

Nothing in config.json says "drafter". transformers' defaults (20 tokens, confidence 0.4, a schedule that adapts) hide
how good a draft is, so the values that were measured as best are written into the assistant's generation_config.
Limits of transformers (5.23): batch 1, chains only, one tokenizer for both unless both are passed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.inference.checkpoint import INDEX_FILE, read_json, weight_files
from draftsmith.inference.couplings import TOKENIZER_FILES
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats.files import CONFIG, read_config, read_tensors, write_json
from draftsmith.inference.formats.record import DrafterRecord, LMFields, refuse, value_problems

NAME = "hf"
GENERATION = "generation_config.json"
# transformers' defaults, where a draft was not measured: stated, so that the file says what will happen
DEFAULTS: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


def assistant_settings(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Our decoder's settings (manifest: decode_defaults) as the assistant's generation_config states them.

    draft_length becomes num_assistant_tokens; a constant schedule drafts all of them (threshold 0), `confidence` stops
    at the same draft confidence, `heuristic` is transformers' own.
    """
    settings = dict(DEFAULTS)
    if "draft_length" in measured:
        settings |= {"num_assistant_tokens": int(measured["draft_length"]), "assistant_confidence_threshold": 0.0}
    if measured.get("schedule") == "confidence":
        settings["assistant_confidence_threshold"] = float(measured.get("confidence_threshold", 0.4))
    if measured.get("schedule") == "heuristic":
        settings["num_assistant_tokens_schedule"] = "heuristic"
    return settings


def write(source: Path, directory: Path, *, measured: Mapping[str, Any]) -> None:
    """Copy a language model's files and state how it assists best. Raises InvalidValue for what is no such model."""
    config = read_config(source)
    if "model_type" not in config:
        raise InvalidValue(f"{source}: config.json has no model_type: the hf format holds causal language models only")
    for path in weight_files(source):
        shutil.copyfile(path, directory / path.name)
    for name in (CONFIG, INDEX_FILE, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    stated = read_json(source / GENERATION) if (source / GENERATION).is_file() else {}
    write_json(directory / GENERATION, {**stated, **assistant_settings(measured)})


def read(directory: Path, *, allow_pickle: bool = False) -> DrafterRecord:
    """Read a language model's directory. Raises InvalidValue for broken weights."""
    config, tensors = read_config(directory), read_tensors(directory, allow_pickle=allow_pickle)
    refuse(value_problems(tensors), str(directory))
    generation = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    return DrafterRecord(LMFields(config, generation), tensors, NAME)
