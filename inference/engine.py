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
        """An empty cache.

        Raises InvalidValue when `capacity` exceeds `spec.max_length`; InvalidType when the state cannot be rolled back.
        """
        ...

    def forward(
        self,
        tokens: Tensor | None = None,  # int64 [B, n]
        *,
        embeds: Tensor | None = None,  # [B, n, D], instead of tokens
        cache: StaticCache | None = None,  # None: no memory, plain causal attention over the n tokens
        positions: Tensor | None = None,  # int64 [B, n]; default: cache.lengths[b] + 0..n-1
        mask: Tensor | None = None,  # float, additive, broadcastable to [B, 1, n, C]; replaces the causal rule (trees)
        aux_layers: Sequence[int] = (),  # hidden states AFTER these layers (0 = embeddings) are returned as well
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(hidden [B, n, D] after the final norm, one [B, n, D] per aux layer); writes the cache, advances it by n."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the network's dtype."""
        ...
