"""Images as tokens: a convolutional autoencoder with a codebook, of one scale (LlamaGen) or of several (VAR).

Sources: VQ-VAE (arXiv 1711.00937), VQGAN (arXiv 2012.09841), LlamaGen (arXiv 2406.06525, section 3.1), and VAR (arXiv
2404.02905, algorithms 1 and 2) for the scales. The layers are those of both published families, so that their weights
load by a change of names (inference/formats/image_tokenizers.py).

Shape letters: B batch, C channels of the image, H and W its sides, h = w sides of the latent, D code width, V codes,
K scales, N tokens (h * w, or the sum of p_k^2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import uniform

INPUT_RANGE = (-1.0, 1.0)
_SLACK = 0.05  # of the input range
_RESIDUAL = 0.5  # VAR: share of a convolution in phi_k
_PHIS = 4  # VAR: convolutions that the scales share


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Everything that decides the network's function. Raises InvalidValue, one line, for what cannot be."""

    channels: int = 3
    resolution: int = 256  # H = W
    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the width, by level; every level but the last halves the sides
    blocks: int = 2  # residual blocks of a level; the decoder has one more
    attention: bool = True  # in the last level and between encoder and latent
    latent_channels: int = 256  # that encoder and decoder exchange
    codes: int = 16384  # V
    code_dim: int = 8  # D
    normalized: bool = True  # codes and latents lie on the unit sphere (LlamaGen)
    kernel: int = 1  # of the convolutions into and out of code space (VAR: 3)
    scales: tuple[int, ...] = ()  # sides p_1 < ... < p_K = h of a multi-scale tokenizer; (): one scale

    def __post_init__(self) -> None:
        for name in ("channels", "resolution", "width", "blocks", "latent_channels", "codes", "code_dim"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} of an image tokenizer must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or self.resolution % self.stride:
            raise InvalidValue(
                f"images of {self.resolution} pixels do not divide by {self.stride}, the stride of"
                f" {len(self.multipliers)} levels: change resolution or multipliers"
            )
        if self.kernel % 2 == 0:
            raise InvalidValue(f"kernel must be odd, got {self.kernel}")
        if self.scales:
            ascending = all(a < b for a, b in zip(self.scales, self.scales[1:], strict=False))
            if not ascending or self.scales[0] < 1 or self.scales[-1] != self.side:
                raise InvalidValue(
                    f"scales must ascend and end with the latent's side {self.side}, got {list(self.scales)}"
                )
            if self.normalized:
                raise InvalidValue("the scales' codes are added up, so they cannot be normalized: set normalized=false")

    @property
    def stride(self) -> int:
        """Pixels of a latent place."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def side(self) -> int:
        """h = w."""
        return self.resolution // self.stride

    @property
    def groups(self) -> tuple[int, ...]:
        """Tokens that are made together, by scale; one group a place where there is one scale."""
        return tuple(p * p for p in self.scales) if self.scales else (1,) * self.side**2

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.groups)


@dataclass(frozen=True)
class Quantized:
    """What quantisation gives back."""

    latent: Tensor  # [B, D, h, w] codes in the latent's place, with straight-through gradients
    codes: Tensor  # int64 [B, N]
    commitment: Tensor  # scalar: mean squared distance of latents to their codes, gradient to the latents alone
    codebook: Tensor  # scalar: the same, gradient to the codes alone


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: Tensor = self.shortcut(x) + inner
        return out


class SpatialAttention(nn.Module):
    """One head over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        out: Tensor = x + self.proj_out(seen.reshape(x.shape))
        return out


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(outputs) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def _middle(channels: int, attention: bool) -> nn.ModuleList:
    between = [SpatialAttention(channels)] if attention else []
    return nn.ModuleList([ResidualBlock(channels, channels), *between, ResidualBlock(channels, channels)])


