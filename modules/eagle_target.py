"""What an EAGLE head learns from: a frozen target whose states are read in process, or only its embedding and head.

Shape letters: B batch, T time, F width of the states read (layers times Dt), Dt width of the target, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.checkpoint import weight_files
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.eagle_head import EagleConfig, default_aux_layers
from draftsmith.modules.hf_model import DTYPES, HFModel, output_head, refuse_changed_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EagleSizes:
    """A head's sizes and switches; what is null is taken from the target."""

    version: int = 3  # 1: EAGLE-1/2, a head on the target's last state; 3: EAGLE-3
    aux_layers: tuple[int, ...] | None = None  # states read ("after" a layer, 0: embeddings); null: 2, L/2, L-3
    draft_vocab_size: int | None = None  # the most frequent tokens of the training labels; null: all
    family: str | None = None  # llama, or qwen3 (norms on each query and key head)
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool | None = None  # null: true for EAGLE-1 only
    own_embedding: bool = False  # true: a copy of the target's embedding that is trained and exported

    @classmethod
    def of(cls, sizes: "EagleSizes | dict[str, Any]") -> "EagleSizes":
        """From itself, or from the plain dict of a checkpoint's hyper-parameters."""
        return sizes if isinstance(sizes, EagleSizes) else cls(**sizes)

    def config(self, target: Any) -> EagleConfig:
        """For a target with this transformers configuration. Raises InvalidValue for sizes that do not fit it."""
        target = target.get_text_config()
        heads = self.num_heads or target.num_attention_heads
        width = self.hidden_size or target.hidden_size
        own_dim = getattr(target, "head_dim", None) if self.num_heads is None else None
        kv_heads = getattr(target, "num_key_value_heads", None) if self.num_heads is None else None
        layers = self.aux_layers or default_aux_layers(target.num_hidden_layers, self.version)
        beyond = [i for i in layers if i > target.num_hidden_layers]
        if beyond:
            raise InvalidValue(
                f"head.aux_layers names layer {beyond[0]}, the target has {target.num_hidden_layers}: "
                f"choose from 0..{target.num_hidden_layers}"
            )
        rope = getattr(target, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
        return EagleConfig(
            version=self.version,
            family=self.family or ("qwen3" if target.model_type == "qwen3" else "llama"),
            hidden_size=width,
            target_hidden_size=target.hidden_size,
            intermediate_size=self.intermediate_size or getattr(target, "intermediate_size", None) or 4 * width,
            num_heads=heads,
            num_kv_heads=self.num_kv_heads or kv_heads or heads,
            head_dim=self.head_dim or own_dim or width // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=self.draft_vocab_size or target.vocab_size,
            aux_layers=tuple(layers),
            max_positions=target.max_position_embeddings,
            rope=dict(rope),
            norm_eps=getattr(target, "rms_norm_eps", 1e-6),
            fc_bias=self.version == 1 if self.fc_bias is None else self.fc_bias,
            norm_before_residual=self.norm_before_residual,
            norm_before_fc=self.norm_before_fc,
            fc_norm=self.fc_norm,
            norm_output=self.norm_output,
            own_embedding=self.own_embedding,
        )


@dataclass(frozen=True)
class Observed:
    """What the target made of a batch."""

    features: Tensor  # [B, T, F], the states that the head reads
    last: Tensor | None  # [B, T, Dt], after the final norm: what the target's head is applied to
    laws: tuple[Tensor, Tensor] | None = None  # instead: ids int64 and log p [B, T, k] of the k likeliest tokens


class EagleTarget:
    """A target held outside module registration: neither saved, sharded nor trained; `to` moves it.

    `load` reads the whole network; `tables` only its embedding and head, for states that were cached before.
    """

    def __init__(self, config: Any, embedding: Tensor, head: tuple[Tensor, Tensor | None], model: Any = None) -> None:
        self.config, self.embedding, self.model = config, embedding, model
        self.head_weight, self.head_bias = head

    @classmethod
    def load(cls, spec: HFModel) -> Self:
        """Build and freeze. Raises as `HFModel.build`."""
        return cls.of(spec.build().eval().requires_grad_(False))

    @classmethod
    def of(cls, model: "PreTrainedModel") -> Self:
        """A network that is there already. Raises InvalidState unless it is frozen and in eval mode."""
        if model.training or any(p.requires_grad for p in model.parameters()):
            raise InvalidState("the target must be frozen: call eval() and requires_grad_(False) on it first")
        refuse_changed_logits(model)
        table: Any = model.get_input_embeddings()
        return cls(model.config, table.weight, output_head(model), model)

    @classmethod
    def tables(cls, spec: HFModel) -> Self:
        """Embedding and head alone, read from the safetensors files of a local directory."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if spec.path is None or not Path(spec.path).is_dir():
            raise InvalidValue(f"cached states need the target's directory, got {spec.path or spec.arch!r}")
        directory = Path(spec.path)
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype])
        refuse_changed_logits(model)
        weight, bias = output_head(model)
        wanted = {"embedding": model.get_input_embeddings().weight, "head": weight, "bias": bias}
        stored = _read(directory, model, wanted, DTYPES[spec.dtype])
        return cls(config, stored["embedding"], (stored["head"], stored.get("bias")))

    def to(self, device: torch.device | str) -> Self:
        """Move it (in place)."""
        if self.model is not None:
            self.model.to(device)
            self.embedding = self.model.get_input_embeddings().weight
            self.head_weight, self.head_bias = output_head(self.model)
            return self
        self.embedding = self.embedding.to(device)
        self.head_weight = self.head_weight.to(device)
        self.head_bias = None if self.head_bias is None else self.head_bias.to(device)
        return self

    @property
    def vocab_size(self) -> int:
        """Rows of its head, padding included."""
        return self.head_weight.shape[0]

    @torch.no_grad()
    def observe(self, batch: TokenBatch, aux_layers: Sequence[int]) -> Observed:
        """Run it over a batch. Raises InvalidState where only its tables were loaded."""
        if self.model is None:
            raise InvalidState("only the target's embedding and head are loaded: set model.cached to false")
        apart = batch.separate
        return read_states(
            self.model,
            batch.ids,
            aux_layers,
            batch.positions() if apart else None,
            batch.visible() if apart else None,
        )


@torch.no_grad()
def read_states(
    model: "PreTrainedModel",
    ids: Tensor,  # int64 [B, T]
    aux_layers: Sequence[int],
    positions: Tensor | None = None,  # int64 [B, T]
    mask: Tensor | None = None,  # bool [B, 1, T, T]
) -> Observed:
    """The states after `aux_layers`, side by side, and the last one. The last layer's is that after the final norm."""
    if mask is not None and model.config._attn_implementation != "sdpa":
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    base: Any = model.base_model
    out = base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, output_hidden_states=True)
    states = (*out.hidden_states[:-1], out.last_hidden_state)
    return Observed(torch.cat([states[i] for i in aux_layers], -1), out.last_hidden_state)


def _read(directory: Path, model: nn.Module, wanted: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the parameters of a weightless model that they fill."""
    from safetensors import safe_open

    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    left = {key: names[id(p)] for key, p in wanted.items() if p is not None}
    found: dict[str, Tensor] = {}
    for path in weight_files(directory):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            there = set(file.keys())
            for key, name in left.items():
                if name in there and key not in found:
                    found[key] = file.get_tensor(name).to(dtype)
    if "head" not in found and "embedding" in found and wanted["head"] is wanted["embedding"]:
        found["head"] = found["embedding"]
    lack = sorted(set(left) - set(found))
    if lack:
        raise InvalidValue(f"{directory} holds no {left[lack[0]]}: it is not a checkpoint of {type(model).__name__}")
    return found
