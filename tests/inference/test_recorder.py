"""The recorder: which positions it keeps, that a stored law predicts its own index, the bounded queue, the records."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.inference import registry
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.laws import Record
from draftsmith.inference.metrics import count
from draftsmith.inference.recorder import LawRecorder, RecorderSettings
from draftsmith.inference.requests import DecodeResult, RoundStats, RoundView, TokenRequest
from draftsmith.inference.sampling import SamplingParams, law
from tests.fakes import MarkovEngine, chi_square, markov, near

V = 9
REQUESTS = [TokenRequest((1, 2, 3), tag="a"), TokenRequest((4,), tag="b")]


def view(
    accepted: list[int], num_drafted: list[int], *, rows: list[int] | None = None, greedy: bool = False, seed: int = 0
) -> RoundView:
    """A round of g = 3 with random logits; contexts are the prompts."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(range(len(accepted))) if rows is None else rows
    logits = torch.randn(len(rows), 4, V, generator=generator)
    return RoundView(
        requests=REQUESTS,
        rows=rows,
        context=[list(REQUESTS[r].prompt) for r in rows],
        drafted=torch.randint(V, (len(rows), 3), generator=generator),
        num_drafted=num_drafted,
        accepted=accepted,
        next_token=[0] * len(rows),
        target_logits=logits,
        target_law=None if greedy else (logits / 0.5).softmax(-1),
        draft_law=None,
    )


def kept(recorder: LawRecorder, row: int, answer: int = 4) -> Record:
    return recorder.finish(row, REQUESTS[row], list(range(answer)))


def dense(record: Record) -> Tensor:
    """Stored log-probabilities as [N, V]; only for laws with top_k = V."""
    return torch.empty(len(record.law), V).scatter_(1, record.law.ids, record.law.logprobs)


@pytest.mark.parametrize(
    ("positions", "k", "n", "expected"),
    [
        ("wrong", 1, 3, [4]),
        ("wrong", 0, 3, [3]),
        ("wrong", 3, 3, []),  # the bonus position: nothing had been proposed there
        ("wrong", 2, 2, []),
        ("wrong", 0, 0, []),  # a plain step
        ("all", 1, 3, [3, 4]),  # nothing behind the correction
        ("all", 3, 3, [3, 4, 5, 6]),
        ("all", 0, 3, [3]),
        ("all", 0, 0, [3]),
    ],
)
def test_positions(positions: str, k: int, n: int, expected: list[int]) -> None:
    recorder = LawRecorder(RecorderSettings(positions=positions))
    recorder(view([k], [n]))
    assert kept(recorder, 0).positions.tolist() == expected


def test_row_i_of_the_logits_is_the_law_of_index_length_plus_i() -> None:
    recorder = LawRecorder(RecorderSettings(top_k=V, temperature=0.8))
    seen = view([2, 3], [3, 3])
    recorder(seen)
    for row in (0, 1):
        record = kept(recorder, row)
        first = len(REQUESTS[row].prompt)
        for position, stored in zip(record.positions.tolist(), dense(record), strict=True):
            expected = torch.log_softmax(seen.target_logits[row, position - first] / 0.8, -1)
            assert torch.allclose(stored, expected, atol=1e-6)
            shifted = torch.log_softmax(seen.target_logits[row, (position - first + 1) % 4] / 0.8, -1)
            assert not torch.allclose(stored, shifted, atol=1e-2)  # the test would see an off-by-one


def test_raw_and_served_laws() -> None:
    seen = view([0], [3])
    for name, expected in (("raw", seen.target_logits[0, 0].softmax(-1)), ("served", seen.target_law[0, 0])):
        recorder = LawRecorder(RecorderSettings(law=name, top_k=4))
        recorder(seen)
        law = kept(recorder, 0).law
        assert torch.allclose(law.logprobs[0].exp(), expected.topk(4).values, atol=1e-6)
        assert law.tail_logmass[0].exp() == pytest.approx(1 - float(expected.topk(4).values.sum()), abs=1e-6)
        assert law.processed == (name == "served")


def test_greedy_decoding_has_no_served_law() -> None:
    with pytest.raises(InvalidState, match="'raw'"):
        LawRecorder(RecorderSettings(law="served"))(view([0], [3], greedy=True))


def test_positions_behind_a_stop_are_left_out() -> None:
    recorder = LawRecorder(RecorderSettings())
    recorder(view([3], [3]))
    assert kept(recorder, 0, answer=2).positions.tolist() == [3, 4]


