"""A drafter between two file formats: the configuration and tensors that every reader returns and every writer takes.

Tensor names of EAGLE heads are those of the speculators library ("canonical"); every other format is a rename. Layer
ids are indices into transformers' hidden_states (0 the embeddings, i the state after layer i), whatever the files say.
Shape letters: V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.eagle_head import EagleConfig, shapes

MAP_TENSORS = ("d2t", "t2d")
EMBEDDING = "embed_tokens.weight"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MedusaFields:
    """What the files of Medusa heads say of them."""

    heads: int
    layers: int  # residual blocks of a head
    hidden_size: int
    vocab_size: int
    base: str  # base_model_name_or_path


@dataclass(frozen=True)
class LMFields:
    """A plain causal language model: its config.json and generation_config.json."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrafterRecord:
    """A drafter as read, or ready to be written."""

    fields: EagleConfig | MedusaFields | LMFields
    tensors: Mapping[str, Tensor]
    format: str = ""  # a row of formats.FORMATS; "" where it was not read from files
    origins: Mapping[str, str] = field(default_factory=dict)  # field -> "config.json", "shape of ...", "default of ..."
    notes: Sequence[str] = ()  # what a reader should know: conventions applied, values that disagree
    problems: Sequence[str] = ()  # what is wrong with it; only where it was not read strictly


def make_config(values: Mapping[str, Any], problems: list[str]) -> EagleConfig | None:
    """EagleConfig(**values); None, with the reason added to `problems`, where there is no such head."""
    try:
        return EagleConfig(**values)
    except InvalidValue as error:
        problems.append(str(error))
        return None


def eagle_problems(config: EagleConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Everything that is wrong with the tensors of a head, a sentence each; empty when they are sound."""
    found = shape_problems(shapes(config), tensors)
    return found + value_problems(tensors) + map_problems(tensors, config.draft_vocab_size, config.vocab_size)


def shape_problems(wanted: Shapes, tensors: Mapping[str, Tensor]) -> list[str]:
    """Missing, unknown and misshaped tensors."""
    found = [f"{name} is missing, it should be {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    extra = sorted(set(tensors) - set(wanted))
    found += [f"{name} {list(tensors[name].shape)} belongs to no such drafter" for name in extra]
    return found + [
        f"{name} is {list(tensors[name].shape)}, it should be {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]


def value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """NaN and infinities: an untrained or forgotten tensor."""
    return [
        f"{name} holds NaN or infinity"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def map_problems(tensors: Mapping[str, Tensor], draft_vocab: int, vocab: int) -> list[str]:
    """d2t holds offsets: ids = arange(Vd) + d2t, strictly increasing and below V; t2d marks exactly these ids."""
    if not set(tensors) & set(MAP_TENSORS):
        return []
    if not set(MAP_TENSORS) <= set(tensors):
        return ["one of d2t and t2d is missing: they come as a pair"]
    d2t, t2d, found = tensors["d2t"], tensors["t2d"], []
    if d2t.dtype != torch.int64 or t2d.dtype != torch.bool:
        found.append(f"d2t must be int64 and t2d bool, they are {d2t.dtype} and {t2d.dtype}")
    if d2t.shape != (draft_vocab,) or t2d.shape != (vocab,):
        return found  # said by the shapes
    marked = int(t2d.sum())
    if marked != draft_vocab:
        found.append(f"t2d marks {marked} ids, draft_vocab_size is {draft_vocab}")
    ids = torch.arange(draft_vocab) + d2t
    if not (ids.diff() > 0).all() or ids[0] < 0 or ids[-1] >= vocab:
        found.append(f"arange + d2t must rise strictly within 0..{vocab - 1} (d2t holds offsets, not ids)")
    elif marked == draft_vocab and not t2d[ids].all():
        found.append("t2d marks other ids than d2t leads to")
    return found


def finish(
    config: EagleConfig | None,
    tensors: Mapping[str, Tensor],
    name: str,
    origins: Mapping[str, str],
    notes: Sequence[str],
    problems: list[str],
    where: str,
    strict: bool,
) -> DrafterRecord:
    """The end of every reader of EAGLE heads: tensors are checked, and all problems are raised at once, or kept.

    Without `strict` only what makes the drafter impossible to compute is raised: no configuration, no such tensors.
    """
    if config is not None:
        impossible = shape_problems(shapes(config), tensors)
        problems += eagle_problems(config, tensors)
        if strict or impossible:
            refuse(problems, where)
        return DrafterRecord(config, tensors, name, origins, notes, problems)
    refuse(problems, where)
    raise AssertionError("no configuration and no problem")


def refuse(problems: Sequence[str], what: str) -> None:
    """Raises InvalidValue with all problems at once; nothing where there are none."""
    if problems:
        raise InvalidValue(f"{what}: {len(problems)} problem{'s'[: len(problems) > 1]}: {'; '.join(problems)}")
