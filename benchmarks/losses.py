"""Time and memory of the chunked losses against plain ones and torch's own F.linear_cross_entropy.

    python -m benchmarks.losses --vocab 2048,50257 --tokens 1024 --width 256
    python -m benchmarks.losses --vocab 151936 --tokens 4096 --width 1024 --rows torch,emo --memory

A run is forward and backward from hidden states and a trained head, all fp32, labels drawn by Zipf's law (as tokens of
text are: EMO makes the costs of a label once). Times are medians over interleaved repetitions in rotated order, ratios
are taken repetition by repetition. Memory is the peak of private memory beyond the inputs, in a fresh process each.

Rows: naive-ce, naive-emo (everything at once, by autograd); torch, the best of F.linear_cross_entropy whole, chunked by
its own rule, and chunked as ours; ce, kl (stored laws of 64 tokens), emo, emo-128 (costs in 128 directions), emo-again
(recompute), emo-frozen (no gradient for the head).
Shape letters: T tokens, D width, V vocabulary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.memory import MIB, Peak, private_bytes
from draftsmith.inference.laws import TeacherLaw
from draftsmith.modules.losses.chunked_head import chunked_head, naive_head
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.losses.divergence import ce, forward_kl
from draftsmith.modules.losses.emo import EMO

TORCH = ("torch-whole", "torch-auto", "torch-chunked")
ROWS = ("naive-ce", "naive-emo", *TORCH, "ce", "kl", "emo", "emo-128", "emo-again", "emo-frozen")


@dataclass
class Inputs:
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # int64 [T]
    chunk_rows: int | None
    costs: TokenCosts | None = None
    law: TeacherLaw | None = None


def make(row: str, vocab: int, tokens: int, width: int, chunk_rows: int | None = None, seed: int = 0) -> Inputs:
    """Inputs for a row; costs and laws only where the row needs them."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1, dtype=torch.float64)
    labels = torch.multinomial(1 / rank, tokens, replacement=True, generator=g)
    # embeddings of rank 64 and some noise, as trained ones roughly are: a projection then has something to find
    weight = torch.randn(vocab, 64, generator=g) @ torch.randn(64, width, generator=g)
    weight.mul_(2.0 / (8 * width**0.5)).add_(torch.randn(vocab, width, generator=g), alpha=0.01)  # logits of 2 or so
    inputs = Inputs(torch.randn(tokens, width, generator=g), weight, labels, chunk_rows)
    if "emo" in row:
        inputs.costs = TokenCosts.of(weight, project=128 if row == "emo-128" else None)
    if row == "kl":
        ids = torch.randint(vocab // 64, (tokens, 64), generator=g) * 64 + torch.arange(64)
        logp = torch.log_softmax(torch.randn(tokens, 65, generator=g), -1)
        inputs.law = TeacherLaw(ids, logp[:, :64].contiguous(), logp[:, 64].contiguous())
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_(row != "emo-frozen")
    return inputs


def total(row: str, x: Inputs) -> Tensor:
    """The mean loss of a row, differentiable."""
    options: dict[str, Any] = {"chunk_rows": x.chunk_rows, "statistics": False}
    if row in TORCH:
        made = None
        if row == "torch-auto":
            made = torch.nn.LinearCrossEntropyOptions()
        elif row == "torch-chunked":
            rows = x.chunk_rows or max(16, 2**24 // len(x.weight))
            made = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=made)
    if row == "kl":
        assert x.law is not None
        return chunked_head(x.hidden, x.weight, x.law, row_loss=forward_kl, **options).mean
    if "emo" not in row:
        head = naive_head if row == "naive-ce" else chunked_head
        return head(x.hidden, x.weight, x.labels, row_loss=ce, **({} if row == "naive-ce" else options)).mean
    assert x.costs is not None
    if row == "naive-emo":
        return naive_head(x.hidden, x.weight, x.labels, row_loss=EMO(x.costs)).mean
    mode = "recompute" if row == "emo-again" else "grad_in_forward"
    return chunked_head(x.hidden, x.weight, x.labels, row_loss=EMO(x.costs), mode=mode, **options).mean


def step(row: str, inputs: Inputs) -> float:
    """Forward and backward; returns the loss. Gradients are dropped first, as an optimizer does."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss = total(row, inputs)
    loss.backward()
    return float(loss.detach())


def times(
    rows: Sequence[str], vocab: int, tokens: int, width: int, repetitions: int, chunk_rows: int | None = None
) -> dict[str, list[float]]:
    """Seconds per repetition and row; the order of the rows is rotated from one repetition to the next."""
    inputs = {row: make(row, vocab, tokens, width, chunk_rows) for row in rows}
    found: dict[str, list[float]] = {row: [] for row in rows}
    for repetition in range(repetitions + 1):
        for i in range(len(rows)):
            row = rows[(i + repetition) % len(rows)]
            start = time.perf_counter()
            step(row, inputs[row])
            if repetition:  # the first one is for warming up
                found[row].append(time.perf_counter() - start)
            inputs[row].hidden.grad = inputs[row].weight.grad = None
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, repetition by repetition."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    if len(ratios) < 2:
        return {"value": ratios[0]}
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"value": middle, "low": low, "high": high}


def compare(vocab: int, tokens: int, width: int, rows: Sequence[str], repetitions: int, chunk_rows: int | None = None,
            tell: Callable[[str], None] = print) -> dict[str, Any]:  # fmt: skip
    """Times of all rows, and their ratios to torch's fastest form and to naive-emo, where these are among the rows."""
    found = times(rows, vocab, tokens, width, repetitions, chunk_rows)
    medians = {row: statistics.median(values) for row, values in found.items()}
    result: dict[str, Any] = {"vocab": vocab, "tokens": tokens, "width": width, "seconds": medians, "raw": found}
    peers = [row for row in TORCH if row in rows]
    if peers:
        result["best_of_torch"] = best = min(peers, key=medians.__getitem__)
        result["over_torch"] = {row: ratio(found[row], found[best]) for row in rows if row not in TORCH}
    if "naive-emo" in rows:
        result["over_naive"] = {row: ratio(found[row], found["naive-emo"]) for row in rows if row.startswith("emo")}
    tell(f"V {vocab}, T {tokens}, D {width}: " + ", ".join(f"{row} {1e3 * s:.0f} ms" for row, s in medians.items()))
    return result


def memory(row: str, vocab: int, tokens: int, width: int, chunk_rows: int | None = None) -> dict[str, float]:
    """Extra peak bytes, seconds and loss of one forward and backward, in a fresh process of one thread."""
    arguments = [row, str(vocab), str(tokens), str(width), str(chunk_rows or 0)]
    command = [sys.executable, "-m", "benchmarks.losses", "--child", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process that measures {row} failed: {done.stderr.strip().splitlines()[-1:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def child(row: str, vocab: int, tokens: int, width: int, chunk_rows: int) -> dict[str, float]:
    """What `memory` runs."""
    small = make(row, 64 if row != "kl" else 128, 8, 128)
    step(row, small)  # code and thread pools are there
    inputs = make(row, vocab, tokens, width, chunk_rows or None)
    before = private_bytes()
    with Peak() as peak:
        start = time.perf_counter()
        loss = step(row, inputs)
        seconds = time.perf_counter() - start
    return {"extra": peak.bytes - before, "seconds": seconds, "loss": loss}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", default="2048,8192,32768,50257,131072,262144")
    parser.add_argument("--tokens", default="512")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows; torch stands for its three forms")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    if given.child:
        row, *numbers = given.child
        print(json.dumps(child(row, *map(int, numbers))))
        return 0
    rows = [name for word in given.rows.split(",") for name in (TORCH if word == "torch" else (word,))]
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}: choose from torch, {', '.join(ROWS)}")
    results = []
    for vocab in map(int, given.vocab.split(",")):
        for tokens in map(int, given.tokens.split(",")):
            if given.memory:
                for row in rows:
                    found = memory(row, vocab, tokens, given.width, given.chunk_rows)
                    results.append({"row": row, "vocab": vocab, "tokens": tokens, "width": given.width, **found})
                    print(
                        f"V {vocab}, T {tokens}, D {given.width}, {row}: {found['extra'] / MIB:.0f} MiB, "
                        f"{found['seconds']:.2f} s, loss {found['loss']:.6f}",
                        flush=True,
                    )
            else:
                results.append(compare(vocab, tokens, given.width, rows, given.repetitions, given.chunk_rows))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