def test_nothing_kept_makes_a_record_without_positions() -> None:
    record = kept(LawRecorder(RecorderSettings()), 0)
    assert len(record.law) == 0 and record.positions.tolist() == [] and len(record.ids) == 7


def test_rows_of_a_batch_are_kept_apart_over_rounds() -> None:
    recorder = LawRecorder(RecorderSettings(positions="wrong", top_k=V))
    first, second = view([0, 1], [3, 3]), view([2], [3], rows=[1], seed=1)
    second = RoundView(**{**vars(second), "context": [[4, 0, 0]]})
    recorder(first)
    recorder(second)
    other = kept(recorder, 1, answer=8)
    assert other.positions.tolist() == [2, 5]
    expected = torch.stack([first.target_logits[1, 1], second.target_logits[0, 2]]).log_softmax(-1)
    assert torch.allclose(dense(other), expected, atol=1e-6)
    assert kept(recorder, 0).positions.tolist() == [3]  # taking one row left the other
    assert kept(recorder, 0).positions.tolist() == []  # and is final


def test_the_queue_is_bounded_and_counts_what_it_drops() -> None:
    recorder = LawRecorder(RecorderSettings(max_positions=5))
    recorder(view([3], [3]))
    recorder(view([3], [3], rows=[1]))
    assert recorder.dropped == 3
    assert len(kept(recorder, 1).positions) == 1
    recorder(view([3], [3], rows=[1]))  # taking row 1 made room again, but row 0 still holds 4
    assert recorder.dropped == 6
    kept(recorder, 0)
    kept(recorder, 1)
    recorder(view([3], [3]))
    assert recorder.dropped == 6


def test_clear_forgets() -> None:
    recorder = LawRecorder(RecorderSettings(max_positions=4))
    recorder(view([3], [3]))
    recorder.clear()
    recorder(view([3], [3], rows=[1]))
    assert recorder.dropped == 0 and len(kept(recorder, 0).positions) == 0


def test_the_view_is_copied() -> None:
    """A decoder may reuse its buffers as soon as the call returns."""
    recorder = LawRecorder(RecorderSettings(top_k=V))
    seen = view([3], [3])
    expected = seen.target_logits[0].log_softmax(-1).clone()
    recorder(seen)
    seen.target_logits.zero_()
    assert torch.allclose(dense(kept(recorder, 0)), expected, atol=1e-6)


def test_finish_all_carries_the_measured_acceptance() -> None:
    recorder = LawRecorder(RecorderSettings())
    recorder(view([1, 3], [3, 3]))
    rounds = RoundStats()
    rounds.append(row=0, drafted=3, accepted=1, committed=2, beta_sum=1.5, seconds=0.0)  # 2 positions examined
    rounds.append(row=1, drafted=3, accepted=3, committed=4, beta_sum=2.4, seconds=0.0)  # 3 positions examined
    rounds.append(
        row=0, drafted=0, accepted=0, committed=1, beta_sum=0.0, seconds=0.0
    )  # a plain round examines nothing
    rounds.append(row=0, drafted=2, accepted=2, committed=3, beta_sum=1.0, seconds=0.0)  # 2 more
    result = DecodeResult([[1, 2], [1, 2, 3, 4]], rounds, {}, 0.0, ["length", "length"])
    a, b = recorder.finish_all(REQUESTS, result, numbers=[7, 8], draft_version=2)
    assert (a.alpha, a.examined, a.request, a.draft_version, a.tag) == (pytest.approx(2.5 / 4), 4, 7, 2, "a")
    assert (b.alpha, b.examined) == (pytest.approx(0.8), 3)
    assert b.positions.tolist() == [1, 2, 3, 4]