class Encoder(nn.Module):
    """Images [B, C, H, W] -> [B, latent_channels, h, w]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(([config.width, *widths])[i], widths[i], config.blocks, config.attention and i == last)
            for i in range(len(widths))
        )
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2) for width in widths[:-1])
        self.mid = _middle(widths[-1], config.attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.down):
                x = self.down[i](F.pad(x, (0, 1, 0, 1)))  # on one side alone, as both published families do
        for block in self.mid:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """[B, latent_channels, h, w] -> images [B, C, H, W]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config.attention)
        self.levels = nn.ModuleList(
            Level(([widths[0], *widths])[i], widths[i], config.blocks + 1, config.attention and i == 0)
            for i in range(len(widths))
        )
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths[:-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.up):
                x = self.up[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class ImageTokenizer(nn.Module):
    """Encoder, codebook and decoder. The codebook is a plain parameter [V, D], which distilled decoding reads."""

    WHAT: ClassVar[str] = "an image tokenizer"

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        around = config.kernel // 2
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, config.kernel, padding=around)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, config.kernel, padding=around)
        self.codebook = nn.Parameter(torch.empty(config.codes, config.code_dim).uniform_(-1.0, 1.0) / config.codes)
        self.phi = nn.ModuleList(
            nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1) for _ in range(_PHIS if config.scales else 0)
        )

    @property
    def spec(self) -> EngineSpec:
        """Its sizes; the vocabulary are the codes."""
        config = self.config
        return EngineSpec("image-tokenizer", config.codes, config.code_dim, len(config.multipliers), config.num_tokens)

    @property
    def vectors(self) -> Tensor:
        """The codes as the decoder sees them, [V, D]: on the unit sphere where the tokenizer normalises."""
        return F.normalize(self.codebook, dim=-1) if self.config.normalized else self.codebook

    def check(self, images: Tensor) -> None:
        """Raises InvalidValue for images of other shapes or outside [-1, 1] (digits of 0..16, bytes of 0..255)."""
        side = self.config.resolution
        if images.ndim != 4 or list(images.shape[1:]) != [self.config.channels, side, side]:
            raise InvalidValue(f"images must be [B, {self.config.channels}, {side}, {side}], got {list(images.shape)}")
        low, high = (v.item() for v in images.aminmax())
        if low < INPUT_RANGE[0] - _SLACK or high > INPUT_RANGE[1] + _SLACK or not images.isfinite().all():
            raise InvalidValue(f"pixels must lie in [-1, 1], got {low:.4g} to {high:.4g}: rescale them")

    def latent(self, images: Tensor) -> Tensor:
        """Continuous latents [B, D, h, w] of images [B, C, H, W]."""
        z: Tensor = self.quant_conv(self.encoder(images)).float()
        return F.normalize(z, dim=1) if self.config.normalized else z

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code, int64 [...], of vectors [..., D]; by products, not by a [.., V, D] difference."""
        vectors = self.vectors.float()
        return (z.float() @ vectors.T - vectors.square().sum(-1) / 2).argmax(-1)

    def quantize(self, z: Tensor) -> Quantized:
        """Latents [B, D, h, w] become codes; VAR's algorithm 1 where there are several scales."""
        if self.config.scales:
            return self._quantize_scales(z)
        flat = z.permute(0, 2, 3, 1)
        codes = self.nearest(flat.detach())
        found = self.vectors[codes]
        straight = flat + (found - flat).detach()
        return Quantized(
            straight.permute(0, 3, 1, 2).contiguous(),
            codes.flatten(1),
            F.mse_loss(flat, found.detach()),
            F.mse_loss(found, flat.detach()),
        )

    def _quantize_scales(self, z: Tensor) -> Quantized:
        rest, total = z.detach(), torch.zeros_like(z)
        codes, commitment, codebook = [], z.new_zeros(()), z.new_zeros(())
        for k, side in enumerate(self.config.scales):
            small = _area(rest, side)
            chosen = self.nearest(small.permute(0, 2, 3, 1))
            codes.append(chosen.flatten(1))
            added = self.contribution(k, self.vectors[chosen].permute(0, 3, 1, 2))
            total = total + added
            rest = rest - added.detach()
            commitment = commitment + F.mse_loss(z, total.detach())
            codebook = codebook + F.mse_loss(total, z.detach())
        count = len(self.config.scales)
        return Quantized(z + (total - z).detach(), torch.cat(codes, 1), commitment / count, codebook / count)

    def contribution(self, k: int, vectors: Tensor) -> Tensor:
        """What scale k adds to the latent, [B, D, h, w], of its codes' vectors [B, D, p_k, p_k] (equation 6: phi_k)."""
        side, count = self.config.side, len(self.config.scales)
        large = vectors if vectors.shape[-1] == side else F.interpolate(vectors, size=(side, side), mode="bicubic")
        conv = self.phi[_phi_index(k, count)]
        out: Tensor = (1 - _RESIDUAL) * large + _RESIDUAL * conv(large)
        return out

    def sum_scales(self, vectors: Tensor) -> list[Tensor]:
        """The latent after each scale, K of [B, D, h, w], of all tokens' vectors [B, N, D] (VAR's algorithm 2)."""
        totals: list[Tensor] = []
        start = 0
        for k, (side, group) in enumerate(zip(self.config.scales, self.config.groups, strict=True)):
            part = _square(vectors[:, start : start + group], side)
            added = self.contribution(k, part)
            totals.append(added if not totals else totals[-1] + added)
            start += group
        return totals

    def next_input(self, total: Tensor, k: int) -> Tensor:
        """What the next-scale model reads to make scale k: the latent so far [B, D, h, w] -> [B, p_k^2, D]."""
        return _area(total, self.config.scales[k]).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 [B, N] of images [B, C, H, W] in [-1, 1]. Raises InvalidValue for other images."""
        self.check(images)
        return self.quantize(self.latent(images)).codes

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors [B, N, D] of codes. Raises InvalidValue for codes outside [0, V)."""
        if codes.numel() and not bool(((codes >= 0) & (codes < self.config.codes)).all()):
            low, high = codes.aminmax()
            raise InvalidValue(f"codes must lie in [0, {self.config.codes}), got {low.item()} to {high.item()}")
        return self.vectors[codes]

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images of latents [B, D, h, w], which need not be codes."""
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, C, H, W] of codes int64 [B, N], or of vectors [B, N, D] in their place."""
        vectors = tokens if tokens.is_floating_point() else self.embed(tokens)
        if self.config.scales:
            return self.decode_latent(self.sum_scales(vectors)[-1])
        return self.decode_latent(_square(vectors, self.config.side))

    def seal_inputs(self) -> dict[str, Tensor]:
        """Two images of noise, and codes."""
        side, channels, tokens = self.config.resolution, self.config.channels, self.config.num_tokens
        at = torch.arange(channels * side * side).view(1, channels, side, side)
        rows = torch.arange(2)
        images = uniform(0, rows.view(-1, 1, 1, 1), at, 0) * 2 - 1
        codes = uniform(0, rows.view(-1, 1), torch.arange(tokens).view(1, -1), 1) * self.config.codes
        return {"images": images.float(), "codes": codes.long()}

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Latents and the decoded codes side by side, [B, any]; as training computes them."""
        images = inputs["images"].to(self.codebook.dtype)
        latent = self.quant_conv(self.encoder(images)).float()
        if self.config.normalized:
            latent = F.normalize(latent, dim=1)
        vectors = self.vectors[inputs["codes"]]
        if self.config.scales:
            decoded = self.decode_latent(self.sum_scales(vectors)[-1])
        else:
            decoded = self.decode_latent(_square(vectors, self.config.side))
        return torch.cat((latent.flatten(1), decoded.float().flatten(1)), 1)

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same by `latent` and `decode`."""
        images = inputs["images"].to(self.codebook.dtype)
        return torch.cat((self.latent(images).flatten(1), self.decode(inputs["codes"]).float().flatten(1)), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruction and what was quantised, for training."""
        found = self.quantize(self.latent(images))
        return self.decode_latent(found.latent), found


def _square(vectors: Tensor, side: int) -> Tensor:
    """[B, side^2, D] in raster order -> [B, D, side, side]."""
    return vectors.transpose(1, 2).reshape(len(vectors), -1, side, side)


def _area(x: Tensor, side: int) -> Tensor:
    """Area-downsample [B, D, h, w] to [B, D, side, side]."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="area")


def _phi_index(k: int, count: int) -> int:
    """Which of the shared convolutions scale k of `count` takes: the one whose tick lies nearest to k / (count - 1)."""
    at = k / max(1, count - 1)
    edge = 1 / 3 / _PHIS
    ticks = [edge + (1 - 2 * edge) * i / (_PHIS - 1) for i in range(_PHIS)]
    return min(range(_PHIS), key=lambda i: abs(ticks[i] - at))
