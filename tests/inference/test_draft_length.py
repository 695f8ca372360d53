"""Draft lengths: schedules by hand, the judge of gain, probes with exponential back-off, what persists over calls."""

import pytest

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.draft_length import (
    Clock,
    DraftLengths,
    DraftLengthSettings,
    Evidence,
    Gain,
    Outcome,
    RowLength,
)
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.forecast import best_g, speedup
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import MarkovEngine, markov, requests_for

T1 = SamplingParams(temperature=1.0)


def row(schedule: str, **settings: int | float) -> RowLength:
    return RowLength(DraftLengthSettings(schedule=schedule, **settings), Evidence())


def after(length: RowLength, *rounds: tuple[int, int]) -> list[int]:
    """Draft lengths after rounds of (offered, accepted)."""
    out = []
    for n, k in rounds:
        length.observe(length.want(None), n, k)
        out.append(length.want(None))
    return out


def test_constant_stays() -> None:
    assert after(row("constant", draft_length=4), (4, 4), (4, 0), (2, 2)) == [4, 4, 4]


def test_heuristic_adds_two_or_takes_one() -> None:
    """transformers' rule: +2 when all were accepted, else -1, at least 1; here also at most max_draft_length."""
    length = row("heuristic", draft_length=3, max_draft_length=6)
    assert after(length, (3, 3), (5, 5), (6, 6), (6, 5), (5, 0)) == [5, 6, 6, 5, 4]
    assert after(row("heuristic", draft_length=2), (2, 0), (1, 0), (1, 1)) == [1, 1, 3]


def test_confidence_follows_what_was_offered() -> None:
    """Cut after 2 of 5: the next round drafts 3; never cut: it grows."""
    length = row("confidence", draft_length=5, max_draft_length=8)
    assert after(length, (2, 1), (1, 0), (2, 2), (4, 4), (6, 6), (8, 8)) == [3, 2, 4, 6, 8, 8]


def test_longest_is_what_caches_must_hold() -> None:
    assert DraftLengthSettings(draft_length=7).longest == 7
    assert DraftLengthSettings(draft_length=7, schedule="heuristic").longest == 16
    assert DraftLengthSettings(draft_length=20, schedule="cost").longest == 20


@pytest.mark.parametrize(("c", "alpha", "g"), [(0.01, 0.6, 7), (0.02, 0.6, 6), (0.05, 0.6, 4), (0.1, 0.6, 3)])
def test_cost_takes_the_best_length(c: float, alpha: float, g: int) -> None:
    """The spec's test vector."""
    lengths = DraftLengths(DraftLengthSettings(schedule="cost"), CostCurve.textbook(c), greedy=False)
    length = lengths.open(1)[0]
    length.evidence.alpha_sum, length.evidence.weight = 100 * alpha, 100.0
    assert length.want(lengths.gain(1)) == g


def test_gain_is_the_forecast() -> None:
    costs = CostCurve(batch=1, plain=5.3, draft_step=0.34, verify={1: 5.3, 9: 7.9}, overhead=0.2)
    gain = Gain(costs, 16)
    for alpha in (0.0, 0.25, 0.5, 0.99, 1.0):
        assert gain.at(alpha, 5) == speedup(alpha, 5, costs)
        assert gain.best(alpha) == best_g(alpha, costs, 16)
    assert gain.at(1.0001, 5) == speedup(1.0, 5, costs), "rounding above 1 is no error"


def test_evidence_by_hand() -> None:
    evidence = Evidence(alpha_sum=2.0, weight=4.0)
    evidence.see([(1.5, 2), (0.5, 1)])
    assert evidence.weight == pytest.approx(0.9 * 4 + 3) and evidence.alpha_sum == pytest.approx(0.9 * 2 + 2)
    assert evidence.alpha == pytest.approx(3.8 / 6.6)


def drive(lengths: DraftLengths, rounds: int, accepts: bool, length: RowLength | None = None) -> list[int]:
    """What one row drafts over rounds in which every draft is accepted, or none."""
    length = length or lengths.open(1)[0]
    drafted = []
    for _ in range(rounds):
        n = length.want(lengths.gain(1))
        k = n if accepts else 0
        lengths.end_round([Outcome(length, n, n, k, float(k))], 1)
        drafted.append(n)
    lengths.close([length])
    return drafted


def probes(drafted: list[int]) -> list[int]:
    return [i for i, n in enumerate(drafted) if n]


def test_probes_back_off_exponentially_and_the_state_persists() -> None:
    """A useless draft: two rounds are enough to see it; then probes of 2 tokens at ever longer intervals."""
    lengths = DraftLengths(DraftLengthSettings(), CostCurve.textbook(0.2), greedy=False)
    first = drive(lengths, 40, accepts=False)
    assert first[:3] == [5, 5, 0], "the prior is outvoted by the second round"
    assert probes(first)[2:] == [16, 32] and first[16] == 2
    second = drive(lengths, 1000, accepts=False)  # another call goes on where the first ended: age 40, interval 64
    assert [40 + i for i in probes(second)] == [64, 128, 256, 512, 1024]
    third = drive(lengths, 4000, accepts=False)
    assert [1040 + i for i in probes(third)] == [512 * i for i in range(3, 10)], "at most every 512 rounds"
    everything = [*first, *second, *third]
    wasted = sum(0.2 * n for n in everything)
    assert wasted / len(everything) < 0.01, "far below 3% of plain decoding"


