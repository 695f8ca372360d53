"""The chunked head against its naive twin: value, gradients, statistics, dropped rows, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses import chunked_head as head_module
from draftsmith.modules.losses.chunked_head import HeadLoss, HeadTarget, TeacherHead, chunked_head, naive_head
from draftsmith.modules.losses.divergence import NEEDS_FULL_SUPPORT, ROW_LOSSES, RowLoss

N, D, V = 37, 8, 23


def parts(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N,D], weight [V,D], bias [V], example_weight [N] with a third of zeros."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=dtype) for s in ((N, D), (V, D), (V,)))
    w = torch.rand(N, generator=g) * (torch.arange(N) % 3 > 0)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), w


def target_of(kind: str, seed: int = 1) -> HeadTarget:
    g = torch.Generator().manual_seed(seed)
    if kind == "labels":
        return torch.randint(V, (N,), generator=g)
    teacher, head = torch.randn(N, 5, generator=g, dtype=torch.float64), torch.randn(V, 5, generator=g).double()
    if kind == "live":
        return TeacherHead(teacher, head, 0.9)
    return TeacherLaw.from_logits(teacher @ head.T, 4, 0.9)


CASES = [
    (kind, name)
    for kind in ("labels", "law", "live")
    for name in sorted(ROW_LOSSES)
    if not (kind == "labels" and name in NEEDS_FULL_SUPPORT)
]


def gradients(run: Callable[[], HeadLoss], *leaves: Tensor) -> list[Tensor | None]:
    for leaf in leaves:
        leaf.grad = None
    (3.0 * run().mean).backward()
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute"])
def test_equals_the_naive_twin(kind: str, name: str, chunk_rows: int, mode: str) -> None:
    hidden, weight, bias, w = parts()
    target, loss = target_of(kind), ROW_LOSSES[name]
    for b in (None, bias):
        ref = naive_head(hidden, weight, target, row_loss=loss, example_weight=w, bias=b)
        got = chunked_head(
            hidden, weight, target, row_loss=loss, example_weight=w, bias=b, chunk_rows=chunk_rows, mode=mode
        )
        torch.testing.assert_close(got.total, ref.total)
        torch.testing.assert_close(got.weight, ref.weight)
        assert got.stats is not None and ref.stats is not None
        for column in ("rows", "loss", "agree", "alpha", "entropy"):
            value = getattr(got.stats, column)
            torch.testing.assert_close(value, getattr(ref.stats, column), check_dtype=False)
            assert not value.requires_grad
        leaves = (hidden, weight) if b is None else (hidden, weight, bias)
        want = gradients(
            lambda b=b: naive_head(hidden, weight, target, row_loss=loss, example_weight=w, bias=b), *leaves
        )
        have = gradients(
            lambda b=b: chunked_head(
                hidden, weight, target, row_loss=loss, example_weight=w, bias=b, chunk_rows=chunk_rows, mode=mode
            ),
            *leaves,
        )
        for a, b_ in zip(have, want, strict=True):
            torch.testing.assert_close(a, b_)


@pytest.mark.parametrize("weights", ["none", "mask"])
def test_agrees_with_torch_own_cross_entropy(weights: str) -> None:
    hidden, weight, bias, real = parts(torch.float32)
    kept = torch.ones(N, dtype=torch.bool) if weights == "none" else real > 0
    labels = target_of("labels")
    assert isinstance(labels, Tensor)

    def ours(statistics: bool) -> HeadLoss:
        return chunked_head(
            hidden,
            weight,
            labels,
            row_loss=ROW_LOSSES["ce"],
            example_weight=None if weights == "none" else kept,
            bias=bias,
            chunk_rows=5,
            statistics=statistics,
        )

    own = torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels.masked_fill(~kept, -100), linear_bias=bias, reduction="sum"
    )
    for statistics in (False, True):
        out = ours(statistics)
        assert (out.stats is not None) == statistics
        torch.testing.assert_close(out.total, own)
    for leaf in (hidden, weight, bias):
        leaf.grad = None
    (3.0 * own / kept.sum()).backward()
    expected = [leaf.grad for leaf in (hidden, weight, bias)]
    for a, b in zip(gradients(lambda: ours(False), hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_with_its_own_gradient_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd is asked for the others only."""
    asked: list[str] = []
    real = head_module._by_autograd

    def counted(row_loss: RowLoss, *rest: object) -> object:
        asked.append(getattr(row_loss, "__name__", "?"))
        return real(row_loss, *rest)  # type: ignore[arg-type]  # passes on whatever came

    monkeypatch.setattr(head_module, "_by_autograd", counted)
    hidden, weight, _, _ = parts()
    for name in ROW_LOSSES:
        chunked_head(hidden, weight, target_of("law"), row_loss=ROW_LOSSES[name], chunk_rows=1000)
    assert sorted(asked) == sorted(set(ROW_LOSSES) - {"ce", "forward_kl"})


