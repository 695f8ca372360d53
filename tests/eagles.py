"""Toy EAGLE heads with random weights: configuration, canonical tensors, and a target directory that fits them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.formats.record import DrafterRecord
from draftsmith.inference.nets.eagle_head import EagleConfig, shapes
from tests.tiny import write_lm

LAYERS, WIDTH, VOCAB, DRAFT_VOCAB = 8, 32, 64, 16
AUX = (2, 4, 5)  # the default of 8 layers: 2, L//2, L-3


def toy_config(**changed: Any) -> EagleConfig:
    """V=64, Vd=16, H=32 over a target of 8 layers."""
    config = EagleConfig(
        hidden_size=WIDTH,
        target_hidden_size=WIDTH,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        aux_layers=AUX,
        max_positions=128,
        own_embedding=True,
    )
    return replace(config, **changed)


def eagle1_config(**changed: Any) -> EagleConfig:
    """EAGLE-1 over the same target."""
    return toy_config(version=1, aux_layers=(LAYERS,), draft_vocab_size=VOCAB, fc_bias=True, **changed)


def toy_tensors(config: EagleConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of every tensor that such a head has, with a sound draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(config).items():
        if name in ("d2t", "t2d"):
            continue
        noise = torch.randn(shape, generator=generator) * 0.3
        tensors[name] = ((1 + noise) if "norm" in name else noise).to(dtype)
    if config.reduced:
        ids = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
        tensors["t2d"][ids] = True
    return tensors


def toy_record(config: EagleConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> DrafterRecord:
    config = config or toy_config()
    return DrafterRecord(config, toy_tensors(config, seed, dtype))


def write_target(directory: Path, layers: int = LAYERS, vocab_size: int = VOCAB) -> Path:
    """A target of the toys' width, vocabulary and depth, without a tokenizer."""
    return write_lm(directory, tokenizer=False, layers=layers, width=WIDTH, vocab_size=vocab_size, max_length=128)


VARIANTS: dict[str, EagleConfig] = {
    "plain": toy_config(),
    "target's embedding": toy_config(own_embedding=False),
    "residual normed, one norm, normed output": toy_config(
        norm_before_residual=True, norm_before_fc=True, norm_output=True, own_embedding=False
    ),
    "a norm each, qwen3, biases": toy_config(fc_norm=True, family="qwen3", attention_bias=True, mlp_bias=True),
    "whole vocabulary": toy_config(draft_vocab_size=64),
    "scaled rope": toy_config(rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "eagle1": eagle1_config(),
}