def test_a_request_without_drafting_has_no_acceptance() -> None:
    rounds = RoundStats()
    rounds.append(row=0, drafted=0, accepted=0, committed=1, beta_sum=0.0, seconds=0.0)
    result = DecodeResult([[1]], rounds, {}, 0.0, ["length"])
    (record,) = LawRecorder(RecorderSettings()).finish_all(REQUESTS[:1], result)
    assert record.alpha != record.alpha and record.examined == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"positions": "rejected"}, "unknown positions 'rejected': choose one of all, wrong"),
        ({"law": "cooked"}, "unknown law"),
        ({"top_k": 0}, "top_k"),
        ({"max_positions": 0}, "max_positions"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_settings_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        RecorderSettings(**kwargs)


class LearningDraft:
    """A recorder that also replaces the draft's weights after every verification, in the middle of requests."""

    def __init__(self, draft: MarkovEngine, settings: RecorderSettings) -> None:
        self.draft, self.inner = draft, LawRecorder(settings)
        self.rounds = 0

    def __call__(self, seen: RoundView) -> None:
        self.inner(seen)
        self.rounds += 1
        self.draft.table = near(TARGET, seed=self.rounds, noise=0.3 + self.rounds % 5).table


TARGET = markov(6, 2, seed=0)
PARAMS = {
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.8, top-p 0.7": SamplingParams(temperature=0.8, top_p=0.7),
}


def serve(params: SamplingParams, rows: int = 20_000) -> tuple[Tensor, RoundStats, LearningDraft]:
    """Three tokens for each of `rows` rows while the draft learns; (tokens [rows, 3], rounds, recorder)."""
    draft = near(TARGET, seed=99)
    recorder = LearningDraft(draft, RecorderSettings(positions="wrong", top_k=6, max_positions=rows * 3))
    settings = {"draft_length": 4, "fallback": "never"}
    decoder = registry.build(
        "speculative", {"target": TARGET, "draft": draft}, sampling=params, settings=settings, recorder=recorder, seed=5
    )
    out, rounds = [], RoundStats()
    for start in range(0, rows, 2000):
        result = decoder.decode([TokenRequest((4, 2), 3, row_id=start + i) for i in range(2000)])
        out += result.output
        rounds.extend(result.rounds, row_offset=start)
        recorder.inner.clear()
    return torch.tensor(out), rounds, recorder


@pytest.mark.parametrize("name", PARAMS)
def test_the_output_has_the_targets_law_in_the_middle_of_learning(name: str) -> None:
    tokens, rounds, recorder = serve(PARAMS[name])
    p = law(TARGET.table, PARAMS[name])  # [past, last, next]
    first = p[4, 2]
    second = p[2]  # [first, second]
    joint = first[:, None, None] * second[:, :, None] * p  # [first, second, third]
    cells = (tokens[:, 0] * 36 + tokens[:, 1] * 6 + tokens[:, 2]).bincount(minlength=216)
    test = chi_square(cells, joint.flatten())
    assert test.p_value > 0.001, test
    assert test.detectable_tv < 0.05
    assert recorder.rounds > 20  # the weights did change, many times within each call
    wrong = joint.flatten().roll(1)
    assert chi_square(cells, wrong).p_value < 1e-6  # the negative control: another law is seen
    # the acceptance that was measured on the way is that of the drafts that really drafted
    total = count(rounds)
    assert total.alpha is not None and total.accepted_rate is not None
    error = (total.alpha * (1 - total.alpha) / total.examined) ** 0.5
    assert abs(total.alpha - total.accepted_rate) < 3 * error


def test_recording_does_not_change_the_output() -> None:
    requests = [TokenRequest((i % 6, 1), 12, row_id=i) for i in range(20)]
    outputs = []
    for recorder in (None, LawRecorder(RecorderSettings())):
        decoder = registry.build(
            "speculative",
            {"target": TARGET, "draft": near(TARGET)},
            sampling=PARAMS["temperature 1"],
            settings={"fallback": "never"},
            recorder=recorder,
        )
        outputs.append(decoder.decode(requests).output)
    assert outputs[0] == outputs[1]


def test_no_host_synchronisation_of_its_own() -> None:
    """What it does with device tensors asks for no value of theirs (counted on the CPU by a dispatch mode)."""

    class Asks(TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.asked += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    seen = view([1, 3], [3, 3])
    recorder = LawRecorder(RecorderSettings())
    with Asks() as mode:
        recorder(seen)
    assert mode.asked == 0
    with Asks() as control:
        int(seen.drafted[0, 0])
    assert control.asked == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_queued_copies_hold_the_same_laws() -> None:
    """On an accelerator the copy is asynchronous; what arrives is what a blocking copy would have brought."""
    seen = view([2, 3], [3, 3])
    on_gpu = RoundView(**{**vars(seen), "target_logits": seen.target_logits.cuda(), "target_law": None})
    recorders = [LawRecorder(RecorderSettings(top_k=V)) for _ in range(2)]
    recorders[0](seen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorders[1](on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_gpu.target_logits.zero_()  # the decoder reuses its buffers
    for row in (0, 1):
        a, b = (kept(recorder, row) for recorder in recorders)
        assert torch.equal(a.positions, b.positions)
        assert torch.allclose(dense(a), dense(b), atol=1e-5) and b.law.ids.device.type == "cpu"
