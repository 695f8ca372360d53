"""Decode traces: the oracle's passes by hand, guarantee 3 on every trace, shards that resume, the split by prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.data import segments
from draftsmith.data.batches import PADDING
from draftsmith.data.decode_traces import (
    SETTINGS,
    Traces,
    TraceSamples,
    read_traces,
    trace,
    whole_answers,
    write_traces,
)
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commit_rules import Oracle
from draftsmith.inference.decoders.parallel_diffusion import ParallelDiffusionDecoder, ParallelDiffusionSettings
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.masked_lm import MaskedLM, MaskedLMConfig

W, MASK = 4, segments.MASK


@pytest.fixture(scope="module")
def net() -> MaskedLM:
    torch.manual_seed(0)
    config = MaskedLMConfig(segments.VOCAB, 16, 1, 2, 32, 40, mask_id=MASK, eos_id=segments.EOT)
    made = MaskedLM(config).eval().requires_grad_(False)
    made.lm_head.weight.mul_(3)  # surer of itself, as a trained one
    return made


def requests(count: int, answer: int = 10) -> list[CanvasRequest]:
    """Prompts of several lengths; the last block of an answer of 10 is cut."""
    made = []
    for i, request in enumerate(segments.requests(count)):
        prompt = [*request.tokens[:4]][i % 3 :]
        made.append(CanvasRequest([*prompt, *[MASK] * answer], range(len(prompt), len(prompt) + answer), row_id=i))
    return made


@torch.no_grad()
def one_by_one(net: MaskedLM, request: CanvasRequest) -> list[int]:
    """The standard decode, as plainly as it can be written."""
    canvas = torch.tensor([list(request.tokens)])
    first = request.holes[0]
    for start in range(first, canvas.shape[1], W):
        end = min(start + W, canvas.shape[1])
        while bool((canvas[0, start:end] == MASK).any()):
            best = net.head(net(canvas))[0, start:end].softmax(-1).max(-1)
            at = int(torch.where(canvas[0, start:end] == MASK, best.values, -1.0).argmax())
            canvas[0, start + at] = best.indices[at]
    return canvas[0, first:].tolist()


def answers(net: MaskedLM, calls: list[int] | None = None) -> Callable[[Sequence[CanvasRequest]], list[list[int]]]:
    def decode(asked: Sequence[CanvasRequest]) -> list[list[int]]:
        if calls is not None:
            calls.append(len(asked))
        return [one_by_one(net, r) for r in asked]

    return decode


def test_guarantee_3_the_oracle_writes_the_reference_in_no_more_passes(net: MaskedLM) -> None:
    asked = requests(12)
    references = [one_by_one(net, r) for r in asked]
    traces, written = trace(net, asked, references, W)
    assert written == references
    assert sorted(traces.passes) == list(range(12))
    assert all(3 <= n <= 10 for n in traces.passes.values()) and min(traces.passes.values()) < 10
    for row in range(len(traces)):
        masked, label = traces.masked[row].bool(), traces.label[row].bool()
        assert masked.any() and label[~masked].all()  # what is committed is final, here it is y
        after = row + 1
        if after < len(traces) and bool(
            (traces.prompt[after] == traces.prompt[row]) & (traces.block[after] == traces.block[row])
        ):
            assert torch.equal(traces.masked[after].bool(), masked & ~label)
            assert int(traces.step[after]) == int(traces.step[row]) + 1
        else:  # the block is done: all was final, or nothing was and it was written
            assert label.all() or not (masked & label).any()


def test_exploring_runs_write_the_same_text_in_more_passes(net: MaskedLM) -> None:
    asked = requests(12)
    references = [one_by_one(net, r) for r in asked]
    oracle, _ = trace(net, asked, references, W)
    wandering, written = trace(net, asked, references, W, run=1)
    assert written == references and len(wandering) > len(oracle)
    both = Traces.joined([oracle, wandering])
    assert both.passes == oracle.passes
    samples = TraceSamples(both, validation=False, val_fraction=0.3, seed=0)
    batch = samples.fetch(range(len(samples)))
    rows = torch.from_numpy(samples.rows)
    assert torch.equal(batch.follows.bool(), both.step[rows] > 0)  # runs are never mixed
    for name in ("masked", "label"):
        assert torch.equal(getattr(batch, name), getattr(both, name)[rows])


def test_records_do_not_depend_on_the_batch(net: MaskedLM) -> None:
    asked = requests(4)
    references = [one_by_one(net, r) for r in asked]
    together = trace(net, asked, references, W)[0]
    alone = Traces.joined([trace(net, [r], [y], W)[0] for r, y in zip(asked, references, strict=True)])
    for name, column in together.arrays().items():
        other = alone.arrays()[name]
        assert torch.equal(column, other) or torch.allclose(column.float(), other.float(), atol=1e-3), name


def test_the_tail_of_a_cut_block_counts_as_committed(net: MaskedLM) -> None:
    request = requests(1)[0]
    traces, _ = trace(net, [request], [one_by_one(net, request)], W)
    last = traces.block == 2  # 10 = 4 + 4 + 2
    assert not traces.masked[last][:, 2:].any() and (traces.predicted[last][:, 2:] == -1).all()
    assert (traces.confidence[last][:, 2:] == 1).all()


def written(net: MaskedLM, out: Path, asked: list[CanvasRequest], calls: list[int], **shares: int) -> str:
    tallies = list(write_traces(net, asked, out, answers(net, calls), block_length=W, batch=3, **shares))
    (out / SETTINGS).write_text('{"block_length": 4}')
    return str(tallies[-1])


def test_shards_resume_and_ranks_share_the_work(net: MaskedLM, tmp_path: Path) -> None:
    asked, calls = requests(8), list[int]()
    written(net, tmp_path / "one", asked, calls)
    assert calls == [3, 3, 2]
    paths = sorted((tmp_path / "one").glob("*.safetensors"))
    assert load_file(paths[0])["confidence"].dtype == torch.float16
    paths[1].unlink()
    said = written(net, tmp_path / "one", asked, calls)
    assert calls[3:] == [3] and "3 prompts" in said and "5 there before" in said
    for rank in (0, 1):
        written(net, tmp_path / "two", asked, [], rank=rank, ranks=2)
    one, two = (read_traces(tmp_path / name)[0] for name in ("one", "two"))
    assert torch.equal(one.prompt, two.prompt) and torch.equal(one.label, two.label)


def test_a_standard_decode_that_leaves_holes_is_noticed(net: MaskedLM, tmp_path: Path) -> None:
    for wrong in ([MASK] * 10, [1] * 9):
        with pytest.raises(InvalidState, match="left holes in request 0"):
            list(write_traces(net, requests(1), tmp_path, lambda asked, y=wrong: [y], block_length=W, batch=1))
    assert not list(tmp_path.glob("traces-*"))


def test_the_block_samplers_standard_decode_is_the_reference(net: MaskedLM) -> None:
    asked = requests(6, answer=8)
    settings = ParallelDiffusionSettings(block_length=W, rule="low_confidence", eot="none")
    assert whole_answers(ParallelDiffusionDecoder(net, settings), asked) == [one_by_one(net, r) for r in asked]


def test_the_block_sampler_with_the_oracle_needs_the_traces_passes(net: MaskedLM) -> None:
    asked = requests(12, answer=8)
    references = [one_by_one(net, r) for r in asked]
    traces, _ = trace(net, asked, references, W)
    canvases = [[*r.tokens[: r.holes[0]], *y] for r, y in zip(asked, references, strict=True)]
    settings = ParallelDiffusionSettings(block_length=W, eot="none")
    result = ParallelDiffusionDecoder(net, settings, rule=Oracle(canvases)).decode(asked)
    same = [row for row in range(12) if not _escaped(traces, row)]
    assert same  # without the escape, which finishes a block at once, both are the same passes
    for row in same:
        assert result.notes["passes"][row] == traces.passes[row]


def _escaped(traces: Traces, prompt: int) -> bool:
    mine = traces.prompt == prompt
    return bool((~(traces.masked.bool() & traces.label.bool()).any(1) & mine).any())


def test_the_split_is_by_prompt_and_batches_know_the_pass_before(net: MaskedLM) -> None:
    asked = requests(30)
    traces, _ = trace(net, asked, [one_by_one(net, r) for r in asked], W)
    train, val = (TraceSamples(traces, validation=v, val_fraction=0.3, seed=0) for v in (False, True))
    assert not set(traces.prompt[train.rows].tolist()) & set(traces.prompt[val.rows].tolist())
    assert len(train) + len(val) == len(traces)
    batch = train.fetch([*range(len(train)), PADDING])
    rows = torch.from_numpy(train.rows)
    steps = traces.step[rows]
    assert torch.equal(batch.follows[:-1].bool(), steps > 0) and int(batch.masked[-1].sum()) == 0
    follows = rows[steps > 0]
    assert torch.equal(batch.before_predicted[:-1][steps > 0], traces.predicted[follows - 1])
    assert torch.equal(batch.halves(batch.confidence)[:-1], traces.confidence[rows].float())


def test_bad_traces(net: MaskedLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no decode traces"):
        read_traces(tmp_path)
    (tmp_path / "traces-00000-of-00001-00000.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidValue, match="no shard of decode traces"):
        read_traces(tmp_path)
    asked = requests(6)
    traces, _ = trace(net, asked, [one_by_one(net, r) for r in asked], W)
    traces.label.fill_(1)
    with pytest.raises(InvalidValue, match=r"all labels equal.*raise G or add prompts"):
        TraceSamples(traces, validation=False, val_fraction=0.3, seed=0)
    with pytest.raises(InvalidValue, match="no prompt of the traces is for validation"):
        TraceSamples(traces, validation=True, val_fraction=1e-9, seed=0)
    middle = CanvasRequest([1, MASK, 2], [1])
    with pytest.raises(InvalidValue, match="prompt first, then the answer"):
        trace(net, [middle], [[3]], W)
