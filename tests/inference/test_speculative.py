"""Guarantees of speculative decoding beyond the committed law: statistics, caches, independence, recorder, limits."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.inference import registry
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.session import ContextWarning
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.drafters.prompt_lookup import PromptLookupDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.forecast import expected_tokens
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.requests import DecodeResult, RoundView, TokenRequest
from draftsmith.inference.sampling import SamplingParams, law
from tests.engines import SIZES, tiny_hf
from tests.fakes import MarkovEngine, markov, near, requests_for, string_law

GREEDY = SamplingParams()
T1 = SamplingParams(temperature=1.0)
PROMPTS = ((1,), (2, 3), (4, 5, 1), (1, 2, 3, 4), (5, 5, 5, 1, 2))


def native(seed: int, layers: int = 2, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> NativeEngine:
    hf = tiny_hf("llama", seed, **{**SIZES, "num_hidden_layers": layers, "vocab_size": 24})
    hf.lm_head.weight.mul_(scale)
    net = CausalLM(CausalLMConfig.from_hf(hf.config)).eval()
    net.load_state_dict(hf.state_dict())
    return NativeEngine(net.to(dtype))


def adapted(seed: int) -> HFEngine:
    return HFEngine(tiny_hf("gpt2", seed, n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=24))


def decoder(target: Engine, draft: Engine, sampling: SamplingParams = GREEDY, **options: Any) -> SpeculativeDecoder:
    """Settings and constructor arguments together; never falls back unless told to."""
    names = {f.name for f in dataclasses.fields(SpeculativeSettings)}
    settings = {"fallback": "never"} | {k: v for k, v in options.items() if k in names}
    rest = {k: v for k, v in options.items() if k not in names}
    drafter = rest.pop("drafter", None) or ModelDrafter(draft)
    return SpeculativeDecoder(target, drafter, sampling=sampling, settings=SpeculativeSettings(**settings), **rest)


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("g", "noise"), [(1, 1.0), (3, 0.5), (5, 1.2), (8, 0.7)])
def test_acceptance_and_tokens_per_round_of_context_free_laws(g: int, noise: float) -> None:
    """Acceptance per position is 1 - TV within 0.5%, tokens per round (1 - a^(g+1)) / (1 - a) within 1%."""
    target = markov(9, 0, seed=g)
    draft = near(target, noise=noise)
    p, q = target.table.softmax(-1), draft.table.softmax(-1)
    a = float(torch.minimum(p, q).sum())
    rounds = decoder(target, draft, T1, draft_length=g).decode(requests_for([[1]], 4000, 60)).rounds
    full = [i for i, n in enumerate(rounds.drafted) if n == g]  # drafts that the length limit did not shorten
    examined = sum(min(rounds.accepted[i] + 1, g) for i in full)
    accepted = sum(rounds.accepted[i] for i in full)
    assert examined >= 100_000
    assert accepted / examined == pytest.approx(a, abs=0.005)
    assert sum(rounds.beta_sum[i] for i in full) / examined == pytest.approx(a, abs=1e-6), (
        "Rao-Blackwell: no noise left"
    )
    tau = sum(rounds.accepted[i] + 1 for i in full) / len(full)
    assert tau == pytest.approx(expected_tokens(a, g), rel=0.01)


def test_rounds_and_calls_are_counted() -> None:
    target = markov(12)
    requests = requests_for(PROMPTS, 5, 17)
    result = decoder(target, target, draft_length=4).decode(requests)
    rounds = result.rounds
    for row in range(5):
        mine = [i for i, r in enumerate(rounds.row) if r == row]
        assert sum(rounds.committed[i] for i in mine) == 17
        # a perfect draft: 4 accepted and a bonus each, then the last 2 tokens are one draft and a bonus
        assert [rounds.drafted[i] for i in mine] == [4, 4, 4, 1] and [rounds.accepted[i] for i in mine] == [4, 4, 4, 1]
        assert [rounds.beta_sum[i] for i in mine] == [4.0, 4.0, 4.0, 1.0]
    assert result.nfe == {"target": 4, "draft": 13}
    assert 0 < sum(rounds.seconds[::5]) <= result.seconds
    assert result.stop == ["length"] * 5 and result.text is None


def test_a_budget_of_one_token_is_a_plain_step() -> None:
    target, draft = markov(12), markov(12, seed=9)
    draft.calls.clear()
    result = decoder(target, draft, T1).decode(requests_for(PROMPTS, 5, 1))
    assert draft.calls == [] and result.rounds.drafted == [0] * 5
    assert result.output == AutoregressiveDecoder(target, sampling=T1).decode(requests_for(PROMPTS, 5, 1)).output


def test_the_draft_never_runs_past_the_last_but_one_token() -> None:
    target = markov(12)
    result = decoder(target, target, draft_length=8).decode(requests_for([[1]], 1, 6))
    assert result.rounds.drafted == [5] and result.nfe == {"target": 1, "draft": 5}


def test_catching_up_takes_one_call() -> None:
    """After a fully accepted round the draft lacks two tokens and reads them in one call; the prompt likewise."""
    target = markov(12)
    draft = MarkovEngine(target.table)
    decoder(target, draft, draft_length=3).decode(requests_for([[1, 2, 3, 4, 5]], 1, 12))
    assert draft.calls == [(1, 5), (1, 1), (1, 1), (1, 2), (1, 1), (1, 1), (1, 2), (1, 1), (1, 1)]
    assert target.calls[-3:] == [(1, 5 + 3), (1, 1 + 3), (1, 1 + 3)]


# Caches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["ragged", "lockstep"])
@pytest.mark.parametrize("kind", ["native", "hf", "markov"])
def test_cache_invariant_after_every_round(kind: str, batching: str) -> None:
    """What the rolled-back caches predict next equals a fresh full pass (1e-4), for every accepted count 0..g."""
    if kind == "markov":
        target, draft = markov(24), markov(24, seed=1)
        draft.table = target.table + 0.5 * draft.table
    else:
        target, draft = (native(0), native(1)) if kind == "native" else (adapted(0), adapted(1))
    g, seen = 3, set()

    def check(view: RoundView) -> None:
        for b, context in enumerate(view.context):
            n, k = view.num_drafted[b], view.accepted[b]
            text = torch.tensor([[*context, *view.drafted[b, :n].tolist()]])
            want = target.head(target.forward(text)[0])[0, len(context) - 1 :]
            torch.testing.assert_close(view.target_logits[b, : n + 1], want, rtol=0, atol=1e-4)
            if n:
                assert view.draft_law is not None
                want = law(draft.head(draft.forward(text)[0]), T1)[0, len(context) - 1 : -1]
                torch.testing.assert_close(view.draft_law[b, :n], want, rtol=0, atol=1e-4)
            seen.add((n, k))

    # lockstep in pairs: the fewest accepted of many rows would always be none
    for first in range(0, 10, 10 if batching == "ragged" else 2):
        requests = requests_for(PROMPTS, 10, 30)[first : first + (10 if batching == "ragged" else 2)]
        decoder(target, draft, T1, draft_length=g, batching=batching, recorder=check).decode(requests)
    assert {k for n, k in seen if n == g} == set(range(g + 1)), "every accepted count was seen"


@pytest.mark.parametrize("batching", ["ragged", "lockstep"])
@pytest.mark.parametrize("kind", ["native", "hf"])
def test_greedy_equals_plain_in_float32(kind: str, batching: str) -> None:
    target, draft = (native(0), native(1, 1)) if kind == "native" else (adapted(0), adapted(1))
    requests = requests_for(PROMPTS, 5, 64)
    want = AutoregressiveDecoder(target).decode(requests).output
    for schedule in ("constant", "heuristic", "confidence"):
        assert decoder(target, draft, batching=batching, schedule=schedule).decode(requests).output == want


def test_bfloat16_differs_only_at_near_ties() -> None:
    """Passes over g+1 tokens and over one round differently; the first difference lies where the top two are close."""
    target, draft = native(0, dtype=torch.bfloat16, scale=0.2), native(0, 1, dtype=torch.bfloat16, scale=0.2)
    requests = [TokenRequest([1 + i % 20, 1 + i // 20], 60, i) for i in range(60)]
    plain = AutoregressiveDecoder(target).decode(requests).output
    drafted = decoder(target, draft).decode(requests).output
    differing = 0
    for request, a, b in zip(requests, plain, drafted, strict=True):
        if a == b:
            continue
        differing += 1
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        hidden, _ = target.forward(torch.tensor([[*request.prompt, *a[:at]]]))
        top = target.head(hidden[:, -1]).float().topk(2).values[0]
        assert float(top[0] - top[1]) < 0.05, f"gap {float(top[0] - top[1])} at token {at}"
    print(f"bf16: {differing} of {len(requests)} rows differ from plain decoding")
    assert differing < len(requests) / 2


def test_rows_that_ended_leave_the_batch() -> None:
    target = markov(12)
    requests = [TokenRequest([1], n, i) for i, n in enumerate((3, 3, 40, 40))]
    result = decoder(target, near(target), T1).decode(requests)
    assert [len(o) for o in result.output] == [3, 3, 40, 40]
    batches = [b for b, _ in target.calls]
    assert batches[0] == 4 and batches[-1] <= 2 and sorted(batches, reverse=True) == batches


# Independence and repeatability --------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "heuristic": {"schedule": "heuristic"},
    "confidence": {"schedule": "confidence"},
    "cost": {"schedule": "cost", "costs": CostCurve.textbook(0.15), "fallback": "auto"},
    "fall-back": {"costs": CostCurve.textbook(0.3), "fallback": "auto"},
    "penalties": {"sampling": SamplingParams(temperature=0.9, repetition_penalty=1.2, frequency_penalty=0.3)},
    "greedy": {"sampling": GREEDY},
}


def per_row(result: DecodeResult, row: int) -> list[tuple[int, int, int, float]]:
    r = result.rounds
    columns = zip(r.row, r.drafted, r.accepted, r.committed, r.beta_sum, strict=True)
    return [(n, k, c, round(b, 4)) for i, n, k, c, b in columns if i == row]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_does_not_depend_on_its_batch_mates(schedule: str) -> None:
    """Alone, together, and in another order: the same ids from the same rounds, adaptive lengths included."""
    options = {"sampling": T1} | SCHEDULES[schedule]
    target = markov(20)
    draft = near(target, noise=1.0)
    requests = [
        TokenRequest(list(PROMPTS[i % 5]), 10 + 7 * i, row_id=100 + i, stop_ids=(0,) if i % 2 else ()) for i in range(7)
    ]
    together = decoder(target, draft, **options).decode(requests)
    backwards = decoder(target, draft, **options).decode(requests[::-1])
    assert backwards.output == together.output[::-1]
    for i, request in enumerate(requests):
        alone = decoder(target, draft, **options).decode([request])
        assert alone.output[0] == together.output[i] and alone.stop[0] == together.stop[i]
        if schedule != "greedy":
            assert per_row(alone, 0) == per_row(together, i)
    if schedule in ("cost", "fall-back"):
        assert 0 in together.rounds.drafted[:-7] and len(set(together.rounds.drafted)) > 1, "the test must adapt"


def test_seed_and_row_id_key_the_numbers() -> None:
    target = markov(20)
    request = TokenRequest([1, 2], 20, row_id=3)
    base = decoder(target, near(target), T1, seed=1).decode([request]).output
    assert decoder(target, near(target), T1, seed=1).decode([request]).output == base
    assert decoder(target, near(target), T1, seed=2).decode([request]).output != base
    assert decoder(target, near(target), T1, seed=1).decode([dataclasses.replace(request, row_id=4)]).output != base


def test_rounds_without_drafts_draw_what_plain_decoding_draws() -> None:
    """Suspended drafting is plain decoding to the letter (same seed, same ids)."""
    target = markov(20)
    hopeless = CostCurve(batch=1, plain=1.0, draft_step=50.0)
    suspended = decoder(target, near(target), T1, costs=hopeless, fallback="auto", seed=5)
    requests = requests_for(PROMPTS, 5, 6)
    suspended.decode(requests)  # learns that drafting does not pay; no probe is due before the 16th round
    result = suspended.decode(requests)
    assert set(result.rounds.drafted) == {0}
    assert result.output == AutoregressiveDecoder(target, sampling=T1, seed=5).decode(requests).output


def test_two_calls_share_no_row_state() -> None:
    target = markov(20)
    shared = decoder(target, near(target), T1)
    requests = requests_for(PROMPTS, 5, 12)
    first, second = shared.decode(requests), shared.decode(requests)
    assert first.output == second.output


# Learning between rounds ---------------------------------------------------------------------------------------------


def test_law_holds_while_the_draft_learns_between_rounds() -> None:
    """The draft's weights change after each round of the same requests; the output keeps the target's law."""
    target = markov(6, seed=3)
    draft = near(target, noise=1.5)
    generator = torch.Generator().manual_seed(7)
    taught = 0

    def learn(view: RoundView) -> None:
        nonlocal taught
        taught += 1
        draft.table = draft.table + 0.7 * torch.randn(draft.table.shape, generator=generator)

    outputs: list[list[int]] = []
    for first in range(0, 20_000, 400):
        busy = decoder(target, draft, T1, draft_length=2, recorder=learn)
        outputs += busy.decode(requests_for([[1, 2]], 400, 7, (0,), first)).output
        draft.table = near(target, noise=1.5, seed=first).table
    test = string_law(target, [1, 2], 3, T1, (0,)).test(outputs, 3)
    assert taught > 200 and test.p_value > 0.001 and test.detectable_tv < 0.05, str(test)


def test_control_learning_inside_a_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: q taken from other weights than those that sampled breaks the law, and the test sees it."""
    from draftsmith.inference.drafters import model

    target = markov(6, seed=3)
    draft = near(target, noise=1.5)
    flat = SamplingParams(temperature=2.0)
    monkeypatch.setattr(model, "sample_categorical", stale_sampler(flat))
    result = decoder(target, draft, T1, draft_length=2).decode(requests_for([[1, 2]], 20_000, 7, (0,)))
    assert string_law(target, [1, 2], 3, T1, (0,)).test(result.output, 3).p_value < 1e-6


