"""Serving as a data set: laws against the target, due updates, ranks, resume, privacy, and what is served."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.data.batches import OnlineBatch
from draftsmith.data.online_buffer import BufferSettings
from draftsmith.data.online_stream import Endless, Item, OnlineStream, Requests, ServeSettings
from draftsmith.data.request_logs import LoggedRequest
from draftsmith.data.router import DraftRouter
from draftsmith.inference import registry
from draftsmith.inference.errors import InvalidState, InvalidValue, UnknownKey
from draftsmith.inference.recorder import RecorderSettings
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import ServedDraft
from tests.fakes import MarkovEngine, markov, near

V = 8
TARGET = markov(V, 2, seed=0)
DRAFT = near(TARGET, seed=1)
SAMPLED = SamplingParams(temperature=1.0)
NO_FALLBACK = {"draft_length": 3, "fallback": "never"}


def requests(count: int, tags: tuple[str, ...] = ("",), tokens: int = 10) -> list[TokenRequest]:
    return [TokenRequest((i % V, (i * 3) % V), max_new_tokens=tokens, tag=tags[i % len(tags)]) for i in range(count)]


def served_draft(engine: MarkovEngine) -> ServedDraft:
    made = iter([engine, MarkovEngine(engine.table.clone())])
    return ServedDraft(lambda: next(made), lambda e, weights: setattr(e, "table", weights["table"]))


def stream(
    items: list[Any] | Endless, *, bind: bool = True, drafts: tuple[MarkovEngine, ...] = (DRAFT,), **changes: Any
) -> OnlineStream:
    arguments: dict[str, Any] = {
        "serve": ServeSettings(in_flight=4, sampling=SAMPLED, decoder=NO_FALLBACK),
        "recorder": RecorderSettings(top_k=V),
        "buffer": BufferSettings(interval=4),
        "num_drafts": len(drafts),
    } | changes
    made = OnlineStream(items if isinstance(items, Endless) else Requests(items), **arguments)
    if bind:
        made.bind(TARGET, [served_draft(d) for d in drafts], reduce=changes.get("reduce"))
    return made


def dense(batch: OnlineBatch) -> Tensor:
    law = batch.law()
    return torch.empty(len(law), V).scatter_(1, law.ids, law.logprobs)


def predicted(batch: OnlineBatch, shift: int = 0) -> Tensor:
    """Log-laws of a full target pass at the rows that predict the marked positions (moved by `shift`)."""
    logits = TARGET.head(TARGET.forward(batch.contexts)[0]).log_softmax(-1)
    return logits[batch.row, (batch.position - 1 + shift).clamp(0, batch.contexts.shape[1] - 1)]


@pytest.mark.parametrize("positions", ["wrong", "all"])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("batching", ["ragged", "lockstep"])
def test_stored_laws_predict_their_index(positions: str, greedy: bool, batching: str) -> None:
    serve = ServeSettings(
        in_flight=5,
        sampling=SamplingParams() if greedy else SAMPLED,
        decoder=NO_FALLBACK | {"batching": batching},
    )
    recorder = RecorderSettings(top_k=V, positions=positions)
    batches = list(stream(requests(20), serve=serve, recorder=recorder, buffer=BufferSettings(interval=5)))
    marked = 0
    for batch in batches:
        marked += len(batch.position)
        assert torch.allclose(dense(batch), predicted(batch), atol=1e-4)
        assert dense(batch).gather(1, batch.labels().unsqueeze(1)).min() > -torch.inf  # the token is possible
        if greedy:
            assert torch.equal(dense(batch).argmax(1), batch.labels())
        off = (dense(batch) - predicted(batch, shift=1)).abs().amax(1)
        assert float((off > 1e-2).float().mean()) > 0.5  # the negative control: a shift by one would be seen
    assert marked >= 20


def test_wrong_marks_are_rejections_and_all_covers_every_new_token() -> None:
    made = stream(requests(12), recorder=RecorderSettings(top_k=V, positions="all"))
    for batch in made:
        for r in range(len(batch.lengths)):
            own = batch.position[batch.row == r].tolist()
            assert own == list(range(2, 12))  # prompt of 2, then 10 new tokens: each was scored once
    made = stream(requests(12), recorder=RecorderSettings(top_k=V, positions="wrong"))
    marked = sum(len(batch.position) for batch in made)
    rejected = sum(
        k < n for entry in made.log for n, k in zip(entry.rounds.drafted, entry.rounds.accepted, strict=True)
    )
    assert 0 < marked == rejected


def test_the_output_of_a_request_does_not_depend_on_batching_or_learning() -> None:
    def texts(in_flight: int, noise: float) -> dict[int, list[int]]:
        made = stream(
            requests(16),
            drafts=(near(TARGET, seed=3, noise=noise),),
            serve=ServeSettings(in_flight=in_flight, decoder=NO_FALLBACK),
        )
        found = {}
        for batch in made:
            for r, number in enumerate(batch.requests.tolist()):
                found[number] = batch.contexts[r, : batch.lengths[r]].tolist()
        return found

    assert texts(4, 0.5) == texts(1, 3.0)  # greedy: the target's own tokens, whatever the draft


def test_updates_come_every_interval_and_repeat_for_each_gradient_step() -> None:
    serve = ServeSettings(in_flight=2, steps=3, sampling=SAMPLED, decoder=NO_FALLBACK)
    made = stream(requests(14), serve=serve)
    seen = [(b.requests.tolist(), b.step, b.steps) for b in made]
    assert [numbers for numbers, step, _ in seen if step == 0] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13],  # what is left at the end is learned from as well
    ]
    assert [s for _, s, _ in seen] == [0, 1, 2] * 4 and {n for _, _, n in seen} == {3}
    assert made.updates == 4 and made.served == 14 and len(seen) <= len(made)


def test_the_next_requests_are_served_by_what_was_swapped_in() -> None:
    made = stream(requests(12))
    for batch in made:
        assert {entry.version for entry in made.log if entry.number in batch.requests.tolist()} == {
            made._drafts[0].version
        }
        made._drafts[0].prepare({"table": TARGET.table})
        made._drafts[0].swap()
    alphas = [entry.alpha for entry in made.log]
    assert max(alphas[:4]) < 0.999 and min(alphas[4:]) > 0.999  # the perfect draft is accepted always


def test_a_record_with_nothing_wrong_is_skipped_and_counted() -> None:
    made = stream(requests(6), drafts=(TARGET,), recorder=RecorderSettings(positions="wrong"))
    assert list(made) == []
    assert made.counters()["skipped"] == 6


def test_an_old_record_does_not_wait_for_ever() -> None:
    items = requests(20, tags=("a", "b", "a", "a", "a"))
    buffer = BufferSettings(interval=4, max_age=8)
    made = stream(items, drafts=(DRAFT, DRAFT), router=DraftRouter(["a", "b"]), buffer=buffer)
    ages = []
    for batch in made:
        if batch.draft == 1:
            ages.append((made.served, batch.requests.tolist()))
    assert ages == [(12, [1, 6, 11]), (20, [16])]  # due 8 requests after request 1


def test_routed_requests_are_served_and_learned_by_their_own_draft() -> None:
    items = requests(24, tags=("a", "b", "b"))
    made = stream(items, drafts=(DRAFT, near(TARGET, seed=9)), router=DraftRouter(["a", "b"]))
    learned: dict[int, set[str]] = {0: set(), 1: set()}
    for batch in made:
        learned[batch.draft] |= {items[n].tag for n in batch.requests.tolist()}
    assert learned == {0: {"a"}, 1: {"b"}}
    assert {(entry.tag, entry.draft) for entry in made.log} == {("a", 0), ("b", 1)}
    mixed = stream(
        items, drafts=(DRAFT, near(TARGET, seed=9)), router=DraftRouter(["a", "b"], lambda r: "ab"[r.prompt[0] % 2])
    )
    tags = {0: set(), 1: set()}
    for batch in mixed:
        tags[batch.draft] |= {items[n].tag for n in batch.requests.tolist()}
    assert tags == {0: {"a", "b"}, 1: {"a", "b"}}  # the negative control: another router mixes the classes


def test_an_unknown_key_names_itself_and_the_known_ones() -> None:
    made = stream(requests(4, tags=("c",)), drafts=(DRAFT, DRAFT), router=DraftRouter(["a", "b"]))
    with pytest.raises(UnknownKey, match=r"'c'.*a, b"):
        list(made)


def test_logged_requests_are_scored_instead_of_decoded() -> None:
    calls = len(TARGET.calls)
    items = [LoggedRequest(TokenRequest((1, 2), tag="x"), (3, 4, 5)), LoggedRequest(TokenRequest((7,)), (6, 5))] * 2
    (batch,) = list(stream(items))
    assert [n for _, n in TARGET.calls[calls:]] == [5]  # one pass of the target over all of the text
    assert batch.position.tolist() == [2, 3, 4, 1, 2] * 2
    assert torch.allclose(dense(batch), predicted(batch), atol=1e-5)


def test_an_endless_stream_is_read_from_where_it_stood() -> None:
    starts = []

    def factory(start: int) -> Iterator[Item]:
        starts.append(start)
        i = start
        while True:
            yield TokenRequest((i % V,), max_new_tokens=6)
            i += 1

    made = stream(Endless(factory))
    it = iter(made)
    first = [next(it) for _ in range(3)]
    assert [b.requests.tolist() for b in first] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    again = stream(Endless(factory))
    again.load_state_dict(made.state_dict())
    assert next(iter(again)).requests.tolist() == next(it).requests.tolist() == [12, 13, 14, 15]
    assert starts == [0, 12]
    limited = stream(Endless(factory), serve=ServeSettings(in_flight=4, limit=6, sampling=SAMPLED, decoder=NO_FALLBACK))
    assert [b.requests.tolist() for b in limited] == [[0, 1, 2, 3], [4, 5]]


def same(a: OnlineBatch, b: OnlineBatch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_resuming_at_rest_equals_going_on() -> None:
    serve = ServeSettings(in_flight=3, steps=2, sampling=SAMPLED, decoder=NO_FALLBACK)
    whole = list(stream(requests(30), serve=serve))
    made = stream(requests(30), serve=serve)
    it, taken = iter(made), 0
    while True:
        next(it)
        taken += 1
        if taken >= 5 and made.at_rest:
            break
    again = stream(requests(30), serve=serve)
    again.load_state_dict(made.state_dict())
    rest = list(again)
    assert taken == 6 and len(rest) == len(whole) - taken > 0
    assert all(same(a, b) for a, b in zip(rest, whole[taken:], strict=True))
    assert again.counters() == stream_counters(serve)


def stream_counters(serve: ServeSettings) -> dict[str, int]:
    made = stream(requests(30), serve=serve)
    list(made)
    return made.counters()


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 7])
def test_with_stored_records_resuming_anywhere_equals_going_on(stop: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "serve": ServeSettings(in_flight=3, steps=2, sampling=SAMPLED, decoder=NO_FALLBACK),
        "buffer": BufferSettings(interval=4, replay=0.25, holdout=0.1, persist=True),
        "buffer_dir": tmp_path,
        "drafts": (DRAFT, near(TARGET, seed=9)),
        "router": DraftRouter(["a", "b"]),
    }
    items = requests(30, tags=("a", "b", "a"))
    whole = list(stream(items, **arguments))
    made = stream(items, **arguments)
    it = iter(made)
    for _ in range(stop):
        next(it)
    state = made.state_dict()
    next(it)  # work that is lost with the interrupted process
    again = stream(items, **arguments)
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(whole) - stop
    assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_waiting_records_that_may_not_be_stored_are_announced() -> None:
    made = stream(requests(30), serve=ServeSettings(in_flight=4, steps=2, sampling=SAMPLED, decoder=NO_FALLBACK))
    next(iter(made))  # in the middle of an update
    assert not made.at_rest
    state = made.state_dict()
    assert "file" not in state and state["waiting"] == 4
    with pytest.warns(UserWarning, match="4 records waited"):
        stream(requests(30)).load_state_dict(state)


def test_no_text_in_the_state_by_default() -> None:
    made = stream(requests(30), buffer=BufferSettings(interval=3, replay=0.3, holdout=0.2))
    for _ in zip(range(3), made, strict=False):
        state = made.state_dict()

        def tensors(x: Any) -> list[Tensor]:
            if isinstance(x, Tensor):
                return [x]
            return [
                t for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else []) for t in tensors(y)
            ]

        assert tensors(state) == []


def test_coming_to_rest_empties_every_buffer() -> None:
    items = requests(60, tags=("a", "b", "c"))
    drafts = (DRAFT, DRAFT, DRAFT)
    made = stream(items, drafts=drafts, router=DraftRouter(["a", "b", "c"]), buffer=BufferSettings(interval=5))
    it = iter(made)
    next(it)
    assert not made.at_rest
    made.come_to_rest()
    seen = []
    while not made.at_rest:
        seen.append(next(it).draft)
    assert len(seen) == len(set(seen)) <= 2 and not any(map(len, made.buffers))
    served = made.served
    next(it)
    assert made.served > served and not made._resting  # and goes on as before


def test_ranks_share_the_requests_and_learn_the_same_draft_together() -> None:
    """Simulated with threads: a real barrier at each reduction."""
    import threading

    barrier, box, results = threading.Barrier(2), [torch.zeros(0)] * 2, [[], []]
    items = requests(40, tags=("a", "a", "b"))

    def run(rank: int) -> None:
        def reduce(x: Tensor) -> Tensor:
            box[rank] = x
            barrier.wait(30)
            total = box[0] + box[1]
            barrier.wait(30)
            return total

        made = stream(
            items,
            bind=False,
            drafts=(DRAFT, DRAFT),
            router=DraftRouter(["a", "b"]),
            rank=rank,
            world_size=2,
            buffer=BufferSettings(interval=6),
        )
        made.bind(TARGET, [served_draft(near(TARGET, seed=1)) for _ in range(2)], reduce=reduce)
        for batch in made:
            results[rank].append((batch.draft, batch.requests.tolist(), made.at_rest))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    a, b = results
    assert len(a) == len(b) > 4
    assert [(draft, rest) for draft, _, rest in a] == [(draft, rest) for draft, _, rest in b]
    numbers = [[n for _, batch, _ in rank for n in batch] for rank in results]
    assert all(n % 2 == rank for rank in range(2) for n in numbers[rank])
    assert sorted(numbers[0] + numbers[1]) == list(range(40))  # every request once
    assert all(items[n].tag == "ab"[draft] for rank in results for draft, batch, _ in rank for n in batch)


def test_a_second_epoch_has_fresh_randomness_and_goes_on_counting() -> None:
    made = stream(requests(4))
    (first,), (second,) = list(made), list(made)
    assert second.requests.tolist() == [4, 5, 6, 7]
    assert not torch.equal(first.contexts, second.contexts)


def test_what_is_logged_holds_no_text_and_adds_up() -> None:
    made = stream(requests(8))
    list(made)
    assert [entry.number for entry in made.log] == list(range(8))
    for entry in made.log:
        assert entry.tokens == sum(entry.rounds.committed) == 10
        assert entry.examined == sum(
            min(k + 1, n) for n, k in zip(entry.rounds.drafted, entry.rounds.accepted, strict=True)
        )
        assert entry.alpha == pytest.approx(sum(entry.rounds.beta_sum) / entry.examined)
        assert set(entry.rounds.row) == {0}


def test_output_of_a_stream_equals_the_decoder_with_the_same_row_ids() -> None:
    items = requests(8)
    batches = list(stream(items, recorder=RecorderSettings(top_k=V, positions="all")))
    decoder = registry.build("speculative", {"target": TARGET, "draft": DRAFT}, sampling=SAMPLED, settings=NO_FALLBACK)
    shadow = decoder.decode([replace(item, row_id=i) for i, item in enumerate(items)])
    for batch in batches:
        for r, number in enumerate(batch.requests.tolist()):
            assert batch.contexts[r].tolist() == [*items[number].prompt, *shadow.output[number]]


def test_iterating_without_engines_says_what_to_do() -> None:
    with pytest.raises(InvalidState, match="bind"):
        next(iter(stream(requests(2), bind=False)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serve": ServeSettings(), "recorder": RecorderSettings(law="served")}, "'raw'"),
        ({"num_drafts": 2}, "2 drafts and no router"),
        ({"router": DraftRouter(["a"])}, "1 drafts and a router over a"),
        ({"num_drafts": 3, "router": DraftRouter(["a", "b"])}, "3 drafts and a router over a, b"),
        ({"buffer": BufferSettings(persist=True)}, "buffer_dir"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        stream(requests(2), bind=False, **changes)


def test_binding_checks_what_it_is_given() -> None:
    with pytest.raises(InvalidValue, match="2 drafts were bound to a stream for 1"):
        stream(requests(2), bind=False).bind(TARGET, [served_draft(DRAFT)] * 2)
    with pytest.raises(InvalidValue, match="2 ranks must agree"):
        stream(requests(2), bind=False, world_size=2).bind(TARGET, [served_draft(DRAFT)])
    with pytest.raises(InvalidValue, match="vocabularies differ"):
        stream(requests(2), bind=False).bind(TARGET, [served_draft(markov(V + 1, 2))])


@pytest.mark.parametrize(("field", "value"), [("in_flight", 0), ("steps", 0), ("limit", 0)])
def test_serve_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(InvalidValue, match=field):
        ServeSettings(**{field: value})


def test_no_requests() -> None:
    with pytest.raises(InvalidValue, match="empty"):
        Requests([])


def test_stored_records_belong_to_their_number_of_ranks(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"buffer": BufferSettings(interval=4, persist=True), "buffer_dir": tmp_path}
    made = stream(requests(8), **arguments)
    next(iter(made))
    state = made.state_dict() | {"world_size": 2}
    with pytest.raises(InvalidValue, match="belong to 2 ranks"):
        stream(requests(8), **arguments).load_state_dict(state)
