"""The any-subset network: laws that sum to one, no leakage, the exact cache, XLNet's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.load_any_subset import read_net
from draftsmith.inference.loader import load
from draftsmith.inference.nets.any_subset_lm import AnySubsetConfig, AnySubsetLM
from draftsmith.inference.orders import check_rank, is_lattice, lattice_rank, order_of
from draftsmith.inference.sampling import SamplingParams
from tests.canvases import canvas_of, hole_law, small_net

VARIANTS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "sink": {"sink": True},
    "xlnet": {"scheme": "xlnet", "tied": True},
}
N = 10


@pytest.fixture(params=VARIANTS)
def net(request: pytest.FixtureRequest) -> AnySubsetLM:
    return small_net(8, **VARIANTS[request.param])


def canvases(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, rank, num_visible and order of random canvases whose prompts differ."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(batch, N, generator=generator) < 0.4
    visible[:, 3], visible[:, 5] = True, False
    rank = lattice_rank(visible)
    return torch.randint(0, 8, (batch, N), generator=generator), rank, visible.sum(1), order_of(rank)


def shown(net: AnySubsetLM, hidden: torch.Tensor) -> torch.Tensor:
    """Logits without the mask id's, which are -inf."""
    logits = net.head(hidden)
    assert bool((logits[..., net.config.mask_id] == float("-inf")).all())
    return logits[..., : net.config.mask_id]


# Orders --------------------------------------------------------------------------------------------------------------


def test_the_lattice() -> None:
    visible = torch.tensor([[False, True, False, True, False]])
    rank = lattice_rank(visible)
    assert rank.tolist() == [[2, 0, 3, 1, 4]] and order_of(rank).tolist() == [[1, 3, 0, 2, 4]]
    assert is_lattice(rank, torch.tensor([2])).tolist() == [True]
    assert is_lattice(torch.tensor([[3, 0, 2, 1, 4]]), torch.tensor([2])).tolist() == [False]
    check_rank(rank, visible)
    with pytest.raises(InvalidValue, match="position 2 has rank 5"):
        check_rank(torch.tensor([[2, 0, 5, 1, 4]]), visible)
    with pytest.raises(InvalidValue, match=r"rank must be int64 \[1, 5\]"):
        check_rank(rank[:, :4], visible)


# Guarantees ----------------------------------------------------------------------------------------------------------


def test_the_joint_sums_to_one() -> None:
    """Guarantee 4, in float64, where the bound says something of the masks and not of rounding."""
    for fields in VARIANTS.values():
        double = small_net(4, **fields).double()
        total = hole_law(double, canvas_of("1__2_", 4), SamplingParams(temperature=1.0)).probs.sum()
        assert abs(float(total) - 1) < 1e-6


def test_queries_see_lower_ranks_only(net: AnySubsetLM) -> None:
    """Guarantee 5: tokens at ranks >= r may change, the query at rank r does not; and those below it do matter."""
    tokens, rank, visible, order = canvases()
    before = shown(net, net(tokens, rank, visible, order))
    for r in range(1, N):
        changed = torch.where(rank >= r, (tokens + 1) % 8, tokens)
        after = shown(net, net(changed, rank, visible, order))
        reach = torch.maximum(visible, torch.full_like(visible, r))  # a prompt token's content sees the whole prompt
        for b in range(len(tokens)):
            if int(reach[b]) == r:
                torch.testing.assert_close(after[b, r], before[b, r], atol=1e-6, rtol=0)
    seen = torch.where(rank < visible.unsqueeze(1), (tokens + 1) % 8, tokens)
    moved = (shown(net, net(seen, rank, visible, order)) - before).abs().amax(-1)
    assert float(moved.gather(1, visible.unsqueeze(1)).min()) > 1e-4


