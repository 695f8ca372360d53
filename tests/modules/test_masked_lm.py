"""Masked diffusion: the bound by enumeration, both objectives equal in expectation, crops, masks, bad input."""

import dataclasses
import json
import math
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftsmith.data.batches import CanvasBatch
from draftsmith.inference import load
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.likelihood_bound import exact_count_mask, likelihood_bound
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig
from draftsmith.inference.portable import write_net
from draftsmith.modules.masked_lm import BoundMeans, DiffusionConfig, MaskedDiffusion, corrupt
from tests.tiny import write_lm

V, MASK, L = 12, 11, 8
CONFIG = MaskedLMConfig(V, 16, 2, 2, 32, L, mask_id=MASK, eos_id=10)


def module(**diffusion: object) -> MaskedDiffusion:
    torch.manual_seed(1)
    made = MaskedDiffusion(CONFIG, DiffusionConfig(**diffusion))  # type: ignore[arg-type]  # fields by name
    made.configure_model()
    return made


def canvases(rows: int = 4, prompt: int = 2, length: int = L, least: int | None = None) -> CanvasBatch:
    ids = torch.randint(0, 10, (rows, L), generator=torch.Generator().manual_seed(3))
    full = torch.full((rows,), length)
    return CanvasBatch(
        ids,
        torch.full((rows,), prompt),
        full if least is None else torch.full((rows,), least),
        full,
        torch.arange(rows),
    )


@torch.no_grad()
def table(net: MaskedLM, ids: Tensor, prompt: int) -> dict[tuple[int, ...], Tensor]:
    """CE [n] of every masked position, for every non-empty set of masked answer positions."""
    n = len(ids) - prompt
    sets = [s for size in range(1, n + 1) for s in combinations(range(n), size)]
    canvas = ids.repeat(len(sets), 1)
    for row, chosen in enumerate(sets):
        canvas[row, [prompt + i for i in chosen]] = MASK
    logp = net.head(net(canvas)).double().log_softmax(-1)[:, prompt:]
    nll = -logp.gather(-1, ids[prompt:].expand(len(sets), -1).unsqueeze(-1)).squeeze(-1)
    return {chosen: nll[row] for row, chosen in enumerate(sets)}


@pytest.mark.parametrize("prompt", [0, 3])
def test_guarantee_1_the_bound_is_the_mean_over_all_orders(prompt: int) -> None:
    net = module().net
    assert net is not None
    ids = canvases().ids[0]
    found = table(net, ids, prompt)
    n = L - prompt
    exact = 0.0
    for size in range(1, n + 1):
        of_size = [float(found[s][list(s)].sum()) for s in combinations(range(n), size)]
        exact += sum(of_size) / len(of_size) / size
    cost = {s: nll.tolist() for s, nll in found.items()}
    total = 0.0
    for order in permutations(range(n)):
        left = list(range(n))
        for position in order:
            total += cost[tuple(left)][position]
            left.remove(position)
    sequential = total / math.factorial(n)
    assert exact == pytest.approx(sequential, abs=1e-5)

    rows = 4096  # many rows of one text: their mean estimates the same number
    maskable = (torch.arange(L) >= prompt).expand(rows, L)
    bound, _ = likelihood_bound(net, ids.expand(rows, L), maskable, mask_id=MASK, draws=4)
    error = float(bound.std() / math.sqrt(rows))
    assert abs(float(bound.mean()) - exact) < 4 * error
    mixture = -torch.logsumexp(torch.tensor([-c for c in _orders(cost, n)], dtype=torch.float64), 0) + math.log(
        math.factorial(n)
    )
    assert exact >= float(mixture)  # -log p of the order-averaged model


def _orders(cost: dict[tuple[int, ...], list[float]], n: int) -> list[float]:
    found = []
    for order in permutations(range(n)):
        left, total = list(range(n)), 0.0
        for position in order:
            total += cost[tuple(left)][position]
            left.remove(position)
        found.append(total)
    return found


def test_guarantee_2_both_objectives_have_one_expectation() -> None:
    made = module(epsilon=0.0)
    batch = canvases(rows=64)
    batch.ids[:] = batch.ids[0]
    means: dict[str, tuple[float, float]] = {}
    for objective in ("exact_count", "inverse_t"):
        config = DiffusionConfig(objective, crop_share=0.0, epsilon=0.0)
        values = []
        with torch.no_grad():
            for step in range(300):
                drawn = corrupt(batch, config, 5, step)
                values.append(float(made.loss(batch, drawn).total / drawn.rows))
        losses = torch.tensor(values, dtype=torch.float64)
        means[objective] = float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))
    (a, ea), (b, eb) = means.values()
    assert abs(a - b) < 3 * math.hypot(ea, eb)
    assert ea < eb  # exact counts vary less
    wrong = a * (L - 2)  # a negative control: not dividing by the answer's length
    assert abs(wrong - b) > 3 * math.hypot(ea, eb)


