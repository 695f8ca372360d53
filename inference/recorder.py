"""The recorder: keeps the target laws that a verification computed anyway, so that a draft can learn from serving.

Source: "Online Speculative Decoding" (arXiv 2310.07177), the online algorithm. The paper keeps the first rejection of a
round ("wrong"); "all" also keeps the accepted positions and the bonus one, which cost nothing more to collect.
A law is reduced on the device to its top K and one tail mass; the copy to the host is queued, never waited for.

Alignment (a law at index j PREDICTS the token at index j), for a row with L committed tokens and g = 3, k = 1:

    index        L-1     L      L+1    L+2    L+3
    token        last    x_1    x_2    x_3
    fed          yes     yes    yes    yes
    logits row           0      1      2      3      row i is the law of index L + i
                         ok     wrong                "wrong" keeps (L+1, row 1); "all" keeps rows 0 and 1

Rows behind k + 1 are conditioned on rejected tokens and are never kept.
Shape letters: B rows of a round, g draft length, M kept positions, K stored tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.requests import DecodeResult, RoundView, TokenRequest

POSITIONS = ("wrong", "all")
LAWS = ("raw", "served")


@dataclass(frozen=True)
class RecorderSettings:
    """What is kept of a round."""

    positions: str = "all"  # "wrong": the paper's corrected positions; "all": every position that the target scored
    top_k: int = 64  # explicit tokens of a law; 12 bytes each on the host
    law: str = "raw"  # "raw": softmax(logits / temperature); "served": the law after every processor
    temperature: float = 1.0  # of the raw law, and the one at which the student will be read
    max_positions: int = 1 << 16  # kept and not yet taken; further positions are dropped and counted

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise unknown_choice("positions", self.positions, POSITIONS)
        if self.law not in LAWS:
            raise unknown_choice("law", self.law, LAWS)
        if self.top_k < 1 or self.max_positions < 1:
            raise InvalidValue(f"top_k and max_positions must be at least 1, got {self.top_k} and {self.max_positions}")
        if self.temperature <= 0:
            raise InvalidValue(
                f"a recorded law needs temperature > 0, got {self.temperature}: serve greedily, but record at 1.0"
            )


@dataclass
class _Chunk:
    """The kept positions of one round, on the host (complete once `ready` has passed)."""

    rows: list[int]
    index: list[int]
    law: TeacherLaw
    ready: "torch.cuda.Event | None"


class LawRecorder:
    """A `requests.Recorder`: call it with each RoundView, then take the records of the finished requests.

    One recorder serves one decode call at a time (rows are numbered within the call).
    """

    def __init__(self, settings: RecorderSettings) -> None:
        self.settings = settings
        self.dropped = 0  # positions lost to a full queue
        self._chunks: list[_Chunk] = []
        self._held = 0

    def __call__(self, view: RoundView) -> None:
        """Keep this round's positions. Makes no host synchronisation on CUDA.

        Raises InvalidState when the served law was asked for and there is none (greedy decoding).
        """
        rows, index, flat = self._select(view)
        room = self.settings.max_positions - self._held
        if len(flat) > room:
            self.dropped += len(flat) - room
            rows, index, flat = rows[:room], index[:room], flat[:room]
        if not flat:
            return
        law = self._law(view, flat)
        self._chunks.append(_Chunk(rows, index, *_to_host(law)))
        self._held += len(flat)

    def _select(self, view: RoundView) -> tuple[list[int], list[int], list[int]]:
        """Rows, sequence indices and rows of the flattened [B * (g+1), V] logits of the positions to keep."""
        rows, index, flat = [], [], []
        width = view.target_logits.shape[1]
        everything = self.settings.positions == "all"
        for b, (row, n, k) in enumerate(zip(view.rows, view.num_drafted, view.accepted, strict=True)):
            first = 0 if everything else k
            # the bonus position (k == n) was not wrong: nothing had been proposed there
            last = k if everything or k < n else k - 1
            length = len(view.context[b])
            for i in range(first, last + 1):
                rows.append(row)
                index.append(length + i)
                flat.append(b * width + i)
        return rows, index, flat

    def _law(self, view: RoundView, flat: Sequence[int]) -> TeacherLaw:
        served = self.settings.law == "served"
        source = view.target_law if served else view.target_logits
        if source is None:
            raise InvalidState("greedy decoding has no served law to record: set the recorder's law to 'raw'")
        host = torch.tensor(flat, dtype=torch.int64, pin_memory=source.device.type == "cuda")
        picked = source.flatten(0, 1).index_select(0, host.to(source.device, non_blocking=True))
        make = TeacherLaw.from_probs if served else TeacherLaw.from_logits
        return make(picked, self.settings.top_k, self.settings.temperature)

    def finish(
        self,
        row: int,
        request: TokenRequest,
        output: Sequence[int],
        *,
        number: int = 0,
        alpha: float = float("nan"),
        num_examined: int = 0,
        draft_version: int = 0,
    ) -> Record:
        """Take what was kept of one finished row and close it into a Record (possibly without positions).

        Args: output: the row's new tokens, cut at its stop; positions behind the cut are left out.
        """
        self._merge()
        ids = torch.tensor([*request.prompt, *output], dtype=torch.int64)
        taken: list[int] = []
        positions: list[int] = []
        law = TeacherLaw(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0))
        if self._chunks:
            chunk = self._chunks[0]
            here = {j: m for m, (r, j) in enumerate(zip(chunk.rows, chunk.index, strict=True)) if r == row}
            positions = sorted(j for j in here if j < len(ids))
            taken = [here[j] for j in positions]
            law = chunk.law[torch.tensor(taken, dtype=torch.int64)]
            rest = [m for m, r in enumerate(chunk.rows) if r != row]
            self._held = len(rest)
            kept = chunk.law[torch.tensor(rest, dtype=torch.int64)]
            others = _Chunk([chunk.rows[m] for m in rest], [chunk.index[m] for m in rest], kept, None)
            self._chunks = [others] if rest else []
        return Record(
            ids=ids,
            positions=torch.tensor(positions, dtype=torch.int64),
            law=law,
            tag=request.tag,
            request=number,
            alpha=alpha,
            examined=num_examined,
            draft_version=draft_version,
        )

    def finish_all(
        self,
        requests: Sequence[TokenRequest],
        result: DecodeResult,
        *,
        numbers: Sequence[int] | None = None,
        draft_version: int = 0,
    ) -> list[Record]:
        """One Record per request of a finished `decode` call, with the acceptance that its rounds measured."""
        rounds = result.rounds
        betas, counts = [0.0] * len(requests), [0] * len(requests)
        for row, beta, n in zip(rounds.row, rounds.beta_sum, rounds.examined, strict=True):
            betas[row] += beta
            counts[row] += n
        return [
            self.finish(
                row,
                request,
                result.output[row],
                number=row if numbers is None else numbers[row],
                alpha=betas[row] / counts[row] if counts[row] else float("nan"),
                num_examined=counts[row],
                draft_version=draft_version,
            )
            for row, request in enumerate(requests)
        ]

    def clear(self) -> None:
        """Forget what was kept (a decode call that was given up)."""
        self._chunks, self._held = [], 0

    def _merge(self) -> None:
        """Wait for the queued copies and make one chunk of them."""
        for chunk in self._chunks:
            if chunk.ready is not None:
                chunk.ready.synchronize()
        if len(self._chunks) > 1:
            self._chunks = [
                _Chunk(
                    [r for chunk in self._chunks for r in chunk.rows],
                    [j for chunk in self._chunks for j in chunk.index],
                    TeacherLaw.cat([chunk.law for chunk in self._chunks]),
                    None,
                )
            ]


def _to_host(law: TeacherLaw) -> "tuple[TeacherLaw, torch.cuda.Event | None]":
    """Start the copy to pinned host memory; the event says when it is complete (None: it already is)."""
    if law.ids.device.type != "cuda":
        return law.to("cpu"), None
    copies: list[Tensor] = []
    for source in (law.ids, law.logprobs, law.tail_logmass):
        copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        copies.append(copy.copy_(source, non_blocking=True))
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    ready.record()
    return TeacherLaw(copies[0], copies[1], copies[2], law.temperature, law.processed), ready
