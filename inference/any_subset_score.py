"""What an any-subset model says of given completions: the exact joint log p of the holes, in one pass.

Every query of rank r reads the content of ranks below r, which holds the completion, so all conditionals of the chain
along the order come out of one forward (arXiv:2504.20456, density estimation).
Shape letters: B completions, N longest canvas, K most holes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.decoders.any_subset_session import order_checked
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.orders import order_of


@dataclass(frozen=True)
class Score:
    """log p of one completion at temperature 1, in nats."""

    by_hole: tuple[float, ...]  # log p of each hole's token given those before it in the order; ascending position

    @property
    def total(self) -> float:
        """log p(holes | what is visible), the exact joint; 0 without holes."""
        return sum(self.by_hole)

    @property
    def mean(self) -> float:
        """The same per hole."""
        return self.total / max(1, len(self.by_hole))


@torch.inference_mode()
def score(
    net: AnySubsetLM, requests: Sequence[CanvasRequest], completions: Sequence[Sequence[int]], batch: int = 64
) -> list[Score]:
    """Score completions[i] (the tokens of the holes of requests[i], in ascending position); `batch` rows a pass.

    Raises InvalidValue for a canvas that the model cannot read and for completions that do not fit their holes;
    InvalidState in train mode and for scores that are no law.
    """
    if net.training:
        raise InvalidState("the model is in train mode, where dropout spoils its scores: call eval()")
    if len(requests) != len(completions):
        raise InvalidValue(f"{len(requests)} canvases and {len(completions)} completions: give one for each")
    found: list[Score] = []
    for first in range(0, len(requests), batch):
        found += _scored(net, first, requests[first : first + batch], completions[first : first + batch])
    return found


def rerank(net: AnySubsetLM, request: CanvasRequest, completions: Sequence[Sequence[int]]) -> list[tuple[int, Score]]:
    """Completions of one canvas, the likeliest first: their index and score. Raises as `score`."""
    scores = score(net, [request] * len(completions), completions)
    return sorted(enumerate(scores), key=lambda item: -item[1].total)


def _scored(
    net: AnySubsetLM, first: int, requests: Sequence[CanvasRequest], completions: Sequence[Sequence[int]]
) -> list[Score]:
    longest = max(len(request.tokens) for request in requests)
    most = max(1, *(len(request.holes) for request in requests)) if requests else 1
    tokens = torch.full((len(requests), longest), net.config.mask_id, dtype=torch.int64)
    rank = torch.arange(longest).repeat(len(requests), 1)  # what is past a shorter canvas comes last, unseen
    visible = torch.zeros(len(requests), dtype=torch.int64)
    targets = torch.zeros(len(requests), most, dtype=torch.int64)
    for b, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        size = len(request.tokens)
        _check(net, first + b, request, completion)
        tokens[b, :size] = torch.tensor(request.filled(completion))
        rank[b, :size] = order_checked(first + b, request, net)[0]
        visible[b] = size - len(request.holes)
        holes = order_of(rank[b : b + 1])[0, visible[b] : size]
        targets[b, : len(holes)] = holes
        targets[b, len(holes) :] = request.holes[-1] if request.holes else 0  # padding, not read
    device = net.device
    hidden = net(tokens.to(device), rank.to(device), visible.to(device), targets.to(device))
    logp = net.head(hidden).float().log_softmax(-1).cpu()
    own = logp.gather(2, tokens.gather(1, targets).unsqueeze(2)).squeeze(2)
    return [_read(first + b, request, targets[b], own[b]) for b, request in enumerate(requests)]


def _read(index: int, request: CanvasRequest, targets: Tensor, logp: Tensor) -> Score:
    at = dict(zip(targets.tolist()[: len(request.holes)], logp.tolist(), strict=False))
    values = tuple(at[position] for position in request.holes)
    if any(value != value for value in values):
        raise InvalidState(f"the model's scores of completion {index} are no law: they hold a NaN (check its weights)")
    return Score(values)


def _check(net: AnySubsetLM, index: int, request: CanvasRequest, completion: Sequence[int]) -> None:
    if len(completion) != len(request.holes):
        raise InvalidValue(f"completion {index} has {len(completion)} tokens for {len(request.holes)} holes")
    for token in completion:
        if not 0 <= token < net.config.vocab_size or token == net.config.mask_id:
            raise InvalidValue(
                f"completion {index}: id {token} is no token of text (vocabulary 0..{net.config.vocab_size - 1}, "
                f"mask {net.config.mask_id})"
            )