def test_prompts_and_padding_are_never_masked_and_counts_are_stratified() -> None:
    batch = canvases(rows=60, prompt=2, length=8)
    drawn = corrupt(batch, DiffusionConfig(crop_share=0.0), 0, 7)
    assert not drawn.masked[:, :2].any() and int(drawn.rows) == 60
    assert torch.bincount(drawn.masked.sum(1), minlength=7).tolist() == [0, 10, 10, 10, 10, 10, 10]
    assert torch.allclose(drawn.weight.sum(1), torch.ones(60))  # of l positions each has 1 / l
    two = [corrupt(canvases(rows=30), DiffusionConfig(crop_share=0.0), 0, 7, rank, 2) for rank in (0, 1)]
    assert sorted(int(n) for d in two for n in d.masked.sum(1)) == sorted(drawn.masked.sum(1).tolist())


def test_masks_are_a_function_of_seed_step_and_row() -> None:
    batch = canvases(rows=8, least=3)
    config = DiffusionConfig(crop_share=0.5)
    first, again = corrupt(batch, config, 0, 3), corrupt(batch, config, 0, 3)
    assert torch.equal(first.masked, again.masked) and torch.equal(first.lengths, again.lengths)
    assert not torch.equal(first.masked, corrupt(batch, config, 0, 4).masked)
    assert not torch.equal(first.masked, corrupt(batch, config, 1, 3).masked)
    halves = [corrupt(canvases(rows=4, least=3), config, 0, 3, rank, 2) for rank in (0, 1)]
    for rank in (0, 1):  # the same rows on two ranks
        assert torch.equal(halves[rank].masked, first.masked[rank::2])


def test_crops_leave_the_answer_and_reach_every_length() -> None:
    batch = canvases(rows=4000, prompt=1, least=4)
    lengths = corrupt(batch, DiffusionConfig(crop_share=0.6), 0, 0).lengths
    counts = torch.bincount(lengths, minlength=9)
    assert int(counts[:4].sum()) == 0
    share = 0.6 / 5
    assert counts[4:8].tolist() == pytest.approx([4000 * share] * 4, rel=0.15)
    assert int(counts[8]) == pytest.approx(4000 * (0.4 + share), rel=0.1)


def test_what_is_cut_away_changes_nothing() -> None:
    made = module()
    batch = canvases(least=5)
    drawn = corrupt(batch, DiffusionConfig(crop_share=1.0), 0, 2)
    loss = made.loss(batch, drawn).total
    for row, length in enumerate(drawn.lengths.tolist()):
        batch.ids[row, length:] = 0
    assert int(drawn.lengths.min()) < L
    assert torch.equal(made.loss(batch, drawn).total, loss)


def test_a_batch_without_a_mask_has_loss_zero_and_gradients() -> None:
    made = module(objective="inverse_t")
    batch = canvases(rows=2, prompt=0, length=0)
    drawn = corrupt(batch, made.diffusion, 0, 0)
    out = made.loss(batch, drawn)
    out.total.backward()
    assert float(out.total.detach()) == 0 and int(drawn.rows) == 0
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    assert grads and all(bool((g == 0).all()) for g in grads)
    assert made.bound(batch, 2)[2].tolist() == [0, 0]


def test_the_mask_is_never_predicted() -> None:
    made = module()
    net = made.net
    assert net is not None
    batch = canvases(prompt=0)
    drawn = corrupt(batch, DiffusionConfig(crop_share=0.0), 0, 0)
    out = made.loss(batch, drawn)
    hidden = net(batch.ids.masked_fill(drawn.masked, MASK))
    logp = net.head(hidden).log_softmax(-1)
    nll = -logp.gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1)
    assert float(out.total.detach()) == pytest.approx(float((nll * drawn.weight).sum().detach()), rel=1e-5)


def test_figures_of_a_row_do_not_depend_on_its_batch() -> None:
    made = module().eval()
    batch = canvases(rows=6)
    bound, right, sizes = made.bound(batch, 3)
    part = CanvasBatch(*(getattr(batch, name)[4:] for name in ("ids", "prompt", "least", "length", "sample_id")))
    assert torch.allclose(made.bound(part, 3)[0], bound[4:], atol=1e-6)
    means = BoundMeans()
    means.update(bound, right, sizes)
    means.update(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64))  # rows that only fill the batch
    assert float(means.compute()["bound"]) == pytest.approx(float(bound.mean()))
    assert float(means.compute()["loss"]) == pytest.approx(float(bound.mean()) / 6)


