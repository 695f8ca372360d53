"""Oracle traces of a masked diffusion model: what it predicted in every pass, and which of it was final already.

Source: Learn2PD (arXiv 2509.25188), section 3.1 and algorithm 1 (Extremely Greedy Parallel). The reference y of a
prompt is the model's own standard decode; each pass commits exactly the masked positions whose prediction equals y.
Where none does, the block is finished with y (the escape). A shard is a safetensors file of one chunk of prompts; the
work is divided among ranks by prompt, finished shards are kept, and the same command goes on behind them.
Shape letters: R records (passes of a row), W block (BL of the paper), B rows decoded together, L canvas.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.data.batches import PADDING, TraceBatch
from draftsmith.inference.canvas import CanvasDecoder, CanvasRequest
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.commit_filter import law_signals
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform

SETTINGS = "traces.json"
NO_TOKEN = -1  # `predicted` behind the end of a cut block


@dataclass(frozen=True)
class Traces:
    """R passes, ordered by prompt, run, block and step."""

    confidence: Tensor  # float16 [R, W]; of the argmax
    entropy: Tensor  # float16 [R, W]; over log V
    margin: Tensor  # float16 [R, W]; confidence minus the second largest probability
    predicted: Tensor  # int32 [R, W]; committed positions: their token
    masked: Tensor  # uint8 [R, W]; before the pass
    label: Tensor  # uint8 [R, W]; the prediction equals y
    prompt: Tensor  # int64 [R]; the request's number
    block: Tensor  # int32 [R]
    step: Tensor  # int32 [R]; passes in this block before this one
    run: Tensor  # int32 [R]; 0: the oracle; others explore (see `trace`)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def block_length(self) -> int:
        return self.masked.shape[1]

    @property
    def passes(self) -> dict[int, int]:
        """Passes of the oracle for each prompt."""
        prompts, counts = np.unique(self.prompt[self.run == 0].numpy(), return_counts=True)
        return dict(zip(prompts.tolist(), counts.tolist(), strict=True))

    def arrays(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def joined(cls, parts: Sequence["Traces"]) -> "Traces":
        """All of them, ordered. Raises InvalidValue for none, and for blocks of several lengths."""
        if not parts:
            raise InvalidValue("no traces: run 'draftsmith trace learn2pd' first")
        if len({part.block_length for part in parts}) > 1:
            raise InvalidValue("traces of several block lengths lie together: give one directory for each")
        columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        order = np.lexsort([columns[name].numpy() for name in ("step", "block", "run", "prompt")])
        return cls(**{name: column[torch.from_numpy(order)] for name, column in columns.items()})


@torch.no_grad()
def trace(
    net: MaskedLM,
    requests: Sequence[CanvasRequest],
    references: Sequence[Sequence[int]],
    block_length: int,
    run: int = 0,
) -> tuple[Traces, list[list[int]]]:
    """(records of the oracle's passes, the tokens that it wrote into the holes) of one batch of requests.

    Args: references: y of each request, the tokens of its holes. run: 0 is the oracle; another number explores: of what
    is final only a random share is committed, another one in each pass, at least one. A filter is more careful than the
    oracle, so its passes see canvases that the oracle's never do.
    Raises InvalidValue for holes that are not the end of their canvas, InvalidState for a y that leaves holes.
    """
    mask_id, rows = net.config.mask_id, len(requests)
    begins = [_first_hole(request) for request in requests]
    first = torch.tensor(begins)
    lengths = torch.tensor([len(request.tokens) for request in requests])
    canvas = torch.full((rows, int(lengths.max())), mask_id)
    wanted = torch.full_like(canvas, mask_id)
    for row, (request, reference) in enumerate(zip(requests, references, strict=True)):
        if len(reference) != len(request.holes) or mask_id in reference or NO_TOKEN in reference:
            raise InvalidState(
                f"the standard decode left holes in request {request.row_id}: it must fill whole canvases (eot 'none')"
            )
        canvas[row, : begins[row]] = torch.tensor(request.tokens[: begins[row]])
        wanted[row, begins[row] : len(request.tokens)] = torch.tensor(reference)
    block, step = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    found: list[Traces] = []
    live, passes = torch.arange(rows), 0
    while len(live):
        start = first[live] + block[live] * block_length
        place = start.unsqueeze(1) + torch.arange(block_length)
        there = place < lengths[live].unsqueeze(1)
        place = place.clamp_max(canvas.shape[1] - 1)
        tokens, goal = canvas[live].gather(1, place), wanted[live].gather(1, place)
        masked = (tokens == mask_id) & there
        hidden = net(canvas[live].to(net.device), lengths[live].to(net.device))
        at = place.to(net.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = net.head(hidden.gather(1, at)).float()
        best = logits.softmax(-1).max(-1)
        entropy, margin = (x.cpu() for x in law_signals(logits))
        predicted = torch.where(masked, best.indices.cpu(), tokens)
        label = predicted == goal
        found.append(
            Traces(
                confidence=torch.where(there, best.values.cpu(), 1.0).half(),
                entropy=torch.where(there, entropy, 0.0).half(),
                margin=torch.where(there, margin, 1.0).half(),
                predicted=torch.where(there, predicted, NO_TOKEN).int(),
                masked=masked.byte(),
                label=(label | ~there).byte(),
                prompt=torch.tensor([requests[row].row_id for row in live.tolist()]),
                block=block[live].int(),
                step=step[live].int(),
                run=torch.full((len(live),), run, dtype=torch.int32),
            )
        )
        commit = masked & label
        if run:
            commit &= _explored(commit, best.values.cpu(), [requests[row].row_id for row in live.tolist()], passes, run)
            passes += 1
        commit = torch.where(commit.any(1, keepdim=True), commit, masked)  # the escape
        at_row, at_column = commit.nonzero(as_tuple=True)
        canvas[live[at_row], place[at_row, at_column]] = goal[at_row, at_column]
        done = ~(masked & ~commit).any(1)
        block[live], step[live] = block[live] + done.long(), torch.where(done, 0, step[live] + 1)
        live = live[first[live] + block[live] * block_length < lengths[live]]
    written = [canvas[row, begins[row] : len(request.tokens)].tolist() for row, request in enumerate(requests)]
    return Traces.joined(found), written


def _explored(final: Tensor, confidence: Tensor, row_ids: list[int], passes: int, run: int) -> Tensor:
    """bool [B, W]: a random share of what is final, and the most confident of it."""
    rows = torch.tensor(row_ids).unsqueeze(1)
    draw = uniform(run, rows, torch.arange(final.shape[1] + 1), int(Stream.DATA) + NUM_STREAMS * (passes + 1))
    surest = confidence.masked_fill(~final, -1.0).argmax(1, keepdim=True)
    return (draw[:, 1:] < draw[:, :1]) | torch.zeros_like(final).scatter_(1, surest, True)


def _first_hole(request: CanvasRequest) -> int:
    first, size = request.holes[0] if request.holes else -1, len(request.tokens)
    if first < 0 or list(request.holes) != list(range(first, size)):
        raise InvalidValue("decode traces want canvases whose holes are their end: prompt first, then the answer")
    return first


def whole_answers(decoder: CanvasDecoder, requests: Sequence[CanvasRequest]) -> list[list[int]]:
    """What a decoder writes into all holes of each request, those behind an end of text too."""
    canvases = [dict.fromkeys(request.holes, NO_TOKEN) for request in requests]
    for commit in decoder.stream(requests):
        canvases[commit.row].update(zip(commit.positions, commit.tokens, strict=True))
    return [list(canvas.values()) for canvas in canvases]


@dataclass
class Tally:
    """What became of a rank's prompts."""

    prompts: int = 0
    before: int = 0  # traced by an earlier run
    records: int = 0
    passes: float = 0.0  # of the oracle, per prompt traced now

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts of {self.records} records, {self.passes:.2f} oracle passes each, "
            f"{self.before} there before"
        )


