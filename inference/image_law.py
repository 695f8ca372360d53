"""The law of an image model's next codes, with guidance and filters: what sampling, pairs and verification share.

Distilled decoding maps noise to THIS law, not to the raw network's: temperature, top-k, top-p and guidance are part of
it. Both image models (raster order, next scale) are driven through it, so nothing else knows their internals.

Shape letters: B batch, g codes of the next group, N codes of an image, V codes of the codebook.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.sampling import SamplingParams, law


class ImageModel(Protocol):
    """An autoregressive model over the codes of an image (nets/image_ar.py, nets/next_scale_ar.py)."""

    @property
    def config(self) -> Any: ...

    @property
    def groups(self) -> tuple[int, ...]:
        """Codes that one step makes together; their sum is N."""
        ...

    @property
    def no_guidance(self) -> float:
        """The guidance that changes nothing."""
        ...

    def guidance_weight(self, guidance: float, group: int) -> float:
        """The w of l_u + w (l_c - l_u) at a group; 1 is no guidance."""
        ...

    def check_classes(self, classes: Tensor) -> None: ...

    def logits(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Teacher-forced logits [B, N, V] of codes int64 [B, N] given classes int64 [B]."""
        ...

    def start(self, classes: Tensor) -> Any: ...

    def prefilled(self, classes: Tensor, codes: Tensor) -> Any: ...

    def next_logits(self, state: Any) -> Tensor: ...

    def advance(self, state: Any, codes: Tensor) -> None: ...


@dataclass
class Progress:
    """Images on their way: the model's state (of 2B rows under guidance) and the group that comes next."""

    state: Any
    group: int
    doubled: bool


class ImageLaw:
    """An image model with its sampling options.

    guidance: w; None: without (the raster model's 1, the next-scale model's 0: their formulas differ). until: guidance
    stops at this group (LlamaGen's cfg_interval); None never.
    Raises InvalidValue for guidance below 0, penalties, and top_k above the codebook.
    """

    def __init__(
        self, model: ImageModel, sampling: SamplingParams, *, guidance: float | None = None, until: int | None = None
    ) -> None:
        self.model, self.sampling = model, sampling
        if guidance is None:
            guidance = (
                1.0 if model.guidance_weight(1.0, 0) == model.guidance_weight(1.0, len(model.groups) - 1) else 0.0
            )
        if guidance < 0:
            raise InvalidValue(f"guidance must be 0 or more, got {guidance}")
        if sampling.has_penalties:
            raise InvalidValue("image codes have no penalties: leave repetition, presence and frequency penalty out")
        if sampling.top_k > model.config.codes:
            raise InvalidValue(f"top_k {sampling.top_k} is above the {model.config.codes} codes: 0 keeps all")
        self.guidance, self.until = guidance, until
        self.guided = any(self.weight(k) != 1.0 for k in range(len(model.groups)))
        if self.guided:
            model.check_classes(torch.tensor([model.config.num_classes]))

    @property
    def groups(self) -> tuple[int, ...]:
        return self.model.groups

    def weight(self, group: int) -> float:
        """The w of a group; 1 is no guidance."""
        if self.until is not None and group >= self.until:
            return 1.0
        return self.model.guidance_weight(self.guidance, group)

    def start(self, classes: Tensor, prefix: Tensor | None = None) -> Progress:
        """Begin images of classes int64 [B], with the codes `prefix` [B, n] (whole groups) made already."""
        self.model.check_classes(classes)
        rows = self._doubled(classes)
        if prefix is None or prefix.shape[1] == 0:
            return Progress(self.model.start(rows), 0, self.guided)
        made, group = 0, 0
        while made < prefix.shape[1]:
            made += self.groups[group]
            group += 1
        if made != prefix.shape[1]:
            raise InvalidValue(f"a prefix of {prefix.shape[1]} codes ends inside a group of {list(self.groups)[:16]}")
        codes = torch.cat((prefix, prefix)) if self.guided else prefix
        return Progress(self.model.prefilled(rows, codes), group, self.guided)

    def next(self, progress: Progress) -> Tensor:
        """The law of the next group's codes: probabilities float32 [B, g, V], one-hot when greedy."""
        logits = self.model.next_logits(progress.state).float()
        if progress.doubled:
            conditional, without = logits.chunk(2)
            logits = _guide(conditional, without, self.weight(progress.group))
        return law(logits, self.sampling)

    def advance(self, progress: Progress, codes: Tensor) -> None:
        """The next group's codes int64 [B, g] are these."""
        progress.group += 1
        if progress.group < len(self.groups):
            self.model.advance(progress.state, torch.cat((codes, codes)) if progress.doubled else codes)

    def forced(self, codes: Tensor, classes: Tensor) -> Tensor:
        """The laws of all positions given the codes before them, one pass: [B, N, V] of codes int64 [B, N]."""
        self.model.check_classes(classes)
        logits = self.model.logits(torch.cat((codes, codes)) if self.guided else codes, self._doubled(classes)).float()
        if self.guided:
            conditional, without = logits.chunk(2)
            sizes = torch.tensor(self.groups, device=logits.device)
            weights = torch.tensor([self.weight(k) for k in range(len(self.groups))], device=logits.device)
            logits = _guide(conditional, without, weights.repeat_interleave(sizes).view(1, -1, 1))
        return law(logits, self.sampling)

    def _doubled(self, classes: Tensor) -> Tensor:
        """Conditional rows first, rows without a class behind them."""
        return torch.cat((classes, torch.full_like(classes, self.model.config.num_classes))) if self.guided else classes


def _guide(conditional: Tensor, without: Tensor, weight: float | Tensor) -> Tensor:
    return without + weight * (conditional - without)
