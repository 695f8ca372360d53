"""The overfit gate of language models as drafts: what one text taught is accepted in full blocks by the real decoder.

A mask, a label or a law that is shifted by one leaves the loss as low as ever and shows here. The gates of EAGLE heads
and Medusa heads stand in their own tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch
from draftsmith.data.online_buffer import collate
from draftsmith.inference import registry
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.served_draft import engine_of
from draftsmith.modules.hf_model import FrozenTeacher, HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.osd_drafter import OSDDrafter
from tests.eagle import peaked, sure_text, text_batch

ARCH = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
}
NEW, DRAFT = 40, 4


def osd(model: Any, loss: str) -> OSDDrafter:
    torch.manual_seed(0)
    module = OSDDrafter(draft=HFModel(arch=ARCH), loss=loss)
    module.configure_model()
    module.use_teacher(FrozenTeacher(model))
    return module


def on_text(model: Any, batch: TokenBatch, loss: str) -> tuple[Any, Callable[[], Tensor]]:
    module = osd(model, loss)
    return module.net(0), lambda: module.text_loss(batch).mean


def on_records(model: Any, batch: TokenBatch, loss: str) -> tuple[Any, Callable[[], Tensor]]:
    """As traffic brings them: every token behind the prompt marked, with the target's law."""
    module, ids = osd(model, loss), batch.ids[0]
    at = batch.loss_mask[0].nonzero().squeeze(1)
    with torch.no_grad():
        laws = TeacherLaw.from_logits(model(ids.unsqueeze(0)).logits[0, at - 1], 64)
    records = collate([Record(ids, at, laws)])
    return module.net(0), lambda: module.online_loss(records).mean


def on_labels(model: Any, batch: TokenBatch, loss: str) -> tuple[Any, Callable[[], Tensor]]:
    """Maximum likelihood on what the target wrote, without its laws."""
    torch.manual_seed(0)
    module = LM(HFModel(arch=ARCH))
    module.configure_model()
    return module.net, lambda: module.loss(batch, statistics=False).mean


@pytest.mark.parametrize(
    ("learn", "loss"), [(on_text, "forward_kl"), (on_text, "ce"), (on_records, "forward_kl"), (on_labels, "ce")]
)
def test_what_overfits_one_text_is_accepted_in_full_blocks(learn: Any, loss: str) -> None:
    model = peaked()
    prompt, ids = sure_text(model, NEW)
    net, objective = learn(model, text_batch(ids, prompt=len(prompt)), loss)
    net.train()
    for steps, lr in ((120, 1e-2), (40, 1e-3)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            objective().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    decoder = registry.build(
        "speculative",
        {"target": HFEngine(model), "draft": engine_of(net)},
        settings={"draft_length": DRAFT, "fallback": "never"},
    )
    result = decoder.decode([TokenRequest(prompt, NEW)])
    assert result.output[0] == ids[0, len(prompt) :].tolist()
    rounds = result.rounds
    assert rounds.accepted == rounds.drafted and len(rounds.drafted) == NEW // (DRAFT + 1), rounds
