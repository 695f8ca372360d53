"""Blocks of a decoder-only transformer of the Llama family: rotary positions, grouped attention, gated MLP, RMS norm.

Shape letters: B batch, n new tokens, C cache slots up to the longest row, D width, H query heads, G key/value heads,
d head width, F feed-forward width, V vocabulary. Parameter names are those of transformers.

Serving wants few calls per layer: the residual stream is one matrix [B*n, D]; q, k and v (gate and up) are read from
one matrix each, of which the named parameters are views (`fuse`); everything that all layers share in a pass is
computed once and travels as `Step`. Under autograd the parameters are used one by one, so the blocks can be trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.cache import StaticCache
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.masks import additive, beyond_window, check_mask, unseen
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
    cos: Tensor  # [B or 1, n, 1, d]
    sin: Tensor
    end: int  # C
    cache: StaticCache | None = None
    slots: Tensor | None = None  # int64 [B, n]; only when rows differ in length
    views: dict[int | None, View] = field(default_factory=dict)  # by window


def plan_step(
    rope: RopeTable,
    windows: Sequence[int | None],
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
    if cache is None:
        start, even = 0, True
    else:
        cache.reserve(n)
        start, even = cache.longest, cache.even
    end = start + n
    slots = None if even else cache.positions(n) if cache is not None else None
    cos, sin = rope.upto(cache.capacity if cache is not None else end, dtype, device)
    if positions is not None:
        if positions.shape[-1] != n or positions.dim() != 2:
            raise InvalidValue(f"positions must be int64 [{batch}, {n}], got {tuple(positions.shape)}")
        cos, sin = rope.at(positions, dtype)
    elif slots is not None:
        cos, sin = cos[slots], sin[slots]
    else:
        cos, sin = cos[start:end].unsqueeze(0), sin[start:end].unsqueeze(0)
    step = Step(batch, n, cos.unsqueeze(2), sin.unsqueeze(2), end, cache, slots)
    if mask is not None:
        check_mask(mask, n, end)
        mask = mask.to(dtype)
    for window in set(windows):
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


def fuse_linears(linears: Sequence[nn.Linear], copy: bool = True) -> tuple[Tensor, Tensor | None]:
    """One weight [sum of outs, in] (and bias) of which the linears' parameters become views; without `copy` unset."""

    def join(parameters: list[Tensor]) -> Tensor:
        first = parameters[0]
        size = sum(p.shape[0] for p in parameters)
        with torch.inference_mode(False), torch.no_grad():
            joint = torch.empty((size, *first.shape[1:]), dtype=first.dtype, device=first.device)
            start = 0
            for parameter in parameters:
                part = joint.narrow(0, start, parameter.shape[0])
                if copy:
                    part.copy_(parameter)
                parameter.data = part
                start += parameter.shape[0]
        return joint

    weight = join([x.weight for x in linears])
    return weight, None if linears[0].bias is None else join([x.bias for x in linears])


