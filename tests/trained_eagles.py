"""EAGLE-3 heads trained on the word grammar's target: the healthy drafters of the experiments on diagnosis and interop.

A bare loop over the training-time test (tree-speculation, acceptance B: AdamW 2e-3, clip 0.5, batch 16, decay 0.8,
head from the target's), 48 of 64 ids, states 2, 4, 5 of 8. Each is kept as a speculators directory in the temporary
directory under the hash of this file.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.formats import speculators
from draftsmith.inference.formats.record import DrafterRecord
from draftsmith.inference.hypotheses.subjects import target_matrices
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead
from draftsmith.modules.eagle_rollout import rollout
from tests import word_grammar

AUX = (2, 4, 5)
DRAFT_VOCAB = 48
STEPS, BATCH, PEAK, DECAY = 250, 16, 2e-3, 0.8


@dataclass(frozen=True)
class Recipe:
    """What distinguishes a drafter from the others."""

    loss: str = "ce"  # against the target's law: "ce" with its argmax, "kl" with all of it
    unroll: int = 4
    steps: int = STEPS
    seed: int = 0
    net: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "ce": Recipe(),
    "kl": Recipe(loss="kl", seed=1),
    "third": Recipe(steps=STEPS // 3, seed=2),
    "flags": Recipe(
        loss="kl",
        seed=3,
        net={"norm_before_residual": True, "fc_norm": True, "norm_output": True, "own_embedding": True},
    ),
}


@cache
def target() -> LoadedPart:
    return load(word_grammar.target_directory())


def config(recipe: Recipe) -> EagleConfig:
    base = EagleConfig(
        hidden_size=64,
        target_hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=word_grammar.VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        aux_layers=AUX,
        max_positions=256,
        own_embedding=False,
    )
    return replace(base, **recipe.net)


def train(recipe: Recipe, part: LoadedPart) -> EagleHead:
    """The head of a target of this grammar after the recipe's steps, in eval mode."""
    lent = target_matrices(part.path)
    grammar = word_grammar.Grammar()
    counts = torch.bincount(word_grammar.batch(grammar, 0, 256).flatten(), minlength=word_grammar.VOCAB)
    ids = counts.argsort(descending=True, stable=True)[:DRAFT_VOCAB].sort().values
    torch.manual_seed(recipe.seed)
    head = EagleHead(config(recipe))
    head.set_draft_vocabulary(ids)
    with torch.no_grad():
        head.lm_head.weight.copy_(lent["head"][ids])
        if head.config.own_embedding:
            head.embed_tokens.weight.copy_(lent["embedding"])
    if not head.config.own_embedding:
        head.use_embedding(lambda: lent["embedding"])
    optimizer = torch.optim.AdamW(head.parameters(), lr=PEAK)
    for step in range(recipe.steps):
        tokens = word_grammar.batch(grammar, 10_000 * (1 + recipe.seed) + step, BATCH)
        hidden, states = part.part.forward(tokens, aux_layers=AUX)
        p = part.part.head(hidden)[..., ids].float().softmax(-1)
        loss = torch.zeros(())
        embeds = head.embed(tokens)
        for k, out in enumerate(rollout(head, embeds, head.project(torch.cat(states, -1)[:, :-1]), recipe.unroll)):
            rows = tokens.shape[1] - 2 - k  # row t predicts token t + k + 2, whose law stands at t + k + 1
            loss = loss + DECAY**k * _loss(recipe.loss, head.logits(out[:, :rows]), p[:, 1 + k : 1 + k + rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
    return head.eval()


def _loss(name: str, logits: Tensor, p: Tensor) -> Tensor:
    logq = logits.float().log_softmax(-1)
    if name == "ce":
        return -logq.gather(-1, p.argmax(-1, keepdim=True)).mean()
    return (p * (p.clamp_min(1e-9).log() - logq)).sum(-1).mean()


def write(head: EagleHead, out: Path, verifier: Path) -> None:
    """A speculators directory of a trained head."""
    tensors = {key: tensor.detach().clone() for key, tensor in head.state_dict().items()}
    speculators.write(DrafterRecord(head.config, tensors), out, verifier=verifier)


@cache
def directory(name: str) -> Path:
    """The trained drafter's directory; trains it (a minute or two on one core) where nobody has yet."""
    version = hashlib.sha256(Path(__file__).read_bytes() + str(target().path).encode()).hexdigest()[:12]
    place = Path(tempfile.gettempdir()) / f"draftsmith-eagle-{name}-{version}"
    if not (place / "config.json").exists():
        head = train(RECIPES[name], target())
        scratch = Path(tempfile.mkdtemp(prefix="draftsmith-eagle-"))
        write(head, scratch, target().path)
        try:
            os.rename(scratch, place)
        except OSError:  # another experiment was faster
            shutil.rmtree(scratch)
    return place
