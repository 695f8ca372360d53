"""`make gpu-smoke`: the short list of checks for a machine with GPUs, and a file that says how each went.

bfloat16, NCCL, torch.compile, decode rounds with their waits for the device counted, one real `draftsmith fit` step of
every shipped config, ZeRO-2 and ZeRO-3 where deepspeed is installed. Development had no GPU: a report of a failure here
is worth more than one of success. Without CUDA it says so and exits with 2.
"""

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from draftsmith.inference import environment, registry
from draftsmith.inference.cli import run_main
from draftsmith.inference.commands._args import parser
from draftsmith.inference.errors import InvalidState
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.trainers import runs, shipped
from draftsmith.trainers.strategies import ZERO

_SIZES = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_FIT_SECONDS = 1200  # of one `draftsmith fit`, its data preparation included
_SKIPPED = "demo/"  # `draftsmith demo` runs these, with paths and sizes of its own


@dataclass(frozen=True)
class Outcome:
    """One check."""

    name: str
    ok: bool
    seconds: float
    detail: str  # what was measured, or how it failed


def main(argv: list[str]) -> int:
    """Run the list. Returns 0 when all is well, 1 when a check failed. Raises InvalidState without a GPU."""
    made = parser("gpu-smoke", "Check this machine's GPUs with draftsmith.", "make gpu-smoke")
    made.prog = "python -m draftsmith.trainers.gpu_smoke"
    made.add_argument("--json", type=Path, default=Path("gpu-smoke.json"), metavar="FILE", help="where the result goes")
    given = made.parse_args(argv)
    if not torch.cuda.is_available():
        raise InvalidState(
            "no GPU: gpu-smoke needs CUDA (torch.cuda.is_available() is false); nothing was checked or written"
        )
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="draftsmith-gpu-smoke-") as folder:
        for name, check in checks(Path(folder)):
            outcomes.append(attempt(name, check))
            print(line(outcomes[-1]), file=sys.stderr, flush=True)
            report(given.json, outcomes)
    failed = [o.name for o in outcomes if not o.ok]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed; {given.json}")
    return 1 if failed else 0


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and function of each check, in order. A function returns what it saw, or raises."""
    yield "bfloat16", lambda: bfloat16("cuda")
    yield "nccl", lambda: collectives("nccl", "cuda", folder)
    yield "compile", lambda: compiled("cuda")
    for name in registry.names():
        for greedy in (True, False):
            kind = "greedy" if greedy else "sampled"
            yield f"decode {name}, {kind}", lambda name=name, greedy=greedy: decode_round(name, greedy, "cuda")  # type: ignore[misc]  # the defaults bind the loop's values
    for words in fits(folder):
        yield " ".join(["fit", *words[:2]]), lambda words=words: fit(folder, words)  # type: ignore[misc]  # as above


def attempt(name: str, check: Callable[[], str]) -> Outcome:
    """Run one check; whatever it raises is its outcome, so that the list goes on."""
    begin = time.perf_counter()
    try:
        ok, detail = True, check()
    except Exception as e:  # noqa: BLE001  # a broken driver raises anything, and the next check may still tell something
        ok, detail = False, f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"
    return Outcome(name, ok, round(time.perf_counter() - begin, 3), detail)


def line(outcome: Outcome) -> str:
    return f"{'ok    ' if outcome.ok else 'FAILED'} {outcome.name} ({outcome.seconds:.1f} s): {outcome.detail}"


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def report(path: Path, outcomes: list[Outcome]) -> None:
    """Write the result so far: machine, GPUs, versions, commit, checks."""
    count = torch.cuda.device_count()
    content = {
        "machine": environment.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "cuda": torch.version.cuda,
        "nccl": _nccl() if count else None,
        "versions": environment.versions(),
        "commit": environment.git(Path(__file__).resolve().parent.parent, "rev-parse", "HEAD"),
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    runs.write_json(path, content)


# --- the checks; each takes its device, so that its logic can be tested without a GPU


def bfloat16(device: str) -> str:
    """A product in bfloat16 is that of float32, up to its rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    exact = a.bfloat16().double() @ b.bfloat16().double()
    error = ((a.bfloat16() @ b.bfloat16()).double() - exact).abs().max() / exact.abs().max()
    if not error < 1e-2:
        raise InvalidState(f"the product is off by {float(error):.1e} of its largest entry, at most 1e-2 is rounding")
    return f"largest error {float(error):.1e} of the largest entry"


