"""Blocks of a decoder-only transformer of the Llama family: rotary positions, grouped attention, gated MLP, RMS norm.

Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, H query heads, G key/value heads,
d head width, F feed-forward width, V vocabulary. Parameter names are those of transformers.

Serving wants few calls per layer: the residual stream is one matrix [B*n, D]; q, k and v (gate and up) are one product;
everything that all layers share in a pass is computed once and travels as `Step`; modules hold parameters under their
names, and a block reads them through one flat record (`Weights`). Without `fuse` or `pack`, and under autograd, that
record is made from the parameters in each pass, so blocks can be trained.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.masks import additive, beyond_window, check_mask, unseen
from draftsmith.inference.nets.matrices import Matrix, fused, joined, packed, suits_one_dnn
from draftsmith.inference.nets.rope import RopeTable


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and switches of one family of blocks."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str = "silu"  # a name of transformers' ACT2FN
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head (qwen3)


# ---------------------------------------------------------------------------------------------------------------------
# What all layers of a pass share


@dataclass(frozen=True, slots=True)
class View:
    """What the queries of a pass see of a layer's keys."""

    mask: Tensor | None  # additive [B or 1, 1, n, C - first]; None: everything, or the plain causal rule
    packed: Tensor | None  # the same for the queries of a key head side by side: [B or 1, 1, H/G * n, C - first]
    causal: bool  # the plain causal rule over n = C tokens
    first: int  # slots before it are seen by no query


@dataclass(slots=True)
class Step:
    """One forward pass over n tokens of B rows."""

    batch: int
    n: int
    cos: Tensor  # [n, 1, d] or [B, n, 1, d]
    sin: Tensor
    end: int  # C
    cache: StaticCache | None = None
    slots: Tensor | None = None  # int64 [B, n]; only when rows differ in length
    views: dict[int | None, View] = field(default_factory=dict)  # by window


def plan_step(
    rope: RopeTable,
    windows: Iterable[int | None],
    group: int,  # H / G
    batch: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: StaticCache | None = None,
    positions: Tensor | None = None,  # int64 [B, n]
    mask: Tensor | None = None,  # additive, broadcastable to [B, 1, n, C]
) -> Step:
    """Positions, rotary factors and masks of one pass; the same for every layer with the same window.

    The query in slot t sees slot j iff j <= t, and t - j < window where the layer has one. A given `mask` replaces the
    causal rule; the windows are then counted in positions, so that the nodes of a tree see what they would see on the
    straight path. Raises InvalidValue for a full cache and a mask of the wrong shape or type.
    """
    start, slots, length = 0, None, n
    if cache is not None:
        cache.reserve(n)
        start, length = cache.longest, cache.capacity
        if not cache.even:
            slots = cache.positions(n)
    end = start + n
    cos, sin = rope.upto(length, dtype, device)
    if positions is not None:
        if positions.shape[-1] != n or positions.dim() != 2:
            raise InvalidValue(f"positions must be int64 [{batch}, {n}], got {tuple(positions.shape)}")
        cos, sin = rope.at(positions.unsqueeze(2), dtype)
    elif slots is not None:
        cos, sin = cos[slots], sin[slots]
    else:
        cos, sin = cos.narrow(0, start, n), sin.narrow(0, start, n)
    step = Step(batch, n, cos, sin, end, cache, slots)
    if mask is not None:
        check_mask(mask, n, end)
        mask = mask.to(dtype)
    for window in windows:
        limit = None if window is None or window >= end else window
        first, causal, seen = 0, False, mask
        if mask is not None:
            if limit is not None:
                seen = mask + additive(beyond_window(limit, start, end, slots, positions, device), dtype)
        elif slots is None and n == 1:  # no mask where the shapes alone say it
            first = 0 if limit is None else end - limit
        elif slots is None and start == 0 and limit is None:
            causal = True
        else:
            first = 0 if limit is None or slots is not None else max(0, start - limit + 1)
            seen = additive(unseen(limit, start, end, slots, first, device), dtype)
        packed = None if seen is None or group == 1 else seen.repeat(1, 1, group, 1)
        step.views[window] = View(seen, packed, causal, first)
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Holds the parameters of grouped-query attention."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)