def stale_sampler(params: SamplingParams) -> Callable[[Tensor, Tensor], Tensor]:
    from draftsmith.inference.rng import sample_categorical

    return lambda q, u: sample_categorical(law(q.log(), params), u)


@pytest.mark.parametrize("temperature", [0.0, 1.7])
def test_a_draft_may_sample_at_its_own_temperature(temperature: float) -> None:
    """T=0.8 and top-p 0.7 on the target, another temperature (or the argmax) on the draft: still the target's law."""
    params = SamplingParams(temperature=0.8, top_p=0.7)
    target = markov(6, seed=3)
    drafter = ModelDrafter(near(target), sampling=SamplingParams(temperature=temperature))
    requests = requests_for([[1, 2]], 20_000, 7, (0,))
    result = decoder(target, target, params, drafter=drafter, draft_length=2).decode(requests)
    test = string_law(target, [1, 2], 3, params, (0,)).test(result.output, 3)
    assert test.p_value > 0.001, str(test)
    assert (result.rounds.accepted.count(0) < len(result.rounds)) and sum(result.rounds.beta_sum) > 0


# Recorder ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["ragged", "lockstep"])
def test_round_views_tell_what_was_committed(batching: str) -> None:
    """Rows 0..accepted of the laws stand on committed text; rows that ended are not shown."""
    target = markov(8)
    text: dict[int, list[int]] = {}
    rounds = 0

    def check(view: RoundView) -> None:
        nonlocal rounds
        rounds += 1
        b = len(view.rows)
        assert len(set(view.rows)) == b == view.target_logits.shape[0] == view.drafted.shape[0]
        assert view.target_law is not None and view.target_law.shape == view.target_logits.shape
        for i, row in enumerate(view.rows):
            context = list(view.context[i])
            assert context[: len(text.get(row, []))] == text.get(row, []), "grows by what was announced as accepted"
            k = view.accepted[i]
            assert k <= view.num_drafted[i] <= view.drafted.shape[1]
            text[row] = [*context, *view.drafted[i, :k].tolist()]
            if k < view.num_drafted[i]:  # a correction
                assert view.next_token[i] != view.drafted[i, k]
        assert not torch.is_inference_mode_enabled() and not view.target_logits.log_softmax(-1).is_inference()

    requests = [TokenRequest(list(PROMPTS[i]), 8 + 9 * i, i) for i in range(5)]
    result = decoder(target, near(target, noise=1.0), T1, batching=batching, recorder=check).decode(requests)
    assert rounds == result.nfe["target"]
    for i, request in enumerate(requests):
        whole = [*request.prompt, *result.output[i]]
        assert whole[: len(text[i])] == text[i][: len(whole)]