def test_exact_zeros_of_a_law_cost_nothing() -> None:
    """A law after top-k: no tail, and tokens that never occur."""
    hidden, weight, _, _ = parts()
    probs = torch.softmax(torch.randn(N, V, generator=torch.Generator().manual_seed(4)), -1)
    probs = torch.where(probs >= probs.topk(3).values[:, -1:], probs, 0.0)
    for k in (2, 3, 5, V):
        law = TeacherLaw.from_probs(probs / probs.sum(-1, keepdim=True), k)
        got = chunked_head(hidden, weight, law, row_loss=ROW_LOSSES["forward_kl"], chunk_rows=6)
        ref = naive_head(hidden, weight, law, row_loss=ROW_LOSSES["forward_kl"])
        torch.testing.assert_close(got.total, ref.total)
        a, b = (torch.autograd.grad(out.total, (hidden, weight)) for out in (got, ref))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # laws are stored in fp32: their sum is 1 to 1e-7


def test_far_tails_stay_finite_in_fp32() -> None:
    """All but the named token lie 200 nats below: the rest's mass is 0 in fp32, its log and gradient are not."""
    z = torch.zeros(1, 5)
    z[0, 0] = 200.0
    law = TeacherLaw.from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]), 1)
    weight = z.T.contiguous().requires_grad_()
    out = chunked_head(torch.ones(1, 1), weight, law, row_loss=ROW_LOSSES["forward_kl"])
    ref = naive_head(torch.ones(1, 1), weight, law, row_loss=ROW_LOSSES["forward_kl"])
    torch.testing.assert_close(out.total, ref.total)
    (got,), (want,) = (torch.autograd.grad(x.total, weight) for x in (out, ref))
    torch.testing.assert_close(got, want)
    assert float(got[1:].sum()) == pytest.approx(-0.5)


def test_backward_runs_once_unless_told_otherwise() -> None:
    hidden, weight, _, _ = parts()

    def head(mode: str, retain: bool) -> Tensor:
        return chunked_head(
            hidden, weight, target_of("labels"), row_loss=ROW_LOSSES["ce"], mode=mode, retain_graph=retain
        ).total

    total = head("grad_in_forward", False)
    total.backward(retain_graph=True)
    with pytest.raises(InvalidState, match="retain_graph=True"):
        total.backward()
    for mode in ("grad_in_forward", "recompute"):
        total = head(mode, True)
        first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_recomputing_keeps_no_gradient_between_the_passes() -> None:
    hidden, weight, _, _ = parts()
    held = {}
    for mode in ("grad_in_forward", "recompute"):
        node = chunked_head(hidden, weight, target_of("law"), row_loss=ROW_LOSSES["forward_kl"], mode=mode).total
        held[mode] = node.grad_fn.grads  # type: ignore[union-attr]  # the function's own attribute
    assert held["recompute"] is None and len(held["grad_in_forward"]) == 3


def test_a_large_trained_head_is_recomputed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, _ = parts()
    monkeypatch.setattr(head_module, "_GRADIENT_BYTES", V * D * 4 - 1)
    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        node = chunked_head(hidden, weight, target_of("labels"), row_loss=ROW_LOSSES["ce"]).total.grad_fn
        assert (node.grads is None) == (not frozen)  # type: ignore[union-attr]  # as above


