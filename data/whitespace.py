"""Code for tokenizers that drop whitespace: line ends, tabs and runs of spaces become tokens that text never uses.

XLNet's tokenizer makes every run of whitespace one space. The any-subset models' code run (arXiv 2504.20456) replaces
line ends, tabs and runs of spaces by spelt special tokens before tokenising; its table looks for two spaces before
three, so that three are never found. Here the longest run comes first, and the map lives in the tokenizer itself: a
copy of its directory that encodes and decodes whitespace as it is, which exports carry like any other tokenizer.
Limits: a character that the vocabulary lacks is encoded as the same token as two spaces, as there.
"""

import json
from pathlib import Path
from typing import Any

from draftsmith.inference.errors import InvalidValue

XLNET = {"   ": "<pad>", "  ": "<unk>", "\n": "<cls>", "\t": "<sep>"}  # the longest run first
_PRIVATE = 0xE000  # code points that no text uses stand for the runs inside the tokenizer
_KEPT = ("bos_token", "eos_token", "mask_token", "model_max_length")


def keep_whitespace(source: Path, target: Path, runs: dict[str, str] = XLNET) -> None:
    """Write into `target` a copy of the tokenizer of `source` in which each run of whitespace is the token beside it.

    The tokens lose their former meaning: what has them (a classifier's [CLS]) is no use for them here. Raises
    InvalidValue for a tokenizer without those tokens, or without XLNet's way to mark spaces.
    """
    try:
        backend = json.loads((source / "tokenizer.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise InvalidValue(f"cannot read {source / 'tokenizer.json'} ({e}): data.text.whitespace needs it") from e
    model, added = backend.get("model", {}), {token["content"]: token for token in backend.get("added_tokens", [])}
    lacking = [token for token in runs.values() if token not in added]
    if model.get("type") != "Unigram" or "Metaspace" not in json.dumps(backend.get("pre_tokenizer")) or lacking:
        why = f"it lacks {lacking[0]}" if lacking else "it is no SentencePiece Unigram tokenizer"
        raise InvalidValue(f"the tokenizer in {str(source)!r} is not like XLNet's ({why}): leave data.text.whitespace")
    symbols = {run: chr(_PRIVATE + i) for i, run in enumerate(runs)}
    for run, token in runs.items():
        model["vocab"][added[token]["id"]][0] = symbols[run]
        added[token].update(content=symbols[run], special=False, normalized=True, lstrip=False, rstrip=False)
    before = backend.get("normalizer")
    backend["normalizer"] = _sequence("normalizers", [_replace(a, b) for a, b in symbols.items()], before)
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    backend["pre_tokenizer"] = space
    backend["decoder"] = {"type": "Sequence", "decoders": [space, *(_replace(b, a) for a, b in symbols.items())]}
    backend["post_processor"] = None  # it would add tokens that now are whitespace
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    kept = {name: settings[name] for name in _KEPT if settings.get(name) is not None}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), "utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(kept, indent=2), "utf-8")


def _replace(one: str, other: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": one}, "content": other}


def _sequence(name: str, first: list[dict[str, Any]], then: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "Sequence", name: [*first, *([] if then is None else [then])]}