def test_plain_rounds_are_recorded_too() -> None:
    views: list[tuple[int, Sequence[int]]] = []
    target = markov(8)
    AutoregressiveDecoder(target, recorder=lambda v: views.append((v.drafted.shape[1], v.next_token))).decode(
        requests_for([[1]], 1, 4)
    )
    assert [g for g, _ in views] == [0, 0, 0, 0]


# Lossy mix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.2, 0.7])
def test_lossy_mix_verifies_the_mixture(mix: float) -> None:
    """The law of a drafted position is (1 - w) p + w q, as transformers' assistant_ensemble_weight 1 - w."""
    target = markov(6, 0, seed=3)
    draft = near(target, noise=1.5)
    p, q = target.table.softmax(-1), draft.table.softmax(-1)
    requests = requests_for([[1]], 40_000, 2)
    outputs = decoder(target, draft, T1, draft_length=1, lossy_mix=mix).decode(requests).output
    from tests.fakes import chi_square

    first = torch.tensor([o[0] for o in outputs]).bincount(minlength=6)
    assert chi_square(first, (1 - mix) * p + mix * q).p_value > 0.001
    assert chi_square(first, p).p_value < 1e-6


def test_greedy_lossy_mix_takes_the_argmax_of_the_mixture() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.7, 0.2])
    target, draft = MarkovEngine(p.log()), MarkovEngine(q.log())
    request = requests_for([[2]], 1, 2)
    assert decoder(target, draft, draft_length=1, lossy_mix=0.2).decode(request).output == [[0, 0]]
    assert decoder(target, draft, draft_length=1, lossy_mix=0.3).decode(request).output == [[1, 0]], "bonus: p alone"


