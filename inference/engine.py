"""The engine protocol (contract 2): a network that maps tokens to hidden states over a cache, and a head, apart.

They are apart because feature drafters, chunked losses and "gather before the head" need the hidden states.
Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class EngineSpec:
    """The sizes that a decoder needs to know of a network."""

    family: str  # "llama", "gpt2", ...
    vocab_size: int  # rows of the head; may be padded above the tokenizer's size
    hidden_size: int
    num_layers: int
    max_length: int  # longest context that the positions allow


class Engine(Protocol):
    """A frozen causal language model ready to decode."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def training(self) -> bool:
        """True while the network is in train mode (dropout); decoders refuse it, since it breaks exactness."""
        ...

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """An empty cache. Raises InvalidValue when `capacity` exceeds `spec.max_length`."""
        ...

    def forward(
        self,
        tokens: Tensor | None = None,  # int64 [B, n]
        *,
        embeds: Tensor | None = None,  # [B, n, D], instead of tokens: rows of the input embedding
        cache: StaticCache | None = None,  # None: no memory, plain causal attention over the n tokens
        positions: Tensor | None = None,  # int64 [B, n]; default: cache.lengths[b] + 0..n-1
        mask: Tensor | None = None,  # float, additive, broadcastable to [B, 1, n, C]; replaces the causal rule (trees)
        aux_layers: Sequence[int] = (),  # 0: the embeddings, i: after layer i; as transformers' hidden_states
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(hidden [B, n, D] after the final norm, one [B, n, D] per aux layer). Writes the cache and advances it by n.

        The n tokens go to the slots cache.lengths[b] + 0..n-1 whatever `positions` says. Sliding windows hold under a
        `mask` too, counted in positions. The last layer's aux state is `hidden` itself (after the final norm). Unless
        the caller runs in inference mode, ordinary tensors come back, which a training step may use. Nothing waits for
        the device.
        Raises InvalidState in train mode; InvalidValue for a full cache, ids outside the vocabulary (checked on the CPU
        only: elsewhere it would stall the device), layers that are not there, a mask of the wrong shape or type.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the network's dtype."""
        ...


def check_capacity(spec: EngineSpec, capacity: int) -> None:
    """Raises InvalidValue when the positions end before `capacity` tokens."""
    if capacity > spec.max_length:
        raise InvalidValue(
            f"{capacity} tokens asked of a {spec.family} network whose positions allow {spec.max_length}: "
            "shorten the prompt or max_new_tokens"
        )


def check_inputs(
    spec: EngineSpec,
    tokens: Tensor | None,
    embeds: Tensor | None,
    cache: StaticCache | None,
    aux_layers: Sequence[int],
) -> None:
    """The checks of `Engine.forward` that need no device. Raises InvalidValue."""
    if (tokens is None) == (embeds is None):
        raise InvalidValue("give exactly one of tokens [B, n] and embeds [B, n, D]")
    if tokens is not None:
        shape, good = tokens.shape, tokens.dim() == 2
    else:
        assert embeds is not None
        shape, good = embeds.shape, embeds.dim() == 3 and embeds.shape[2] == spec.hidden_size
    if not good or 0 in shape:
        raise InvalidValue(f"tokens must be [B, n], embeds [B, n, {spec.hidden_size}], none empty; got {list(shape)}")
    if cache is None:
        check_capacity(spec, shape[1])
    elif cache.batch != shape[0]:
        raise InvalidValue(f"{shape[0]} rows were fed to a cache of {cache.batch} rows")
    for layer in aux_layers:
        if not 0 <= layer <= spec.num_layers:
            raise InvalidValue(f"aux layer {layer} is outside 0..{spec.num_layers} (0 = embeddings)")


def out_of_vocabulary(tokens: Tensor, vocab_size: int) -> InvalidValue | None:
    """The error that names a token id outside the vocabulary; None when all are inside. Waits for the device."""
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.numel() == 0:
        return None
    return InvalidValue(
        f"token id {int(bad[0])} is outside the vocabulary 0..{vocab_size - 1}: use the tokenizer of this model"
    )
