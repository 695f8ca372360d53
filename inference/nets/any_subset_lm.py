"""Any-subset autoregressive models: every conditional p(x_i | visible subset) along an order, a joint in one pass.

"Self-Speculative Decoding Accelerates Lossless Inference in Any-Order and Any-Subset Autoregressive Models"
(arXiv:2504.20456). A content row of rank r sees content of ranks <= r, and the whole prompt if it belongs to it; the
query of rank r sees content of ranks < r (oracle mask), or of ranks < n whatever its own (draft mask). So the content
states of committed ranks never change, and their keys and values can be kept.

Shape letters: B batch, N canvas, K queries, c content rows of a pass, D width, V vocabulary, m prompt length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.nets.any_subset_layers import Layer, LayerCache, Linear, Pass, Place, distance_encoding
from draftsmith.inference.nets.any_subset_seal import Sealed

SCHEMES = ("absolute", "xlnet")


@dataclass(frozen=True)
class AnySubsetConfig:
    """Sizes and switches of `AnySubsetLM`."""

    vocab_size: int  # with the mask id
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_length: int
    mask_id: int  # stands in the holes of a canvas; is never predicted
    dropout: float = 0.0
    scheme: str = "absolute"  # "absolute": pre-norm, learned positions; "xlnet": layers of the published weights
    sink: bool = False  # one more key that every row sees, so that a canvas may be all holes; scheme absolute
    tied: bool = False  # the head's matrix is the embedding
    head_dim: int | None = None  # default: hidden_size / num_heads
    activation: str = "gelu"  # a name of transformers' ACT2FN
    norm_eps: float = 1e-5
    clamp_length: int = -1  # scheme xlnet: distances are clamped to +-this where it is above 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown_choice("scheme", self.scheme, SCHEMES)
        if not 0 <= self.mask_id < self.vocab_size:
            raise InvalidValue(f"mask_id {self.mask_id} is outside the vocabulary 0..{self.vocab_size - 1}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise InvalidValue(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        if self.sink and self.scheme != "absolute":
            raise InvalidValue("a sink needs scheme 'absolute': put a BOS token into the canvas instead")
        if self.scheme == "xlnet" and self.hidden_size % 2:
            raise InvalidValue(f"scheme 'xlnet' needs an even hidden_size, got {self.hidden_size}")

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_heads


class ContentCache:
    """Keys and values of the content rows of B canvases; slot = rank, behind the sink where there is one.

    Rows see slots below a rank that is all written, so what stands above it may be garbage and is overwritten in time.
    """

    def __init__(self, layers: list[LayerCache], positions: Tensor, offset: int, encoding: Tensor | None) -> None:
        self.layers = layers
        self.positions = positions  # int64 [B, capacity]: of the slots
        self.offset = offset  # 1 with a sink
        self.encoding = encoding

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    def select(self, rows: Tensor) -> None:
        """Keep these rows (int64), in this order."""
        self.positions = self.positions[rows]
        for layer in self.layers:
            layer.select(rows)


class AnySubsetLM(Sealed, nn.Module):
    """One stack for content and query rows, equal to two-stream attention with shared weights."""

    def __init__(self, config: AnySubsetConfig) -> None:
        super().__init__()
        self.config = config
        self.trained: Mapping[str, Any] = {}  # of a loaded one: its manifest's mask_rate, order, ...
        absolute = config.scheme == "absolute"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        if absolute:
            self.embed_positions = nn.Embedding(config.max_length, config.hidden_size)
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if config.sink:
            self.sink = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(
            Layer(
                config.hidden_size,
                config.intermediate_size,
                config.num_heads,
                config.head_width,
                xlnet=not absolute,
                activation=config.activation,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=not absolute)
        self.reset_parameters()
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.query.device

    def fuse(self) -> None:
        """Serve: products of few rows by the fastest kernel. Training and changes in place go on as before."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.fuse()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); the projections back into the residual stream by 1 / sqrt(2 layers) less (GPT-2)."""
        std = 0.02
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 or name in ("query", "sink"):
                thin = name.endswith(("o_proj.weight", "down_proj.weight")) and self.config.scheme == "absolute"
                nn.init.normal_(parameter, std=std / (2 * self.config.num_layers) ** 0.5 if thin else std)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(
        self, tokens: Tensor, rank: Tensor, num_visible: Tensor, targets: Tensor, limit: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, K, D] of queries, without a cache.

        Args: tokens: int64 [B, N]; at ranks that no query sees they do not matter. rank: int64 [B, N], see `orders`.
        num_visible: int64 [B], m. targets: int64 [B, K], positions of the queries. limit: None: the query of rank r
        sees ranks < r (oracle); int64 [B] or [B, K]: it sees ranks < limit (draft).
        Raises InvalidValue for a canvas longer than max_length.
        """
        length = tokens.shape[1]
        self._check_length(length)
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        content = torch.maximum(rank + 1, num_visible.unsqueeze(1))
        if limit is None:
            limit = rank.gather(1, targets)
        elif limit.dim() == 1:
            limit = limit.unsqueeze(1).expand_as(targets)
        seen = torch.cat([content, limit], 1)
        x = torch.cat([self._content(tokens, positions), self._queries(targets)], 1)
        rows, keys = torch.cat([positions, targets], 1), positions
        if self.config.sink:
            x, rank, seen, rows, keys = self._with_sink(x, rank, seen, rows, keys)
        mask = (rank.unsqueeze(1) < seen.unsqueeze(2)).unsqueeze(1)
        encoding = self._encoding(length, x) if self.config.scheme == "xlnet" else None
        step = Pass(keys.shape[1], mask, self._distance(rows, keys, length), encoding)
        for layer in self.layers:
            x = layer(x, step)
        return self._last(x[:, -targets.shape[1] :])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]; the mask id's is -inf."""
        logits: Tensor = self.lm_head(hidden)
        mask_id = self.config.mask_id
        if torch.is_grad_enabled() and logits.requires_grad:
            hidden_id = torch.arange(logits.shape[-1], device=logits.device) == mask_id
            return logits.masked_fill(hidden_id, float("-inf"))
        logits[..., mask_id] = float("-inf")
        return logits

    # -----------------------------------------------------------------------------------------------------------------
    # With a cache

    def new_cache(self, order: Tensor, slack: int = 0) -> ContentCache:
        """An empty cache for canvases of the given order int64 [B, N]; `slack` ranks more may be written behind it."""
        batch, length = order.shape
        self._check_length(length)
        config, like, offset = self.config, self.lm_head.weight, int(self.config.sink)
        positions = torch.cat([order[:, :1].expand(-1, offset), order, order[:, -1:].expand(-1, slack)], 1)
        layers = [
            LayerCache(batch, config.num_heads, offset + length + slack, config.head_width, like.dtype, order.device)
            for _ in self.layers
        ]
        encoding = self._encoding(length, self.lm_head.weight) if config.scheme == "xlnet" else None
        cache = ContentCache(layers, positions, offset, encoding)
        if config.sink:
            x = self.sink.expand(batch, 1, -1)
            mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=order.device)
            for layer, kept in zip(self.layers, layers, strict=True):
                x = layer(x, Pass(1, mask, None, None), kept, Place(0, 1))
        return cache

    def extend(
        self,
        cache: ContentCache,
        tokens: Tensor,
        first: Sequence[int],
        num_visible: Tensor,
        ranks: Tensor,
        limit: Tensor,
    ) -> Tensor:
        """Write content rows into the cache and compute queries over it: hidden states [B, K, D], as `forward`'s.

        Args: tokens: int64 [B, c], content of the ranks first[b], first[b] + 1, ...; c may be 0. num_visible: int64
        [B], m. ranks: int64 [B, K] of the queries. limit: int64 [B, K], the query sees ranks below it; all of them
        must have been written, in this pass or before.
        Raises InvalidState in train mode.
        """
        if self.training:
            raise InvalidState("a cache serves a network in eval mode: call eval()")
        count, offset = tokens.shape[1], cache.offset
        start = torch.tensor(list(first), device=tokens.device)
        own = start.unsqueeze(1) + torch.arange(count, device=tokens.device)  # [B, c] ranks of the content rows
        even = min(first) == max(first)
        slots: int | Tensor = first[0] + offset if even else own + offset
        end = max(first) + count + offset
        seen = torch.cat([torch.maximum(own + 1, num_visible.unsqueeze(1)), limit], 1)
        rows = cache.positions.gather(1, torch.cat([own, ranks], 1) + offset)
        x = torch.cat([self._content(tokens, rows[:, :count]), self._queries(rows[:, count:])], 1)
        keys = torch.arange(-offset, end - offset, device=tokens.device)
        mask = (keys < seen.unsqueeze(2)).unsqueeze(1)
        length = 0 if cache.encoding is None else (cache.encoding.shape[0] + 1) // 2
        step = Pass(count, mask, self._distance(rows, cache.positions[:, :end], length), cache.encoding)
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            x = layer(x, step, kept, Place(slots, end))
        return self._last(x[:, count:])

    # -----------------------------------------------------------------------------------------------------------------

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise InvalidValue(
                f"a canvas of {length} positions asked of a network for {self.config.max_length}: shorten it"
            )

    def _content(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        if self.config.scheme == "absolute":
            x = x + self.embed_positions(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def _queries(self, positions: Tensor) -> Tensor:
        x = self.query.expand(*positions.shape, -1)
        if self.config.scheme == "absolute":
            x = x + self.embed_positions(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def _last(self, x: Tensor) -> Tensor:
        last: Tensor = self.norm(x) if self.config.scheme == "absolute" else x
        return F.dropout(last, self.config.dropout, self.training)

    def _with_sink(
        self, x: Tensor, rank: Tensor, seen: Tensor, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The sink as content row of rank -1, which sees itself and is seen by all."""
        lone = torch.zeros_like(rank[:, :1])
        x = torch.cat([self.sink.expand(x.shape[0], 1, -1), x], 1)
        return (
            x,
            torch.cat([lone - 1, rank], 1),
            torch.cat([lone, seen], 1),
            torch.cat([lone, rows], 1),
            torch.cat([lone, keys], 1),
        )

    def _distance(self, rows: Tensor, keys: Tensor, length: int) -> Tensor | None:
        if self.config.scheme != "xlnet":
            return None
        return (rows.unsqueeze(2) - keys.unsqueeze(1) + length - 1).unsqueeze(1)

    def _encoding(self, length: int, like: Tensor) -> Tensor:
        made = distance_encoding(length, self.config.hidden_size, self.config.clamp_length, like.device)
        return F.dropout(made.to(like.dtype), self.config.dropout, self.training)
