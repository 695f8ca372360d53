"""A class-conditional transformer that makes an image scale by scale, all codes of a scale at once (VAR).

Source: "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (arXiv 2404.02905): blocks
with adaptive layer norms on the class, attention over unit queries and keys. A scale's input is the image so far,
downsampled to the scale (not the previous codes), so the tokenizer takes part.

Shape letters: B batch, N codes of all scales, K scales, D width, C code width, V codes, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.image_ar import check_classes
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer

_LARGEST_SCALE = math.log(100)  # of the learned temperature of attention


@dataclass(frozen=True)
class NextScaleConfig:
    """Everything that decides the network's function. Raises InvalidValue, one line, for what cannot be."""

    codes: int  # V
    code_dim: int  # C
    scales: tuple[int, ...]  # sides p_1 < ... < p_K
    num_classes: int  # class id num_classes means "no class" (guidance)
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    class_dropout: float = 0.1
    norm_eps: float = 1e-6
    tokenizer_hash: str | None = None

    def __post_init__(self) -> None:
        for name in ("codes", "code_dim", "num_classes", "hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} of an image model must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise InvalidValue(f"{self.num_heads} heads do not divide a width of {self.hidden_size}")
        if not self.scales or list(self.scales) != sorted(set(self.scales)) or self.scales[0] < 1:
            raise InvalidValue(f"scales must ascend, got {list(self.scales)}")

    @property
    def groups(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(p * p for p in self.scales)

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.groups)


class ScaleAttention(nn.Module):
    """Attention over unit queries and keys with a learned temperature for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, past: "list[Tensor] | None") -> Tensor:
        """x [B, n, D]; mask bool [n, n], true where visible; past: this layer's keys and values, replaced in place."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
        q, k, v = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1), qkv[2]
        q = q * self.log_scale.clamp_max(_LARGEST_SCALE).exp()
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            past[:] = [k, v]
        seen = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out


