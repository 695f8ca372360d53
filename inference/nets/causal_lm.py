"""The native causal language model: llama, mistral, qwen2 and qwen3 with the parameter names of transformers.

Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.matrices import Matrix, matrix, packed, suits_one_dnn
from draftsmith.inference.nets.rope import RopeTable, rope_frequencies
from draftsmith.inference.nets.transformer import Block, BlockConfig, RMSNorm, plan_step

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class CausalLMConfig:
    """Everything that decides the network's function; `from_hf` reads it from a transformers configuration."""

    family: str
    vocab_size: int
    num_layers: int
    block: BlockConfig
    tied: bool  # the head is the embedding
    windows: tuple[int | None, ...]  # per layer: how many positions back it sees, itself included
    rope: Mapping[str, Any]  # transformers' rope_parameters
    max_positions: int  # max_position_embeddings
    max_length: int  # longest text: max_positions, but see `from_hf`

    @property
    def hidden_size(self) -> int:
        return self.block.hidden_size

    @staticmethod
    def from_hf(hf_config: Any, max_length: int | None = None) -> "CausalLMConfig":
        """From a transformers configuration of one of FAMILIES, or its dictionary (a parsed config.json).

        max_length: the longest text that will be decoded, at most max_position_embeddings. It matters for `longrope`,
        whose frequencies depend on the length of the text: up to original_max_position_embeddings (the default) the
        short set is used, as transformers does for such texts; a larger `max_length` uses the long set for every text,
        as transformers does for the texts beyond. Choosing by the text at hand would change the keys in the cache in
        the middle of a text, and no roll-back would be exact. For the same reason `dynamic` is limited to
        max_position_embeddings, up to which it is plain RoPE.
        Raises InvalidValue for another family and for settings that the family's transformers class does not have.
        """
        if isinstance(hf_config, Mapping):
            hf_config = _parse(hf_config)
        family = hf_config.model_type
        if family not in FAMILIES:
            raise InvalidValue(f"{family!r} is not a native family ({', '.join(FAMILIES)}): load it with engine='hf'")
        rope = dict(hf_config.rope_parameters)
        positions = hf_config.max_position_embeddings
        limit = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else positions
        if max_length is not None and not 1 <= max_length <= positions:
            raise InvalidValue(
                f"max_length {max_length} is outside 1..{positions}, the positions that this {family} network allows"
            )
        heads = hf_config.num_attention_heads
        bias = bool(getattr(hf_config, "attention_bias", False))
        block = BlockConfig(
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            num_heads=heads,
            num_kv_heads=hf_config.num_key_value_heads or heads,
            # qwen2 has no such field but its network reads it where a config.json brings one
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            norm_eps=hf_config.rms_norm_eps,
            activation=hf_config.hidden_act,
            qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and bias),
            o_bias=family in ("llama", "qwen3") and bias,
            mlp_bias=family == "llama" and bool(getattr(hf_config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
        )
        if block.num_heads % block.num_kv_heads:
            raise InvalidValue(f"{heads} attention heads cannot share {block.num_kv_heads} key/value heads evenly")
        return CausalLMConfig(
            family=family,
            vocab_size=hf_config.vocab_size,
            num_layers=hf_config.num_hidden_layers,
            block=block,
            tied=bool(hf_config.tie_word_embeddings),
            windows=_windows(hf_config),
            rope=rope,
            max_positions=positions,
            max_length=min(limit, positions) if max_length is None else max_length,
        )

    def with_max_length(self, max_length: int) -> "CausalLMConfig":
        """The same network for texts up to `max_length` (see `from_hf`)."""
        return replace(self, max_length=max_length)


def _parse(fields: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InvalidValue(f"{family!r} is not a native family ({', '.join(FAMILIES)}): load it with engine='hf'")
    return AutoConfig.for_model(**fields)


def _windows(hf_config: Any) -> tuple[int | None, ...]:
    """The window of each layer, as the family's transformers class applies it."""
    layers: int = hf_config.num_hidden_layers
    if hf_config.model_type == "llama":
        return (None,) * layers
    window: int | None = hf_config.sliding_window
    if hf_config.model_type == "mistral":
        return (window,) * layers
    kinds = hf_config.layer_types
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other:
        raise InvalidValue(f"layer_types {sorted(other)}: the native network has full_attention and sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise InvalidValue("layer_types name sliding_attention but sliding_window is unset: set use_sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Backbone(nn.Module):
    """Embedding, blocks and final norm (`model.` in the parameter names)."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.block, i, w) for i, w in enumerate(config.windows))
        self.norm = RMSNorm(config.hidden_size, config.block.norm_eps)


class CausalLM(nn.Module):
    """A Llama-family network whose state dict has exactly the names and shapes of the transformers class."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output: Matrix | None = None  # the head, after `fuse` or `pack`
        self.packed = False
        self._windows = tuple(dict.fromkeys(config.windows))
        block = config.block
        self.rope = RopeTable(
            partial(rope_frequencies, config.rope, block.head_dim, config.max_positions, config.max_length)
        )
        self.register_load_state_dict_post_hook(lambda net, _: net.mend())  # type: ignore[no-untyped-call]  # torch's
        self.mend()

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]  # a ModuleList is typed as a list of Module

    # -----------------------------------------------------------------------------------------------------------------
    # Serving forms

    def fuse(self, copy: bool = True) -> None:
        """Make the projections that read the same input views of one weight each: faster passes in the same memory.

        Parameters keep their names and may be changed in place. `copy=False` leaves the joint weights unset, for a
        loader that fills the parameters next.
        """
        for block in self.blocks:
            block.fuse(copy)
        self.output = matrix(self.lm_head.weight, None)

    def pack(self) -> None:
        """Fuse, and on the CPU in float32 re-lay the large matrices for oneDNN, in place of their parameters.

        From then on the network can be run, but its weights can be neither read nor changed.
        """
        for block in self.blocks:
            block.pack()
        if not self.config.tied and suits_one_dnn(self.lm_head.weight):
            self.output = packed(self.lm_head.weight, None)
            self.lm_head.register_parameter("weight", None)
            self.packed = True
        else:  # a tied head is the embedding, which has to stay readable
            self.output = matrix(self.lm_head.weight, None)
        self.packed = self.packed or any(block.packed for block in self.blocks)

    def mend(self) -> None:
        """Tie the head again, and fuse again what was fused, after parameters were replaced."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.output is not None:
            self.fuse()

    def _check_readable(self) -> None:
        if self.packed:
            raise InvalidState(
                "the network is packed for serving and has no readable weights: load it with frozen=False"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module. Raises InvalidState for a packed network."""
        self._check_readable()
        return super().state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every module. Raises InvalidState for a packed network."""
        self._check_readable()
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        self._check_readable()
        if self.config.tied:
            self.lm_head.register_parameter("weight", None)  # else the embedding is converted twice
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.mend()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a copy's parameters are its own, so it has to fuse anew."""
        self._check_readable()
        return self.__dict__ | {"output": None}

    # -----------------------------------------------------------------------------------------------------------------
    # Passes

    def forward(
        self,
        tokens: Tensor | None = None,  # int64 [B, n]
        *,
        embeds: Tensor | None = None,  # [B, n, D]
        cache: StaticCache | None = None,
        positions: Tensor | None = None,  # int64 [B, n]
        mask: Tensor | None = None,  # additive, broadcastable to [B, 1, n, C]
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(hidden [B, n, D] after the final norm, one [B, n, D] per aux layer); see `engine.Engine.forward`."""
        config, model = self.config, self.model
        if embeds is None:
            assert tokens is not None
            embeds = F.embedding(tokens, model.embed_tokens.weight)
        batch, n, width = embeds.shape
        block = config.block
        step = plan_step(
            self.rope,
            self._windows,
            block.num_heads // block.num_kv_heads,
            batch,
            n,
            embeds.dtype,
            embeds.device,
            cache,
            positions,
            mask,
        )
        x = embeds.reshape(batch * n, width)
        seen = {0: x} if 0 in aux_layers else {}
        for i, layer in enumerate(model.layers, 1):
            x = layer(x, step)
            if i in aux_layers:
                seen[i] = x
        if cache is not None:
            cache.advance(n)
        hidden = model.norm(x)
        if config.num_layers in aux_layers:
            seen[config.num_layers] = hidden
        return hidden.view(batch, n, width), tuple(seen[i].view(batch, n, width) for i in aux_layers)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        if self.output is None or (torch.is_grad_enabled() and not self.packed):
            return F.linear(hidden, self.lm_head.weight)
        return self.output(hidden)
