"""The automatic mode against plain decoding alone, in pairs of runs that alternate in order.

    python -m benchmarks.automatic --size 50M --alpha 0 --batch 1,8,16 --pairs 30

Nothing else runs between them, so a difference of a percent shows, which the few repetitions of `benchmarks.sizes`
cannot resolve. The automatic decoder lives through all pairs, as in a server.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.sizes import SIZES, ScriptedDrafter, Scripts, _curve, write_models
from draftsmith.inference.bench import BenchSettings
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.forecast import forecast
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.metrics import Estimate, median_estimate
from draftsmith.inference.requests import Decoder, TokenRequest


def automatic_over_plain(
    name: str, folder: Path, alpha: float, settings: BenchSettings, pairs: int
) -> dict[int, Estimate]:
    """Batch -> median speed of the automatic mode over plain decoding. alpha: set acceptance of the draft."""
    target_path, draft_path = write_models(folder, name)
    target, draft, vocab = load_engine(target_path), load_engine(draft_path), SIZES[name].vocab
    found = {}
    for batch in settings.batches:
        ids = [[(17 * row + 5 * i + row * i) % vocab for i in range(32)] for row in range(batch)]
        requests = [TokenRequest(p, max_new_tokens=settings.max_new_tokens, row_id=i) for i, p in enumerate(ids)]
        plain = AutoregressiveDecoder(target)
        scripts = Scripts(ids, plain.decode(requests).output, alpha, vocab)
        curve = _curve(target, draft, scripts, requests, settings)
        best = SpeculativeSettings(draft_length=forecast(Estimate(alpha, None, None), curve).g, schedule="cost")
        drafter = ScriptedDrafter(draft, scripts)
        decoders: dict[str, Decoder] = {
            "automatic": SpeculativeDecoder(target, drafter, settings=best, costs=curve),
            "plain": plain,
        }
        decoders["automatic"].decode(requests)  # warm-up
        ratios = []
        for pair in range(pairs):
            order = list(decoders) if pair % 2 else list(reversed(decoders))
            seconds = {which: decoders[which].decode(requests).seconds for which in order}
            ratios.append(seconds["plain"] / seconds["automatic"])
        found[batch] = median_estimate(torch.tensor(ratios, dtype=torch.float64), seed=settings.seed)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50M", choices=SIZES)
    parser.add_argument("--alpha", type=float, default=0.0, help="set acceptance; 0 is a useless draft")
    parser.add_argument("--batch", default="1,8,16")
    parser.add_argument("--pairs", type=int, default=30)
    given = parser.parse_args(argv)
    settings = BenchSettings(max_new_tokens=64, batches=tuple(int(b) for b in given.batch.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        found = automatic_over_plain(given.size, Path(folder), given.alpha, settings, given.pairs)
    for batch, estimate in found.items():
        print(f"batch {batch}: automatic / plain {asdict(estimate)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
