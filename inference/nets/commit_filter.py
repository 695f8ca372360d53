"""Filters that say which predictions of a pass of masked diffusion may be committed now.

Source: Learn2PD (arXiv 2509.25188), section 3: two linear layers over the block's confidences ("reference"). What is
done differently: positions that are committed already read as confidence 1 (feature "one"; "raw" is the published
form), and an equivariant net slides one small perceptron over the positions, so that its blocks may have any length.
Shape letters: B batch, W block (BL of the paper), F features, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.rng import uniform

NETS = ("reference", "equivariant")
KINDS = ("one", "raw")  # of the reference net's only feature
FEATURES = (
    "confidence",  # of masked positions; 1 elsewhere
    "masked",
    "rank",  # of the confidence among the masked positions, as a share of the block; the most confident has 0
    "share_masked",
    "mean_confidence",  # of the masked positions
    "risk",  # sum of 1 - confidence over the positions up to this rank: bounds the chance that one of them is wrong
    "position",  # in the block, as a share
    "left",  # confidence of the left neighbour; 1 outside the block
    "right",
    "same_left",  # the left neighbour has the same token
    "same_right",
    "agreement",  # the pass before in this block predicted the same token
    "gain",  # confidence minus that of the pass before
    "first",  # there is no pass before
    "entropy",  # of the law, over log V
    "margin",  # confidence minus the second largest probability
)
_LOGITS = ("entropy", "margin")


@dataclass(frozen=True)
class Signals:
    """What a filter may look at in one pass; [B, W] each. `previous`: the pass before in the same block."""

    confidence: Tensor  # of the argmax, in [0, 1]
    masked: Tensor  # bool
    predicted: Tensor  # int64; committed positions: their token
    entropy: Tensor | None = None  # nats over log V
    margin: Tensor | None = None
    previous: "Signals | None" = None
    has_previous: Tensor | None = None  # bool [B]; None: all rows where `previous` is given


@dataclass(frozen=True)
class FilterConfig:
    """Everything that decides a filter's function. Raises InvalidValue for what no filter can be."""

    block_length: int  # W of its traces; the reference net works at this one alone
    net: str = "equivariant"
    feature: str = "one"  # reference net: what is read
    features: tuple[str, ...] = FEATURES  # equivariant net: what is read
    hidden: int = 32  # width of the equivariant net's two hidden layers; the reference net's is the block's
    window: int = 2  # equivariant net: each hidden layer also sees so many neighbours on either side

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))  # a parsed config.json brings a list
        if self.net not in NETS:
            raise unknown_choice("filter net", self.net, NETS)
        if self.feature not in KINDS:
            raise unknown_choice("filter feature", self.feature, KINDS)
        for name in self.features:
            if name not in FEATURES:
                raise unknown_choice("filter features", name, FEATURES)
        if not self.features or len(set(self.features)) != len(self.features):
            raise InvalidValue(f"filter features must be different ones of {FEATURES}, got {list(self.features)}")
        if self.block_length < 1 or self.hidden < 1 or self.window < 0:
            raise InvalidValue(
                f"a filter wants block_length and hidden of at least 1 and window of at least 0, got "
                f"{self.block_length}, {self.hidden} and {self.window}"
            )

    @property
    def equivariant(self) -> bool:
        return self.net == "equivariant"

    @property
    def reads_laws(self) -> bool:
        """Whether it wants more of a law than the probability of the argmax."""
        return self.equivariant and any(name in self.features for name in _LOGITS)

    @property
    def reads_previous(self) -> bool:
        """Whether it wants the pass before."""
        return self.equivariant and any(name in self.features for name in ("agreement", "gain"))