def write_traces(
    net: MaskedLM,
    requests: Sequence[CanvasRequest],
    out: Path,
    answers: Callable[[Sequence[CanvasRequest]], Sequence[Sequence[int]]],
    *,
    block_length: int,
    batch: int,
    explored: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Tally]:
    """Trace this rank's prompts that are still missing, a shard per `batch` of them; the running tally after each.

    answers: y of requests, all their holes filled by the standard decode (one token a pass); see `whole_answers`.
    explored: further runs over every prompt that explore (see `trace`).
    """
    out.mkdir(parents=True, exist_ok=True)
    mine = [requests[i] for i in range(rank, len(requests), ranks)]
    tally = Tally()
    for number, start in enumerate(range(0, len(mine), batch)):
        path = out / f"traces-{rank:05d}-of-{ranks:05d}-{number:05d}.safetensors"
        asked = mine[start : start + batch]
        if path.exists():
            tally.before += len(asked)
            continue
        references = answers(asked)
        traces = Traces.joined([trace(net, asked, references, block_length, run)[0] for run in range(explored + 1)])
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(traces.arrays(), temporary, metadata={"prompts": str(len(asked))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        oracle = sum(traces.passes.values())
        tally.passes = (tally.passes * tally.prompts + oracle) / (tally.prompts + len(asked))
        tally.prompts += len(asked)
        tally.records += len(traces)
        yield tally
    if not tally.prompts:
        yield tally


def read_traces(directory: Path) -> tuple[Traces, dict[str, Any]]:
    """(all records, what they were made with). Raises InvalidValue when the directory has none, or damaged ones."""
    paths = sorted(directory.glob("traces-*.safetensors"))
    if not paths:
        raise InvalidValue(f"no decode traces in {directory}: make them with 'draftsmith trace learn2pd'")
    parts = []
    for path in paths:
        try:
            columns = load_file(path)
            if "step" in columns:  # shards from before there were exploring runs are the oracle's
                columns.setdefault("run", torch.zeros_like(columns["step"]))
            parts.append(Traces(**columns))
        except (SafetensorError, OSError, TypeError) as error:
            raise InvalidValue(f"{path} is no shard of decode traces ({error}): remove it, and trace again") from None
    try:
        settings: dict[str, Any] = json.loads((directory / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue(f"{directory} lacks {SETTINGS}, which says what was traced ({error}): trace again") from None
    return Traces.joined(parts), settings


class TraceSamples:
    """The records of one side of the split by prompt, as loaders read them."""

    def __init__(
        self, traces: Traces, *, validation: bool, val_fraction: float, seed: int, fingerprint: str = ""
    ) -> None:
        """Raises InvalidValue when no prompt falls on this side, and when all labels of masked positions are equal."""
        inside = uniform(seed, traces.prompt.long(), 0, int(Stream.DATA)) < val_fraction
        self.rows: NDArray[np.int64] = (inside if validation else ~inside).nonzero().squeeze(1).numpy()
        self.traces = traces
        side = "validation" if validation else "training"
        self.fingerprint = f"{fingerprint}/{side}/{val_fraction}/{seed}"
        if not len(self.rows):
            raise InvalidValue(f"no prompt of the traces is for {side}: trace more prompts, or change val_fraction")
        labels = traces.label[self.rows][traces.masked[self.rows].bool()]
        if not len(labels) or bool((labels == labels[0]).all()):
            raise InvalidValue(f"all labels equal in the {side} traces: raise G or add prompts")
        same = torch.ones(len(traces) - 1, dtype=torch.bool)
        for column in (traces.prompt, traces.run, traces.block):
            same &= column[1:] == column[:-1]
        self.follows = torch.cat((torch.zeros(1, dtype=torch.bool), same))  # row r - 1 is the pass before row r

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int]) -> TraceBatch:
        """The batch of these records; an index PADDING gives a row with nothing masked."""
        index = torch.tensor(list(indices))
        real = index != PADDING
        now = torch.from_numpy(self.rows)[index.clamp_min(0)]
        before = (now - 1).clamp_min(0)
        t = self.traces
        return TraceBatch(
            confidence=t.confidence[now].view(torch.int16),
            entropy=t.entropy[now].view(torch.int16),
            margin=t.margin[now].view(torch.int16),
            predicted=t.predicted[now],
            masked=t.masked[now] * real.unsqueeze(1),
            label=t.label[now],
            before_confidence=t.confidence[before].view(torch.int16),
            before_predicted=t.predicted[before],
            before_masked=t.masked[before],
            follows=(self.follows[now] & real).byte(),
            sample_id=index,
        )
