"""Hugging Face causal language models as parts of a module: built by name or from sizes, and teachers kept out of it.

Language models train as the Hugging Face class (contract 1), split into body and head, since every loss goes through
the chunked head. Weights are read from safetensors only, code from the installed transformers only.
Shape letters: B batch, T time, N positions, D width, V vocabulary.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidState, InvalidType, InvalidValue, unknown_choice
from draftsmith.modules.losses.chunked_head import TeacherHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# configuration keys by which an architecture changes its logits AFTER the head, and the value that means "does not"
_LOGIT_CHANGES: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "output_logit_soft_cap": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_mup_width_multiplier": 1.0,
}


@dataclass(frozen=True)
class Birth:
    """Contexts in which a strategy lets networks be built: ZeRO-3 cuts their parameters to pieces as they are made."""

    trained: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher: Callable[[], AbstractContextManager[None]] = nullcontext
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = nullcontext  # within, these are whole


_birth: ContextVar[Birth] = ContextVar("birth", default=Birth())  # noqa: B039  # frozen


@contextmanager
def born(birth: Birth) -> Iterator[None]:
    """Within, networks that train and teachers are built in these contexts; all others are built whole."""
    token = _birth.set(birth)
    try:
        yield
    finally:
        _birth.reset(token)


@dataclass(frozen=True)
class HFModel:
    """Which causal language model, and in which number format its weights live.

    Exactly one of `path` and `arch` is given. With a mixed-precision trainer keep float32 here (master weights).
    """

    path: str | None = None  # a local directory, or a Hugging Face name
    dtype: str = "float32"
    revision: str | None = None  # branch, tag or commit, when `path` is a name
    arch: dict[str, Any] | None = None  # random weights: model_type and sizes, as in the model's config.json

    def __post_init__(self) -> None:
        if (self.path is None) == (self.arch is None):
            raise InvalidValue(
                "a model needs exactly one of path (a directory or name) and arch (model_type and sizes)"
            )
        if self.dtype not in DTYPES:
            raise unknown_choice("dtype", self.dtype, DTYPES)
        if self.arch is not None and "model_type" not in self.arch:
            raise InvalidValue("model.arch has no model_type: add one, for example model_type: llama")

    @classmethod
    def of(cls, spec: "HFModel | Mapping[str, Any]") -> "HFModel":
        """From itself, or from the plain dict that a checkpoint's hyper-parameters hold."""
        return spec if isinstance(spec, HFModel) else cls(**spec)

    def build(self) -> "PreTrainedModel":
        """The model in train mode: random weights for `arch`, else those of `path`.

        Raises InvalidValue (one line) for a path that cannot be loaded, a model_type or size that does not exist;
        InvalidType for an architecture that changes its logits after the head.
        """
        model = self._from_sizes(self.arch) if self.arch is not None else self._from_path(str(self.path))
        refuse_changed_logits(model)
        model.config.use_cache = False  # training never decodes with it
        return model.train()

    def build_trained(self) -> "PreTrainedModel":
        """As `build`, for a network that trains: born as the strategy wants it (`born`)."""
        with _birth.get().trained():
            return self.build()

    def _from_sizes(self, arch: Mapping[str, Any]) -> "PreTrainedModel":
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type, sizes = arch["model_type"], {k: v for k, v in arch.items() if k != "model_type"}
        try:
            default = AutoConfig.for_model(model_type)
        except ValueError as e:
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

            near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidValue(f"transformers has no model_type {model_type!r}{hint}") from e
        known = set(default.to_dict()) | set(default.attribute_map)
        for key in sizes:
            if key not in known:
                raise unknown_choice(f"model.arch key for {model_type}", key, known)
        try:
            config = AutoConfig.for_model(model_type, **sizes)
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])
        except StrictDataclassError as e:  # "... validation error for ...:\n  ValueError: the reason"
            reason = str(e).strip().splitlines()[-1].strip()
            raise InvalidValue(f"model.arch cannot be built as {model_type}: {reason}") from e
        except (ValueError, TypeError, KeyError, RuntimeError) as e:
            raise InvalidValue(f"model.arch cannot be built as {model_type}: {_first_line(e)}") from e

    def _from_path(self, path: str) -> "PreTrainedModel":
        from transformers import AutoModelForCausalLM

        here = Path(path).expanduser()
        if not here.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise InvalidValue(f"no model directory {path!r}")
        try:
            with torch.random.fork_rng():  # born in pieces it is initialised first: loading shall draw nothing
                return AutoModelForCausalLM.from_pretrained(
                    str(here) if here.is_dir() else path,
                    revision=self.revision or "main",
                    dtype=DTYPES[self.dtype],
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except (OSError, ValueError, KeyError) as e:
            if here.is_dir():
                raise InvalidValue(f"cannot load a causal language model from {path!r}: {_first_line(e)}") from e
            raise InvalidValue(
                f"cannot load model {path!r}: no such directory, and neither in the local Hugging Face cache nor "
                f"reachable on the hub ({_first_line(e)})"
            ) from e


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def refuse_changed_logits(model: "PreTrainedModel") -> None:
    """Raise InvalidType when the logits are not simply head(hidden): losses here would see other ones than decoding."""
    for key, neutral in _LOGIT_CHANGES.items():
        value = getattr(model.config, key, neutral)
        if value is not None and value != neutral:
            raise InvalidType(
                f"{model.config.model_type} changes its logits after the head ({key}={value}), which the chunked "
                "losses do not know: choose a model without it"
            )


def output_head(model: "PreTrainedModel") -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of the head. Raises InvalidType when the head is not one linear map."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InvalidType(f"{type(model).__name__} has no single linear head, which the chunked losses need")
    return head.weight, head.bias


def head_rows(model: "PreTrainedModel") -> int:
    """Rows V of the head, also while its weight is cut to pieces (ZeRO-3 leaves an empty tensor between steps)."""
    rows: int = model.get_output_embeddings().out_features
    return rows


def whole_head(model: "PreTrainedModel") -> Tensor:
    """A copy [V, D] of the head's weight as it was born; to be called in `configure_model`, by all ranks."""
    weight, _ = output_head(model)
    with _birth.get().gathered([weight]):  # type: ignore[list-item]  # a parameter
        return weight.detach().clone()


def last_hidden(
    model: "PreTrainedModel",
    ids: Tensor,  # int64 [B, T]
    positions: Tensor | None = None,  # int64 [B, T]; default 0, 1, 2, ...
    mask: Tensor | None = None,  # bool [B, 1, T, T], True = may see; default: causal
) -> Tensor:
    """Hidden states [B, T, D] after the final norm: what the head is applied to. No cache."""
    if mask is not None and model.config._attn_implementation != "sdpa":
        low = torch.finfo(model.dtype).min
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, low)
    out = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


