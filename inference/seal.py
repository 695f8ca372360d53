"""The parity seal: a fresh process loads an export, replays fixed tokens through the cached path, and measures.

Run by the exporter as `python -m draftsmith.inference.seal DIR --inputs FILE`; prints one JSON object. It shares
nothing with the training process but the two paths, so whatever is wrong with the files, the loader or the cache shows
as a difference.

Shape letters: B batch, T time, V vocabulary.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.checkpoint import sha256
from draftsmith.inference.commands._args import parser
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_eagle import replay_head
from draftsmith.inference.loader import load
from draftsmith.inference.manifest import Seal, SealCheck
from draftsmith.inference.portable import INPUT_PREFIX, PortableNet

# dtype -> (share of the largest |logit| by which serving may differ, least tolerance). float32: another order of sums;
# the 16-bit types: rounding, loose because random deep networks amplify it (16% of the scale was seen in bfloat16); the
# same files computed in float32 are held to the tight one.
TOLERANCES = {"float32": (5e-5, 1e-4), "float16": (0.05, 0.01), "bfloat16": (0.25, 0.05)}
_REJECTED = 2  # tokens of the first chunk that are fed wrong and rolled back, as after a rejected draft


def tolerance(dtype: str, logit_scale: float) -> float:
    """Largest |difference| of two logits that rounding alone may cause; logit_scale: the largest |logit|."""
    share, least = TOLERANCES[dtype]
    return max(share * logit_scale, least)


@torch.inference_mode()
def replay(engine: Engine, tokens: Tensor) -> Tensor:
    """Logits at every position of `tokens`, taken along the path that decoders use; tokens: int64 [B, T], T >= 2.

    The first half goes in at once; then come chunks of four and of one token. The first chunk ends in wrong tokens, and
    each row is rolled back by another count, so that roll-back and ragged rows are part of the comparison.
    Returns: float32 [B, T, V].
    """
    batch, length = tokens.shape
    cache = engine.new_cache(batch, length + _REJECTED)
    logits = torch.zeros(batch, length, engine.spec.vocab_size)
    done = [0] * batch  # tokens of each row whose logits are final

    def feed(n: int, wrong: int = 0) -> None:
        index = torch.tensor(done).unsqueeze(1) + torch.arange(
            n
        )  # [B, n]; behind the end of a row: repeat its last token
        fed = tokens.gather(1, index.clamp_max(length - 1))
        if wrong:
            fed[:, n - wrong :] = (fed[:, n - wrong :] + 1) % engine.spec.vocab_size
        hidden, _ = engine.forward(fed.to(engine.device), cache=cache)
        found = engine.head(hidden).float().cpu()
        for row in range(batch):
            kept = min(n - (wrong + row % 2 if wrong else 0), length - done[row])
            logits[row, done[row] : done[row] + kept] = found[row, :kept]
            done[row] += kept
        cache.truncate(done)

    feed(length // 2)
    if length - length // 2 > 4:
        feed(4, wrong=_REJECTED)
    step = 1
    while min(done) < length:
        feed(min(step, length - min(done)))
        step = 5 - step  # 1, 4, 1, 4, ...
    return logits


def measure(directory: Path, inputs: Path) -> Seal:
    """Compare the export with the references in `inputs` (safetensors).

    inputs: tokens int64 [B, T] (of an EAGLE head also features and embeds, see `replay_head`; of a PortableNet its
    own, "input.NAME" each); float32: logits [B, T, V] (or the net's own numbers) to be met when the export computes in
    float32; optionally also float16 or bfloat16, to be met when it computes in that dtype. Metadata: what computed each
    of them.
    """
    from safetensors import safe_open

    with safe_open(str(inputs), framework="pt", device="cpu") as file:
        names = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    given = {name: arrays.pop(name) for name in sorted(set(arrays) - set(names))}  # all but the references
    first = given["tokens"] if "tokens" in given else max(given.values(), key=Tensor.numel)
    scale = max(float(reference.abs().max()) for reference in arrays.values())
    checks = []
    for dtype, reference in sorted(arrays.items()):
        part: Any = load(directory, dtype=dtype, sealing=True).part
        found = _replayed(part, given)
        if found.shape != reference.shape:
            raise InvalidValue(f"logits of shape {list(found.shape)}, the training class gave {list(reference.shape)}")
        difference = float((found - reference).abs().max())
        if difference != difference:
            raise InvalidValue(f"logits computed in {dtype} are not finite")
        checks.append(SealCheck(dtype, names.get(dtype, "unknown"), difference, tolerance(dtype, scale)))
    return Seal(sha256(inputs), first.shape[0], first[0].numel(), scale, tuple(checks))


def _replayed(part: Any, given: dict[str, Tensor]) -> Tensor:
    """What a part makes of the fixed inputs, along the path that decoders use; float32 on the CPU."""
    if isinstance(part, PortableNet):
        own = {name.removeprefix(INPUT_PREFIX): array for name, array in given.items()}
        with torch.inference_mode():
            return part.seal_replay(own).float().cpu()
    if "features" in given:
        return replay_head(part.net, given["features"], given["embeds"])
    return replay(part, given["tokens"])


def main(argv: list[str] | None = None) -> int:
    """Print the measured seal as JSON; whether it is good enough is for the exporter to say."""
    arguments = parser("seal", "Measure an export against logits of its training class.", "seal OUT --inputs FILE")
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--inputs", type=Path, required=True, help="safetensors with tokens and reference logits")
    given = arguments.parse_args(argv)
    print(json.dumps(asdict(measure(given.directory, given.inputs))))
    return 0


if __name__ == "__main__":
    from draftsmith.inference.cli import run_main

    sys.exit(run_main(main, sys.argv[1:], "python -m draftsmith.inference.seal"))
