"""Why a call takes what it takes: bytes of weights to read, arithmetic, calls into torch; memory of compiled kernels.

    python -m benchmarks.profile --size 50M --n 1,6       # random weights
    python -m benchmarks.profile --target DIR --draft DIR

A target call on n tokens reads every weight once, whatever n is: bytes over seconds says how near that comes to the
memory's speed, multiply-adds over seconds how near to the processor's. What is left over is the number of calls into
torch. The last table shows what oneDNN keeps for each number of rows that a weight meets for the first time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import GIVE_BACK, private_bytes
from benchmarks.sizes import SIZES, write_models
from draftsmith.inference.engine import Engine
from draftsmith.inference.load_engine import load_engine

MIB = 2**20
CONTEXT = 64


class Count(TorchDispatchMode):
    """Counts the operators that reach torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def call(engine: Engine, weights: int, n: int, repetitions: int = 30) -> dict[str, float]:
    """One call on n tokens of one row with 64 in its cache, head included. weights: numbers that it must read."""
    cache = engine.new_cache(1, CONTEXT + n)
    ids = torch.arange(CONTEXT + n).remainder(engine.spec.vocab_size).unsqueeze(0)

    def once() -> None:
        hidden, _ = engine.forward(ids[:, CONTEXT:], cache=cache)
        engine.head(hidden)
        cache.truncate([CONTEXT])

    with torch.inference_mode():
        engine.forward(ids[:, :CONTEXT], cache=cache)
        seconds = _median(once, repetitions)
        with Count() as count:
            once()
    size = torch.empty((), dtype=engine.dtype).element_size()
    return {
        "milliseconds": 1e3 * seconds,
        "weights, MiB": weights * size / MIB,
        "GiB per second": weights * size / seconds / 2**30,
        "giga multiply-adds per second": weights * n / seconds / 1e9,
        "calls into torch": count.calls,
        "microseconds per call": 1e6 * seconds / count.calls,
    }


def _median(work: Callable[[], None], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def read_per_call(path: Path) -> int:
    """Numbers of a model directory that a call reads: all but the embedding, of which only the head's copy counts."""
    from safetensors import safe_open

    count = 0
    for file in path.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        tied = "lm_head.weight" not in shapes
        for name, shape in shapes.items():
            if tied or name != "model.embed_tokens.weight":
                count += torch.Size(shape).numel()
    return count


def kernels(target: Path, rows: Sequence[int]) -> dict[int, float]:
    """MiB that stay after the first call on each number of rows; to be run in a fresh process (Linux only)."""
    engine = load_engine(target)
    cache = engine.new_cache(1, CONTEXT + max(rows))
    ids = torch.arange(CONTEXT + max(rows)).remainder(engine.spec.vocab_size).unsqueeze(0)
    found = {}
    with torch.inference_mode():
        engine.head(engine.forward(ids[:, :CONTEXT], cache=cache)[0])
        for n in rows:
            before = private_bytes()
            for _ in range(3):
                engine.head(engine.forward(ids[:, CONTEXT : CONTEXT + n], cache=cache)[0])
                cache.truncate([CONTEXT])
            found[n] = (private_bytes() - before) / MIB
    return found


def profile(target: Path, draft: Path, n: Sequence[int]) -> dict[str, Any]:
    """Everything above for a pair; JSON-ready."""
    engines = {"target": target, "draft": draft}
    calls = {
        f"{role}, {tokens} tokens": call(load_engine(path), read_per_call(path), tokens)
        for role, path in engines.items()
        for tokens in (n if role == "target" else n[:1])
    }
    child = [sys.executable, "-m", "benchmarks.profile", "--kernels", str(target)]
    environment = {**os.environ, **GIVE_BACK}
    done = subprocess.run(child, capture_output=True, text=True, check=True, timeout=600, env=environment)
    return {"calls": calls, "kernels": json.loads(done.stdout.splitlines()[-1])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", default="50M", choices=SIZES)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--n", default="1,6", help="tokens of a target call")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    if given.kernels:
        print(json.dumps(kernels(given.kernels, range(1, 9))))
        return 0
    if (given.target is None) != (given.draft is None):
        parser.error("give both --target and --draft, or neither")
    with tempfile.TemporaryDirectory() as folder:
        target, draft = (given.target, given.draft) if given.target else write_models(Path(folder), given.size)
        found = profile(target, draft, [int(n) for n in given.n.split(",")])
    for name, figures in found["calls"].items():
        print(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in figures.items()))
    print("MiB kept after the first call on n rows: " + ", ".join(f"{n}: {x:.2f}" for n, x in found["kernels"].items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