class FrozenTeacher:
    """A target held OUTSIDE module registration: not an `nn.Module`, so a LightningModule that holds one neither saves,
    shards nor trains it, and nobody moves it to the device but `to`.

    Raises InvalidState for a network in train mode or with a parameter that requires a gradient.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        if model.training:
            raise InvalidState("the target is in train mode (its laws would be noisy): call eval() on it first")
        if any(p.requires_grad for p in model.parameters()):
            raise InvalidState("the target requires gradients: freeze it with requires_grad_(False) first")
        refuse_changed_logits(model)
        self.model = model
        self.parts: Any | None = None  # what gathers its layers, where a strategy has cut it to pieces

    @classmethod
    def load(cls, spec: HFModel) -> Self:
        """Build and freeze, as the strategy wants it (`born`). Raises as `HFModel.build`."""
        with _birth.get().teacher():
            return cls(spec.build().eval().requires_grad_(False))

    def to(self, device: torch.device | str) -> Self:
        """Move it (in place)."""
        self.model.to(device)
        return self

    @property
    def vocab_size(self) -> int:
        """Rows of its head, padding included."""
        return head_rows(self.model)

    @torch.no_grad()
    def hidden(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As `last_hidden`, without gradient."""
        return last_hidden(self.model, ids, positions, mask)

    def head(self, hidden: Tensor, temperature: float = 1.0) -> TeacherHead:
        """The live teacher of N positions for the chunked head; hidden [N, D] from `hidden`."""
        weight, bias = output_head(self.model)
        return TeacherHead(hidden, weight, temperature, bias)


def special_ids(tokenizer_dir: str | Path) -> dict[str, int]:
    """The bos/eos/pad ids of a tokenizer directory, as far as it has them, under their config.json keys."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True, trust_remote_code=False)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: value for key in keys if (value := getattr(tokenizer, key)) is not None}


def set_special_ids(model: "PreTrainedModel", ids: Mapping[str, int]) -> None:
    """Write them into the configurations that an export carries: a network made from sizes knows only its family's."""
    for config in (model.config, model.generation_config):
        if config is not None:
            for key, value in ids.items():
                setattr(config, key, value)