def test_a_good_probe_resumes_drafting() -> None:
    lengths = DraftLengths(DraftLengthSettings(), CostCurve.textbook(0.2), greedy=False)
    length = lengths.open(1)[0]
    assert drive(lengths, 20, accepts=False, length=length)[-1] == 0
    better = drive(lengths, 40, accepts=True, length=length)
    assert better[12] == 2 and better[13:] == [5] * 27, "the probe of round 32 succeeds, and full drafts follow"
    # having settled, the next suspension starts with short intervals again
    worse = drive(lengths, 60, accepts=False, length=length)
    assert length.evidence.interval <= 64 and 0 in worse


def test_never_means_never() -> None:
    lengths = DraftLengths(DraftLengthSettings(fallback="never"), CostCurve.textbook(0.9), greedy=False)
    assert drive(lengths, 50, accepts=False) == [5] * 50


def test_without_costs_sampling_never_asks_the_clock() -> None:
    """Wall-clock decisions would make sampled ids unrepeatable: only greedily, or when asked for."""
    assert DraftLengths(DraftLengthSettings(), None, greedy=False).clock is None
    assert DraftLengths(DraftLengthSettings(), None, greedy=True).clock is not None
    assert DraftLengths(DraftLengthSettings(), CostCurve.textbook(0.1), greedy=True).clock is None
    assert (
        DraftLengths(DraftLengthSettings(fallback="measured"), CostCurve.textbook(0.1), greedy=False).clock is not None
    )
    assert DraftLengths(DraftLengthSettings(fallback="never"), None, greedy=True).clock is None


def test_greedy_rows_pool_what_they_see_and_sampling_rows_do_not() -> None:
    costs = CostCurve.textbook(0.2)
    pooled = DraftLengths(DraftLengthSettings(), costs, greedy=True).open(3)
    assert len({id(r.evidence) for r in pooled}) == 1
    apart = DraftLengths(DraftLengthSettings(), costs, greedy=False).open(3)
    assert len({id(r.evidence) for r in apart}) == 3


def test_clock_by_hand() -> None:
    clock = Clock(16)
    assert clock.wants_plain(1) and clock.gain(1) is None
    for seconds in (1.0, 50.0, 1.0):  # one slow moment among the plain rounds
        clock.add(1, 0, seconds)
    assert not clock.wants_plain(1) and clock.wants_plain(3), "batch sizes stand for others up to twice their size"
    assert clock.gain(1) is None, "no round with drafts yet"
    clock.add(1, 4, 3.0)
    gain = clock.gain(1)
    assert gain is not None
    # plain 1, half a second a drafted token: at alpha 1 five tokens for 3 seconds
    assert gain.at(1.0, 4) == pytest.approx(5 / 3) and gain.at(0.0, 4) == pytest.approx(1 / 3)
    assert gain.at(1.0, 2) == pytest.approx(3 / 2)
    for _ in range(255):
        clock.add(1, 4, 3.0)
    assert clock.wants_plain(1), "plain decoding is timed anew now and then"


def test_an_empty_round_is_no_evidence() -> None:
    """Prompt lookup that found nothing has not failed."""
    lengths = DraftLengths(DraftLengthSettings(), CostCurve.textbook(0.2), greedy=False)
    length = lengths.open(1)[0]
    for _ in range(20):
        lengths.end_round([Outcome(length, 5, 0, 0, 0.0)], 1)
    assert length.want(lengths.gain(1)) == 5 and length.evidence.alpha == pytest.approx(0.6)


@pytest.mark.parametrize("sampling", [SamplingParams(), T1], ids=["greedy", "T=1"])
@pytest.mark.parametrize("schedule", ["constant", "heuristic", "cost", "confidence"])
def test_a_useless_draft_costs_next_to_nothing(sampling: SamplingParams, schedule: str) -> None:
    """Through the decoder, in units of the cost curve: within 3% of plain decoding after the first call."""
    target = markov(30, 1)
    draft = MarkovEngine(-target.table)  # most likely what the target finds least likely
    costs = CostCurve.textbook(0.25)
    decoder = SpeculativeDecoder(
        target,
        ModelDrafter(draft),
        sampling=sampling,
        settings=SpeculativeSettings(schedule=schedule, confidence_threshold=0.0),
        costs=costs,
    )
    requests = requests_for([[1], [2, 3]], 4, 300)
    decoder.decode(requests)
    result = decoder.decode(requests)
    seconds = result.nfe["target"] * costs.plain + result.nfe["draft"] * costs.draft_step
    assert seconds <= 1.03 * 300 * costs.plain
    if sampling.greedy:
        assert result.output == AutoregressiveDecoder(target).decode(requests).output


@pytest.mark.parametrize("schedule", ["constant", "cost"])
def test_a_good_draft_is_used_all_the_time(schedule: str) -> None:
    target = markov(30, 1)
    settings = SpeculativeSettings(schedule=schedule, max_draft_length=8)
    decoder = SpeculativeDecoder(target, ModelDrafter(target), settings=settings, costs=CostCurve.textbook(0.1))
    result = decoder.decode([TokenRequest([1], 200)])
    assert min(result.rounds.drafted[:-2]) >= (5 if schedule == "constant" else 3)
    if schedule == "cost":
        assert max(result.rounds.drafted) == 8, "the running acceptance grows to 1, and with it the draft"


def test_the_clock_finds_a_useless_draft_too() -> None:
    """Greedy without a cost curve: rounds are timed as they happen, and the slow draft is dropped."""
    import time

    class Slow(MarkovEngine):
        def forward(self, *args: object, **kwargs: object) -> object:
            time.sleep(0.002)
            return super().forward(*args, **kwargs)

    target = markov(30, 1)
    decoder = SpeculativeDecoder(target, ModelDrafter(Slow(-target.table)))
    requests = requests_for([[1]], 1, 120)
    decoder.decode(requests)
    result = decoder.decode(requests)
    assert result.nfe["draft"] <= 10 and result.output == AutoregressiveDecoder(target).decode(requests).output
