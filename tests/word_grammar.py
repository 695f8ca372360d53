"""A word grammar, and the small Llama trained on it: the target of the acceptance experiments on trees and n-grams.

`tree-speculation`, Small-scale acceptance B: 40 words of 2 to 4 random tokens over V=64, the next word drawn from a
bigram law per word (Dirichlet 0.08); 8 layers of H=64 with 4 heads, 400 steps of 32 sequences of 64, OneCycle to 3e-3.
The trained directory is kept in the temporary directory under the hash of this file, so that experiments share it.
Imports inference only, and transformers to train.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCAB = 64
WORDS = 40
LENGTH = 64
STEPS = 400
BATCH = 32
PEAK = 3e-3
CONCENTRATION = 0.08


class Grammar:
    """Words and the law of the next word; everything follows from the seed."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.words = [rng.integers(0, VOCAB, rng.integers(2, 5)).tolist() for _ in range(WORDS)]
        self.bigram = rng.dirichlet([CONCENTRATION] * WORDS, WORDS)

    def sample(self, count: int, length: int = LENGTH, *, seed: int) -> list[list[int]]:
        """`count` sequences of `length` tokens, each cut where its last word may go on."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(count):
            word, text = int(rng.integers(WORDS)), list[int]()
            while len(text) < length:
                text += self.words[word]
                word = int(rng.choice(WORDS, p=self.bigram[word]))
            found.append(text[:length])
        return found


def batch(grammar: Grammar, step: int, count: int = BATCH) -> Tensor:
    """int64 [count, LENGTH]: the training batch of a step."""
    return torch.tensor(grammar.sample(count, seed=1_000_000 + step))


def train(directory: Path, *, seed: int = 0, steps: int = STEPS) -> float:
    """Train the target and write it as a Hugging Face directory; the mean loss of the last 20 steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    grammar = Grammar(seed)
    losses = []
    for step in range(steps):
        ids = batch(grammar, step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval().save_pretrained(directory)
    return sum(losses[-20:]) / 20


def target_directory(seed: int = 0) -> Path:
    """The trained target's directory; trains it (about a minute on one core) where nobody has yet."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    place = Path(tempfile.gettempdir()) / f"draftsmith-word-grammar-{version}-{seed}"
    if not (place / "config.json").exists():
        scratch = Path(tempfile.mkdtemp(prefix="draftsmith-word-grammar-"))
        loss = train(scratch, seed=seed)
        (scratch / "loss.txt").write_text(f"{loss:.4f}\n")
        try:
            os.rename(scratch, place)  # whole or not at all: two experiments may train at once
        except OSError:
            shutil.rmtree(scratch)
    return place
