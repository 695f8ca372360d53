"""Peak memory of speculative decoding over plain decoding, each in a process of its own. Linux only (/proc).

    python -m benchmarks.memory --size 50M --batch 1,8          # random weights
    python -m benchmarks.memory --target DIR --draft DIR

The claim that is checked: what speculative decoding takes beyond plain decoding is at most the draft's weights and
caches (its own, and the few more slots of the target's) plus 5%. Read is the private resident memory (RssAnon: what the
process cannot give back; pages of mapped files come and go with the kernel's mood), about a hundred times a second
from a thread, while decoding. Both processes import the same modules.

As a process runs, glibc keeps the buffers that loading has freed, and decoding takes from them what it needs. With
--give-back it is told (MALLOC_MMAP_THRESHOLD_) to hand them back at once: then everything that decoding needs shows,
also the kernels that oneDNN compiles and keeps for every shape it meets. They are more than 5% of what a small draft
owns, so the excess is given as a share of plain decoding's peak too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import SIZES, write_models

MIB = 2**20
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc maps every larger buffer on its own, and unmaps it when freed


class Peak:
    """The largest private resident memory of this process, in bytes, between enter and exit."""

    def __enter__(self) -> "Peak":
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._read()

    def _read(self) -> None:
        self.bytes = max(self.bytes, private_bytes())


def private_bytes() -> int:
    """Private resident memory of this process. Raises RuntimeError where /proc does not tell it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this script needs Linux")


def child(mode: str, target_path: Path, draft_path: Path, batch: int, prompt: int, new: int, g: int) -> dict[str, int]:
    """Load, decode, and watch; in the process that is measured."""
    from draftsmith.inference import registry
    from draftsmith.inference.load_engine import load_engine
    from draftsmith.inference.requests import TokenRequest

    registry.get("speculative").settings_type()  # imported for plain decoding too: code is not what is compared
    target = load_engine(target_path)
    parts: dict[str, Any] = {"target": target}
    settings: dict[str, Any] = {}
    if mode == "speculative":
        parts["draft"] = load_engine(draft_path)
        settings = {"draft_length": g, "schedule": "constant", "fallback": "never"}
    decoder = registry.build("speculative" if mode == "speculative" else "autoregressive", parts, settings=settings)
    ids = [[(17 * row + 5 * i) % target.spec.vocab_size for i in range(prompt)] for row in range(batch)]
    requests = [TokenRequest(p, max_new_tokens=new, row_id=i) for i, p in enumerate(ids)]
    with Peak() as peak:
        decoder.decode(requests)
        decoder.decode(requests)
    found = {"decoding_peak": peak.bytes}
    if mode == "speculative":
        draft = parts["draft"]
        capacity = prompt + new
        found["draft_weights"] = sum(path.stat().st_size for path in draft_path.glob("*.safetensors"))
        found["draft_cache"] = draft.new_cache(batch, capacity + g).nbytes()
        more = target.new_cache(batch, capacity + g).nbytes() - target.new_cache(batch, capacity).nbytes()
        found["target_cache_growth"] = more
    return found


def compare(
    target: Path, draft: Path, *, batch: int, prompt: int, new: int, g: int, give_back: bool, repetitions: int = 3
) -> dict[str, Any]:
    """Medians over fresh processes; JSON-ready."""
    environment = {**os.environ, **GIVE_BACK} if give_back else dict(os.environ)
    runs: dict[str, list[dict[str, int]]] = {"plain": [], "speculative": []}
    for _ in range(repetitions):
        for mode, results in runs.items():
            arguments = [str(x) for x in (mode, target, draft, batch, prompt, new, g)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", "--child", *arguments],
                capture_output=True, text=True, check=True, timeout=600,
                env=environment,
            )  # fmt: skip
            results.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = {mode: int(statistics.median(r["decoding_peak"] for r in results)) for mode, results in runs.items()}
    owned = {name: runs["speculative"][0][name] for name in ("draft_weights", "draft_cache", "target_cache_growth")}
    extra, allowed = peaks["speculative"] - peaks["plain"], sum(owned.values())
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "g": g,
        "give_back": give_back,
        "peak_plain": peaks["plain"],
        "peak_speculative": peaks["speculative"],
        **owned,
        "owned": allowed,
        "extra": extra,
        "extra_over_owned": extra / allowed,
        "extra_beyond_owned_of_plain": (extra - allowed) / peaks["plain"],
        "raw": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--size", default="50M", choices=SIZES)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--g", type=int, default=5)
    parser.add_argument("--give-back", action="store_true", help="without what the allocator keeps of loading")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    if given.child:
        mode, target, draft, *numbers = given.child
        print(json.dumps(child(mode, Path(target), Path(draft), *map(int, numbers))))
        return 0
    if (given.target is None) != (given.draft is None):
        parser.error("give both --target and --draft, or neither")
    with tempfile.TemporaryDirectory() as folder:
        target, draft = given.target, given.draft
        if target is None:
            target, draft = write_models(Path(folder), given.size)
        results = []
        for batch in map(int, given.batch.split(",")):
            found = compare(
                target, draft, batch=batch, prompt=given.prompt, new=given.max_new_tokens, g=given.g,
                give_back=given.give_back,
            )  # fmt: skip
            results.append(found)
            mib = {name: value / MIB for name, value in found.items() if isinstance(value, int)}
            print(
                f"batch {batch}: plain {mib['peak_plain']:.1f} MiB, speculative {mib['peak_speculative']:.1f} MiB; "
                f"extra {mib['extra']:.1f} MiB for {mib['owned']:.1f} MiB of the draft's weights and caches: "
                f"{found['extra_over_owned']:.2f} of it, {100 * found['extra_beyond_owned_of_plain']:+.1f}% of plain "
                "beyond it",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
