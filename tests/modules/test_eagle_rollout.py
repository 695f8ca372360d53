"""The training-time test against what it stands for: a cached rollout of the head with its own states (guarantee 8)."""

import pytest
import torch

from draftsmith.inference.load_eagle import compared, replay_head
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead
from draftsmith.modules.eagle_rollout import rollout


def small_head(seed: int = 0, **changes: object) -> EagleHead:
    """A random head of width 32 on a target of width 24 (EAGLE-1: 32), with large weights so that attention matters."""
    torch.manual_seed(seed)
    first = changes.get("version") == 1
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "target_hidden_size": 32 if first else 24,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "draft_vocab_size": 64,
        "aux_layers": (8,) if first else (2, 4, 5),
        "max_positions": 64,
    }
    head = EagleHead(EagleConfig(**(sizes | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.2) + (p.dim() == 1))
    return head.eval()


@torch.no_grad()
def cached_rollout(
    head: EagleHead, tokens: torch.Tensor, features: torch.Tensor, start: int, steps: int
) -> torch.Tensor:
    """Output states [B, steps, D] of drafting behind pairs 0..start with the given tokens, one at a time."""
    cache = head.new_cache(len(tokens), 64)
    embeds = head.embed(tokens)
    out = head(embeds[:, 1 : start + 2], head.project(features[:, : start + 1]), cache=cache)[:, -1:]
    outs = [out]
    for k in range(1, steps):
        out = head(embeds[:, start + 1 + k : start + 2 + k], head.feedback(out), cache=cache)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": 1, "fc_bias": True},
        {"family": "qwen3"},
        {"norm_before_residual": True, "norm_before_fc": True},
        {"fc_norm": True, "norm_output": True, "attention_bias": True, "num_kv_heads": 4},
    ],
)
def test_step_k_at_row_t_is_the_cached_rollout_behind_row_t(changes: dict[str, object]) -> None:
    head = small_head(**changes)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (2, 14), generator=generator)
    features = torch.randn(2, 13, head.config.feature_size, generator=generator)
    with torch.no_grad():
        outs = list(rollout(head, head.embed(tokens), head.project(features), 4))
    for start in (0, 3, 8):
        expected = cached_rollout(head, tokens, features, start, 4)
        found = torch.stack([out[:, start] for out in outs], 1)
        assert (head.ready(found) - head.ready(expected)).abs().max() < 1e-5 * head.ready(expected).abs().max()
        if head.config.version == 3:
            logits = head.logits(expected).detach()
            assert (head.logits(found).detach() - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))


def test_a_document_of_a_packed_row_is_what_it_is_alone() -> None:
    head = small_head()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (1, 15), generator=generator)
    features = torch.randn(1, 14, head.config.feature_size, generator=generator)
    cut = 6
    document = torch.tensor([0] * cut + [1] * (14 - cut))
    positions = torch.cat((torch.arange(cut), torch.arange(14 - cut))).unsqueeze(0)
    visible = (document.unsqueeze(0) == document.unsqueeze(1)).tril().view(1, 1, 14, 14)
    with torch.no_grad():
        packed = list(rollout(head, head.embed(tokens), head.project(features), 3, positions, visible))
        alone = list(rollout(head, head.embed(tokens[:, cut:]), head.project(features[:, cut:]), 3))
        joined = list(rollout(head, head.embed(tokens), head.project(features), 3))
    for k in range(3):
        torch.testing.assert_close(packed[k][:, cut:], alone[k], rtol=1e-4, atol=1e-5)
        assert (joined[k][:, cut:] - alone[k]).abs().max() > 0.01  # without the mask the documents do mix


def test_gradients_reach_every_parameter_through_the_last_step() -> None:
    head = small_head(own_embedding=True).train()
    tokens = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(3))
    features = torch.randn(1, 8, head.config.feature_size)
    *_, last = rollout(head, head.embed(tokens), head.project(features), 3)
    head.logits(last).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


@pytest.mark.parametrize("version", [1, 3])
def test_the_cached_replay_of_the_seal_is_the_training_pass(version: int) -> None:
    head = small_head(version=version)
    features, embeds = torch.rand(2, 11, head.config.feature_size), torch.randn(2, 12, 32)
    found = replay_head(head, features, embeds)
    padded = torch.cat((torch.zeros(2, 1, 32), embeds), 1)
    with torch.no_grad():
        outs = torch.stack([compared(head, x) for x in rollout(head, padded, head.project(features), 2)], 1)
    torch.testing.assert_close(found, outs, rtol=1e-4, atol=1e-4)