# Context limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_context", [40, 12, 6])
@pytest.mark.parametrize("sampling", [GREEDY, T1], ids=["greedy", "T=1"])
@pytest.mark.filterwarnings("ignore::draftsmith.inference.decoders.session.ContextWarning")
def test_rows_at_the_end_of_the_context(sampling: SamplingParams, draft_context: int) -> None:
    """Rows of very different length fill a context of 24; the draft's may be shorter. Exact, independent of mates."""
    target = markov(12)
    target.max_length = 24
    draft = dataclasses.replace(near(target), max_length=draft_context)
    requests = [TokenRequest([1 + (i + j) % 11 for j in range(n)], m, i) for i, (n, m) in enumerate(LIMITS)]
    together = decoder(target, draft, sampling, draft_length=6).decode(requests)
    assert [len(o) for o in together.output] == [min(m, 24 - n) for n, m in LIMITS]
    for i, request in enumerate(requests):
        assert decoder(target, draft, sampling, draft_length=6).decode([request]).output[0] == together.output[i]
    if sampling.greedy:
        assert together.output == AutoregressiveDecoder(target).decode(requests).output


LIMITS = ((1, 30), (23, 5), (20, 4), (10, 14), (5, 3), (22, 1), (13, 100))


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.filterwarnings("ignore::draftsmith.inference.decoders.session.ContextWarning")
def test_networks_at_the_end_of_the_context(kind: str) -> None:
    """Learned positions would fail outright one step behind the context."""
    make = native if kind == "native" else adapted
    target, draft = make(0), make(1)
    requests = [TokenRequest([1 + (i + j) % 20 for j in range(n)], 60, i) for i, n in enumerate((1, 127, 100, 125, 60))]
    want = AutoregressiveDecoder(target).decode(requests).output
    assert decoder(target, draft, draft_length=7).decode(requests).output == want