def are_views(fused: tuple[Tensor, Tensor | None] | None, linears: Sequence[nn.Linear]) -> bool:
    """Whether the parameters still are the views that `fuse_linears` made: `.to`, deepcopy, assignment part them."""
    if fused is None or fused[0].device != linears[0].weight.device:
        return False
    place, step = fused[0].data_ptr(), fused[0].element_size() * fused[0].shape[1]
    for linear in linears:
        if linear.weight.data_ptr() != place:
            return False
        place += step * linear.out_features if place else 0  # meta tensors all lie at 0
    return True


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over a static cache, or over the pass's own tokens when there is none."""

    def __init__(self, config: BlockConfig, layer: int, window: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.window = window
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.fused: tuple[Tensor, Tensor | None] | None = None

    def fuse(self, copy: bool = True) -> None:
        """Make q, k and v views of one weight."""
        self.fused = fuse_linears([self.q_proj, self.k_proj, self.v_proj], copy)

    def is_fused(self) -> bool:
        """Whether the parameters still are the views that `fuse` made."""
        return are_views(self.fused, [self.q_proj, self.k_proj, self.v_proj])

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B*n, D], normed -> the heads' outputs [B*n, H*d], before `o_proj`."""
        if self.fused is None or torch.is_grad_enabled():
            projected = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        else:
            projected = F.linear(x, *self.fused)
        batch, n, heads, kv_heads = step.batch, step.n, self.heads, self.kv_heads
        qkv = projected.view(batch, n, heads + 2 * kv_heads, self.head_dim)
        turned = heads + kv_heads
        if self.q_norm is not None and self.k_norm is not None:
            qkv = torch.cat(
                (self.q_norm(qkv[:, :, :heads]), self.k_norm(qkv[:, :, heads:turned]), qkv[:, :, turned:]), 2
            )
        qk = qkv.narrow(2, 0, turned)
        swapped = qk.roll(self.head_dim // 2, -1)  # the halves change places
        qk.mul_(step.cos).addcmul_(swapped, step.sin)
        view = step.views[self.window]
        if step.cache is None:
            keys, values = (
                qkv.narrow(2, heads, kv_heads).transpose(1, 2),
                qkv.narrow(2, turned, kv_heads).transpose(1, 2),
            )
            if view.first:
                keys, values = keys[:, :, view.first :], values[:, :, view.first :]
        else:
            step.cache.write_joint(self.layer, qkv.narrow(2, heads, 2 * kv_heads), step.slots)
            length = step.end - view.first
            keys = step.cache.keys[self.layer].narrow(2, view.first, length)
            values = step.cache.values[self.layer].narrow(2, view.first, length)
        q = qkv.narrow(2, 0, heads)
        if heads == kv_heads or view.causal:
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, view.mask, is_causal=view.causal, enable_gqa=heads != kv_heads
            )
            return out.transpose(1, 2).reshape(batch * n, heads * self.head_dim)
        # The queries that share a key head become the rows of one attention: no key is repeated in memory, and every
        # kernel takes it (with `enable_gqa` and a mask most fall back to the slow one).
        group = heads // kv_heads
        q = q.view(batch, n, kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            q.reshape(batch, kv_heads, group * n, self.head_dim), keys, values, view.packed
        )
        out = out.view(batch, kv_heads, group, n, self.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * n, heads * self.head_dim)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) without the last product."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act: Callable[[Tensor], Tensor] = F.silu if config.activation == "silu" else activation(config.activation)
        self.fused: tuple[Tensor, Tensor | None] | None = None

    def fuse(self, copy: bool = True) -> None:
        """Make gate and up views of one weight."""
        self.fused = fuse_linears([self.gate_proj, self.up_proj], copy)

    def is_fused(self) -> bool:
        """Whether the parameters still are the views that `fuse` made."""
        return are_views(self.fused, [self.gate_proj, self.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        """x [B*n, D], normed -> [B*n, F], before `down_proj`."""
        if self.fused is None or torch.is_grad_enabled():
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, *self.fused).chunk(2, -1)
        inner: Tensor = self.act(gate) * up
        return inner


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """transformers' activation of that name. Raises InvalidValue for an unknown one."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InvalidValue(f"unknown activation {name!r}: choose one of {', '.join(sorted(ACT2FN))}")
    act: Callable[[Tensor], Tensor] = ACT2FN[name]
    return act


def add_linear(x: Tensor, linear: nn.Linear, inner: Tensor) -> Tensor:
    """x + linear(inner), in one call where there is no bias. x: [N, out], inner: [N, in]."""
    if linear.bias is None:
        return torch.addmm(x, inner, linear.weight.t())
    added: Tensor = x + linear(inner)
    return added


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: BlockConfig, layer: int, window: int | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, window)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def fuse(self, copy: bool = True) -> None:
        """Make the projections that read the same input views of one weight each."""
        self.self_attn.fuse(copy)
        self.mlp.fuse(copy)

    @property
    def ever_fused(self) -> bool:
        return self.self_attn.fused is not None

    def is_fused(self) -> bool:
        """Whether all parameters still are the views that `fuse` made."""
        return self.self_attn.is_fused() and self.mlp.is_fused()

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B*n, D] -> [B*n, D]; writes this layer's keys and values into the step's cache."""
        attention, mlp = self.self_attn, self.mlp
        x = add_linear(x, attention.o_proj, attention(self.input_layernorm(x), step))
        return add_linear(x, mlp.down_proj, mlp(self.post_attention_layernorm(x)))
