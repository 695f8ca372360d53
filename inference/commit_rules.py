"""Which masked positions of a block are committed in this pass: the block sampler's rules, pure functions of a view.

A rule says yes or no to every position; the sampler adds the single best masked position where a rule took none, so
that every pass commits. `SCORES` say what "best" is.

Shape letters: R rows in the batch, K block length, M masked positions of the block in all rows together, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.nets.commit_filter import CommitFilter, Signals, law_signals
from draftsmith.inference.rng import NUM_STREAMS, Stream, uniform_from


@dataclass(frozen=True)
class BlockView:
    """What a rule sees of the active block of every row. Columns behind the end of a shorter block count as committed.

    `quota`, `order_key` and `packed` are None in a view that was made by hand for the rules that do not read them.
    """

    confidence: Tensor  # float32 [R, K]: softmax(logits) of `predicted`; 1 where nothing is masked
    predicted: Tensor  # int64 [R, K]: the token that a commit would write; the token that stands there elsewhere
    masked: Tensor  # bool [R, K]
    step: Tensor  # int64 [R]: passes that the row has spent in this block before this one
    position: Tensor  # int64 [R, K]: in the canvas
    row: Tensor  # int64 [R]: index into the requests
    block_start: Tensor  # int64 [R]: position of the block's first column
    quota: Tensor | None = None  # int64 [R]: commits that the schedule of `steps` gives this pass (see `split_quota`)
    order_key: Tensor | None = None  # int64 [R, 1]: of the counter generator, for the row (see `rng.key`)
    passes: Tensor | None = None  # int64 [R]: passes that the row has seen in all
    packed: Tensor | None = None  # [M, V]: logits of the masked positions, row by row
    law: Tensor | None = None  # float32 [M, V]: their softmax; None: made where it is needed
    previous: "BlockView | None" = None  # the pass before; `predicted` is -1 in rows whose block has just begun

    @cached_property
    def logits(self) -> Tensor | None:
        """[R, K, V]: zero where nothing is masked. Made when it is first asked for: large for large vocabularies."""
        if self.packed is None:
            return None
        return self.spread(self.packed, 0.0)

    @cached_property
    def signals(self) -> tuple[Tensor, Tensor]:
        """[R, K] each: entropy as a share of log V (0 where nothing is masked), margin (1 where nothing is masked)."""
        entropy, margin = law_signals(self.required_logits, self.law)
        both = self.spread(torch.stack((entropy, margin - 1.0), -1), 0.0)
        return both[..., 0], both[..., 1] + 1.0

    @property
    def margin(self) -> Tensor:
        """[R, K]: probability of the likeliest token minus that of the second; 1 where nothing is masked."""
        return self.signals[1]

    @property
    def entropy(self) -> Tensor:
        """[R, K] in nats; 0 where nothing is masked."""
        return self.signals[0] * math.log(self.required_logits.shape[-1])

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """[M, ...] of the masked positions -> [R, K, ...], `fill` elsewhere."""
        out = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
        wide = self.masked.view(*self.masked.shape, *[1] * (values.dim() - 1))
        return out.masked_scatter_(wide, values)  # unlike indexing by a mask it does not wait for the device

    def select(self, rows: Tensor) -> "BlockView":
        """The view of some of its rows (int64 [any]), without logits and without the pass before."""
        kept: dict[str, Any] = {
            name: value.index_select(0, rows)
            for name, value in vars(self).items()
            if name in _BY_ROW and value is not None
        }
        return replace(self, packed=None, law=None, previous=None, **kept)

    @property
    def required_logits(self) -> Tensor:
        """[M, V]. Raises InvalidValue where the view has none."""
        if self.packed is None:
            raise InvalidValue("this view holds no logits: margin and entropy need them")
        return self.packed


_BY_ROW = frozenset(f.name for f in fields(BlockView)) - {"packed", "law", "previous"}


class CommitRule(Protocol):
    """Chooses among the masked positions of a pass; what it says elsewhere is ignored.

    A rule may also have `written(view) -> int64 [R, K]`: the tokens that commits write instead of the predicted ones.
    """

    def __call__(self, view: BlockView) -> Tensor:
        """bool [R, K]"""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# Scores: what is committed first


def _random(view: BlockView) -> Tensor:
    if view.order_key is None or view.passes is None:
        raise InvalidValue("score 'random' needs the rows' keys: use it in the sampler")
    return uniform_from(view.order_key, view.position, (NUM_STREAMS * view.passes + Stream.ACCEPT).unsqueeze(1)).float()


SCORES: Mapping[str, Callable[[BlockView], Tensor]] = {
    "confidence": lambda view: view.confidence,
    "margin": lambda view: view.margin,
    "entropy": lambda view: -view.entropy,
    "left_to_right": lambda view: -view.position.float(),
    "random": _random,
}


def best(score: Tensor, masked: Tensor) -> Tensor:
    """bool [R, K]: the masked position of highest score (the first of equals) in each row that has one."""
    at = score.masked_fill(~masked, float("-inf")).argmax(-1, keepdim=True)
    return torch.zeros_like(masked).scatter_(1, at, True) & masked


def ranks(score: Tensor, masked: Tensor) -> Tensor:
    """int64 [R, K]: place of each masked position by falling score, the left one of equals first; the others follow."""
    order = score.masked_fill(~masked, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, steps)


def split_quota(count: int, steps: int) -> list[int]:
    """`count` commits over `steps` passes, as even as can be, the larger ones first (spec guarantee 3)."""
    base, more = divmod(count, steps)
    return [base + (i < more) for i in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@dataclass(frozen=True)
class TopN:
    """The best so many of a pass: the schedule's quota, or always `n` (LLaDA's low-confidence remasking)."""

    score: str = "confidence"
    n: int | None = None  # None: the view's quota

    def __post_init__(self) -> None:
        _known_score(self.score)
        if self.n is not None and self.n < 1:
            raise InvalidValue(f"commits a pass must be at least 1, got {self.n}")

    def __call__(self, view: BlockView) -> Tensor:
        score = SCORES[self.score](view)
        if self.n == 1:
            return best(score, view.masked)
        if self.n is not None:
            return (ranks(score, view.masked) < self.n) & view.masked
        if view.quota is None:
            raise InvalidValue("top_n without n follows the schedule's quota, and this view has none")
        return (ranks(score, view.masked) < view.quota.unsqueeze(1)) & view.masked


@dataclass(frozen=True)
class Threshold:
    """All whose confidence exceeds the threshold (Fast-dLLM, arXiv 2505.22618, algorithm 1); 1 or more: one by one."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise InvalidValue(f"threshold must be above 0, got {self.threshold}")

    def __call__(self, view: BlockView) -> Tensor:
        return view.masked & (view.confidence > self.threshold)


