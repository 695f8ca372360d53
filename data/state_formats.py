"""How a target's states and laws are kept as integers, and the batch that brings them.

Shape letters: B batch, T time, n states of a token, D width of the target, k tokens of a law, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.batches import TokenBatch, check_field
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue

FORMATS = ("int8", "bfloat16")
_ROWS = 256  # positions whose whole laws are there at once


@dataclass(eq=False, kw_only=True)
class StateBatch(TokenBatch):
    """Packed tokens with the target's states, as integers (contract 12)."""

    states: Tensor  # int8 [B, T, n, D], or int16 (bit patterns of bfloat16)
    scale_bits: Tensor  # int32 [B, T, n]: bit patterns of float32; 0 for bfloat16
    law_ids: Tensor | None = None  # int32 [B, T, k], likeliest first; None: the last state is kept, and gives the laws
    law_bits: Tensor | None = None  # int16 [B, T, k]: bit patterns of float16 log-probabilities

    def __post_init__(self) -> None:
        super().__post_init__()
        batch, time = self.ids.shape
        if self.states.ndim != 4 or self.states.shape[:2] != (batch, time):
            raise InvalidValue(f"StateBatch.states must be [{batch}, {time}, n, D], got {list(self.states.shape)}")
        check_field("StateBatch", "scale_bits", self.scale_bits, torch.int32, tuple(self.states.shape[:3]))
        if self.law_ids is not None and self.law_bits is not None:
            shape = (batch, time, self.law_ids.shape[-1])
            check_field("StateBatch", "law_ids", self.law_ids, torch.int32, shape)
            check_field("StateBatch", "law_bits", self.law_bits, torch.int16, shape)

    def observed(self) -> tuple[Tensor, Tensor | None]:
        """(states read [B, T, F], last state [B, T, D] where it was kept), float32."""
        states = decode(self.states, self.scale_bits)
        if self.law_ids is not None:
            return states.flatten(2), None
        return states[:, :, :-1].flatten(2), states[:, :, -1]

    def laws(self) -> tuple[Tensor, Tensor] | None:
        """(ids int64 [B, T, k], log-probabilities float32 [B, T, k]) where the k likeliest tokens were kept."""
        if self.law_ids is None or self.law_bits is None:
            return None
        return self.law_ids.long(), self.law_bits.view(torch.float16).float()


def encode(states: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(integers [..., n, D], scale bits int32 [..., n]) of float states. int8: a state's largest number becomes 127."""
    if kind == "bfloat16":
        return states.bfloat16().view(torch.int16), torch.zeros(states.shape[:-1], dtype=torch.int32)
    scale = states.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (states.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale.view(torch.int32)


def decode(states: Tensor, scale_bits: Tensor) -> Tensor:
    """The reverse of `encode`, float32."""
    if states.dtype == torch.int16:
        return states.view(torch.bfloat16).float()
    return states.float() * scale_bits.view(torch.float32).unsqueeze(-1)


@torch.no_grad()
def top_laws(engine: Engine, last: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids int32 [B, T, k], float16 log-probabilities) of the k likeliest tokens, by the last states [B, T, D].

    Raises InvalidValue when the target has fewer than k tokens.
    """
    if k > engine.spec.vocab_size:
        raise InvalidValue(f"states.laws keeps {k} tokens of each law, the target has {engine.spec.vocab_size}")
    rows = last.flatten(0, 1)
    parts = [_log_laws(engine, part).topk(k, -1) for part in torch.split(rows, _ROWS)]
    ids = torch.cat([part.indices for part in parts]).int().cpu()
    values = torch.cat([part.values for part in parts]).half().cpu()
    return ids.view(*last.shape[:2], k), values.view(*last.shape[:2], k)


@torch.no_grad()
def state_errors(states: Tensor, kind: str) -> list[float]:
    """What storing does to states [B, T, n, D]: the relative error of each of the n."""
    stored = decode(*encode(states, kind))
    gap, size = (stored - states.float()).square().mean((0, 1, 3)), states.float().square().mean((0, 1, 3))
    return [round(float(x), 6) for x in (gap / size.clamp_min(1e-30)).sqrt()]


@torch.no_grad()
def law_errors(engine: Engine, last: Tensor, kind: str, k: int) -> dict[str, float]:
    """What storing does to the target's laws: total variation and equal argmax; of k tokens also the mass they have.

    k: 0 where the last state [B, T, D] is kept; else the kept tokens' law is compared as training takes it, divided by
    its sum.
    """
    rows = last.flatten(0, 1)
    sums = torch.zeros(3, dtype=torch.float64)  # total variation, equal argmax, mass
    for part in torch.split(rows, _ROWS):
        p = _log_laws(engine, part).exp()
        if k:
            ids, logp = (x[0].to(p.device) for x in top_laws(engine, part.unsqueeze(0), k))
            kept = torch.zeros_like(p).scatter_(-1, ids.long(), logp.float().exp())
            mass = p.gather(-1, ids.long()).sum()
            q = kept / kept.sum(-1, keepdim=True)
        else:
            q = _log_laws(engine, decode(*encode(part.unsqueeze(1).cpu(), kind))[:, 0]).exp()
            mass = p.sum()
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        sums += torch.stack([0.5 * (p - q).abs().sum(), agree, mass]).double().cpu()
    tv, agree_share, mass_share = (float(x) for x in sums / len(rows))
    return {"law_tv": tv, "law_agree": agree_share, **({"law_mass": mass_share} if k else {})}


@torch.no_grad()
def law_gap(engine: Engine, last: Tensor, ids: Tensor, logp: Tensor) -> float:
    """The largest difference of kept log-probabilities [m, k] from those of plain states [m, D], in float16 steps."""
    plain = _log_laws(engine, last).gather(-1, ids.long().to(engine.device)).cpu()
    step = plain.abs() * 2.0**-10 + 2e-3  # passes of another batch differ a little
    return float(((logp.float() - plain).abs() / step).max())


def _log_laws(engine: Engine, last: Tensor) -> Tensor:
    """float32 [m, V] of states [m, D]."""
    logits: Tensor = engine.head(last.to(engine.device, engine.dtype))
    return logits.float().log_softmax(-1)
