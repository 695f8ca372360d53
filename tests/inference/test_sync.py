"""At most one host synchronisation per round, so that the loop is fit for a GPU: counted on every path."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.inference import registry
from draftsmith.inference.costs import CostCurve
from draftsmith.inference.recorder import LawRecorder, RecorderSettings
from draftsmith.inference.requests import DecodeResult, RoundView
from draftsmith.inference.sampling import SamplingParams
from tests.engines import SIZES, tiny_hf
from tests.fakes import markov, near, requests_for

# Operators that must know values on the host (or the size of whose result depends on them).
SYNCING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
# Tensor methods that copy to the host without such an operator.
SYNCING_METHODS = {"tolist", "cpu", "numpy", "__array__"}


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        by_counts = name == "repeat_interleave" and isinstance(args[0], torch.Tensor)
        if name in SYNCING_OPS or by_mask or by_counts:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class MethodCounter(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in SYNCING_METHODS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[str]]:
    """The list of synchronising calls made inside."""
    ops = OpCounter()
    with ops, MethodCounter(ops.seen):
        yield ops.seen


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: int(x[0, 0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2])),
        lambda x: [0, 1, 2][x[0, 0].long()],
    ],
)
def test_the_counter_counts(waits: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(2, 2)
    with counted() as seen:
        waits(x)
    assert len(seen) >= 1


def test_the_counter_counts_nothing_else() -> None:
    x = torch.ones(2, 2)
    with counted() as seen:
        x.softmax(-1).gather(-1, x.long().clamp_max(1)).cumsum(-1).to("cpu", non_blocking=True)[torch.tensor([0])]
    assert seen == []


def networks() -> tuple[Any, Any]:
    from draftsmith.inference.native import NativeEngine
    from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig

    def engine(seed: int) -> NativeEngine:
        hf = tiny_hf("llama", seed, **SIZES)
        net = CausalLM(CausalLMConfig.from_hf(hf.config)).eval()
        net.load_state_dict(hf.state_dict())
        return NativeEngine(net)

    return engine(0), engine(1)


PATHS: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "greedy": (SamplingParams(), {}),
    "sampling": (SamplingParams(temperature=1.0), {}),
    "filters": (SamplingParams(temperature=0.8, top_k=10, top_p=0.9, min_p=0.01), {}),
    "penalties": (
        SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1),
        {},
    ),
    "greedy penalties": (SamplingParams(repetition_penalty=1.2), {}),
    "confidence": (SamplingParams(temperature=1.0), {"schedule": "confidence"}),
    "greedy confidence": (SamplingParams(), {"schedule": "confidence"}),
    "heuristic": (SamplingParams(temperature=1.0), {"schedule": "heuristic"}),
    "cost and fall-back": (SamplingParams(temperature=1.0), {"schedule": "cost", "fallback": "auto"}),
    "by the clock": (SamplingParams(), {"fallback": "measured"}),
    "lockstep": (SamplingParams(temperature=1.0), {"batching": "lockstep"}),
    "lossy": (SamplingParams(), {"lossy_mix": 0.3}),
}


def rounds_of(result: DecodeResult) -> int:
    """Rounds of the whole batch: each one is a target call."""
    return result.nfe["target"]


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorder"])
@pytest.mark.parametrize("path", PATHS)
def test_one_synchronisation_per_round(path: str, recorded: bool) -> None:
    """Ragged rows of different length, which end at different times and are removed from the batch."""
    sampling, settings = PATHS[path]
    target = markov(50, 2)
    recorder = LawRecorder(RecorderSettings(top_k=8)) if recorded else None
    decoder = registry.build(
        "speculative",
        {"target": target, "draft": near(target)},
        sampling=sampling,
        settings={"fallback": "never"} | settings,
        recorder=recorder,
        costs=CostCurve.textbook(0.2),
    )
    requests = [r for n in (3, 9, 30, 31) for r in requests_for([[1], [2, 3, 4]], 2, n, stop_ids=[0], first_row=10 * n)]
    with counted() as seen:
        result = decoder.decode(requests)
    if recorded:  # on a CPU the recorder's copy to the host is no wait: it is `.to("cpu")` of what is there
        assert recorder is not None and len(recorder.finish_all(requests, result)) == len(requests)
    assert rounds_of(result) > 5
    assert len(seen) == rounds_of(result), f"{len(seen)} synchronisations in {rounds_of(result)} rounds: {set(seen)}"


@pytest.mark.parametrize("name", ["autoregressive", "prompt_lookup"])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, repetition_penalty=1.1)])
def test_one_synchronisation_per_round_of_the_others(name: str, sampling: SamplingParams) -> None:
    target = markov(12, 1)
    decoder = registry.build(name, {"target": target}, sampling=sampling)
    with counted() as seen:
        result = decoder.decode(requests_for([[1], [2, 3, 4]], 6, 30))
    assert len(seen) == rounds_of(result)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
def test_one_synchronisation_per_round_with_native_networks(sampling: SamplingParams) -> None:
    """The engine's own forward passes must not wait either, also with ragged rows."""
    target, draft = networks()
    decoder = registry.build(
        "speculative", {"target": target, "draft": draft}, sampling=sampling, settings={"fallback": "never"}
    )
    with counted() as seen:
        result = decoder.decode(requests_for([[1], [2, 3, 4]], 5, 20))
    assert len(seen) == rounds_of(result), set(seen)


def test_a_synchronising_recorder_is_noticed() -> None:
    """Negative control: the count sees what a careless recorder does."""

    def careless(view: RoundView) -> None:
        view.target_logits.sum().item()

    target = markov(12, 2)
    decoder = registry.build("speculative", {"target": target, "draft": target}, recorder=careless)
    with counted() as seen:
        result = decoder.decode(requests_for([[1]], 1, 20))
    assert len(seen) == 2 * rounds_of(result)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9)])
def test_cuda_itself_sees_one_synchronisation_per_round(sampling: SamplingParams) -> None:
    """CUDA's own debug mode warns at each implicit synchronisation."""
    target, draft = networks()
    for engine in (target, draft):
        engine.net.to("cuda")
        engine.net.fuse()
    decoder = registry.build(
        "speculative", {"target": target, "draft": draft}, sampling=sampling, settings={"fallback": "never"}
    )
    decoder.decode(requests_for([[1]], 1, 5))  # warm-up: libraries synchronise when they are loaded
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
            result = decoder.decode(requests_for([[1], [2, 3, 4]], 5, 20))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= rounds_of(result) + 5  # the set-up of the call may wait
