"""A Hugging Face directory (config.json, safetensors) becomes an engine: native for the Llama family, else adapted.

Weights are read tensor by tensor out of the mapped files into their final place and dtype: what is held at any moment
is the network and one tensor. Nothing is unpickled and no code of the directory is run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.inference.checkpoint import TensorHeader, read_header, read_json, weight_files
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import FAMILIES, CausalLM, CausalLMConfig

ENGINES = ("auto", "native", "hf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float32}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_engine(
    path: str | Path,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    frozen: bool = True,
) -> Engine:
    """Load a causal language model for decoding, in eval mode.

    Args:
        engine: "native" (llama, mistral, qwen2, qwen3), "hf" (adapter over the transformers class), or "auto": native
            where there is a native net.
        dtype: to compute in; "auto": as the weights are stored.
        max_length: see `CausalLMConfig.from_hf`; native engine only. Default: what the configuration allows.
        frozen: the weights will be neither read nor changed, so a native network may re-lay them (`CausalLM.pack`).
    Raises InvalidValue or InvalidType, one line, for whatever is missing, damaged, unknown or would need foreign code.
    """
    directory = Path(path)
    if engine not in ENGINES:
        raise unknown_choice("engine", engine, ENGINES)
    if dtype not in ("auto", *DTYPES):
        raise unknown_choice("dtype", dtype, ("auto", *DTYPES))
    if not directory.is_dir():
        raise InvalidValue(f"no such directory: {directory} (models are loaded from local directories only)")
    config = read_json(directory / "config.json")
    family = config.get("model_type")
    native = family in FAMILIES and engine != "hf"
    if engine == "native" and not native:
        raise InvalidValue(
            f"{directory} is of the family {family!r}; the native engine has {', '.join(FAMILIES)}: use engine='hf'"
        )
    _check_config(directory, config, native)
    files = weight_files(directory)
    headers = {path: read_header(path) for path in files}
    target = DTYPES[dtype] if dtype != "auto" else _stored_dtype(directory, config, headers)
    if native:
        net = _load_native(directory, config, headers, target, torch.device(device), max_length)
        if frozen:
            net.pack()
        return NativeEngine(net)
    if max_length is not None:
        raise InvalidValue(f"max_length is a setting of the native engine; {directory} is loaded by the adapter")
    return _load_adapter(directory, target, torch.device(device))


def _check_config(directory: Path, config: Mapping[str, Any], native: bool) -> None:
    """Refuse remote code and quantised weights."""
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InvalidValue(
            f"{directory} holds quantised weights ({method}): use the model in float32, bfloat16 or float16"
        )
    if native:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    family = config.get("model_type")
    if family not in CONFIG_MAPPING_NAMES:
        code = " and would run Python code of its own (auto_map), which is never done" if "auto_map" in config else ""
        raise InvalidValue(f"{directory} is of the family {family!r}, which transformers does not know{code}")


def _stored_dtype(
    directory: Path, config: Mapping[str, Any], headers: Mapping[Path, Mapping[str, TensorHeader]]
) -> torch.dtype:
    """The dtype of most stored numbers; float64 is computed in float32."""
    counts: dict[str, int] = {}
    for header in headers.values():
        for tensor in header.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.end - tensor.start
    name = max(counts, key=lambda n: counts[n]) if counts else ""
    if name not in _STORED:
        raise InvalidValue(f"{directory} stores its weights as {name or 'nothing'}: give dtype, or another model")
    return _STORED[name]


def _load_native(
    directory: Path,
    fields: Mapping[str, Any],
    headers: Mapping[Path, Mapping[str, TensorHeader]],
    dtype: torch.dtype,
    device: torch.device,
    max_length: int | None,
) -> CausalLM:
    with torch.device("meta"):
        net = CausalLM(CausalLMConfig.from_hf(fields, max_length))
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    stored = {name: entry.shape for header in headers.values() for name, entry in header.items()}
    # old checkpoints carry the inverse frequencies, which follow from the configuration
    stored = {name: shape for name, shape in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    alias = {}
    if net.config.tied:  # one of the two is enough
        if _EMBEDDING not in stored and _HEAD in stored:
            alias = {_HEAD: _EMBEDDING}
        elif _HEAD not in stored:
            del wanted[_HEAD]
    _check_names(directory, wanted, {alias.get(name, name): shape for name, shape in stored.items()}, bool(alias))
    net = net.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    net.fuse(copy=False)  # each tensor is then read straight to its place in a joint weight
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in _tensors(headers):
            if name in stored:
                place = alias.get(name, name)
                if place == _HEAD and net.config.tied:
                    _check_tied(directory, tensor, headers, dtype)
                else:
                    parameters[place].copy_(tensor)
    return net


def _check_names(
    directory: Path, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], swapped: bool
) -> None:
    """Refuse missing, unexpected and misshaped tensors, naming the first of them."""
    missing = sorted(set(wanted) - set(stored) - ({_HEAD} if swapped else set()))
    unexpected = sorted(set(stored) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(stored) if wanted[name] != stored[name])
    if missing or unexpected or wrong:
        example = (
            f"first missing {missing[0]}"
            if missing
            else f"{wrong[0]} is {list(stored[wrong[0]])}, not {list(wanted[wrong[0]])}"
            if wrong
            else f"first unexpected {unexpected[0]}"
        )
        raise InvalidValue(
            f"{directory}: the weights do not fit config.json: {len(missing)} tensors missing, {len(unexpected)} "
            f"unexpected, {len(wrong)} misshaped ({example})"
        )


def _tensors(headers: Mapping[Path, Mapping[str, TensorHeader]]) -> Iterator[tuple[str, Tensor]]:
    for path, header in headers.items():
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                for name in header:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise InvalidValue(f"{path} is not a sound safetensors file ({error}): copy it again") from error


def _check_tied(
    directory: Path, head: Tensor, headers: Mapping[Path, Mapping[str, TensorHeader]], dtype: torch.dtype
) -> None:
    """config.json says that the head is the embedding; a stored head must then agree."""
    path = next(path for path, header in headers.items() if _EMBEDDING in header)
    with safe_open(str(path), framework="pt", device="cpu") as file:
        same = torch.equal(head.to(dtype), file.get_tensor(_EMBEDDING).to(dtype))
    if not same:
        raise InvalidValue(
            f"{directory}: config.json ties the head to the embedding, but the stored lm_head.weight differs from it: "
            "set tie_word_embeddings to false in config.json"
        )


def _load_adapter(directory: Path, dtype: torch.dtype, device: torch.device) -> Engine:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from draftsmith.inference.hf_adapter import HFEngine

    family = read_json(directory / "config.json")["model_type"]
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InvalidValue(
            f"{directory} is of the family {family!r}, which has no causal language model in transformers"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidValue(
            f"{directory} cannot be loaded by transformers: {' '.join(str(error).split()):.300}"
        ) from error
    missing = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if missing:
        raise InvalidValue(
            f"{directory}: the weights do not fit config.json: {len(missing)} tensors missing or misshaped "
            f"(first {missing[0]})"
        )
    return HFEngine(model.to(device).eval().requires_grad_(False))