class AdaptiveBlock(nn.Module):
    """Pre-norm attention and MLP whose norms' scale and shift, and whose gates, are made from the class (AdaLN)."""

    def __init__(self, config: NextScaleConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, round(config.hidden_size * config.mlp_ratio)
        self.norm = nn.LayerNorm(width, config.norm_eps, elementwise_affine=False)
        self.attn = ScaleAttention(width, config.num_heads)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ada_lin = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, past: "list[Tensor] | None") -> Tensor:
        """x [B, n, D], condition [B, D]."""
        parts = self.ada_lin(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts
        x = x + self.dropout(self.attn(self.norm(x) * (1 + scale1) + shift1, mask, past)) * gate1
        inner = F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        out: Tensor = x + self.dropout(self.fc2(inner)) * gate2
        return out


class NextScaleAR(nn.Module):
    """Class and the images so far in, hidden states of the codes' laws out; needs its tokenizer to know those images.

    The tokenizer is no submodule: it is frozen, and exported apart.
    """

    def __init__(self, config: NextScaleConfig, tokenizer: ImageTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embed = nn.Linear(config.code_dim, width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.randn(1, config.groups[0], width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, config.num_tokens, width) * 0.02)
        self.level_embed = nn.Embedding(len(config.scales), width)
        self.blocks = nn.ModuleList(AdaptiveBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, config.norm_eps, elementwise_affine=False)
        self.head_ada = nn.Linear(width, 2 * width)
        self.lm_head = nn.Linear(width, config.codes)
        embeddings: tuple[nn.Embedding | nn.Linear, ...] = (self.class_embedding, self.level_embed, self.word_embed)
        for module in (*embeddings, self.lm_head):
            nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "ada" in name:  # gates near zero at the start (AdaLN-zero)
                nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        self._tokenizer: tuple[ImageTokenizer, ...] = ()
        if tokenizer is not None:
            self.attach(tokenizer)

    def attach(self, tokenizer: ImageTokenizer) -> None:
        """Give the network its tokenizer. Raises InvalidValue when their scales or codes differ."""
        theirs = (tokenizer.config.scales, tokenizer.config.codes, tokenizer.config.code_dim)
        ours = (self.config.scales, self.config.codes, self.config.code_dim)
        if theirs != ours:
            raise InvalidValue(f"the model's scales, codes and code width {ours} are not the tokenizer's {theirs}")
        self._tokenizer = (tokenizer,)  # in a tuple, so that it is no submodule

    @property
    def tokenizer(self) -> ImageTokenizer:
        """Raises InvalidValue where none was attached."""
        if not self._tokenizer:
            raise InvalidValue("a next-scale model makes its inputs with its tokenizer: attach it first")
        return self._tokenizer[0]

    @property
    def groups(self) -> tuple[int, ...]:
        """Codes that one step makes together."""
        return self.config.groups

    @property
    def no_guidance(self) -> float:
        """The guidance that changes nothing."""
        return 0.0

    def guidance_weight(self, guidance: float, group: int) -> float:
        """The w of l_u + w (l_c - l_u) at a scale: VAR raises it from 1 to 1 + guidance over the scales."""
        return 1 + guidance * group / max(1, len(self.config.scales) - 1)

    def check_classes(self, classes: Tensor) -> None:
        """Raises InvalidValue for class ids outside [0, num_classes], of which the last means no class."""
        check_classes(classes, self.config.num_classes, self.config.class_dropout)

    def inputs(self, codes: Tensor) -> Tensor:
        """What the scales after the first read, [B, N - p_1^2, C]: the image so far, made small; codes int64 [B, N]."""
        totals = self.tokenizer.sum_scales(self.tokenizer.embed(codes))
        parts = [self.tokenizer.next_input(totals[k - 1], k) for k in range(1, len(self.config.scales))]
        return torch.cat(parts, 1) if parts else codes.new_zeros(len(codes), 0, self.config.code_dim)

    def level(self, device: torch.device | str | None = None) -> Tensor:
        """The scale of each code, int64 [N]."""
        sizes = torch.tensor(self.config.groups, device=device)
        return torch.arange(len(self.config.scales), device=device).repeat_interleave(sizes)

    def forward(self, codes: Tensor, classes: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Teacher forcing: codes int64 [B, N] and classes int64 [B] -> hidden [B, N, D] of the codes' laws.

        inputs: from `inputs(codes)`, where they are known already.
        """
        condition = self.class_embedding(classes)
        inputs = self.inputs(codes) if inputs is None else inputs
        start = condition.unsqueeze(1) + self.pos_start
        level = self.level(codes.device)
        x = torch.cat((start, self.word_embed(inputs.to(start.dtype))), 1) + self.level_embed(level) + self.pos_embed
        mask = level.unsqueeze(1) >= level  # its own scale and the earlier ones
        for block in self.blocks:
            x = block(x, condition, mask, None)
        return self._finish(x, condition)

    def _finish(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.head_ada(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        out: Tensor = self.norm(x) * (1 + scale) + shift
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def logits(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Teacher-forced logits of all positions, [B, N, V]."""
        return self.head(self(codes, classes))

    def start(self, classes: Tensor) -> "ScaleState":
        """A state in which nothing has been made. classes: int64 [B]."""
        condition = self.class_embedding(classes)
        return ScaleState(condition, [[] for _ in self.blocks], condition.unsqueeze(1) + self.pos_start)

    def next_logits(self, state: "ScaleState") -> Tensor:
        """Logits of the next scale's codes, [B, p_k^2, V]; once per step."""
        k = state.scale
        first = sum(self.config.groups[:k])
        x = state.inputs + self.level_embed.weight[k] + self.pos_embed[:, first : first + self.config.groups[k]]
        for block, past in zip(self.blocks, state.past, strict=True):
            x = block(x, state.condition, None, past)
        return self.head(self._finish(x, state.condition))

    def advance(self, state: "ScaleState", codes: Tensor) -> None:
        """The scale's codes int64 [B, p_k^2] are these."""
        side = self.config.scales[state.scale]
        vectors = self.tokenizer.embed(codes).transpose(1, 2).reshape(len(codes), -1, side, side)
        added = self.tokenizer.contribution(state.scale, vectors)
        state.total = added if state.total is None else state.total + added
        state.scale += 1
        if state.scale < len(self.config.scales):
            small = self.tokenizer.next_input(state.total, state.scale)
            state.inputs = self.word_embed(small.to(state.condition.dtype))

    def prefilled(self, classes: Tensor, codes: Tensor) -> "ScaleState":
        """A state in which the first whole scales have been made; codes int64 [B, sum of p_k^2]."""
        state = self.start(classes)
        first = 0
        while first < codes.shape[1]:
            size = self.config.groups[state.scale]
            if first + size > codes.shape[1]:
                raise InvalidValue(f"a prefix of {codes.shape[1]} codes ends inside a scale of {list(self.groups)}")
            self.next_logits(state)
            self.advance(state, codes[:, first : first + size])
            first += size
        return state


@dataclass
class ScaleState:
    """An image on its way: each layer's keys and values, the latent so far, and what the next pass reads."""

    condition: Tensor  # [B, D]
    past: list[list[Tensor]]
    inputs: Tensor  # [B, p_k^2, D]
    scale: int = 0
    total: Tensor | None = None  # [B, C, h, w]