def test_frozen_head_and_frozen_body() -> None:
    hidden, weight, _, w = parts()
    both = gradients(
        lambda: naive_head(hidden, weight, target_of("law"), row_loss=ROW_LOSSES["forward_kl"], example_weight=w),
        hidden,
        weight,
    )
    for frozen in (weight, hidden):
        frozen.requires_grad_(False)
        got = gradients(
            lambda: chunked_head(
                hidden, weight, target_of("law"), row_loss=ROW_LOSSES["forward_kl"], example_weight=w, chunk_rows=4
            ),
            hidden,
            weight,
        )
        for value, expected, leaf in zip(got, both, (hidden, weight), strict=True):
            if leaf is frozen:
                assert value is None
            else:
                torch.testing.assert_close(value, expected)
        frozen.requires_grad_(True)


def test_tied_head_adds_both_gradients() -> None:
    _, weight, _, _ = parts()
    ids = torch.arange(N) % V
    results = []
    for head in (naive_head, chunked_head):
        weight.grad = None
        hidden = torch.tanh(weight[ids])  # the embedding is the head
        head(hidden, weight, target_of("labels"), row_loss=ROW_LOSSES["ce"]).mean.backward()
        assert weight.grad is not None
        results.append(weight.grad.clone())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["ce", "forward_kl"])
@pytest.mark.parametrize("statistics", [True, False])
def test_all_positions_ignored(name: str, statistics: bool) -> None:
    hidden, weight, _, _ = parts()
    out = chunked_head(
        hidden,
        weight,
        target_of("labels"),
        row_loss=ROW_LOSSES[name],
        example_weight=torch.zeros(N),
        statistics=statistics,
    )
    out.mean.backward()
    assert out.mean.item() == 0 and out.weight.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()
    if statistics:
        assert out.stats is not None and len(out.stats.rows) == 0 and out.stats.agree.dtype == torch.bool


def test_gradients_are_zero_outside_marked_positions() -> None:
    hidden, weight, _, w = parts()
    chunked_head(hidden, weight, target_of("law"), row_loss=ROW_LOSSES["reverse_kl"], example_weight=w).total.backward()
    assert hidden.grad is not None
    assert not hidden.grad[w == 0].any()
    assert bool((hidden.grad[w > 0].abs().sum(-1) > 0).all())


@pytest.mark.parametrize(("student_v", "teacher_v"), [(V, V - 4), (V - 4, V)])
def test_padded_vocabularies_are_cut_to_the_common_rows(student_v: int, teacher_v: int) -> None:
    hidden, weight, _, _ = parts()
    full = target_of("live")
    assert isinstance(full, TeacherHead)
    head = weight.detach()[:student_v].clone().requires_grad_()
    out = chunked_head(
        hidden,
        head,
        TeacherHead(full.hidden, full.weight[:teacher_v], 0.9),
        row_loss=ROW_LOSSES["forward_kl"],
        chunk_rows=6,
    )
    ref = naive_head(
        hidden,
        weight[: V - 4],
        TeacherHead(full.hidden, full.weight[: V - 4], 0.9),
        row_loss=ROW_LOSSES["forward_kl"],
    )
    torch.testing.assert_close(out.total, ref.total)
    out.total.backward()
    assert head.grad is not None and not head.grad[V - 4 :].any() and bool(head.grad[: V - 4].any())


def test_statistics_mean_what_they_say() -> None:
    hidden, weight, _, w = parts()
    labels = target_of("labels")
    assert isinstance(labels, Tensor)
    stats = chunked_head(hidden, weight, labels, row_loss=ROW_LOSSES["ce"], example_weight=w, chunk_rows=4).stats
    assert stats is not None
    kept = w > 0
    logits = (hidden @ weight.T).detach()[kept]
    torch.testing.assert_close(stats.rows, kept.nonzero().squeeze(-1))
    torch.testing.assert_close(stats.agree, logits.argmax(-1) == labels[kept])
    q_y = logits.softmax(-1).gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stats.alpha, q_y)
    assert not stats.entropy.any()
    live = target_of("live")
    assert isinstance(live, TeacherHead)
    stats = chunked_head(hidden, weight, live, row_loss=ROW_LOSSES["tvd"], example_weight=w, chunk_rows=4).stats
    assert stats is not None
    p, q = (live.hidden @ live.weight.T / 0.9).softmax(-1)[kept], (logits / 0.9).softmax(-1)
    torch.testing.assert_close(stats.alpha, torch.minimum(p, q).sum(-1))
    torch.testing.assert_close(stats.loss, 1 - stats.alpha)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1))


