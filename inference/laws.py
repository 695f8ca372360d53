"""Laws of a teacher at single positions: the one form for recorder, buffer, traces and losses (contract 3).

Shape letters: N positions, K stored categories, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class TeacherLaw:
    """A target law p at N positions: K explicit tokens and ONE more category that holds all the rest.

    The student's mass on the tail is 1 minus its mass on `ids`. A full law has K = V and tail_logmass = -inf; tokens
    that top-k or top-p removed also have no tail (tail_logmass = -inf): the law says that they never occur.
    """

    ids: Tensor  # int64 [N, K]
    logprobs: Tensor  # float32 [N, K]
    tail_logmass: Tensor  # float32 [N], -inf when nothing is left
    temperature: float = 1.0  # at which the law was taken; the student is read at the same one
    processed: bool = False  # True: after top-k/top-p/penalties; False: the plain softmax at `temperature`

    def __post_init__(self) -> None:
        n = self.ids.shape[0]
        if self.ids.ndim != 2 or self.logprobs.shape != self.ids.shape or self.tail_logmass.shape != (n,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (self.ids, self.logprobs, self.tail_logmass))
            raise InvalidValue(f"TeacherLaw wants ids [N,K], logprobs [N,K], tail_logmass [N]; got {shapes}")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: Tensor | slice) -> "TeacherLaw":
        return replace(self, ids=self.ids[index], logprobs=self.logprobs[index], tail_logmass=self.tail_logmass[index])

    def to(self, device: torch.device | str) -> "TeacherLaw":
        return replace(
            self, ids=self.ids.to(device), logprobs=self.logprobs.to(device), tail_logmass=self.tail_logmass.to(device)
        )

    @staticmethod
    def from_logits(logits: Tensor, top_k: int, temperature: float = 1.0) -> "TeacherLaw":
        """The K most likely tokens of softmax(logits / temperature) and the mass of the rest. logits: [N, V].

        temperature > 0 (InvalidValue otherwise). The tail is summed from the tail itself (not as 1 - head), so that it
        keeps its digits when it is small.
        """
        if temperature <= 0:
            raise InvalidValue(f"a law to learn from needs temperature > 0, got {temperature}; greedy gives labels")
        logp = torch.log_softmax(logits.float() / temperature, -1)
        k = min(top_k, logp.shape[-1])
        top, ids = logp.topk(k, -1)
        tail = logp.scatter(-1, ids, float("-inf")).logsumexp(-1)
        return TeacherLaw(ids, top, tail, temperature, processed=False)

    @staticmethod
    def from_probs(probs: Tensor, top_k: int, temperature: float = 1.0) -> "TeacherLaw":
        """As `from_logits`, from a law after processors: zeros stay impossible (logprob -inf). probs: [N, V]."""
        k = min(top_k, probs.shape[-1])
        top, ids = probs.float().topk(k, -1)
        tail = probs.float().scatter(-1, ids, 0.0).sum(-1)
        return TeacherLaw(ids, top.log(), tail.log(), temperature, processed=True)

    @staticmethod
    def cat(laws: "list[TeacherLaw]") -> "TeacherLaw":
        """Concatenate along N; K, temperature and processing must agree."""
        first = laws[0]
        if any(
            x.ids.shape[1] != first.ids.shape[1] or x.temperature != first.temperature or x.processed != first.processed
            for x in laws
        ):
            raise InvalidValue(
                "laws of different K, temperature or processing cannot share a batch: record them with one setting"
            )
        return replace(
            first,
            ids=torch.cat([x.ids for x in laws]),
            logprobs=torch.cat([x.logprobs for x in laws]),
            tail_logmass=torch.cat([x.tail_logmass for x in laws]),
        )


@dataclass(frozen=True)
class Record:
    """What one served request leaves for learning: its tokens and the target's laws at some of its positions.

    positions[i] = j: law i is the law of the token AT index j of `ids`, which the network's row j - 1 predicts.
    """

    ids: Tensor  # int64 [T] prompt and answer
    positions: Tensor  # int64 [N], each in 1..T-1
    law: TeacherLaw  # N rows
    tag: str = ""  # domain, class or language
    request: int = 0  # the stream's running number of the request
    alpha: float = float("nan")  # mean of 1 - TV(p, q) over the request's examined positions when it was served
    examined: int = 0
    draft_version: int = 0  # how many times the served draft had been swapped

    def __post_init__(self) -> None:
        if self.positions.shape != (len(self.law),):
            raise InvalidValue(f"Record has {len(self.law)} laws for {tuple(self.positions.shape)} positions")
        if len(self.law) and not (int(self.positions.min()) >= 1 and int(self.positions.max()) < self.ids.shape[0]):
            raise InvalidValue(
                f"Record positions must lie in 1..{self.ids.shape[0] - 1}: position 0 has no predicting row"
            )
