"""Writing an EAGLE head: config.json, safetensors, and what its parity seal is measured against.

Shape letters: B batch, T time, D width of the head, W compared numbers a row (`load_eagle.compared`).
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_eagle import compared
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.inference.rng import uniform
from draftsmith.modules.eagle_rollout import rollout


def save(head: EagleHead, dtype: torch.dtype, directory: Path, inputs: Path, tokens: Tensor) -> None:
    """Write the head into `directory`, and the seal's inputs and references into `inputs`.

    tokens: int64 [B, T + 1]. The references are the training pass (rollout of two steps): with the weights as trained,
    to be met roughly in `dtype`, and with the stored weights in float32, to be met tightly.
    """
    from safetensors.torch import save_file

    served = str(dtype).removeprefix("torch.")
    features = _features(head, tokens.shape[0], tokens.shape[1] - 1)
    embeds = head.embed(tokens.to(head.device)).detach().float().cpu()
    arrays = {"tokens": tokens, "features": features, "embeds": embeds.contiguous()}
    arrays[served], said = reference(head, features, embeds), {served: "EagleHead as trained"}
    stored = {name: x.to(dtype) if x.is_floating_point() else x for name, x in head.state_dict().items()}
    if not head.dtype == dtype == torch.float32:
        rounded = copy.deepcopy(head).to(dtype).float()
        arrays["float32"], said["float32"] = reference(rounded, features, embeds), "EagleHead with the stored weights"
    save_file(arrays, inputs, metadata=said)
    save_file({name: x.detach().cpu().contiguous() for name, x in stored.items()}, directory / "model.safetensors")
    config: dict[str, Any] = {"architectures": ["EagleHead"], "vocab_size": head.config.vocab_size, "dtype": served}
    config["eagle"] = head.config.to_json()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def reference(head: EagleHead, features: Tensor, embeds: Tensor) -> Tensor:
    """[B, 2, T, W]: the training pass without a cache, its first two steps."""
    states = head.project(features.to(head.device, head.dtype))
    outs = list(rollout(head, _before(embeds).to(head.device, head.dtype), states, 2))
    rows = torch.stack([compared(head, out) for out in outs], 1).contiguous()
    if not rows.isfinite().all():
        raise InvalidValue("the head's outputs are not finite: its weights are broken, export an earlier checkpoint")
    return rows


def _before(embeds: Tensor) -> Tensor:
    """Row t of a rollout begins with token t + 1: a row in front that nobody reads."""
    return torch.cat((torch.zeros_like(embeds[:, :1]), embeds), 1)


def _features(head: EagleHead, batch: int, rows: int) -> Tensor:
    """float32 [B, T, F] in (-1, 1), the same on every machine."""
    size = head.config.feature_size
    row = torch.arange(batch).view(-1, 1, 1)
    at = torch.arange(rows).view(1, -1, 1)
    return (uniform(0, row, at, torch.arange(size).view(1, 1, -1)) * 2 - 1).float().contiguous()
