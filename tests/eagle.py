"""A tiny target with peaked laws and EAGLE heads trained on one text of it, for tests."""

from typing import Any

import torch

from draftsmith.data.batches import TokenBatch
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_target import EagleSizes, EagleTarget
from draftsmith.modules.hf_model import HFModel
from tests.tiny import lm

ARCH = HFModel(arch={"model_type": "llama"})  # a module whose target is set by hand


def peaked(seed: int = 1, vocab_size: int = 64, **sizes: int) -> Any:
    """A frozen random Llama of 6 layers whose most likely token is nearly certain."""
    model = lm(seed=seed, layers=6, vocab_size=vocab_size, max_length=sizes.pop("max_length", 96), **sizes)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model.requires_grad_(False)


def module_for(model: Any, sizes: EagleSizes | None = None, **settings: Any) -> EagleDrafter:
    """A drafter module on a target in memory, built."""
    torch.manual_seed(0)
    module = EagleDrafter(ARCH, sizes or EagleSizes(), **settings)
    module.use_target(EagleTarget.of(model))
    module.configure_model()
    return module


def text_batch(ids: torch.Tensor, prompt: int = 1, document: torch.Tensor | None = None) -> TokenBatch:
    """Rows of one document each (or of `document`); everything behind the prompt is a label. ids: int64 [B, T]."""
    mask = torch.ones_like(ids, dtype=torch.int8)
    mask[:, :prompt] = 0
    separate = document is not None
    if document is None:
        document = torch.zeros_like(ids)
    return TokenBatch(ids, mask, document.int(), torch.arange(len(ids)), separate)


def fit(module: EagleDrafter, batch: TokenBatch, steps: int, lr: float = 3e-3) -> float:
    """Train on one batch; the last loss."""
    assert module.net is not None
    module.train()
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=lr, weight_decay=0.0)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = module.unroll(batch, statistics=False).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.net.parameters(), 0.5)
        optimizer.step()
    module.eval()
    return float(loss.detach())


@torch.no_grad()
def greedy_text(model: Any, prompt: list[int], new: int) -> torch.Tensor:
    """int64 [1, len(prompt) + new]: what the target writes, never ending."""
    text = torch.tensor([prompt])
    for _ in range(new):
        text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), 1)
    return text


@torch.no_grad()
def sure_text(model: Any, new: int) -> tuple[list[int], torch.Tensor]:
    """(prompt, int64 [1, len(prompt) + new]) that the target writes without ever being near a tie.

    What learns a text with a tie by heart gets the tied token right or wrong by the last digits.
    """
    for first in range(64):
        prompt = [first, 9, 30, 17]
        ids = greedy_text(model, prompt, new)
        top = model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1).topk(2).values
        if bool((top[:, 0] > 1.5 * top[:, 1]).all()) and len(ids.unique()) > 12:
            return prompt, ids
    raise AssertionError("every text of this target has a tie")