class MLP(nn.Module):
    """Holds the parameters of down(act(gate(x)) * up(x))."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


@dataclass(slots=True)
class Weights:
    """A block's parameters as a pass reads them."""

    attention_norm: Tensor  # [D]
    qkv: Matrix  # D -> (H + 2G) * d
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None
    out: Matrix  # H * d -> D
    mlp_norm: Tensor  # [D]
    gate_up: Matrix  # D -> 2F
    down: Matrix  # F -> D


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """transformers' activation of that name. Raises InvalidValue for an unknown one."""
    if name == "silu":
        return F.silu
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InvalidValue(f"unknown activation {name!r}: choose one of {', '.join(sorted(ACT2FN))}")
    act: Callable[[Tensor], Tensor] = ACT2FN[name]
    return act


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: BlockConfig, layer: int, window: int | None = None) -> None:
        super().__init__()
        self.config, self.layer, self.window = config, layer, window
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.act = activation(config.activation)
        self.weights: Weights | None = None  # after `fuse` or `pack`
        self.packed = False

    def _groups(self) -> tuple[list[nn.Linear], ...]:
        """The linears of qkv, out, gate_up and down."""
        a, m = self.self_attn, self.mlp
        return [a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]

    def _record(self, make: Callable[[list[nn.Linear]], Matrix]) -> Weights:
        qkv, out, gate_up, down = (make(linears) for linears in self._groups())
        normed = self.config.qk_norm
        return Weights(
            attention_norm=self.input_layernorm.weight,
            qkv=qkv,
            q_norm=self.self_attn.q_norm.weight if normed else None,
            k_norm=self.self_attn.k_norm.weight if normed else None,
            out=out,
            mlp_norm=self.post_attention_layernorm.weight,
            gate_up=gate_up,
            down=down,
        )

    def fuse(self, copy: bool = True) -> None:
        """Make the projections that read the same input views of one weight each; unset without `copy`.

        Changes in place of the parameters are seen; parameters that are replaced need a new `fuse`.
        """
        self.weights = self._record(lambda linears: fused(linears, copy))

    def pack(self) -> None:
        """Re-lay the large matrices for serving and give up their parameters: the block can only be run from now on."""

        def make(linears: list[nn.Linear]) -> Matrix:
            whole = fused(linears)
            if not suits_one_dnn(whole.weight):
                return whole
            relaid = packed(whole.weight, whole.bias)
            for linear in linears:
                linear.register_parameter("weight", None)
                linear.register_parameter("bias", None)
            self.packed = True
            return relaid

        self.weights = self._record(make)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a copy's parameters are its own, so it has to fuse anew."""
        if self.packed:
            raise InvalidState("a packed network cannot be copied: load it with frozen=False")
        return self.__dict__ | {"weights": None}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B*n, D] -> [B*n, D]; writes this layer's keys and values into the step's cache."""
        weights, eps = self.weights, self.config.norm_eps
        if weights is None or (torch.is_grad_enabled() and not self.packed):
            weights = self._record(joined)
        normed = torch.rms_norm(x, weights.attention_norm.shape, weights.attention_norm, eps)
        x = weights.out.plus(x, self._attend(weights, normed, step))
        normed = torch.rms_norm(x, weights.mlp_norm.shape, weights.mlp_norm, eps)
        gate, up = weights.gate_up(normed).chunk(2, -1)
        return weights.down.plus(x, self.act(gate) * up)

    def _attend(self, weights: Weights, x: Tensor, step: Step) -> Tensor:
        """Grouped-query attention over the cache, or over the pass's own tokens: x [B*n, D], normed -> [B*n, H*d]."""
        config, batch, n = self.config, step.batch, step.n
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        turned = heads + kv_heads
        qkv = weights.qkv(x).view(batch, n, turned + kv_heads, width)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = torch.rms_norm(qkv[:, :, :heads], weights.q_norm.shape, weights.q_norm, config.norm_eps)
            k = torch.rms_norm(qkv[:, :, heads:turned], weights.k_norm.shape, weights.k_norm, config.norm_eps)
            qkv = torch.cat((q, k, qkv[:, :, turned:]), 2)
        qk = qkv.narrow(2, 0, turned)
        swapped = qk.roll(width // 2, -1)  # the halves change places
        qk.mul_(step.cos).addcmul_(swapped, step.sin)
        view = step.views[self.window]
        if step.cache is None:
            keys, values = qkv.narrow(2, heads, 2 * kv_heads).transpose(1, 2).chunk(2, 1)
            if view.first:
                keys, values = keys[:, :, view.first :], values[:, :, view.first :]
        else:
            step.cache.write_joint(self.layer, qkv.narrow(2, heads, 2 * kv_heads), step.slots)
            keys = step.cache.keys[self.layer].narrow(2, view.first, step.end - view.first)
            values = step.cache.values[self.layer].narrow(2, view.first, step.end - view.first)
        q = qkv.narrow(2, 0, heads)
        if n == 1:  # the queries that share a key head are the rows of one attention
            q = q.view(batch, kv_heads, heads // kv_heads, width)
            return F.scaled_dot_product_attention(q, keys, values, view.mask).reshape(batch, heads * width)
        if heads == kv_heads or view.causal:
            q = q.transpose(1, 2)
            grouped = heads != kv_heads
            out = F.scaled_dot_product_attention(q, keys, values, view.mask, is_causal=view.causal, enable_gqa=grouped)
            return out.transpose(1, 2).reshape(batch * n, heads * width)
        # As for one token: no key is repeated in memory, and every kernel takes it (with `enable_gqa` and a mask most
        # fall back to the slow one).
        q = q.view(batch, n, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(q.reshape(batch, kv_heads, -1, width), keys, values, view.packed)
        out = out.view(batch, kv_heads, heads // kv_heads, n, width).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * n, heads * width)