def test_gradcheck_through_the_function() -> None:
    hidden, weight, bias, w = parts()
    law = target_of("live")

    def total(h: Tensor, m: Tensor, b: Tensor) -> Tensor:
        return chunked_head(
            h, m, law, row_loss=ROW_LOSSES["jsd"], example_weight=w.double(), bias=b, retain_graph=True
        ).mean

    assert torch.autograd.gradcheck(total, (hidden, weight, bias), atol=1e-6)


def test_low_precision_and_autocast() -> None:
    hidden, weight, _, w = (x.detach().float().requires_grad_() for x in parts())
    w = w.detach()
    target = target_of("law")
    ref = chunked_head(hidden, weight, target, row_loss=ROW_LOSSES["forward_kl"], example_weight=w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = chunked_head(hidden, weight, target, row_loss=ROW_LOSSES["forward_kl"], example_weight=w)
        assert auto.total.dtype == torch.float32
        auto.total.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32  # the master weight's dtype
    assert auto.total.item() == pytest.approx(ref.total.item(), rel=0.02)
    low_h, low_w = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    chunked_head(low_h, low_w, target, row_loss=ROW_LOSSES["forward_kl"], example_weight=w).total.backward()
    assert low_h.grad is not None and low_h.grad.dtype == torch.bfloat16
    assert low_w.grad is not None
    torch.testing.assert_close(low_w.grad.float(), weight.grad, atol=0.05, rtol=0.1)


def test_evaluation_makes_no_gradient_buffers() -> None:
    hidden, weight, _, _ = parts()
    with torch.no_grad():
        out = chunked_head(hidden, weight, target_of("law"), row_loss=ROW_LOSSES["forward_kl"], chunk_rows=5)
    assert not out.total.requires_grad and out.stats is not None


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest sum of live bytes that torch's CPU allocator held during `run` beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    assert prof.profiler is not None
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("kind", "name"), [("labels", "ce"), ("law", "forward_kl"), ("live", "jsd")])
def test_memory_grows_with_the_chunk_and_not_with_n(kind: str, name: str) -> None:
    n, v, rows = 2048, 4000, 32
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 16, generator=g).requires_grad_(), torch.randn(v, 16, generator=g).requires_grad_()
    teacher = TeacherHead(torch.randn(n, 16, generator=g), torch.randn(v, 16, generator=g))
    target: HeadTarget = teacher
    if kind == "labels":
        target = torch.randint(v, (n,), generator=g)
    elif kind == "law":
        target = TeacherLaw.from_logits(teacher.hidden @ teacher.weight.T, 8)
    logits = n * v * 4
    loss = ROW_LOSSES[name]
    for statistics in (True, False):
        chunked = peak_bytes(
            lambda s=statistics: chunked_head(
                hidden, weight, target, row_loss=loss, chunk_rows=rows, statistics=s
            ).mean.backward()
        )
        fixed = 4 * (4 * n * 16 + 6 * v * 16)  # hidden and weight gradients, their scaled copies, accumulation
        assert chunked < 30 * rows * v * 4 + fixed < logits
    naive = peak_bytes(lambda: naive_head(hidden, weight, target, row_loss=loss).mean.backward())
    assert naive > 2 * logits  # negative control: the meter sees what the twin allocates


def test_bad_input() -> None:
    hidden, weight, _, _ = parts()
    ce = ROW_LOSSES["ce"]
    with pytest.raises(InvalidValue, match="at least 1"):
        chunked_head(hidden, weight, target_of("labels"), row_loss=ce, chunk_rows=0)
    with pytest.raises(InvalidValue, match="unknown mode of the chunked head 'lazy'"):
        chunked_head(hidden, weight, target_of("labels"), row_loss=ce, mode="lazy")
    with pytest.raises(InvalidValue, match="37 positions, but target"):
        chunked_head(hidden, weight, torch.zeros(N - 1, dtype=torch.int64), row_loss=ce)
    with pytest.raises(InvalidValue, match="hidden"):
        chunked_head(hidden.T, weight, target_of("labels"), row_loss=ce)
    with pytest.raises(InvalidState, match="freeze it"):
        TeacherHead(hidden.detach(), weight)
    with pytest.raises(InvalidValue, match="temperature > 0"):
        TeacherHead(hidden.detach(), weight.detach(), 0.0)
