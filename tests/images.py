"""Tiny image tokenizers and models with random weights."""

import torch

from draftsmith.inference.nets.image_ar import ImageAR, ImageARConfig
from draftsmith.inference.nets.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from draftsmith.inference.nets.next_scale_ar import NextScaleAR, NextScaleConfig


def tokenizer(scales: tuple[int, ...] = (), normalized: bool = False, seed: int = 0, codes: int = 16) -> ImageTokenizer:
    """8x8 grey images, 4x4 places, codes of width 4 that are spread over the latents."""
    torch.manual_seed(seed)
    net = ImageTokenizer(
        ImageTokenizerConfig(
            channels=1,
            resolution=8,
            width=8,
            multipliers=(1, 2),
            blocks=1,
            attention=True,
            latent_channels=8,
            codes=codes,
            code_dim=4,
            normalized=normalized,
            scales=scales,
        )
    )
    with torch.no_grad():
        net.codebook.normal_()
    return net.eval()


def raster(seed: int = 0, spread: float = 20.0, **changes: object) -> ImageAR:
    """Over the codes of `tokenizer()`, laws far from uniform."""
    torch.manual_seed(seed)
    fields: dict[str, object] = {"codes": 16, "side": 4, "num_classes": 3, "hidden_size": 32, "num_layers": 2}
    fields |= {"num_heads": 2, "intermediate_size": 48} | changes
    net = ImageAR(ImageARConfig(**fields))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 * spread**0.5 * 2)
    return net.eval()


def next_scale(seed: int = 0, scales: tuple[int, ...] = (1, 2, 4)) -> NextScaleAR:
    """Over the codes of `tokenizer(scales)`, with gates that are open."""
    torch.manual_seed(seed)
    net = NextScaleAR(NextScaleConfig(16, 4, scales, 3, 32, 2, 2), tokenizer(scales))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return net.eval()
