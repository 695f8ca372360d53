"""The roofline forecast: hand-worked bytes and rounds, sizes from configs, the fit on made-up rows, bad input."""

import functools
import itertools
import math
import random
from typing import Any

import pytest

from draftsmith.inference import roofline as rl
from draftsmith.inference import roofline_fit as fit
from draftsmith.inference.errors import InvalidValue

GPU = rl.Gpu(bandwidth=1000.0, flops=4000.0)
DENSE = rl.Sizes(layers=2, always=100.0)  # 200 bytes a call, 200 operations a token
ROUTED = rl.Sizes(layers=2, always=100.0, expert=10.0, experts=4, chosen=1, routed_layers=2)
DRAFT = rl.Sizes(layers=1, always=10.0)
CHAIN = rl.Plan(batch=1, steps=3, topk=1, num_draft_tokens=4)

DENSE_CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}


def test_experts_touched() -> None:
    """Hand-worked: one token touches its own; two of four experts, three tokens: 4 (1 - 1/8)."""
    assert rl.experts_touched(128, 8, 1) == pytest.approx(8)
    assert rl.experts_touched(4, 2, 3) == pytest.approx(3.5)
    assert rl.experts_touched(4, 4, 1) == 4
    assert rl.experts_touched(16, 1, 1e6) == pytest.approx(16)


def test_experts_touched_against_drawn_ones() -> None:
    rng = random.Random(0)
    seen = [len({e for _ in range(5) for e in rng.sample(range(16), 3)}) for _ in range(4000)]
    assert sum(seen) / len(seen) == pytest.approx(rl.experts_touched(16, 3, 5), rel=0.01)


def test_bytes_and_operations_of_a_call() -> None:
    assert DENSE.bytes(1) == DENSE.bytes(64) == 200
    assert DENSE.flops(3) == 600
    assert ROUTED.bytes(2) == pytest.approx(2 * (100 + 2 * (4 * (1 - 0.75**2)) * 10))
    assert ROUTED.flops(2) == 2 * 2 * (100 + 2 * 1 * 10)


def test_the_longer_of_reading_and_arithmetic() -> None:
    """200 bytes take 0.2 s; 200 operations a token take 0.05 s each, so they take over from the fifth token on."""
    seconds = [rl.call_seconds(DENSE, n, GPU) for n in (1, 4, 5, 8)]
    assert seconds == pytest.approx([0.2, 0.2, 0.25, 0.4])


def test_speedup_uses_every_term() -> None:
    """Hand-worked, chain: 0.2 s is the unit. Plain 1 + c; round 1 + c + 3 draft calls of 0.02 s + 3 d + r."""
    t = rl.terms(DENSE, DRAFT, CHAIN, GPU)
    o = rl.Overheads(call=0.5, draft=0.02, tree=9.0, round=0.05)
    assert rl.plain_step(o) == pytest.approx(1.5)
    assert rl.whole_round(t, o) == pytest.approx(1 + 0.5 + 0.3 + 0.06 + 0.05)
    assert rl.speedup(2.0, t, o) == pytest.approx(2 * 1.5 / 1.91)


def test_a_tree_verifies_its_nodes_and_drafts_with_wide_calls() -> None:
    """Draft calls after the first take batch * topk = 8 tokens: 160 operations, 0.04 s, above 0.02 s of bytes."""
    t = rl.terms(DENSE, DRAFT, rl.Plan(batch=2, steps=3, topk=4, num_draft_tokens=6), GPU)
    assert t.verify == pytest.approx(0.6 / 0.2)  # 12 tokens
    assert t.draft == pytest.approx((0.02 + 2 * 0.04) / 0.2)
    assert t.tree_calls == 3
    assert rl.whole_round(t, rl.Overheads(tree=0.1)) == pytest.approx(rl.whole_round(t, rl.Overheads()) + 0.3)


def test_the_speed_of_memory_and_processor_together_cancels() -> None:
    fast = rl.Gpu(GPU.bandwidth * 8, GPU.flops * 8)
    assert vars(rl.terms(ROUTED, DRAFT, CHAIN, fast)) == pytest.approx(vars(rl.terms(ROUTED, DRAFT, CHAIN, GPU)))


