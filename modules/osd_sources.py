"""Who writes the text that a draft is distilled on: teacher, student, or a mixture of the two.

Source: "Online Speculative Decoding" (arXiv 2310.07177), offline distillation ("sample source"). Both networks keep
their caches, so an answer of n tokens costs n single-token passes of whoever writes in it. Randomness is the counter's:
a row's answer depends on (seed, row id, its prompt), not on its batch-mates.
Shape letters: B rows, T tokens of the longest row, V vocabulary, D width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.cache import StaticCache
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.rng import NUM_STREAMS, Stream, sample_categorical, uniform

SOURCES = ("teacher", "student", "mix_request", "mix_token")
_CHECK_EVERY = 16  # tokens between two looks at whether every row has stopped (each costs one synchronisation)
_COIN = Stream.DATA + NUM_STREAMS  # who writes; apart from what is written


def written_by_student(source: str, row_ids: Tensor, length: int, *, seed: int, share: float = 0.5) -> Tensor:
    """bool [B, T]: which tokens the student writes (were they answer tokens).

    "teacher": none; "student": all; "mix_request": all of a row or none, "mix_token": each, with probability `share`.
    """
    rows = row_ids.unsqueeze(1)
    if source in ("teacher", "student"):
        return torch.full((len(row_ids), length), source == "student", device=row_ids.device)
    position = torch.arange(length, device=row_ids.device) if source == "mix_token" else torch.tensor([-1])
    coin = uniform(seed, rows, position.to(row_ids.device), _COIN, device=row_ids.device) < share
    return coin.expand(len(row_ids), length)


def rewrite(
    batch: TokenBatch,
    source: str,
    *,
    student: Engine,
    teacher: Engine | None,  # needed for mix_token
    share: float,
    prompt_length: int,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int],
) -> TokenBatch:
    """The batch with its answers written anew. Texts of the teacher are the data itself, generated beforehand.

    An answer begins at a row's first label (text without a marked answer: after `prompt_length` tokens) and ends at the
    row's end or an end-of-sequence token. Raises InvalidValue for rows that hold several documents.
    """
    if batch.separate:
        raise InvalidValue(f"source {source!r} writes one answer a row: set data.text.separate_documents to false")
    ids, mask = batch.ids.clone(), batch.loss_mask.clone()
    by_student = written_by_student(source, batch.sample_id, ids.shape[1], seed=seed, share=share)
    used = (batch.document >= 0).sum(1).tolist()
    first = mask.argmax(1).tolist()
    wanted = (mask.any(1) & (by_student.any(1) | (source == "mix_token"))).tolist()
    prompts = [f if f > 1 else min(prompt_length, n - 1) for f, n in zip(first, used, strict=True)]
    rows = [b for b, wants in enumerate(wanted) if wants and 1 <= prompts[b] < used[b]]
    if not rows:
        return batch
    index = torch.tensor(rows, device=ids.device)
    text, lengths = write_answers(
        ids[index],
        [prompts[b] for b in rows],
        [used[b] for b in rows],
        student=student,
        teacher=teacher,
        by_student=by_student[index],
        temperature=temperature,
        seed=seed,
        row_ids=batch.sample_id[index],
        stop_ids=stop_ids,
    )
    column = torch.arange(ids.shape[1], device=ids.device)
    begin = torch.tensor([prompts[b] for b in rows], device=ids.device).unsqueeze(1)
    ids[index] = text
    mask[index] = ((column >= begin) & (column < lengths.unsqueeze(1))).to(mask.dtype)
    return dataclasses.replace(batch, ids=ids, loss_mask=mask)


@dataclass
class _Writer:
    engine: Engine
    cache: StaticCache
    hidden: Tensor  # [B, D]: predicts each row's next token


@torch.no_grad()
def write_answers(
    text: Tensor,  # int64 [B, T], prompts; what stands behind them is overwritten
    prompts: Sequence[int],  # tokens of each prompt, at least 1
    totals: Sequence[int],  # tokens of each row with its answer, at most T
    *,
    student: Engine,
    teacher: Engine | None,  # needed where by_student has a False
    by_student: Tensor,  # bool [B, T]
    temperature: float,  # 0: greedy
    seed: int,
    row_ids: Tensor,  # int64 [B]
    stop_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Write the answers behind the prompts. Returns (text int64 [B, T], lengths int64 [B]).

    Every row has something to write (prompt < total) and ends with its first stop id, which is kept, or at its total.
    With both engines at work the vocabularies are cut to the smaller one.
    """
    assert all(m < n for m, n in zip(prompts, totals, strict=True))
    text = text.clone()
    device = text.device
    longest = max(totals)
    everyone = bool(by_student[:, :longest].all())
    writers = [_start(student, text, prompts, longest)]
    if not everyone:
        assert teacher is not None
        writers.append(_start(teacher, text, prompts, longest))
    size = min(writer.engine.spec.vocab_size for writer in writers)
    rows = torch.arange(len(prompts), device=device)
    first, last = torch.tensor(prompts, device=device), torch.tensor(totals, device=device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    lengths = last.clone()
    for step in range(max(n - m for m, n in zip(prompts, totals, strict=True))):
        at = (first + step).clamp_max(text.shape[1] - 1)
        logits = [writer.engine.head(writer.hidden)[:, :size].to(device).float() for writer in writers]
        chosen = logits[0]
        if not everyone:
            chosen = torch.where(by_student[rows, at].unsqueeze(1), logits[0], logits[1])
        token = _sample(chosen, temperature, uniform(seed, row_ids, first + step, Stream.SAMPLE, device=device))
        alive = ~stopped & (first + step < last)
        text[rows, at] = torch.where(alive, token, text[rows, at])
        ends = alive & torch.isin(token, stops)
        lengths = torch.where(ends, first + step + 1, lengths)
        stopped |= ends
        if step % _CHECK_EVERY == _CHECK_EVERY - 1 and bool((stopped | (first + step + 1 >= last)).all()):
            break
        _advance(writers, token, [step + 1 < n - m for m, n in zip(prompts, totals, strict=True)])
    return text, lengths


def _start(engine: Engine, text: Tensor, prompts: Sequence[int], capacity: int) -> _Writer:
    """Feed the prompts in one pass, padded on the right; what stands behind a prompt is rolled back."""
    cache = engine.new_cache(len(prompts), capacity)
    hidden, _ = engine.forward(text[:, : max(prompts)].to(engine.device), cache=cache)
    cache.truncate(list(prompts))
    rows = torch.arange(len(prompts), device=hidden.device)
    return _Writer(engine, cache, hidden[rows, torch.tensor(prompts, device=hidden.device) - 1])


def _advance(writers: Sequence[_Writer], token: Tensor, going_on: Sequence[bool]) -> None:
    """Feed one token to every row; rows that are complete take none, so that none outgrows the cache."""
    if not any(going_on):
        return
    for writer in writers:
        before = writer.cache.lengths
        hidden, _ = writer.engine.forward(token.unsqueeze(1).to(writer.engine.device), cache=writer.cache)
        writer.hidden = hidden[:, 0]
        writer.cache.truncate([n + int(go) for n, go in zip(before, going_on, strict=True)])


def _sample(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """int64 [B] from logits [B, V]: argmax at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_categorical((logits / temperature).softmax(-1), u)
