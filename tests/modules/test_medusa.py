"""Medusa's loss by hand, and the overfit gate of its heads in the real decoder."""

import pytest
import torch

from draftsmith.inference.decoders.tree import TreeDecoder, TreeSettings
from draftsmith.inference.drafters.medusa import MedusaTreeDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.nets.medusa import MedusaConfig, MedusaHeads
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.modules.medusa import medusa_loss
from tests.eagle import greedy_text, peaked, text_batch


def test_the_loss_is_the_weighted_mean_cross_entropy_of_each_heads_token() -> None:
    torch.manual_seed(0)
    heads = MedusaHeads(MedusaConfig(3, 2, 16, 20))
    batch = text_batch(torch.randint(20, (2, 9)), prompt=3, document=torch.tensor([[0] * 9, [0] * 5 + [1] * 4]))
    last = torch.randn(2, 9, 16)
    expected = 0.0
    for m, head in enumerate(heads):
        values = [
            torch.nn.functional.cross_entropy(head(last[b, t]), batch.ids[b, t + m + 2])
            for b in range(2)
            for t in range(9 - m - 2)
            if batch.loss_mask[b, t + m + 2] and batch.document[b, t] == batch.document[b, t + m + 2]
        ]
        expected += 0.5**m * float(torch.stack(values).mean().detach())
    loss = medusa_loss(heads, last, batch, decay=0.5)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())
    with pytest.raises(InvalidValue, match="decay"):
        medusa_loss(heads, last, batch, decay=1.5)


def test_what_overfits_one_text_is_accepted_in_full_blocks() -> None:
    model, prompt = peaked(), [5, 9, 30, 17]
    ids = greedy_text(model, prompt, 40)
    with torch.no_grad():
        last = model.model(ids).last_hidden_state
    torch.manual_seed(0)
    heads = MedusaHeads(MedusaConfig(3, 1, 32, 64))
    heads.start_from(model.lm_head.weight)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = medusa_loss(heads, last, text_batch(ids, prompt=4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target = HFEngine(model)
    drafter = MedusaTreeDrafter(heads.eval(), ChainPolicy(3), target=target)
    result = TreeDecoder(target, drafter, settings=TreeSettings(nodes=3, depth=3)).decode([TokenRequest(prompt, 40)])
    assert result.output[0] == ids[0, 4:].tolist()
    assert sum(result.rounds.accepted) == sum(result.rounds.drafted), result.rounds
