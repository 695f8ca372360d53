"""An export of kind "eagle" becomes a tree drafter; and its parity replay through the cached path.

Shape letters: B batch, T time, F width of the states read, D width of the head, W what is compared (Vd logits; of
EAGLE-1, which has no head of its own, the D numbers that the target's head would read).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.inference import manifest as manifests
from draftsmith.inference.checkpoint import read_json, weight_files
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.formats.convert import read_drafter
from draftsmith.inference.load_engine import DTYPES
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, load_tensors
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy

NODES, DEPTH, BEAM = 16, 5, 4  # of the EAGLE-2 tree that a head drafts where no policy is chosen
_REJECTED = 2  # pairs of a chunk that are fed wrong and rolled back


def load_eagle(
    path: str | Path, *, engine: str = "auto", dtype: str = "auto", device: torch.device | str = "cpu"
) -> EagleTreeDrafter:
    """Load a head for drafting; the decoder lends it its target (`bind`).

    Args: dtype: to compute in; "auto": as the weights are stored.
    Raises InvalidValue, one line, for files that are not those of one EAGLE head.
    """
    if engine == "hf":
        raise InvalidValue("an EAGLE head has no transformers class: leave engine at auto or native")
    head = read_head(Path(path), dtype).to(device)
    head.fuse()
    return own_tree(head)


def own_tree(head: EagleHead) -> EagleTreeDrafter:
    """A head as a drafter of the tree that it makes where no policy is chosen."""
    return EagleTreeDrafter(head, Eagle2Policy(NODES, DEPTH, beam=BEAM))


def read_head(directory: Path, dtype: str = "auto") -> EagleHead:
    """The head of an export directory, in eval mode. Raises as `load_eagle`."""
    config = read_json(directory / "config.json")
    tensors: dict[str, Tensor] = {}
    if "eagle" in config:
        head = EagleHead(EagleConfig.from_json(config["eagle"], str(directory / "config.json")))
        for file in weight_files(directory):
            tensors |= load_file(file)
    else:  # the format of another engine
        record = read_drafter(directory, target_layers=_depth(directory))
        if not isinstance(record.fields, EagleConfig):
            raise InvalidValue(f"{directory}: config.json describes no EAGLE head (key 'eagle'), but {record.format}")
        head, tensors = EagleHead(record.fields), dict(record.tensors)
    head.to(tensors["fc.weight"].dtype if dtype == "auto" and "fc.weight" in tensors else DTYPES.get(dtype))
    load_tensors(head, tensors, str(directory))
    return head.eval().requires_grad_(False)


def _depth(directory: Path) -> int | None:
    """The target's depth by the manifest: formats that leave the states out read 2, L//2, L-3 (EAGLE-1: L)."""
    found = manifests.read(directory)
    aux = found.couplings.aux_layers if found is not None else None
    return None if aux is None else aux.layers[-1] + (3 if len(aux.layers) > 1 else 0)


@torch.inference_mode()
def replay_head(head: EagleHead, features: Tensor, embeds: Tensor) -> Tensor:
    """Rows [B, 2, T, W] along the cached path: every pair from the target's states, and one drafted step behind it.

    The first half of the pairs goes in at once, then chunks that end in wrong pairs and are rolled back; what they gave
    is compared with single steps, behind each of which a pair with the head's own state is drafted and dropped.
    Args: features: [B, T, F]. embeds: [B, T + 1, D]; pair t reads row t, a draft behind it row t + 1.
    Raises InvalidValue when chunks and single steps differ by more than rounding.
    """
    batch, length, _ = features.shape
    states, embeds = head.project(features.to(head.device, head.dtype)), embeds.to(head.device, head.dtype)
    cache = head.new_cache(batch, length + _REJECTED + 1)
    chunks, done = [], 0
    while done < length:
        n = min(max(1, length // 2) if done == 0 else 3, length - done)
        wrong = torch.randn(batch, _REJECTED, states.shape[-1], generator=torch.Generator().manual_seed(done))
        fed = torch.cat((states[:, done : done + n], wrong.to(states)), 1)
        rows = torch.cat((embeds[:, done : done + n], wrong.to(embeds)), 1)
        chunks.append(head(rows, fed, cache=cache)[:, :n])
        done += n
        cache.truncate([done] * batch)
    cache.truncate([0] * batch)
    outs, drafted = [], []
    for t in range(length):
        outs.append(head(embeds[:, t : t + 1], states[:, t : t + 1], cache=cache))
        drafted.append(head(embeds[:, t + 1 : t + 2], head.feedback(outs[-1]), cache=cache))
        cache.truncate([t + 1] * batch)
    first, chunked = torch.cat(outs, 1), torch.cat(chunks, 1)
    gap, size = float((first - chunked).abs().max()), float(first.abs().max())
    if not gap <= (1e-3 if head.dtype == torch.float32 else 0.1) * max(size, 1.0):
        raise InvalidValue(f"chunks of pairs differ from single pairs by {gap:.3g} (largest number {size:.3g})")
    return torch.stack([compared(head, x) for x in (first, torch.cat(drafted, 1))], 1)


def compared(head: EagleHead, out: Tensor) -> Tensor:
    """[..., W] of output states [..., D], float32 on the CPU."""
    rows = head.logits(out) if head.config.version == 3 else head.ready(out)
    return rows.float().cpu()