@pytest.mark.parametrize("target", [DENSE, ROUTED])
def test_monotone(target: rl.Sizes) -> None:
    """More accepted is faster; each overhead of drafting, each step, and each verified token is slower."""
    t = rl.terms(target, DRAFT, CHAIN, GPU)
    assert rl.speedup(3.0, t, rl.Overheads()) > rl.speedup(2.0, t, rl.Overheads())
    for name in ("draft", "round"):
        assert rl.speedup(2.0, t, rl.Overheads(**{name: 0.1})) < rl.speedup(2.0, t, rl.Overheads())
    chains = [rl.terms(target, DRAFT, rl.Plan(8, g, 1, g + 1), GPU) for g in range(1, 12)]
    speeds = [rl.speedup(2.0, chain, rl.Overheads()) for chain in chains]
    assert all(a > b for a, b in itertools.pairwise(speeds))


def test_a_target_with_experts_gains_less_from_the_same_accepted_length() -> None:
    wide = rl.Sizes(layers=2, always=20.0, expert=10.0, experts=64, chosen=1, routed_layers=2)
    dense, routed = (rl.terms(target, DRAFT, CHAIN, rl.Gpu(1000.0, 1e9)) for target in (DENSE, wide))
    assert rl.speedup(3.0, routed, rl.Overheads()) < rl.speedup(3.0, dense, rl.Overheads())


def test_sizes_of_a_dense_config() -> None:
    """Hand-worked: attention 8*8 + 2*(8*4) + 8*8 = 192, MLP 3*8*16 = 384, head 8*50."""
    assert rl.sizes_of(DENSE_CONFIG) == rl.Sizes(layers=3, always=3 * (192 + 384) + 400)
    assert rl.sizes_of({**DENSE_CONFIG, "dtype": "float32"}).number_bytes == 4
    assert rl.sizes_of({**DENSE_CONFIG, "quantization_config": {"quant_method": "fp8"}}).number_bytes == 1


def test_sizes_of_an_eagle_head() -> None:
    """Its queries, keys and values read twice the width: 128 + 2*64 + 64; its head has the draft's vocabulary."""
    config = {**DENSE_CONFIG, "num_hidden_layers": 1, "draft_vocab_size": 20}
    assert rl.sizes_of(config) == rl.Sizes(layers=1, always=(128 + 128 + 64) + 384 + 160)