@dataclass(frozen=True)
class Factor:
    """The n most confident for the largest n with (n + 1)(1 - conf_n) < factor (Fast-dLLM, section 3.3)."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise InvalidValue(f"factor must be above 0, got {self.factor}")

    def __call__(self, view: BlockView) -> Tensor:
        doubt = (1.0 - view.confidence).masked_fill(~view.masked, float("inf"))
        falling, order = doubt.sort(dim=-1, stable=True)
        n = torch.arange(2, doubt.shape[1] + 2, device=doubt.device)  # n + 1; the product rises along the row
        taken = torch.zeros_like(view.masked).scatter_(1, order, n * falling < self.factor)
        return taken & view.masked


@dataclass(frozen=True)
class EntropyBound:
    """The most certain positions while their entropies, the largest left out, sum to at most the bound, in nats.

    EB-sampler (arXiv 2505.24857, equation 5): what the positions know of each other is at most that sum.
    """

    bound: float = 0.1

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise InvalidValue(f"entropy_bound must be at least 0, got {self.bound}")

    def __call__(self, view: BlockView) -> Tensor:
        rising, order = view.entropy.masked_fill(~view.masked, float("inf")).sort(dim=-1, stable=True)
        before = rising.cumsum(-1) - rising  # rising order: the largest of a prefix is its last
        # inf - inf behind the masked ones is NaN, which is not <= bound
        return torch.zeros_like(view.masked).scatter_(1, order, before <= self.bound) & view.masked


class Oracle:
    """Commits exactly what already equals a reference (the EGP oracle of Learn2PD, arXiv 2509.25188, section 3.1)."""

    def __init__(self, references: Sequence[Sequence[int]]) -> None:
        """references: the finished canvas of every request (prompt and answer), in the requests' order.

        Raises InvalidValue for no references.
        """
        if not references:
            raise InvalidValue("the oracle needs a finished canvas for every request, got none")
        width = max(map(len, references))
        self._canvas = torch.tensor([[*canvas, *[-1] * (width - len(canvas))] for canvas in references])

    def __str__(self) -> str:
        return "Oracle"

    def __call__(self, view: BlockView) -> Tensor:
        return view.masked & (view.predicted == self.written(view))

    def written(self, view: BlockView) -> Tensor:
        """The reference: where no prediction equals it, the pass's one commit still does (the oracle's way out)."""
        if self._canvas.device != view.predicted.device:
            self._canvas = self._canvas.to(view.predicted.device)
        return self._canvas[view.row.unsqueeze(1), view.position.clamp_max(self._canvas.shape[1] - 1)]


class LearnedFilter:
    """A trained filter's yes (Learn2PD, arXiv 2509.25188, section 3.2): sigmoid of its logit above the threshold."""

    def __init__(self, net: CommitFilter, threshold: float = 0.96) -> None:
        """Raises InvalidValue for a threshold outside (0, 1]; 1 never says yes."""
        if not 0 < threshold <= 1:
            raise InvalidValue(f"threshold of a filter must lie in (0, 1], got {threshold}")
        self.net, self.threshold = net, threshold
        self._bar = float("inf") if threshold == 1 else math.log(threshold / (1 - threshold))

    def __str__(self) -> str:
        return f"LearnedFilter({self.net.config.net}, threshold={self.threshold:g})"

    def __call__(self, view: BlockView) -> Tensor:
        return view.masked & (self.net.score(self.signals(view)) > self._bar)

    def signals(self, view: BlockView) -> Signals:
        """What the net may look at. Raises InvalidValue where it reads laws and the view holds no logits."""
        config, before = self.net.config, view.previous if self.net.config.reads_previous else None
        entropy = margin = None
        if config.reads_laws:
            entropy, margin = view.signals
        if before is None:
            return Signals(view.confidence, view.masked, view.predicted, entropy, margin)
        earlier = Signals(before.confidence, before.masked, before.predicted)
        return Signals(view.confidence, view.masked, view.predicted, entropy, margin, earlier, view.step > 0)


RULES = ("low_confidence", "top_n", "threshold", "factor", "entropy_bound", "learned_filter")


def _known_score(score: str) -> None:
    if score not in SCORES:
        raise unknown_choice("score", score, SCORES)