def test_the_draft_mask_equals_the_oracle_at_the_first_rank(net: AnySubsetLM) -> None:
    """Guarantee 1: p[0] = q[0]; and the draft's later queries see nothing past n."""
    tokens, rank, visible, order = canvases()
    n = visible + 1
    targets = order.gather(1, n.unsqueeze(1) + torch.arange(3))
    draft = shown(net, net(tokens, rank, visible, targets, n))
    oracle = shown(net, net(tokens, rank, visible, targets))
    assert float((draft.softmax(-1)[:, 0] - oracle.softmax(-1)[:, 0]).abs().max()) < 1e-5
    assert float((draft - oracle)[:, 1:].abs().max()) > 1e-3
    changed = torch.where(rank >= n.unsqueeze(1), (tokens + 3) % 8, tokens)
    torch.testing.assert_close(shown(net, net(changed, rank, visible, targets, n)), draft, atol=1e-6, rtol=0)


def test_the_cache_is_exact(net: AnySubsetLM) -> None:
    """Guarantee 6: ragged prompts, rounds of several ranks with wrong tokens that are overwritten, rows dropped."""
    tokens, rank, visible, order = canvases(4, seed=2)
    by_rank = tokens.gather(1, order)
    plain = shown(net, net(tokens, rank, visible, order))
    cache = net.new_cache(order, slack=4)
    first = visible.unsqueeze(1)
    hidden = net.extend(cache, by_rank[:, : int(visible.max())], [0] * 4, visible, first, first)
    rows, worst = torch.arange(4), 0.0

    def gap(hidden: torch.Tensor, ranks: torch.Tensor) -> float:
        at = ranks.unsqueeze(-1).expand(-1, -1, plain.shape[-1])
        return float((shown(net, hidden) - plain[rows].gather(1, at)).abs().max())

    worst = max(worst, gap(hidden, first))
    done = visible.clone()
    while int(done.max()) + 3 < N:
        ranks = done.unsqueeze(1) + torch.arange(3)
        wrong = by_rank.gather(1, ranks)
        wrong[:, 2] = (wrong[:, 2] + 1) % 8  # the last of the round is rejected
        worst = max(worst, gap(net.extend(cache, wrong, done.tolist(), visible, ranks, ranks), ranks))
        if len(rows) == 4:
            rows = torch.tensor([3, 1, 2])
            cache.select(rows)
            by_rank, visible, done = by_rank[rows], visible[rows], done[rows]
        done = done + 2
    assert worst < 1e-5, worst
    assert cache.batch == 3


def test_a_row_that_sees_nothing_is_finite_and_leaks_nothing() -> None:
    """The pitfall of XLNet's -1e30: rank 0 of a canvas without prompt would attend to everything alike."""
    net = small_net(8)
    tokens, rank, _, order = canvases()
    none = torch.zeros(3, dtype=torch.int64)
    first = shown(net, net(tokens, rank, none, order[:, :1]))
    assert bool(first.isfinite().all())
    torch.testing.assert_close(shown(net, net((tokens + 1) % 8, rank, none, order[:, :1])), first, atol=0, rtol=0)
    net.requires_grad_(True)
    net(tokens, rank, none, order).square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


def test_the_head_is_the_matrix_of_the_loss(net: AnySubsetLM) -> None:
    hidden = torch.randn(2, 32)
    expected = torch.nn.functional.linear(hidden, net.lm_head.weight, net.lm_head.bias)
    torch.testing.assert_close(shown(net, hidden), expected[:, :8])
    assert (net.lm_head.weight is net.embed_tokens.weight) == net.config.tied


