"""Block verification: exact enumeration, the shipped code against it, edge cases, the sampled law at the decoder."""

import itertools
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from draftsmith.inference import block_verification, registry
from draftsmith.inference.acceptance import Fault, one_hot, verify
from draftsmith.inference.block_verification import block_tests, check_laws, expected_accepted, verify_block
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import SamplingParams
from tests import exact_rules as exact
from tests.fakes import MarkovEngine, markov, near, requests_for, string_law


def pairs(count: int, seed: int = 0) -> list[tuple[int, int, exact.Table, exact.Table]]:
    """(V, g, p, q): random laws, V in {2, 3}, g <= 4."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        vocab = rng.choice((2, 3))
        g = rng.randint(1, 4 if vocab == 2 else 3)
        found.append((vocab, g, exact.random_table(rng, vocab, g), exact.random_table(rng, vocab, g - 1)))
    return found


def test_lossless_and_never_worse_than_the_token_rule() -> None:
    for vocab, g, p, q in pairs(20):
        emitted, length = exact.block_rule(p, q, vocab, g)
        assert exact.completed(emitted, p, vocab, g + 1) == exact.string_law(p, vocab, g + 1)
        token = exact.token_rule_length(p, q, vocab, g)
        assert length >= token and (g > 1 or length == token)
        by_weights = Fraction(0)
        for x in itertools.product(range(vocab), repeat=g):
            drafted = Fraction(1)
            for i, t in enumerate(x):
                drafted *= q[x[:i]][t]
            if drafted:
                by_weights += drafted * sum(exact.weights_of(x, p, q)[1:])
        assert length == by_weights


def test_the_toy_of_the_paper() -> None:
    third, two = Fraction(1, 3), Fraction(2, 3)
    p = {x: (third, two) for n in range(3) for x in itertools.product(range(2), repeat=n)}
    q = {x: (two, third) for x in p}
    assert exact.token_rule_length(p, q, 2, 2) == Fraction(10, 9)
    assert exact.block_rule(p, q, 2, 2)[1] == Fraction(11, 9)


def test_one_hot_drafts_gain_nothing() -> None:
    rng = random.Random(1)
    for _ in range(5):
        p = exact.random_table(rng, 3, 3)
        q = {x: tuple(Fraction(v == rng.randrange(3)) for v in range(3)) for x in p}
        q = {x: law if sum(law) else (Fraction(1), Fraction(0), Fraction(0)) for x, law in q.items()}
        q = {x: tuple(Fraction(v == law.index(max(law))) for v in range(3)) for x, law in q.items()}
        assert exact.block_rule(p, q, 3, 3)[1] == exact.token_rule_length(p, q, 3, 3)


@pytest.mark.parametrize("mutant", exact.MUTANTS)
def test_negative_controls_are_detected(mutant: str) -> None:
    rng = random.Random(2)
    missed = 0
    for _ in range(8):
        p, q = exact.random_table(rng, 3, 3), exact.random_table(rng, 3, 2)
        emitted, _ = exact.block_rule(p, q, 3, 3, mutant)
        missed += exact.completed(emitted, p, 3, 4) == exact.string_law(p, 3, 4)
    assert missed < 8 / 2


def stacked(x: tuple[int, ...], table: exact.Table, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[float(v) for v in table[x[:i]]] for i in range(rows)], dtype=dtype)


def every_draft(vocab: int, g: int, p: exact.Table, q: exact.Table) -> tuple[list, Tensor, Tensor, Tensor]:
    drafts = [x for x in itertools.product(range(vocab), repeat=g) if all(q[x[:i]][t] for i, t in enumerate(x))]
    return (
        drafts,
        torch.tensor(drafts),
        torch.stack([stacked(x, q, g) for x in drafts]),
        torch.stack([stacked(x, p, g + 1) for x in drafts]),
    )


def test_shipped_weights_and_tests_are_the_exact_ones() -> None:
    for vocab, g, p, q in pairs(15, seed=3):
        drafts, x, q_laws, p_laws = every_draft(vocab, g, p, q)
        w, h = block_tests(x, q_laws, p_laws, torch.full((len(drafts),), g))
        for row, draft in enumerate(drafts):
            want = exact.weights_of(draft, p, q)
            assert w[row].tolist() == pytest.approx([float(v) for v in want], abs=1e-12)
            assert h[row].tolist() == pytest.approx([float(v) for v in exact.tests_of(draft, p, q, want)], abs=1e-12)


def test_shipped_rule_takes_the_last_length_that_passes_and_draws_from_the_weighted_residual() -> None:
    """All patterns of passing and failing tests, and the extra token at a grid of uniforms."""
    for vocab, g, p, q in pairs(6, seed=4):
        drafts, x, q_laws, p_laws = every_draft(vocab, g, p, q)
        n = torch.full((len(drafts),), g)
        _, h = block_tests(x, q_laws, p_laws, n)
        for pattern in itertools.product((False, True), repeat=g):
            # just below the threshold passes, just above fails
            u = torch.where(torch.tensor(pattern), h[:, 1:] * (1 - 1e-9), (h[:, 1:] * (1 + 1e-9)).clamp_max(1 - 1e-12))
            for u_next in (0.05, 0.35, 0.65, 0.95):
                got = verify_block(x, q_laws, p_laws, n, u, torch.full((len(drafts),), u_next).double())
                for row, draft in enumerate(drafts):
                    passed = [0, *(i for i in range(1, g + 1) if u[row, i - 1] < h[row, i])]
                    k = passed[-1]
                    assert got.k[row] == k
                    weights = exact.weights_of(draft, p, q)
                    law = p[draft] if k == g else exact.excess(weights[k], p[draft[:k]], q[draft[:k]])
                    law = law if sum(law) else p[draft[:k]]
                    steps = [float(sum(law[: i + 1]) / sum(law)) for i in range(vocab)]
                    if min(abs(s - u_next) for s in steps) > 1e-9:
                        assert got.y[row] == next(i for i, s in enumerate(steps) if s > u_next)


def test_ragged_rows_equal_shorter_drafts() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(40, 6, 7, generator=generator).softmax(-1)
    q = torch.randn(40, 5, 7, generator=generator).softmax(-1)
    x = torch.multinomial(q.view(-1, 7), 1, generator=generator).view(40, 5)
    u = torch.rand(40, 6, generator=generator, dtype=torch.float64)
    n = torch.arange(40) % 6
    got = verify_block(x, q, p, n, u[:, :5], u[:, 5])
    assert (got.k <= n).all() and (got.fault == Fault.NONE).all()
    for length in range(6):
        rows = (n == length).nonzero().squeeze(1)
        short = verify_block(
            x[rows, :length], q[rows, :length], p[rows, : length + 1], n[rows], u[rows, :length], u[rows, 5]
        )
        assert torch.equal(short.k, got.k[rows]) and torch.equal(short.y, got.y[rows])


@pytest.mark.parametrize("vocab", [3, 300, 9000])  # the last one is summed in two blocks
def test_few_rows_on_the_cpu_get_the_verdict_of_the_batched_form(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)

    def law(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, vocab, generator=generator)).softmax(-1)

    kept = 0
    for trial in range(120):
        rows, g = trial % 3 + 1, (0, 1, 2, 5, 8)[trial % 5]
        p = law(rows, g + 1)
        q = p[:, :g].lerp(law(rows, g), 0.3)
        x = torch.multinomial(q.reshape(-1, vocab), 1, generator=generator).view(rows, g)
        n = torch.randint(g + 1, (rows,), generator=generator) if trial % 2 else torch.full((rows,), g)
        if g and trial % 7 == 0:
            p[0, 0, x[0, 0]] = 0.0  # excluded by the target
        if g and trial % 11 == 0:
            q[0, 0, x[0, 0]] = 0.0  # not the draft's own
        if trial % 13 == 0:
            p[0, trial % (g + 1)] = float("nan")
        if g and trial % 17 == 0:
            q = p[:, :g].clone()  # nothing is left of a residual
        u = torch.rand(rows, g + 1, generator=generator, dtype=torch.float64)
        many, few = (
            rule(x, q, p, n, u[:, :g], u[:, g])
            for rule in (block_verification._verify_on_device, block_verification._verify_on_host)
        )
        assert torch.equal(few.k, many.k) and torch.equal(few.fault, many.fault)
        fine = many.fault == Fault.NONE
        assert torch.equal(few.y[fine], many.y[fine])
        torch.testing.assert_close(few.beta, many.beta, equal_nan=True)
        kept += int(few.k.sum())
    assert kept > 150


def test_one_token_is_the_token_rule_and_large_vocabularies_are_summed_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(50, 4, 100, generator=generator).softmax(-1)
    q = torch.randn(50, 3, 100, generator=generator).softmax(-1)
    x = torch.multinomial(q.view(-1, 100), 1, generator=generator).view(50, 3)
    u = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    one = torch.ones(50, dtype=torch.int64)
    a = verify_block(x[:, :1], q[:, :1], p[:, :2], one, u[:, :1], u[:, 3])
    b = verify(x[:, :1], q[:, :1], p[:, :2], one, u[:, :1], u[:, 3])
    assert torch.equal(a.k, b.k) and torch.equal(a.y, b.y) and torch.equal(a.beta, b.beta)
    whole = block_tests(x, q, p, 3 * one)
    monkeypatch.setattr(block_verification, "_VOCAB_BLOCK", 7)
    torch.testing.assert_close(block_tests(x, q, p, 3 * one), whole, rtol=1e-6, atol=1e-7)


def test_an_excluded_token_ends_the_draft_and_nothing_is_nan() -> None:
    p = torch.tensor([[[0.5, 0.5], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    q = torch.full((1, 3, 2), 0.5)
    x, n = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3])
    w, h = block_tests(x, q, p, n)
    assert w.tolist() == [[1.0, 1.0, 0.0, 0.0]] and h.isfinite().all() and h[0, 2:].tolist() == [0.0, 0.0]
    verdict = verify_block(x, q, p, n, torch.zeros(1, 3).double(), torch.zeros(1).double())
    assert (verdict.k.item(), verdict.y.item(), verdict.fault.item()) == (1, 1, Fault.NONE)


def test_faults() -> None:
    p, q = torch.full((1, 3, 2), 0.5), torch.full((1, 2, 2), 0.5)
    x, u, one = torch.tensor([[0, 1]]), torch.full((1, 2), 0.5).double(), torch.full((1,), 0.5).double()
    for position in range(3):
        bad = p.clone()
        bad[0, position] = float("nan")
        verdict = verify_block(x, q, bad, torch.tensor([2]), u, one)
        assert (verdict.fault.item(), verdict.k.item()) == (Fault.TARGET, position)
        if position == 2:
            assert verify_block(x, q, bad, torch.tensor([1]), u, one).fault.item() == Fault.NONE, "not offered"
    bad = p.clone()
    bad[0, 0] = torch.tensor([0.0, 1.0])  # x_1 is impossible, so what the target says behind it does not matter
    bad[0, 1] = float("nan")
    assert verify_block(x, q, bad, torch.tensor([2]), u, one).fault.item() == Fault.NONE
    impossible = q.clone()
    impossible[0, 1] = torch.tensor([1.0, 0.0])
    assert verify_block(x, impossible, p, torch.tensor([2]), u, one).fault.item() == Fault.DRAFT
    assert verify_block(x, impossible, p, torch.tensor([1]), u, one).fault.item() == Fault.NONE


def test_laws_are_checked_with_row_and_position() -> None:
    p, q = torch.full((2, 3, 2), 0.5), torch.full((2, 2, 2), 0.5)
    x, n = torch.tensor([[0, 1], [0, 1]]), torch.tensor([1, 2])
    check_laws(x, q, p, n)
    q[0, 1] = 0.7
    check_laws(x, q, p, n)  # not offered
    with pytest.raises(InvalidValue, match=r"q at row 1, position 1 does not sum to 1 \(sum 1.4\)"):
        check_laws(x, torch.full_like(q, 0.7).where(torch.arange(2)[:, None] == 1, torch.tensor(0.5)), p, n)
    with pytest.raises(InvalidValue, match="p at row 1, position 2 holds a NaN"):
        check_laws(x, q, torch.cat([p[:, :2], torch.full((2, 1, 2), float("nan"))], 1), n)
    with pytest.raises(InvalidValue, match="row 1, position 1: the draft token has zero probability"):
        check_laws(x, one_hot(torch.zeros_like(x), p[:, :2]), p, n)
    with pytest.raises(InvalidValue, match="3 and 2 ids"):
        verify_block(x, q, torch.full((2, 3, 3), 1 / 3), n, q[..., 0].double(), q[:, 0, 0].double())


def test_expected_lengths() -> None:
    block, token = expected_accepted(torch.tensor([[0.2, 0.6]]), torch.tensor([[0.4, 0.3]]))
    assert block.item() == pytest.approx(0.5 + 1.0) and token.item() == pytest.approx(0.5 + 0.5)


# The decoder ---------------------------------------------------------------------------------------------------------

BLOCK = {"verification": "block", "fallback": "never", "draft_length": 3}


def decoded(target: MarkovEngine, draft: MarkovEngine, params: SamplingParams, rows: int, **settings: object):
    build = registry.build(
        "speculative",
        {"target": target, "draft": draft},
        sampling=params,
        settings={**BLOCK, **settings},
        seed=3,
    )
    return build.decode(requests_for(((1,), (2, 3)), rows, 6))


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.9)],
    ids=["T=1", "T=0.7 top-p 0.9"],
)
def test_sampled_law_of_the_decoder(params: SamplingParams) -> None:
    target = markov(6, 2, seed=1)
    draft = near(target)
    result = decoded(target, draft, params, 20_000)
    assert result.notes["rule"] == "block" and max(result.rounds.accepted) == 3
    for i, prompt in enumerate(((1,), (2, 3))):
        test = string_law(target, prompt, 3, params).test(result.output[i::2], 3)
        assert test.p_value > 1e-3, str(test)


def test_the_decoder_notices_a_residual_without_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = block_verification.residual
    target = markov(4, 1, seed=1)
    params = SamplingParams(temperature=1.0)
    law = string_law(target, (1,), 3, params)
    right = decoded(target, near(target, noise=2.0), params, 20_000)
    assert law.test(right.output[::2], 3).p_value > 1e-3
    monkeypatch.setattr(block_verification, "residual", lambda p, q: whole(p / p.sum(-1, keepdim=True), q))
    wrong = decoded(target, near(target, noise=2.0), params, 20_000)
    assert law.test(wrong.output[::2], 3).p_value < 1e-6


def test_block_accepts_more_and_the_rule_is_reported() -> None:
    target = markov(6, 2, seed=1)
    draft = near(target)
    params = SamplingParams(temperature=1.0)
    block = decoded(target, draft, params, 4000, draft_length=5)
    token = decoded(target, draft, params, 4000, draft_length=5, verification="token")
    per_call = [sum(r.rounds.committed) / len(r.rounds) for r in (block, token)]
    assert per_call[0] > per_call[1] and token.notes["rule"] == "token"
    greedy = decoded(target, draft, SamplingParams(), 2)
    assert greedy.notes["rule"] == "greedy"
    lookup = registry.build("prompt_lookup", {"target": target}, sampling=params, settings=BLOCK)
    assert lookup.decode(requests_for(((1, 2, 1),), 4, 8)).notes["rule"].startswith("token (the drafts are determin")
    with pytest.raises(InvalidValue, match="verification"):
        registry.make_settings("speculative", {"verification": "blocks"})
