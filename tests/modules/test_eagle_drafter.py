"""The EAGLE trainer: what is trained where, losses by hand, the draft vocabulary, the overfit gate, bad input."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_settings import TreeSettings
from draftsmith.modules.eagle_drafter import EagleDrafter, cached_rows
from draftsmith.modules.eagle_metrics import StepMeans
from draftsmith.modules.eagle_rollout import rollout, state_noise
from draftsmith.modules.eagle_target import EagleSizes, EagleTarget
from draftsmith.modules.losses.draft_laws import DRAFT_LOSSES, draft_laws, draft_loss, draft_vocabulary
from tests.eagle import ARCH, fit, module_for, peaked, sure_text, text_batch


@pytest.fixture(scope="module")
def model() -> Any:
    return peaked()


# --- what is trained


def test_row_t_of_step_k_is_trained_iff_token_t_plus_k_plus_2_is_a_label_of_its_document(model: Any) -> None:
    module = module_for(model, steps=3)
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, -1]])
    batch = text_batch(torch.arange(10).unsqueeze(0), document=document)
    batch.loss_mask[:] = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.int8)
    out = module.unroll(batch, statistics=True)
    trained = {(int(k), int(t)) for k, t in zip(out.step, out.place, strict=True)}
    label = batch.loss_mask[0].bool().tolist()
    expected = {
        (k, t)
        for k in range(3)
        for t in range(9)
        if t + k + 2 < 10 and label[t + k + 2] and document[0, t] == document[0, t + k + 2]
    }
    assert trained == expected
    assert (0, 1) in trained and (0, 2) in trained  # the first prediction behind the prompt too
    assert (0, 5) in trained and (1, 4) not in trained  # token 7 from its own document only


def _by_hand(module: EagleDrafter, batch: TokenBatch, name: str) -> float:
    """The loss of a batch written out: softmaxes over all positions, a mean per step."""
    net, model = module.net, module.target.model  # type: ignore[union-attr]
    assert net is not None
    states = model(batch.ids, output_hidden_states=True)
    features = torch.cat([states.hidden_states[i] for i in net.config.aux_layers], -1)[:, :-1]
    whole = states.logits.double().softmax(-1)
    ids = net.draft_ids()
    total, rows = 0.0, batch.ids.shape[1] - 1
    for k, out in enumerate(rollout(net, net.embed(batch.ids), net.project(features), module.steps)):
        q_all, losses = net.logits(out).double().softmax(-1), []
        for b in range(len(batch.ids)):
            for t in range(rows):
                if t + k + 2 > rows or not batch.loss_mask[b, t + k + 2]:
                    continue
                p, q = whole[b, t + k + 1, ids], q_all[b, t]
                inside = whole[b, t + k + 1].argmax() in ids
                r, m = p / p.sum(), (p / p.sum() + q) / 2
                alpha = torch.minimum(p, q).sum()
                kl = (r * (r / q).log()).sum()
                weight = (-3 * alpha).exp()
                value = {
                    "ce": -(r * q.log()).sum(),
                    "kl": kl,
                    "rkl": (q * (q / r).log()).sum(),
                    "jsd": ((r * (r / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
                    "tv": 1 - alpha,
                    "nla": -alpha.log(),
                    "lk_hybrid": weight * kl + (1 - weight) * (1 - alpha),
                }[name]
                if inside or name in ("tv", "nla", "lk_hybrid"):
                    losses.append(value)
        total += module.decay**k * float(torch.stack(losses).mean())
    return total


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", DRAFT_LOSSES)
def test_the_loss_is_the_one_written_out_by_hand(model: Any, name: str, reduced: bool) -> None:
    module = module_for(model, EagleSizes(draft_vocab_size=24 if reduced else None), steps=3, loss=name)
    assert module.net is not None
    if reduced:
        module.net.set_draft_vocabulary(torch.arange(24) * 2 + 3)
    generator = torch.Generator().manual_seed(5)
    batch = text_batch(torch.randint(64, (2, 12), generator=generator), prompt=3)
    with torch.no_grad():
        assert float(module.unroll(batch, False).total) == pytest.approx(_by_hand(module, batch, name), rel=1e-4)
    module.unroll(batch, False).total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.net.parameters())


@pytest.mark.parametrize("version", [1, 3])
def test_rows_a_chunk_change_neither_value_nor_gradients(model: Any, version: int) -> None:
    module = module_for(model, EagleSizes(version=version), steps=1 if version == 1 else 3)
    assert module.net is not None and module.chunk_rows is None
    batch = text_batch(torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(5)), prompt=3)
    found = []
    for module.chunk_rows in (None, 7):
        module.zero_grad()
        total = module.unroll(batch, statistics=False).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in module.net.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_chunks_fit_a_cores_cache_but_are_never_a_few_rows() -> None:
    heads = {vocabulary: cached_rows(torch.empty(vocabulary, 8)) for vocabulary in (1000, 4096, 32000, 128000)}
    assert heads == {1000: 1048, 4096: 256, 32000: 256, 128000: None}
    assert cached_rows(torch.empty(4096, 8, device="meta")) is None


def test_eagle_1_is_smooth_l1_on_the_states_and_a_tenth_of_cross_entropy(model: Any) -> None:
    module = module_for(model, EagleSizes(version=1), steps=1)
    assert module.net is not None
    batch = text_batch(torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(5)), prompt=2)
    states = model(batch.ids, output_hidden_states=True)
    features = states.hidden_states[-1]
    (out,) = rollout(module.net, module.net.embed(batch.ids), features[:, :-1], 1)
    rows = range(7)  # row t is trained on token t + 2
    guess, goal = out[:, rows], features[:, 1:8]
    smooth = torch.nn.functional.smooth_l1_loss(guess, goal)
    p, q = model.lm_head(goal).softmax(-1), model.lm_head(guess).log_softmax(-1)
    expected = smooth - 0.1 * (p * q).sum(-1).mean()
    torch.testing.assert_close(module.unroll(batch, False).total, expected, rtol=1e-4, atol=1e-5)


def test_noise_is_for_training_alone_and_a_samples_own(model: Any) -> None:
    module = module_for(model, EagleSizes(version=1), steps=1, noise=0.1)
    batch = text_batch(torch.randint(64, (1, 9)))
    with torch.no_grad():
        module.train()
        noisy = float(module.unroll(batch, False).total)
        assert noisy == float(module.unroll(batch, False).total)  # the same step
        module.eval()
        assert float(module.unroll(batch, False).total) != noisy
    states = torch.zeros(3, 5, 400, dtype=torch.float64)
    found = state_noise(torch.tensor([4, 9, 2]), states, 0.1, seed=1, step=3)
    assert 0.0999 < float(found.abs().max()) < 0.1 and abs(float(found.mean())) < 0.003
    assert float(found.std()) == pytest.approx(0.2 / 12**0.5, rel=0.02)
    alone = state_noise(torch.tensor([9]), states[:1], 0.1, seed=1, step=3)
    assert torch.equal(alone[0], found[1]) and not torch.equal(found[0], found[1])
    for other in ({"seed": 2, "step": 3}, {"seed": 1, "step": 4}):
        assert not torch.equal(state_noise(torch.tensor([9]), states[:1], 0.1, **other), alone)


def test_laws_too_many_to_keep_are_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, ids = torch.randn(40, 32), torch.arange(24) * 2
    kept = draft_laws(hidden, model.lm_head.weight, None, ids)
    monkeypatch.setattr("draftsmith.modules.losses.draft_laws._TABLE_ELEMENTS", 0)
    live = draft_laws(hidden, model.lm_head.weight, None, ids)
    at = torch.tensor([3, 3, 39, 0])
    assert kept.table is not None and live.table is None
    torch.testing.assert_close(kept.log_p(at), live.log_p(at), rtol=1e-5, atol=1e-5)
    whole = model.lm_head(hidden[at]).log_softmax(-1)
    torch.testing.assert_close(kept.log_p(at), whole[:, ids], rtol=1e-5, atol=1e-5)


# --- the draft vocabulary (guarantee 9)


def test_the_draft_vocabulary_takes_the_most_frequent_ids_then_the_smallest_unused() -> None:
    counts = torch.tensor([0, 5, 0, 2, 2, 9, 0, 2])
    ids, covered = draft_vocabulary(counts, 4)
    assert ids.tolist() == [1, 3, 4, 5] and covered == 18 / 20  # of 3, 4, 7 with equal counts the smaller ids
    ids, covered = draft_vocabulary(counts, 7)
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 7] and covered == 1.0
    with pytest.raises(InvalidValue, match="loss mask is empty"):
        draft_vocabulary(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(InvalidValue, match=r"1\.\.8"):
        draft_vocabulary(counts, 9)


def test_tables_of_the_draft_vocabulary_round_trip(model: Any) -> None:
    module = module_for(model, EagleSizes(draft_vocab_size=10))
    net = module.net
    assert net is not None and net.d2t is not None and net.t2d is not None
    ids = torch.tensor([0, 1, 5, 9, 20, 21, 30, 41, 62, 63])
    net.set_draft_vocabulary(ids)
    assert int(net.t2d.sum()) == 10 and net.t2d[torch.arange(10) + net.d2t].all()
    assert net.draft_ids().tolist() == ids.tolist()
    net.check()
    for bad in (ids.flip(0), ids.clamp_max(62), ids + 1, ids[:9]):
        with pytest.raises(InvalidValue, match="draft vocabulary"):
            net.set_draft_vocabulary(bad)
    net.t2d[0] = False
    with pytest.raises(InvalidValue, match="t2d"):
        net.check()


# --- metrics


def test_metrics_of_the_steps_by_hand(model: Any) -> None:
    module = module_for(model, steps=3)
    assert module.net is not None
    batch = text_batch(torch.randint(64, (3, 14), generator=torch.Generator().manual_seed(6)), prompt=2)
    fit(module, batch, 30)
    with torch.no_grad():
        out = module.unroll(batch, statistics=True)
        means = StepMeans(3)
        means.update(out, batch.ids.numel())
        states = model(batch.ids, output_hidden_states=True)
        features = torch.cat([states.hidden_states[i] for i in module.net.config.aux_layers], -1)[:, :-1]
        outs = list(rollout(module.net, module.net.embed(batch.ids), module.net.project(features), 3))
        found = means.compute()
        right = torch.ones(3, 13, dtype=torch.bool)
        accuracies = []
        for k in range(3):
            n = 14 - 2 - k
            p, q = states.logits[:, k + 1 : k + 1 + n], module.net.logits(outs[k])[:, :n]
            hit = p.argmax(-1) == q.argmax(-1)
            accuracies.append(float(hit.double().mean()))
            assert float(found["accuracy"][k]) == pytest.approx(accuracies[-1])
            alpha = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).double().mean()
            assert float(found["alpha"][k]) == pytest.approx(float(alpha), abs=1e-5)
            before = right[:, :n]
            assert float(found["conditional"][k]) == pytest.approx(float(hit[before].double().mean()))
            right[:, :n] &= hit
        assert 0 < accuracies[0] < 1  # else nothing was tested
    expected = 1 + sum(math.prod(accuracies[: k + 1]) for k in range(3))
    assert float(found["tau_simulated"]) == pytest.approx(expected)


@pytest.mark.parametrize("version", [1, 3])
def test_a_trainer_runs_it_with_one_step_and_logs_what_was_measured(model: Any, version: int) -> None:
    module = module_for(model, EagleSizes(version=version), steps=1)
    rows = [text_batch(torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(i))) for i in range(2)]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader, loader)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/loss", "val/accuracy", "val/alpha", "val/tau_simulated", "val_step/conditional_0"} <= set(logged)
    assert logged["val/tau_simulated"] == pytest.approx(1 + logged["val/accuracy"])
    assert logged["val_step/alpha_0"] == logged["val/alpha"] and logged["train/skipped"] == 0


# --- the overfit gate


@pytest.mark.parametrize(("version", "steps"), [(3, 4), (1, 1)])
def test_what_overfits_one_text_is_accepted_in_full_blocks(model: Any, version: int, steps: int) -> None:
    """A head that knows a text by heart drafts it for the real decoder: a shifted mask or state shows at once."""
    prompt, ids = sure_text(model, 40)
    module = module_for(model, EagleSizes(version=version), steps=steps)
    assert module.net is not None
    batch = text_batch(ids, prompt=len(prompt))
    fit(module, batch, 200 if version == 3 else 600)
    fit(module, batch, 60, lr=3e-4)
    target = HFEngine(model)
    drafter = EagleTreeDrafter(module.net, ChainPolicy(4), target=target)
    decoder = TreeDecoder(target, drafter, settings=TreeSettings(nodes=4, depth=4))
    result = decoder.decode([TokenRequest(prompt, 40)])
    assert result.output[0] == ids[0, 4:].tolist()
    assert result.rounds.drafted == result.rounds.accepted
    assert result.rounds.drafted[:-1] == [4] * (len(result.rounds.drafted) - 1) and len(result.rounds.drafted) == 8


# --- bad input


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, said in (
        ({"steps": 0}, "steps"),
        ({"head": EagleSizes(version=1), "steps": 2}, "1 for EAGLE-1"),
        ({"decay": 0.0}, "decay"),
        ({"loss": "kll"}, "did you mean 'kl'"),
        ({"noise": -0.1}, "noise"),
        ({"head": EagleSizes(version=1), "steps": 1, "loss": "kl"}, "EAGLE-1 has its own loss"),
    ):
        with pytest.raises(InvalidValue, match=said):
            EagleDrafter(ARCH, **settings)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_the_target_are_refused(model: Any) -> None:
    with pytest.raises(InvalidValue, match="layer 7, the target has 6"):
        module_for(model, EagleSizes(aux_layers=(2, 7)))
    with pytest.raises(InvalidValue, match="own_embedding"):
        module_for(model, EagleSizes(hidden_size=16))
    with pytest.raises(InvalidValue, match="draft_vocab_size"):
        module_for(model, EagleSizes(draft_vocab_size=65))


def test_a_target_that_is_not_frozen_is_refused() -> None:
    model = peaked().requires_grad_(True)
    with pytest.raises(InvalidState, match="frozen"):
        EagleTarget.of(model)


def test_texts_longer_than_the_heads_positions_are_refused(model: Any) -> None:
    module = module_for(model, steps=7)
    with pytest.raises(InvalidValue, match=r"shorten data\.text\.length"):
        module.unroll(text_batch(torch.zeros(1, 96, dtype=torch.int64)), False)


def test_batches_without_a_label_are_counted_and_end_a_run_that_saw_no_other(model: Any) -> None:
    module = module_for(model, steps=2)
    batch = text_batch(torch.randint(64, (2, 9)))
    batch.loss_mask.zero_()
    out = module.unroll(batch, statistics=False)
    out.total.backward()
    assert float(out.total.detach()) == 0.0 and len(out.step) == 0
    for _ in range(9):
        module._note_labels(False)
    with pytest.raises(InvalidValue, match="answers_only"):
        module._note_labels(False)
    module._note_labels(True)
    module._note_labels(False)  # from then on they are only counted
    assert module._empty == 11


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(InvalidValue, match="loss"):
        draft_loss("nope", False)
