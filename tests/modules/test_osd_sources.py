"""Who writes the training text: laws of what is written, caches against full passes, alignment of the new labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.modules.osd_sources import rewrite, write_answers, written_by_student
from tests.fakes import chi_square, markov
from tests.tiny import lm

V = 6
STUDENT, TEACHER = markov(V, 2, seed=1), markov(V, 2, seed=2)


def write(text: Tensor, prompts: list[int], totals: list[int], **changes: Any) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "student": STUDENT,
        "teacher": TEACHER,
        "by_student": torch.ones(len(text), text.shape[1], dtype=torch.bool),
        "temperature": 1.0,
        "seed": 0,
        "row_ids": torch.arange(len(text)),
    } | changes
    return write_answers(text, prompts, totals, **arguments)


@pytest.mark.parametrize("student_writes", [True, False])
def test_every_token_has_the_law_of_its_writer(student_writes: bool) -> None:
    n = 12_000
    text = torch.tensor([[3, 1, 0, 0]]).expand(n, 4)
    out, lengths = write(text, [2] * n, [4] * n, by_student=torch.full((n, 4), student_writes), temperature=0.8)
    table = ((STUDENT if student_writes else TEACHER).table / 0.8).softmax(-1)
    first = table[3, 1]
    law = (first[:, None] * table[1]).flatten()  # two tokens, order 2
    counts = torch.bincount(out[:, 2] * V + out[:, 3], minlength=V * V)
    test = chi_square(counts, law)
    assert test.p_value > 0.001, test
    other = ((TEACHER if student_writes else STUDENT).table / 0.8).softmax(-1)
    assert chi_square(counts, (other[3, 1][:, None] * other[1]).flatten()).p_value < 1e-6  # the test can fail
    assert out[:, :2].eq(text[:, :2]).all() and lengths.eq(4).all()


def test_a_token_mixture_has_the_mixed_law() -> None:
    n = 12_000
    ids = torch.arange(n)
    by = written_by_student("mix_token", ids, 3, seed=7)
    out, _ = write(torch.tensor([[3, 1, 0]]).expand(n, 3), [2] * n, [3] * n, by_student=by, row_ids=ids, seed=7)
    law = 0.5 * STUDENT.table[3, 1].softmax(-1) + 0.5 * TEACHER.table[3, 1].softmax(-1)
    test = chi_square(torch.bincount(out[:, 2], minlength=V), law)
    assert test.p_value > 0.001, test
    mine = out[by[:, 2], 2]
    assert chi_square(torch.bincount(mine, minlength=V), STUDENT.table[3, 1].softmax(-1)).p_value > 0.001


def test_coins() -> None:
    ids = torch.arange(4000)
    assert not written_by_student("teacher", ids, 5, seed=0).any()
    assert written_by_student("student", ids, 5, seed=0).all()
    rows = written_by_student("mix_request", ids, 5, seed=0)
    assert rows.eq(rows[:, :1]).all() and abs(float(rows[:, 0].float().mean()) - 0.5) < 0.04
    tokens = written_by_student("mix_token", ids, 5, seed=0, share=0.25)
    assert abs(float(tokens.float().mean()) - 0.25) < 0.02
    both = tokens[:, 0] & tokens[:, 1]
    assert abs(float(both.float().mean()) - 0.0625) < 0.02  # independent of each other
    assert not torch.equal(rows, written_by_student("mix_request", ids, 5, seed=1))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    text = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(0))
    prompts, totals = [1, 5, 3, 8], [12, 9, 12, 10]
    together, lengths = write(text, prompts, totals)
    for b in range(4):
        alone, length = write(text[b : b + 1], prompts[b : b + 1], totals[b : b + 1], row_ids=torch.tensor([b]))
        assert torch.equal(alone[0, : totals[b]], together[b, : totals[b]]) and length == lengths[b]
    assert torch.equal(together[1, 9:], text[1, 9:])  # nothing is written behind a row's total


def test_greedy_answers_equal_recomputed_ones() -> None:
    """Networks with real caches, ragged prompts: each token is the argmax of a full pass over what stands before it."""
    student, teacher = lm(seed=1), lm(seed=2)
    text = torch.randint(300, (3, 14), generator=torch.Generator().manual_seed(0))
    prompts, totals = [3, 9, 6], [14, 12, 14]
    by = written_by_student("mix_token", torch.arange(3), 14, seed=3)
    out, _ = write(
        text,
        prompts,
        totals,
        student=HFEngine(student),
        teacher=HFEngine(teacher),
        by_student=by,
        temperature=0.0,
    )
    writers = set()
    for b in range(3):
        for t in range(prompts[b], totals[b]):
            net = student if by[b, t] else teacher
            writers.add(bool(by[b, t]))
            with torch.no_grad():
                assert int(out[b, t]) == int(net(out[b : b + 1, :t]).logits[0, -1].argmax())
    assert writers == {True, False}


def test_the_number_of_passes_is_linear() -> None:
    student, teacher = markov(V, 2), markov(V, 2)
    n = 24
    write(
        torch.zeros(2, n).long(),
        [4, 2],
        [n, n],
        student=student,
        teacher=teacher,
        by_student=torch.tensor([[True], [False]]).expand(2, n),
    )
    for engine in (student, teacher):
        assert engine.calls[0] == (2, 4)  # one pass over the prompts
        assert engine.calls[1:] == [(2, 1)] * 21  # one token each afterwards: 22 are written


def test_answers_end_at_a_stop_token() -> None:
    table = torch.full((V, V), -30.0)
    table[:, 1] = 0.0  # 1 follows everything
    table[1] = torch.tensor([-30.0, -30.0, 0.0, -30.0, -30.0, -30.0])  # but 2 follows 1
    engine = markov(V, 1)
    engine.table = table
    text = torch.zeros(2, 40).long()
    out, lengths = write(text, [1, 3], [40, 40], student=engine, stop_ids=[2])
    assert lengths.tolist() == [3, 5]
    assert out[0, :3].tolist() == [0, 1, 2] and out[1, :5].tolist() == [0, 0, 0, 1, 2]
    assert len(engine.calls) <= 17  # it looks every 16 tokens, and 36 more would have been possible


def batch(lengths: list[int], first: list[int], width: int = 10) -> TokenBatch:
    generator = torch.Generator().manual_seed(5)
    column = torch.arange(width)
    used = column < torch.tensor(lengths)[:, None]
    return TokenBatch(
        ids=torch.randint(V, (len(lengths), width), generator=generator),
        loss_mask=(used & (column >= torch.tensor(first)[:, None])).to(torch.int8),
        document=torch.where(used, 0, -1).to(torch.int32),
        sample_id=torch.arange(len(lengths)) + 40,
    )


def redo(given: TokenBatch, source: str, **changes: Any) -> TokenBatch:
    arguments: dict[str, Any] = {
        "student": STUDENT,
        "teacher": TEACHER,
        "share": 0.5,
        "prompt_length": 3,
        "temperature": 1.0,
        "seed": 0,
        "stop_ids": [],
    } | changes
    return rewrite(given, source, **arguments)


def test_only_answers_are_rewritten_and_labelled() -> None:
    given = batch([10, 8, 10, 10], [4, 6, 1, 9])
    out = redo(given, "student")
    assert torch.equal(out.ids[0, :4], given.ids[0, :4]) and not torch.equal(out.ids[0, 4:], given.ids[0, 4:])
    assert torch.equal(out.ids[1, :6], given.ids[1, :6]) and torch.equal(out.ids[1, 8:], given.ids[1, 8:])
    assert out.loss_mask[1].tolist() == given.loss_mask[1].tolist()
    # labels from the first token on: no marked answer, so the first 3 tokens are the prompt
    assert torch.equal(out.ids[2, :3], given.ids[2, :3]) and out.loss_mask[2].tolist() == [0] * 3 + [1] * 7
    assert out.loss_mask[3].tolist() == [0] * 9 + [1]


def test_rows_without_answers_stay_as_they_are() -> None:
    given = batch([10, 10, 1], [4, 10, 1])
    out = redo(given, "student")
    assert torch.equal(out.ids[1:], given.ids[1:]) and torch.equal(out.loss_mask[1:], given.loss_mask[1:])
    padding = batch([0, 0], [10, 10])
    assert redo(padding, "student") is padding


def test_mixed_requests_keep_the_teachers_text_in_its_rows() -> None:
    given = batch([10] * 30, [4] * 30)
    out = redo(given, "mix_request", teacher=None)
    kept = (out.ids == given.ids).all(1)
    by = written_by_student("mix_request", given.sample_id, 10, seed=0)[:, 0]
    assert torch.equal(kept, ~by) and 5 < int(by.sum()) < 25


def test_labels_end_with_the_answer() -> None:
    given = batch([10] * 40, [2] * 40)
    out = redo(given, "student", stop_ids=[4])
    for b in range(40):
        answer = out.ids[b, 2:].tolist()
        n = answer.index(4) + 1 if 4 in answer[: int(out.loss_mask[b].sum())] else 8
        assert out.loss_mask[b].tolist() == [0, 0] + [1] * n + [0] * (8 - n)
    assert len({int(n) for n in out.loss_mask.sum(1)}) > 3


def test_packed_documents_are_refused() -> None:
    given = batch([10], [4])
    given.separate = True
    with pytest.raises(InvalidValue, match="separate_documents to false"):
        redo(given, "student")
