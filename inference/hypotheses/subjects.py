"""A target and a drafter's directory become a subject of diagnosis; what is certainly wrong is said before any pass."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from draftsmith.inference.checkpoint import read_header, read_json, weight_files
from draftsmith.inference.couplings import tokenizer_identity
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.formats.convert import read_drafter
from draftsmith.inference.formats.files import rope_of
from draftsmith.inference.formats.record import DrafterRecord, LMFields
from draftsmith.inference.hypotheses.base import Facts, Subject
from draftsmith.inference.hypotheses.eagle_head import LAYER, EagleCouplings, EagleSubject
from draftsmith.inference.hypotheses.language_model import lm_subject
from draftsmith.inference.hypotheses.served_law import ALL, LawFilter
from draftsmith.inference.hypotheses.window import window_of
from draftsmith.inference.loader import LoadedPart
from draftsmith.inference.nets.eagle_head import EagleConfig

EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
HEAD = "lm_head.weight"


def load_subject(
    target: LoadedPart,
    drafter: Path,
    *,
    format: str | None = None,
    allow_pickle: bool = False,
    served: tuple[LawFilter, LawFilter] = (ALL, ALL),
) -> tuple[Subject, list[str], list[str]]:
    """(subject, faults that are certain, notes). served: filters of the target's law and of the draft's.

    Raises InvalidValue for a drafter that no coupling could run.

    Raises InvalidType for a kind that cannot be diagnosed (block drafters and Medusa heads are not among the families).
    """
    record = read_drafter(drafter, target=target.path, format=format, allow_pickle=allow_pickle, strict=False)
    certain = [*record.problems, *_tokenizers(target.path, drafter)]
    if isinstance(record.fields, LMFields):
        return _served(lm_subject(target, drafter, record), served), certain, list(record.notes)
    if not isinstance(record.fields, EagleConfig):
        raise InvalidType(
            f"{drafter} has the format {record.format!r}: diagnosed are EAGLE drafters and language models"
        )
    certain += _sizes(target, record.fields)
    return _served(eagle_subject(target, record), served), certain, [*record.notes, *_origins(record)]


def eagle_subject(target: LoadedPart, record: DrafterRecord) -> EagleSubject:
    """An EAGLE drafter under the couplings that its files state. Raises InvalidValue where something is missing."""
    config = record.fields
    assert isinstance(config, EagleConfig)
    spec, lent = target.part.spec, target_matrices(target.path)
    if not config.own_embedding and "embedding" not in lent:
        raise InvalidValue(f"the drafter reads its target's embedding, but {target.path} holds none under a known name")
    fits = config.hidden_size == spec.hidden_size and len(lent) == 2
    rope, _ = rope_of(read_json(target.path / "config.json"))
    facts = Facts(
        target_layers=spec.num_layers,
        target_rope=rope,
        has_map="d2t" in record.tensors,
        draft_vocab_size=config.draft_vocab_size,
        vocab_size=config.vocab_size,
        own_embedding=config.own_embedding,
        own_head=config.version == 3,
        same_width=fits,
        square_kv=True,
        square_qk=config.num_heads == config.num_kv_heads,
        half_head=config.head_dim % 2 == 0,
        target_window=window_of(target.path),
    )
    couplings = EagleCouplings(
        version=config.version,
        aux_layers=config.aux_layers,
        rope=dict(config.rope),
        norm_before_residual=config.norm_before_residual,
        norm_before_fc=config.norm_before_fc,
        fc_norm=config.fc_norm,
        norm_output=config.norm_output,
        embedding="own" if config.own_embedding else "target",
        head="own" if config.version == 3 else "target",
    )
    return EagleSubject(record, lent, facts, couplings)


def _served(subject: Any, filters: tuple[LawFilter, LawFilter]) -> Any:
    subject.facts = replace(subject.facts, target_filter=filters[0])
    subject.couplings = replace(subject.couplings, law_filter=filters[1])
    return subject


def target_matrices(directory: Path) -> dict[str, Tensor]:
    """ "embedding" and "head" [V, D] of a target's directory, as far as they have a known name."""
    names = {name: path for path in weight_files(directory) for name in read_header(path)}
    embedding = next((name for name in EMBEDDINGS if name in names), None)
    head = HEAD if HEAD in names else embedding  # a tied head is not stored
    found: dict[str, Tensor] = {}
    for what, name in (("embedding", embedding), ("head", head)):
        if name is not None:
            with safe_open(str(names[name]), framework="pt", device="cpu") as file:
                found[what] = file.get_tensor(name)
    return found