def collectives(backend: str, device: str, folder: Path) -> str:
    """The process group's backend starts and sums, in a group of one; several ranks are `fit`'s check."""
    store = FileStore(str(folder / f"store-{backend}"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        x = torch.ones(1024, device=device)
        torch.distributed.all_reduce(x)
        total = float(x.sum())
    finally:
        torch.distributed.destroy_process_group()
    if total != 1024:
        raise InvalidState(f"all_reduce over one rank gave {total}, not 1024")
    return f"{backend} sums"


def compiled(device: str, backend: str = "inductor") -> str:
    """torch.compile of a training body gives the same hidden states, and how fast."""
    from draftsmith.modules.hf_model import HFModel, last_hidden

    dtype = "bfloat16" if device == "cuda" else "float32"
    torch.manual_seed(0)
    model = HFModel(arch=_SIZES, dtype=dtype).build().to(device).eval()
    ids = torch.arange(2 * 64, device=device).view(2, 64)
    with torch.no_grad():
        plain = last_hidden(model, ids).float()
        model.model.compile(backend=backend)
        fast = last_hidden(model, ids).float()
        times = [_seconds(lambda: last_hidden(model, ids), device) for _ in range(5)]
    error = float((plain - fast).abs().max())
    if not error < (0.1 if dtype == "bfloat16" else 1e-4):
        raise InvalidState(f"compiled and plain hidden states differ by {error:.1e}")
    return f"differs by {error:.1e}; {1e3 * min(times):.2f} ms a pass"


def _seconds(function: Callable[[], Any], device: str) -> float:
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def engine(device: str) -> NativeEngine:
    """A small served network with random weights."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    net = CausalLM(CausalLMConfig.from_hf(AutoConfig.for_model(**_SIZES)))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.05)
    return NativeEngine(net.to(device, torch.bfloat16).eval().requires_grad_(False))


def decode_round(name: str, greedy: bool, device: str) -> str:
    """Rounds of a decoder wait for the device once each. Raises InvalidState when they wait more often."""
    parts = {role: engine(device) for role in registry.get(name).needs}
    sampling = SamplingParams() if greedy else SamplingParams(temperature=0.8, top_p=0.9)
    known = {f.name for f in dataclasses.fields(registry.get(name).settings_type())}
    wished = {"draft_length": 4, "schedule": "constant", "fallback": "never"}
    settings = {key: value for key, value in wished.items() if key in known}
    made = registry.build(name, parts, sampling=sampling, settings=settings, seed=0)
    requests = [TokenRequest((7, 8, 9) * 4, max_new_tokens=24, row_id=i) for i in range(2)]
    made.decode(requests)  # kernels are loaded, caches of tensors filled
    waits: list[str] = []
    by_row: Counter[int] = Counter()
    stream = made.stream(requests)
    begin = time.perf_counter()
    with counted_waits(waits, device):
        for commit in stream:
            by_row[commit.row] += 1
    seconds = time.perf_counter() - begin
    rounds = max(by_row.values())
    first = 1  # the prompts go to the device once
    each = 2 if "adapt" in known else 1  # a table that learns reads what the target said, too
    if len(waits) > each * rounds + first:
        raise InvalidState(f"{len(waits)} waits for the device in {rounds} rounds, {each} each is enough: {waits[0]}")
    return f"{len(waits)} waits in {rounds} rounds, {1e3 * seconds / rounds:.2f} ms a round"


@contextlib.contextmanager
def counted_waits(found: list[str], device: str) -> Iterator[None]:
    """Within, every wait for the GPU is noted (torch warns of each); on a CPU there is none to note."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(w.message) for w in caught if "synchroniz" in str(w.message).lower()]


def fits(folder: Path) -> list[list[str]]:
    """The arguments of each `draftsmith fit`: every shipped config, then the strategies on the debug one."""
    target = str(folder / "target")
    found = []
    for name in sorted(shipped.names(), key=lambda name: name != "lm/debug"):  # the first makes the others' target
        if name.startswith(_SKIPPED):
            continue
        words = ["-c", name, "--trainer.strategy=auto", *_one_step()]
        if name.startswith("osd/"):
            words.append(f"--model.draft.path={target}")
            online = "OnlineDataModule" in shipped.resolve(name).read_text("utf-8")
            words += [f"--data.target={target}"] if online else [f"--model.teacher.path={target}"]
            words += ["--data.serve.limit=16"] if online else [f"--data.text.tokenizer={target}"]
            words += [] if online else ["--data.text.length=64"]
        found.append(words)
    count = torch.cuda.device_count()
    strategies = (["ddp"] if count > 1 else []) + ([s for s in ZERO if s in ("zero2", "zero3")] * bool(_deepspeed()))
    for strategy in strategies:
        found.append(["-c", "lm/debug", f"--trainer.strategy={strategy}", *_one_step(devices=count)])
    return found


def _deepspeed() -> bool:
    return find_spec("deepspeed") is not None


def _one_step(devices: int = 1) -> list[str]:
    return [
        *("--trainer.accelerator=gpu", f"--trainer.devices={devices}", "--trainer.num_nodes=1"),
        *("--trainer.precision=bf16-mixed", "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1"),
        *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"),
    ]


def fit(folder: Path, words: list[str]) -> str:
    """One real step in a process of its own. The debug language model's export is the target of the others."""
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    done = _draftsmith("fit", *words, f"--run={run}")
    target = folder / "target"
    if not target.exists():
        _draftsmith("export", str(run), str(target))
    loss = next((row.split()[-1] for row in done.splitlines() if row.startswith("train/loss")), "?")
    return f"loss {loss}"


def _draftsmith(*words: str) -> str:
    """The stdout of a command. Raises InvalidState with its last line when it fails."""
    command = [sys.executable, "-m", "draftsmith.inference.cli", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_FIT_SECONDS)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InvalidState(f"draftsmith {words[0]} ended with code {done.returncode}: {said[0]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "gpu-smoke"))
