"""Tiny Hugging Face directories and exports on disk. Imports inference only: the slim install runs its tests."""

from pathlib import Path
from typing import Any

import torch

from draftsmith.inference import checkpoint, couplings
from draftsmith.inference.manifest import MANIFEST_FILE, Couplings, Manifest, Provenance, Seal, SealCheck

TEXT = (
    "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over the lazy dog, twice: naïve café – 日本語 😀.\n"
)


def write_tokenizer(directory: Path, text: str = TEXT, vocab_size: int = 300) -> Any:
    """A byte-level BPE trained on `text`, with <|bos|> = 0 and <|eos|> = 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.save_pretrained(directory)
    return tokenizer


def lm(
    *, seed: int = 0, vocab_size: int = 320, layers: int = 2, width: int = 32, max_length: int = 256, tie: bool = False
) -> Any:
    """A random LlamaForCausalLM in eval mode; its end-of-sequence id is 1. Weights are large enough for peaked laws."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def write_lm(directory: Path, *, tokenizer: bool = True, text: str = TEXT, **sizes: int) -> Path:
    """A plain Hugging Face directory: random weights and, unless told otherwise, a tokenizer."""
    lm(**sizes).save_pretrained(directory)
    if tokenizer:
        write_tokenizer(directory, text)
    return directory


def add_manifest(directory: Path, kind: str = "lm", **stated: Any) -> Manifest:
    """Put a manifest with true hashes (and a made-up seal) beside the files; `stated` overrides couplings."""
    config = checkpoint.read_json(directory / "config.json")
    identity = couplings.tokenizer_identity(directory)
    known: dict[str, Any] = {"vocab_size": config["vocab_size"]}
    if identity is not None:
        known = {
            "vocab_size": identity.vocab_size,
            "tokenizer_hash": identity.hash,
            "vocab_map_hash": identity.vocab_map_hash,
        }
    manifest = Manifest(
        kind=kind,
        net=config["architectures"][0],
        config=config,
        dtype="float32",
        files=checkpoint.hash_files(directory),
        couplings=Couplings(**(known | stated)),
        provenance=Provenance("a test", "2026-01-01T00:00:00Z", "none", {"python": "3.11"}),
        seal=Seal("0" * 64, 2, 16, 1.0, (SealCheck("float32", "a test", 0.0, 1e-4),)),
    )
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
