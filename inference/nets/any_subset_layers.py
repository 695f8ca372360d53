"""Layers of any-subset models: rows that attend to the content rows of a canvas.

The two streams of XLNet (arXiv:1906.08237) are one stack here: content rows embed a token and its position, query rows
a learned vector and the position that they predict, and both go through the same weights. Keys and values come from
content rows alone, so that queries change nothing. What a row sees is one number: content of ranks below `seen`.

Shape letters: B batch, R rows of a pass, C keys, D width, H heads, d head width, N canvas.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.nets.matrices import Matrix, matrix
from draftsmith.inference.nets.transformer import activation as activation_of


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one pass share."""

    content: int  # the first rows of the R, whose keys and values are written
    mask: Tensor  # bool [B, 1, R, C]: True where the row sees the key
    distance: Tensor | None  # int64 [B, 1, R, C]: position of the row - position of the key + N - 1; scheme xlnet
    encoding: Tensor | None  # [2N - 1, D]: sines and cosines of the distances -(N - 1)..N - 1; scheme xlnet


class LayerCache:
    """Keys and values of one layer, slot by slot; `place` says where a pass writes its content rows."""

    def __init__(self, batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device):
        # zeros, since a weight of 0 times what was never written must be 0
        self.k = torch.zeros(batch, heads, capacity, width, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.relative: Tensor | None = None  # scheme xlnet: [H, d, 2N - 1], the projected encodings of the distances

    def write(self, k: Tensor, v: Tensor, place: int | Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Store k and v [B, H, c, d] from slot `place` on (int64 [B, c]: slot by slot); returns slots 0..end-1."""
        if isinstance(place, int):
            self.k[:, :, place : place + k.shape[2]] = k
            self.v[:, :, place : place + k.shape[2]] = v
        else:
            index = place[:, None, :, None].expand_as(k)
            self.k.scatter_(2, index, k)
            self.v.scatter_(2, index, v)
        return self.k[:, :, :end], self.v[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.k, self.v = self.k[rows], self.v[rows]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pass writes into a layer's cache, and how many slots its rows look at."""

    slots: int | Tensor
    end: int


class Linear(nn.Linear):
    """A linear that serves few rows by the fastest product for them (`nets.matrices`); trains as torch's."""

    _matrix: Matrix | None = None

    def fuse(self) -> None:
        """Serve from now on; changes of the weight in place are seen, a replaced one is served as before."""
        self._matrix = matrix(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        served = self._matrix
        if served is None or torch.is_grad_enabled() or served.weight.data_ptr() != self.weight.data_ptr():
            return F.linear(x, self.weight, self.bias)
        return served(x)


class Attention(nn.Module):
    """Multi-head attention of all rows over the content rows; with `relative`, Transformer-XL's score."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, relative: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.q_proj = Linear(width, heads * head_dim, bias=bias)
        self.k_proj = Linear(width, heads * head_dim, bias=bias)
        self.v_proj = Linear(width, heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=bias)
        self.relative = relative
        if relative:
            self.r_proj = Linear(width, heads * head_dim, bias=False)
            self.r_w_bias = nn.Parameter(torch.zeros(heads, head_dim))
            self.r_r_bias = nn.Parameter(torch.zeros(heads, head_dim))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, step: Pass, cache: LayerCache | None = None, place: Place | None = None) -> Tensor:
        """x [B, R, D] -> [B, R, D]; a row that sees nothing gets the output bias alone."""
        q, content = self._split(self.q_proj(x)), x[:, : step.content]
        k, v = self._split(self.k_proj(content)), self._split(self.v_proj(content))
        if cache is not None:
            assert place is not None
            k, v = cache.write(k, v, place.slots, place.end)
        mask = step.mask
        if self.relative:
            assert step.distance is not None
            far = (q + self.r_r_bias.unsqueeze(1)) @ self._relative(step, cache)  # [B, H, R, 2N - 1]
            bias = far.gather(3, step.distance.expand(-1, self.heads, -1, -1)) / math.sqrt(self.head_dim)
            mask = bias.masked_fill(~mask, float("-inf"))
            q = q + self.r_w_bias.unsqueeze(1)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out

    def _relative(self, step: Pass, cache: LayerCache | None) -> Tensor:
        """[H, d, 2N - 1]; computed once for a cache."""
        if cache is not None and cache.relative is not None:
            return cache.relative
        made: Tensor = self.r_proj(step.encoding).view(-1, self.heads, self.head_dim).permute(1, 2, 0)
        if cache is not None:
            cache.relative = made
        return made


class Layer(nn.Module):
    """Attention and MLP with their residuals: norms before them ("absolute"), or behind them ("xlnet")."""

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        head_dim: int,
        *,
        xlnet: bool,
        activation: str,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.post_norm = xlnet
        self.attention = Attention(width, heads, head_dim, not xlnet, xlnet, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.act = activation_of(activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, step: Pass, cache: LayerCache | None = None, place: Place | None = None) -> Tensor:
        """x [B, R, D] -> [B, R, D]"""
        if self.post_norm:
            x = self.attention_norm(x + self.dropout(self.attention(x, step, cache, place)))
            x = self.mlp_norm(x + self._mlp(x))
            return x
        x = x + self.dropout(self.attention(self.attention_norm(x), step, cache, place))
        return x + self._mlp(self.mlp_norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.act(self.up_proj(x))
        out: Tensor = self.dropout(self.down_proj(self.dropout(inner) if self.post_norm else inner))
        return out


def distance_encoding(length: int, width: int, clamp: int, device: torch.device) -> Tensor:
    """float32 [2N - 1, D]: sines, then cosines, of the distances -(N - 1)..N - 1, clamped to +-clamp where above 0."""
    distance = torch.arange(1 - length, length, dtype=torch.float32, device=device)
    if clamp > 0:
        distance = distance.clamp(-clamp, clamp)
    frequency = 1 / torch.pow(10000, torch.arange(0, width, 2.0, device=device) / width)
    angle = distance.unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