def test_one_token_answers_are_exact_after_one_draw() -> None:
    net = module().eval().net
    assert net is not None
    batch = canvases(rows=3, prompt=L - 1)
    maskable = torch.arange(L).expand(3, L) == L - 1
    found, _ = likelihood_bound(net, batch.ids, maskable, mask_id=MASK)
    with torch.no_grad():
        logits = net.head(net(batch.ids.masked_fill(maskable, MASK)))[:, -1]
    wanted = torch.nn.functional.cross_entropy(logits, batch.ids[:, -1], reduction="none")
    assert torch.allclose(found.float(), wanted, atol=1e-5)


def test_exact_counts() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.0]])
    maskable = torch.tensor([[True, True, True, False]])
    assert exact_count_mask(noise, maskable, torch.tensor([2])).tolist() == [[False, True, True, False]]


def test_a_run_starts_from_an_export(tmp_path: Path) -> None:
    old = module()
    write_net(old._built(), torch.float32, tmp_path)
    new = MaskedDiffusion(CONFIG, init_from=str(tmp_path))
    new.configure_model()
    for name, tensor in old._built().state_dict().items():
        assert torch.equal(new._built().state_dict()[name], tensor), name
    wide = MaskedDiffusion(dataclasses.replace(CONFIG, hidden_size=32), init_from=str(tmp_path))
    with pytest.raises(InvalidValue, match="has hidden_size 16, this run 32"):
        wide.configure_model()
    longer = MaskedDiffusion(dataclasses.replace(CONFIG, max_length=9), init_from=str(tmp_path))
    with pytest.raises(InvalidValue, match="has 8 learned positions, this run 9"):
        longer.configure_model()


def test_an_autoregressive_model_becomes_one(tmp_path: Path) -> None:
    """Of one layer, the state of the last position is that of the causal model: nothing stands behind it."""
    path = write_lm(tmp_path / "lm", vocab_size=300, width=64, layers=1)
    known = json.loads((path / "config.json").read_text())
    config = MaskedLMConfig(
        vocab_size=301,
        hidden_size=64,
        num_layers=1,
        num_heads=known["num_attention_heads"],
        intermediate_size=known["intermediate_size"],
        max_length=32,
        mask_id=300,
        logit_shift=True,
        positions="rope",
        num_kv_heads=known["num_key_value_heads"],
        norm_eps=known["rms_norm_eps"],
        tied=known["tie_word_embeddings"],
    )
    made = MaskedDiffusion(config, init_from=str(path))
    made.configure_model()
    engine = load(path).part
    ids = torch.randint(0, 300, (2, 6))
    with torch.no_grad():
        hidden, _ = engine.forward(ids)
        before = engine.head(hidden)[:, -1]
        after = made._built().head(made._built().states(ids))[:, -1, :300]
    assert torch.allclose(before, after, atol=1e-4)
    plain = MaskedDiffusion(dataclasses.replace(config, logit_shift=False), init_from=str(path))
    with pytest.raises(InvalidValue, match=r"is autoregressive.*set model.net.logit_shift true"):
        plain.configure_model()
    wide = MaskedDiffusion(dataclasses.replace(config, hidden_size=32, num_heads=2), init_from=str(path))
    with pytest.raises(InvalidValue, match=r"is \[\d+, 64\], this run's"):
        wide.configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "bert"}, "diffusion.objective"),
        ({"crop_share": 1.5}, "crop_share"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"val_draws": 0}, "val_draws"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        DiffusionConfig(**settings)  # type: ignore[arg-type]  # fields by name


def test_bad_input() -> None:
    made = module()
    long = canvases()
    long.ids = torch.zeros(4, L + 1, dtype=torch.int64)
    with pytest.raises(InvalidValue, match="9 tokens, but the network has 8 positions"):
        made.loss(long, corrupt(long, made.diffusion, 0, 0))
    with pytest.raises(InvalidValue, match="no row has a position"):
        likelihood_bound(made._built(), long.ids, torch.zeros(4, L + 1, dtype=torch.bool), mask_id=MASK)
    with pytest.raises(InvalidState, match="configure_model"):
        MaskedDiffusion(CONFIG).export_spec()
    with pytest.raises(InvalidValue, match="chunk_rows"):
        MaskedDiffusion(CONFIG, chunk_rows=0)
