"""What an any-subset network offers to be exported (`inference.portable`): fixed canvases, plainly and with the cache.

Shape letters: B batch, N canvas, K compared ranks, k queries of a pass, V vocabulary.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from draftsmith.inference.engine import EngineSpec
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.orders import lattice_rank, order_of
from draftsmith.inference.rng import Stream, uniform

if TYPE_CHECKING:
    from draftsmith.inference.nets.any_subset_lm import AnySubsetLM

_ROWS, _POSITIONS = 2, 48
_CHUNK, _WRONG = 5, 2  # ranks of a round, of which so many are fed wrong and overwritten, as after a rejected draft


class Sealed:
    """Mixed into `AnySubsetLM`: the parts of `PortableNet` that a network must offer."""

    WHAT: ClassVar[str] = "an any-subset model"
    config: Any

    @property
    def spec(self) -> EngineSpec:
        c = self.config
        return EngineSpec("any-subset", c.vocab_size, c.hidden_size, c.num_layers, c.max_length)

    def seal_inputs(self) -> dict[str, Tensor]:
        """tokens, rank int64 [B, N] and visible int64 [B] (prompt lengths): two canvases of different prompts.

        Raises InvalidValue for a canvas of fewer than four positions.
        """
        size = min(_POSITIONS, self.config.max_length)
        if size < 4:
            raise InvalidValue(f"a canvas of {size} positions has nothing to compare: raise max_length")
        row, position = torch.arange(_ROWS).unsqueeze(1), torch.arange(size)
        tokens = (uniform(0, row, position, int(Stream.SAMPLE)) * (self.config.vocab_size - 1)).long()
        tokens += tokens >= self.config.mask_id
        place = uniform(0, row, position, int(Stream.DATA)).argsort(1).argsort(1)
        num_visible = torch.tensor([size // 3, size // 4])
        return {
            "tokens": tokens,
            "rank": lattice_rank(place < num_visible.unsqueeze(1)),
            "visible": num_visible,
        }

    def seal_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """float32 [B, K + k, V - 1]: the joint's logits from the training pass, and those of the first draft."""
        tokens, rank, visible, order = _given(self.config, inputs)
        net: AnySubsetLM = self  # type: ignore[assignment]  # what this is mixed into
        device = net.query.device
        tokens, rank, visible, order = (x.to(device) for x in (tokens, rank, visible, order))
        first = visible.unsqueeze(1) + torch.arange(_drafted(tokens, visible), device=device)
        oracle = net(tokens, rank, visible, order[:, int(visible.max()) :])
        draft = net(tokens, rank, visible, order.gather(1, first), visible)
        return _compared(net, torch.cat([oracle, draft], 1))

    def seal_replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same along the path that decoders use: prompts at once, then rounds that end in wrong tokens."""
        tokens, _, visible, order = _given(self.config, inputs)
        net: AnySubsetLM = self  # type: ignore[assignment]  # as above
        batch, size = tokens.shape
        content = tokens.gather(1, order)  # by rank
        cache = net.new_cache(order, slack=_CHUNK)
        prompt = int(visible.max())
        drafted = visible.unsqueeze(1) + torch.arange(_drafted(tokens, visible))
        limit = visible.unsqueeze(1).expand_as(drafted)
        draft = net.extend(cache, content[:, :prompt], [0] * batch, visible, drafted, limit)
        found = draft.new_zeros(batch, size, draft.shape[-1])
        done = visible.tolist()
        while min(done) < size:
            ranks = torch.tensor(done).unsqueeze(1) + torch.arange(_CHUNK)
            fed = content.gather(1, ranks.clamp_max(size - 1))
            fed[:, -_WRONG:] = (fed[:, -_WRONG:] + 1) % self.config.vocab_size
            inside = ranks.clamp_max(size - 1)
            hidden = net.extend(cache, fed, done, visible, inside, inside)
            for row in range(batch):
                kept = min(_CHUNK - _WRONG - row % 2, size - done[row])
                found[row, done[row] : done[row] + kept] = hidden[row, :kept]
                done[row] += kept
        return _compared(net, torch.cat([found[:, prompt:], draft], 1))


def _given(config: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs["tokens"], inputs["rank"], inputs["visible"], order_of(inputs["rank"])


def _drafted(tokens: Tensor, visible: Tensor) -> int:
    return min(_CHUNK, tokens.shape[1] - int(visible.max()))


def _compared(net: "AnySubsetLM", hidden: Tensor) -> Tensor:
    """float32 on the CPU; the mask id's logit, minus infinity everywhere, is left out."""
    logits = net.head(hidden)
    keep = torch.arange(logits.shape[-1], device=logits.device) != net.config.mask_id
    return logits[..., keep].float().cpu()