def test_errors() -> None:
    net = small_net(8)
    with pytest.raises(InvalidValue, match="a canvas of 25 positions asked of a network for 24"):
        net.new_cache(torch.arange(25).unsqueeze(0))
    with pytest.raises(InvalidState, match="eval mode"):
        small_net(8).train().extend(
            net.new_cache(torch.arange(4).unsqueeze(0)),
            torch.zeros(1, 1, dtype=torch.int64),
            [0],
            torch.tensor([1]),
            torch.tensor([[1]]),
            torch.tensor([[1]]),
        )
    sizes = {"vocab_size": 9, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "intermediate_size": 8}
    for fields, message in (
        ({"mask_id": 9}, "mask_id 9 is outside"),
        ({"mask_id": 8, "scheme": "rotary"}, "unknown scheme"),
        ({"mask_id": 8, "num_heads": 5}, "no multiple of num_heads"),
        ({"mask_id": 8, "scheme": "xlnet", "sink": True}, "a sink needs scheme 'absolute'"),
    ):
        with pytest.raises(InvalidValue, match=message):
            AnySubsetConfig(max_length=8, **(sizes | fields))


# XLNet ---------------------------------------------------------------------------------------------------------------


def xlnet(directory: Path, **fields: Any) -> Any:
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(5)
    sizes = {"vocab_size": 30, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "initializer_range": 0.3}
    model = XLNetLMHeadModel(XLNetConfig(**(sizes | fields))).eval()
    with torch.no_grad():
        model.lm_loss.bias.normal_()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("fields", [{}, {"clamp_len": 3, "ff_activation": "relu"}], ids=["base", "clamped"])
def test_equals_xlnet(fields: dict[str, Any], tmp_path: Path) -> None:
    """Two-stream logits of transformers' class, with perm_mask and target_mapping, under both masks."""
    model = xlnet(tmp_path, **fields)
    part = load(tmp_path)
    assert part.kind == "any-subset-lm" and part.vocab_size == 30
    net: Any = part.part
    assert net.config.mask_id == 6 and net.config.tied
    tokens, rank, visible, order = canvases()
    prompt = rank < visible.unsqueeze(1)
    allow = (rank.unsqueeze(1) < rank.unsqueeze(2)) | (prompt.unsqueeze(1) & prompt.unsqueeze(2))
    least = int(visible.max())
    targets = order[:, least:]
    mapping = torch.nn.functional.one_hot(targets, N).float()
    with torch.no_grad():
        theirs = model(input_ids=tokens, perm_mask=(~allow).float(), target_mapping=mapping).logits
    assert float((theirs[..., 7:] - net.head(net(tokens, rank, visible, targets))[..., 7:]).abs().max()) < 1e-4
    n = torch.full_like(visible, least)
    drafting = allow & ~((rank.unsqueeze(2) >= least) & (rank.unsqueeze(1) >= least))
    with torch.no_grad():
        theirs = model(input_ids=tokens, perm_mask=(~drafting).float(), target_mapping=mapping).logits
    assert float((theirs[..., 7:] - net.head(net(tokens, rank, visible, targets, n))[..., 7:]).abs().max()) < 1e-4


def test_xlnet_is_served_from_its_cache(tmp_path: Path) -> None:
    from draftsmith.inference import registry
    from draftsmith.inference.canvas import CanvasRequest

    xlnet(tmp_path)
    net = load(tmp_path).part
    requests = [CanvasRequest.from_mask([3, 6, 6, 9, 6, 6, 6, 2], 6, row_id=i) for i in range(20)]
    params = SamplingParams(temperature=1.0)
    outputs = [
        registry.build_canvas("any_subset", {"target": net}, sampling=params, settings={"cache": cache}).decode(
            requests
        )
        for cache in (True, False)
    ]
    assert outputs[0].output == outputs[1].output and max(outputs[0].notes["nfe_per_row"]) <= 5


def test_xlnet_variants_and_damage_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    xlnet(tmp_path / "uni", attn_type="uni")
    with pytest.raises(InvalidValue, match="attn_type 'bi'"):
        read_net(tmp_path / "uni")
    xlnet(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.layer.1.rel_attn.r"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidValue, match=r"lacks layers.1.attention.r_proj.weight"):
        read_net(tmp_path / "cut")
    with pytest.raises(InvalidValue, match="leave engine at auto or native"):
        load(tmp_path / "uni", engine="hf")
