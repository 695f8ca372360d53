"""The native engine: a `CausalLM` behind the engine protocol, checked at the door and run without autograd.

Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import EngineSpec, check_capacity, check_inputs, out_of_vocabulary
from draftsmith.inference.errors import InvalidState
from draftsmith.inference.nets.causal_lm import CausalLM


class NativeEngine:
    """Serves a Llama-family network (llama, mistral, qwen2, qwen3).

    The network's projections are fused here unless it was packed before (see `CausalLM.fuse` and `pack`). Of a fused
    network the parameters keep their names and may be changed in place; they must not be replaced.
    Limits: token ids are checked on the CPU; on an accelerator the check would stall the device, and the caller must.
    """

    def __init__(self, net: CausalLM) -> None:
        self.net = net
        if net.output is None:
            net.fuse()
        config = net.config
        self._spec = EngineSpec(
            family=config.family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            max_length=config.max_length,
        )

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self.net.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.model.embed_tokens.weight.dtype

    @property
    def training(self) -> bool:
        return self.net.training

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """An empty cache. Raises InvalidValue when `capacity` exceeds `spec.max_length`."""
        config = self.net.config
        check_capacity(self._spec, capacity)
        block = config.block
        return StaticCache(
            config.num_layers, batch, block.num_kv_heads, block.head_dim, capacity, self.dtype, self.device
        )

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        cache: StaticCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `engine.Engine.forward`. Raises InvalidState in train mode, InvalidValue for inputs that do not fit."""
        net = self.net
        if net.training:
            raise InvalidState("the network is in train mode: call eval() (dropout breaks exactness)")
        check_inputs(self._spec, tokens, embeds, cache, aux_layers)
        if net.output is None:  # a copy
            net.fuse()
        try:
            with torch.inference_mode():
                hidden, aux = net(
                    tokens, embeds=embeds, cache=cache, positions=positions, mask=mask, aux_layers=aux_layers
                )
        except IndexError:  # the embedding's own check
            error = None if tokens is None else out_of_vocabulary(tokens, self._spec.vocab_size)
            if error is None:
                raise
            raise error from None
        if torch.is_inference_mode_enabled():
            return hidden, aux
        return hidden.clone(), tuple(x.clone() for x in aux)  # clones of inference tensors are ordinary tensors

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        with torch.no_grad():
            return self.net.head(hidden)