def corrected(subject: EagleSubject, couplings: EagleCouplings) -> DrafterRecord:
    """The drafter whose files state what `couplings` say, for any engine that reads files alone.

    Raises InvalidValue, with what to do in the engine, for what no file can state (pairing of tokens and states).
    """
    c, deployed = couplings, subject.couplings
    engine: tuple[str, ...] = ("feature_shift", "token_shift", "step_offset", "features", "hidden_norm", "final_norm")
    engine += ("final_state_normed", "windows", "rotary_share", "law_filter", "rendering")
    beyond = [name for name in engine if getattr(c, name) != getattr(deployed, name)]
    if beyond:
        raise InvalidValue(f"{', '.join(beyond)} is how an engine feeds it: no file can state that, fix the engine")
    record, config = subject.record, subject.config
    tensors: dict[str, Tensor] = dict(record.tensors)
    if c.swapped:
        pair = {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "k_v": ("self_attn.k_proj", "self_attn.v_proj")}
        pair["q_k"] = ("self_attn.q_proj", "self_attn.k_proj")
        first, second = (f"{LAYER}{name}.weight" for name in pair[c.swapped])
        tensors[first], tensors[second] = tensors[second], tensors[first]
    if c.interleaved:
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            tensors |= _halves(tensors, name, heads, config.head_dim)
    ids = subject._ids(c)
    if c.map != "offset" and "d2t" in tensors:
        tensors = _with_ids(tensors, ids, config.vocab_size)
    if c.head != deployed.head:
        tensors["lm_head.weight"] = subject._head(c, ids).to(record.tensors["fc.weight"].dtype)
    if c.embedding == "target":
        tensors.pop("embed_tokens.weight", None)
    missing = {"norm_before_fc": {"input_norm.weight": config.feature_size}}
    missing["fc_norm"] = {f"fc_norm.{i}.weight": config.target_hidden_size for i in range(len(c.aux_layers))}
    for flag, names in missing.items():
        for name, size in names.items():
            if getattr(c, flag):
                tensors.setdefault(name, torch.ones(size, dtype=record.tensors["fc.weight"].dtype))
            else:
                tensors.pop(name, None)
    fields = replace(
        config,
        aux_layers=c.aux_layers,
        rope=dict(c.rope),
        norm_before_residual=c.norm_before_residual,
        norm_before_fc=c.norm_before_fc,
        fc_norm=c.fc_norm,
        norm_output=c.norm_output,
        own_embedding=c.embedding == "own",
    )
    return replace(record, fields=fields, tensors=tensors, problems=())


def _halves(tensors: Mapping[str, Tensor], name: str, heads: int, size: int) -> dict[str, Tensor]:
    """q or k of a drafter with neighbouring rotary pairs, its rows permuted to pairs of halves."""
    found = {}
    for kind in ("weight", "bias"):
        full = f"{LAYER}self_attn.{name}_proj.{kind}"
        if full in tensors:
            by_head = tensors[full].view(heads, size // 2, 2, *tensors[full].shape[1:])
            found[full] = by_head.transpose(1, 2).flatten(0, 2).contiguous()
    norm = f"{LAYER}self_attn.{name}_norm.weight"
    if norm in tensors:
        found[norm] = tensors[norm].view(size // 2, 2).transpose(0, 1).flatten().contiguous()
    return found


def _with_ids(tensors: Mapping[str, Tensor], ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Rows of the head sorted by their target ids, d2t as offsets, t2d to match."""
    if bool((ids < 0).any()) or len(set(ids.tolist())) != len(ids):
        raise InvalidValue("two rows of the head mean one id, or a row means none: the map cannot be written")
    order = ids.argsort()
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    head = tensors["lm_head.weight"][order].contiguous()
    return {**tensors, "d2t": ids[order] - torch.arange(len(ids)), "t2d": t2d, "lm_head.weight": head}


def _sizes(target: LoadedPart, config: EagleConfig) -> list[str]:
    """Sizes that cannot fit, each a sentence."""
    spec, found = target.part.spec, []
    if config.target_hidden_size != spec.hidden_size:
        raise InvalidValue(
            f"the drafter reads states of width {config.target_hidden_size} (fc.weight takes {config.fc_inputs} inputs "
            f"for {len(config.aux_layers)} states), the target's are {spec.hidden_size} wide: it is for another target"
        )
    if config.vocab_size > spec.vocab_size:
        found.append(f"the drafter was made for {config.vocab_size} ids, the target's head has {spec.vocab_size}")
    if config.max_positions < spec.max_length:
        found.append(f"its {config.max_positions} positions end before the target's {spec.max_length}: long texts fail")
    return found


def _tokenizers(target: Path, drafter: Path) -> list[str]:
    ours, theirs = tokenizer_identity(target), tokenizer_identity(drafter)
    if ours is None or theirs is None or ours.vocab_map_hash == theirs.vocab_map_hash:
        return []
    return ["the drafter's tokenizer maps ids to other tokens than the target's: it is for another target"]


def _origins(record: DrafterRecord) -> list[str]:
    guessed = {name: origin for name, origin in record.origins.items() if origin != "config.json"}
    return [f"{name} {getattr(record.fields, name, '')} is not stated: {origin}" for name, origin in guessed.items()]