def test_clamping_is_announced() -> None:
    target = markov(12)
    target.max_length = 10
    with pytest.warns(ContextWarning, match="request 0 and 1 more: prompt and max_new_tokens exceed the context of 10"):
        AutoregressiveDecoder(target).decode(requests_for([[1, 2, 3]], 2, 30))
    with pytest.warns(ContextWarning) as caught:
        decoder(target, target, draft_length=8).decode(requests_for([[1, 2, 3]], 1, 30))
    assert "exceed the context" in str(caught[0].message)
    assert "draft length 8 does not fit" in str(caught[1].message) and "(6 or more" in str(caught[1].message)


# Prompt lookup -------------------------------------------------------------------------------------------------------


def test_prompt_lookup_copies_the_latest_match_and_loops() -> None:
    from draftsmith.inference.drafters.base import DraftTask

    task = DraftTask(2, 100, 5, 50, GREEDY, torch.device("cpu"), False, None)
    found = PromptLookupDrafter(3, 1).start(task)
    proposal = found.propose([[1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [5, 6, 5, 6, 5]], [3, 5], None, None)
    assert proposal is not None and proposal.n is not None and proposal.law is None
    assert proposal.n.tolist() == [3, 5]
    assert proposal.tokens[0, :3].tolist() == [4, 8, 1], "after the latest '1 2', not the first"
    assert proposal.tokens[1].tolist() == [6, 5, 6, 5, 6], "a copy that reaches the end goes on with itself"
    grown = found.propose([[1, 2, 3, 9, 1, 2, 4, 8, 1, 2, 7], [5, 6, 5, 6, 5]], [3, 0], None, None)
    assert grown is None, "7 never occurred, and the other row wants nothing"


@pytest.mark.parametrize("ngram", [(3, 2), (1, 1)])
def test_prompt_lookup_index_equals_a_scan(ngram: tuple[int, int]) -> None:
    from draftsmith.inference.drafters.base import DraftTask

    task = DraftTask(1, 500, 4, 5, GREEDY, torch.device("cpu"), False, None)
    found = PromptLookupDrafter(*ngram).start(task)
    text = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for end in itertools.accumulate([3, 1, 2, 1, 5] * 15):
        seen = text[:end]
        want: list[int] = []
        for n in range(ngram[0], ngram[1] - 1, -1):
            starts = [i for i in range(n, len(seen)) if seen[i - n : i] == seen[-n:]]
            if starts:
                copy = list(seen)
                want = [copy[starts[-1] + i] for i in range(4) if copy.append(copy[starts[-1] + i]) is None]
                break
        proposal = found.propose([seen], [4], None, None)
        assert (proposal.tokens[0].tolist() if proposal is not None else []) == want


def test_prompt_lookup_gains_on_repetition() -> None:
    table = torch.full((6, 6), -9.0)
    for i in range(6):
        table[i, (i + 1) % 6] = 9.0
    result = registry.build(
        "prompt_lookup", {"target": MarkovEngine(table)}, settings={"fallback": "never", "draft_length": 5}
    ).decode(requests_for([[0, 1, 2, 3, 4, 5, 0]], 1, 60))
    assert result.nfe["target"] == 10 and result.nfe["draft"] == 0


def test_an_abandoned_stream_keeps_what_was_learned() -> None:
    target = markov(12)
    busy = decoder(target, near(target), T1, costs=CostCurve.textbook(0.1), fallback="auto")
    stream = busy.stream(requests_for([[1]], 1, 50))
    for _ in range(5):
        next(stream)
    stream.close()
    assert busy.lengths.open(1)[0].evidence.age == 5