def test_sizes_of_configs_with_experts() -> None:
    moe = {**DENSE_CONFIG, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
    plain = rl.sizes_of(moe)
    assert (plain.expert, plain.experts, plain.chosen, plain.routed_layers) == (3 * 8 * 5, 6, 2, 3)
    assert plain.always == 3 * 192 + 400
    first_dense = rl.sizes_of({**moe, "first_k_dense_replace": 1, "num_shared_experts": 1})
    assert first_dense.routed_layers == 2
    assert first_dense.always == 3 * 192 + 384 + 2 * 120 + 400
    assert rl.sizes_of({**moe, "decoder_sparse_step": 2}).routed_layers == 1  # the second layer of three
    mixtral = {**DENSE_CONFIG, "num_local_experts": 6, "num_experts_per_tok": 2}
    assert rl.sizes_of(mixtral).expert == 384


def made_up(targets: int = 4, noise: float = 0.0, o: rl.Overheads | None = None) -> list[fit.Row]:
    """Rows that obey the model exactly, but for `noise` on the log speed-up."""
    o = o or rl.Overheads(call=2.0, draft=0.1, tree=0.05, round=0.4)
    rng, rows = random.Random(0), []
    for i in range(targets):
        target = rl.Sizes(16 * (i + 1), 1e9 * (i + 1), 1e7, 64, 4, 16 * (i + 1))
        draft = rl.Sizes(1, 1e8 * (targets - i))
        for plan in (rl.Plan(8, 3, 1, 4), rl.Plan(8, 5, 1, 6), rl.Plan(1, 5, 3, 6), rl.Plan(8, 7, 4, 8)):
            t = rl.terms(target, draft, plan, rl.GPUS["h200"])
            tau = 2.0 + rng.random()
            speed = rl.speedup(tau, t, o) * math.exp(rng.gauss(0.0, noise))
            rows.append(fit.Row(f"target{i}", plan, t, tau, speed))
    return rows


def test_the_fit_recovers_the_overheads() -> None:
    found = fit.fit_roofline(made_up()).overheads
    assert vars(found) == pytest.approx(vars(rl.Overheads(call=2.0, draft=0.1, tree=0.05, round=0.4)), rel=1e-3)


def test_the_fits_of_the_baselines() -> None:
    rows = made_up()
    share = [fit.Row(r.target, r.plan, r.terms, r.accepted_length, 0.6 * r.accepted_length) for r in rows]
    assert fit.fit_accepted_length_only(share).share == pytest.approx(0.6)
    ratio = [fit.Row(r.target, r.plan, r.terms, 3.0, 3.0 / (1 + 0.2 * r.plan.steps)) for r in rows]
    assert fit.fit_constant_ratio(ratio).c == pytest.approx(0.2)


def test_a_target_is_scored_by_a_fit_that_has_not_seen_it() -> None:
    seen: list[set[str]] = []

    def spy(rows: Any) -> fit.Forecaster:
        seen.append({row.target for row in rows})
        return fit.fit_accepted_length_only(rows)

    score = fit.leave_one_target_out(made_up(), spy)
    names = {f"target{i}" for i in range(4)}
    assert [names - s for s in seen] == [{f"target{i}"} for i in range(4)]
    assert set(score.errors) == names
    assert len(score.all) == 16


def test_made_up_rows_are_forecast_and_the_roofline_beats_the_baselines() -> None:
    rows = made_up(noise=0.02)
    scores = [
        fit.leave_one_target_out(rows, f).median
        for f in (fit.fit_roofline, fit.fit_constant_ratio, fit.fit_accepted_length_only)
    ]
    assert scores[0] < 0.04
    assert scores[0] < min(scores[1:])


def test_rows_that_no_cost_explains_are_scored_but_not_fitted() -> None:
    rows = made_up()
    spoilt = [
        fit.Row(r.target, r.plan, r.terms, r.accepted_length, 1.5 * r.accepted_length) if r.target == "target0" else r
        for r in rows
    ]
    score = fit.leave_one_target_out(spoilt, fit.fit_roofline)
    assert min(score.errors["target0"]) > 0.3
    assert max(score.by_target[f"target{i}"] for i in (1, 2, 3)) < 1e-3
    plain = fit.leave_one_target_out(spoilt, functools.partial(fit.fit_roofline, robust=False))
    assert min(plain.by_target[f"target{i}"] for i in (1, 2, 3)) > 0.02


def test_scores() -> None:
    score = fit.Score({"a": (0.1, 0.2, 0.3), "b": (0.5,)}, {})
    assert score.median == pytest.approx(0.25)
    assert score.by_target == {"a": 0.2, "b": 0.5}
    assert score.quantile(1.0) == pytest.approx(0.5)
    assert score.interval() == (0.2, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rl.Plan(0, 3, 1, 4), "batch"),
        (lambda: rl.Plan(1, 3, 1, 6), "chain of 3 steps"),
        (lambda: rl.Overheads(call=-1.0), "at least 0"),
        (lambda: rl.Sizes(layers=0, always=1.0), "at least one layer"),
        (lambda: rl.Sizes(layers=1, always=1.0, expert=1.0, experts=4, chosen=5, routed_layers=1), "1 to 4 experts"),
        (lambda: rl.experts_touched(4, 0, 1), "1 to 4 experts"),
        (lambda: rl.speedup(0.9, rl.terms(DENSE, DRAFT, CHAIN, GPU), rl.Overheads()), "at least one token"),
        (lambda: rl.sizes_of({"hidden_size": 8}), "num_hidden_layers"),
        (lambda: rl.sizes_of({**DENSE_CONFIG, "quantization_config": {"quant_method": "awq"}}), "'awq'"),
        (lambda: rl.sizes_of({**DENSE_CONFIG, "dtype": "int3"}), "int3"),
        (lambda: fit.leave_one_target_out(made_up(1), fit.fit_roofline), "at least two targets"),
        (lambda: fit.fit_roofline([]), "no row to fit on"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()