def law_signals(logits: Tensor, law: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(entropy over log V, margin) of logits [..., V], in float32; law: their softmax, where it is there already.

    Few operators, all of them vectorised: a decoder calls this in every pass (topk and logsumexp are several times
    dearer on a CPU).
    """
    p = logits.float().softmax(-1) if law is None else law
    # log p + log of the largest; finite, since 0 * -inf would be NaN
    below = (logits.float() - logits.amax(-1, keepdim=True).float()).clamp_min_(-1e30)
    first = p.amax(-1, keepdim=True)
    entropy = -first.squeeze(-1).log() - torch.linalg.vecdot(p, below)
    leads = p == first
    second = p.masked_fill(leads, 0.0).amax(-1)
    margin = torch.where(leads.sum(-1) > 1, 0.0, first.squeeze(-1) - second)
    return entropy.clamp_min(0.0) / math.log(logits.shape[-1]), margin


def check_confidence(confidence: Tensor) -> None:
    """Raises InvalidValue for numbers that are no confidences (an entropy fed as one, NaN); synchronises."""
    if not bool(((confidence >= 0) & (confidence <= 1.001)).all()):
        raise InvalidValue("confidences must lie in [0, 1]: give the softmax probability of the argmax")


def features(config: FilterConfig, signals: Signals) -> Tensor:
    """[B, W] (reference) or [B, W, F] (equivariant), float32. Raises InvalidValue for a block of another length."""
    masked, width = signals.masked, signals.masked.shape[-1]
    if not config.equivariant:
        if width > config.block_length:
            raise InvalidValue(
                f"the filter was trained for blocks of {config.block_length}, these have {width}: set block_length "
                f"to {config.block_length}, or train with net equivariant"
            )
        confidence = signals.confidence.float()
        if config.feature == "one":
            confidence = torch.where(masked, confidence, 1.0)
        # a block that was cut at the end of text: what is missing reads as committed
        return F.pad(confidence, (0, config.block_length - width), value=1.0)
    made = _all_features(config.features, signals)
    return torch.stack([made[name] for name in config.features], -1)


def _all_features(wanted: tuple[str, ...], signals: Signals) -> dict[str, Tensor]:
    masked, width = signals.masked, signals.masked.shape[-1]
    one = torch.where(masked, signals.confidence.float(), 1.0)
    hidden = masked.float()
    made = {"confidence": one, "masked": hidden}
    count = hidden.sum(-1, keepdim=True)
    if "share_masked" in wanted:
        made["share_masked"] = (count / width).expand_as(one)
    if "mean_confidence" in wanted:
        made["mean_confidence"] = ((one * hidden).sum(-1, keepdim=True) / count.clamp_min(1)).expand_as(one)
    if "position" in wanted:
        made["position"] = (torch.arange(width, device=one.device) / width).expand_as(one)
    if "rank" in wanted or "risk" in wanted:
        order = one.masked_fill(~masked, -1.0).sort(dim=-1, descending=True, stable=True).indices
        place = torch.arange(width, device=one.device).expand_as(order)
        made["rank"] = torch.empty_like(one).scatter_(-1, order, place / width) * hidden
        doubt = ((1 - one) * hidden).gather(-1, order).cumsum(-1)
        made["risk"] = torch.empty_like(one).scatter_(-1, order, doubt) * hidden
    around = F.pad(one, (1, 1), value=1.0)
    made["left"], made["right"] = around[:, :-2], around[:, 2:]
    if "same_left" in wanted or "same_right" in wanted:
        same = F.pad((signals.predicted[:, 1:] == signals.predicted[:, :-1]).float(), (1, 1))
        made["same_left"], made["same_right"] = same[:, :-1], same[:, 1:]
    before = signals.previous
    if before is None:
        zero = torch.zeros_like(one)
        made |= {"agreement": zero, "gain": zero, "first": torch.ones_like(one)}
    else:
        known = torch.ones_like(one[:, :1]) if signals.has_previous is None else signals.has_previous.unsqueeze(1)
        earlier = torch.where(before.masked, before.confidence.float(), 1.0)
        made["agreement"] = (signals.predicted == before.predicted).float() * known
        made["gain"] = (one - earlier) * known
        made["first"] = (1.0 - known.float()).expand_as(one)
    if signals.entropy is not None:
        made["entropy"] = signals.entropy.float() * hidden
    if signals.margin is not None:
        made["margin"] = torch.where(masked, signals.margin.float(), 1.0)
    if missing := [name for name in wanted if name not in made]:
        raise InvalidValue(f"feature {missing[0]!r} needs the logits of the block, which were not given")
    return made


class CommitFilter(nn.Module):
    """Logits of "this prediction is the final token", one a position."""

    WHAT: ClassVar[str] = "a commit filter"

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self.config = config
        size = config.block_length
        if config.equivariant:
            inner, kernel = config.hidden, 2 * config.window + 1
            self.layers = nn.Sequential(
                nn.Conv1d(len(config.features), inner, kernel, padding=config.window), nn.ReLU(),
                nn.Conv1d(inner, inner, kernel, padding=config.window), nn.ReLU(),
                nn.Conv1d(inner, 1, 1),
            )  # fmt: skip
        else:
            self.layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, W] (reference) or [B, W, F]. Returns logits [B, W], float32."""
        features = features.to(next(self.parameters()).dtype)
        if self.config.equivariant:
            shared: Tensor = self.layers(features.transpose(1, 2))
            return shared.squeeze(1)
        out: Tensor = self.layers(features)
        return out

    def score(self, signals: Signals) -> Tensor:
        """logits [B, W] of a pass; a reference filter's padding is cut off."""
        logits: Tensor = self(features(self.config, signals))
        return logits[:, : signals.masked.shape[-1]]

    @property
    def spec(self) -> EngineSpec:
        """A filter knows no ids: vocab_size is that of its base, which the manifest states."""
        return EngineSpec("commit-filter", 0, self.config.hidden, 2, self.config.block_length)

    def seal_inputs(self) -> dict[str, Tensor]:
        """Signals of 16 blocks of full length, and of the pass before."""
        shape = (2, 16, self.config.block_length)
        at = torch.arange(2 * 16 * self.config.block_length).view(shape)
        draw = [uniform(0, 0, at, stream).float() for stream in range(5)]
        return {
            "confidence": draw[0],
            "masked": draw[1] < 0.7,
            "predicted": (draw[2] * 5).long(),
            "entropy": draw[3],
            "margin": draw[4] * draw[0],
        }

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [16, W] of all blocks at once."""
        return self.score(_signals(inputs, slice(None), next(self.parameters()).device)).float()

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same block by block: a filter's word must not depend on who shares the batch."""
        device = next(self.parameters()).device
        rows = [self.score(_signals(inputs, slice(i, i + 1), device)).float() for i in range(16)]
        return torch.cat(rows)


def _signals(inputs: Mapping[str, Tensor], rows: slice, device: torch.device) -> Signals:
    before, now = ({name: value[i, rows].to(device) for name, value in inputs.items()} for i in (0, 1))
    return Signals(**now, previous=Signals(**before))  # type: ignore[arg-type]  # tensors by name
