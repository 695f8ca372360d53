"""What a training step holds on one rank, by parts, without ZeRO and for each of its stages.

Sources: the allocations of torch's AdamW, of DistributedDataParallel (its buckets beside the gradients) and of
DeepSpeed 0.19's stage_1_and_2.py and stage3.py, read in their code and held to measurements (docs/scaling.md). The
phases of a step compete for the peak: forward, backward, the reduction of gradients, the optimizer.
"""

from dataclasses import dataclass, field
from typing import Any

from draftsmith.trainers.meta import StepTrace

REPLICATED = 0  # the stage of single and ddp
_DEFAULT_BUCKET = 500_000_000  # elements, DeepSpeed's reduce_bucket_size
_DEFAULT_PREFETCH = 50_000_000  # ... and its stage3_prefetch_bucket_size
_DEFAULT_LIVE = 1_000_000_000  # ... and its stage3_max_live_parameters
_MASTER = 4  # bytes of a float32
_MOMENTS = 2  # of AdamW, in the dtype of what it updates
_TEMPORARIES = 2  # AdamW one tensor at a time: sqrt(v), and the denominator made of it


@dataclass(frozen=True)
class Pieces:
    """A teacher whose body the ranks share under ZeRO-3 (ZeRO's partition_teacher)."""

    body: int  # elements
    head: int  # elements; whole on every rank
    largest: int  # elements of a module's own parameters, which are gathered together
    size: int  # bytes of an element

    def held(self, world_size: int) -> int:
        """Bytes that lie on a rank between two steps."""
        return (-(-self.body // world_size) + self.head) * self.size

    def gathered(self, world_size: int, zero: dict[str, Any]) -> int:
        """Bytes while it runs: a module goes when it has run, and those that follow are fetched ahead."""
        ahead = int(zero.get("stage3_prefetch_bucket_size", _DEFAULT_PREFETCH))
        return min(self.body, self.largest + ahead, _live(zero)) * self.size if world_size > 1 else 0


@dataclass(frozen=True)
class Load:
    """What is trained, and in which form."""

    parameters: int  # elements, tied ones once
    largest: int  # elements of the largest parameter
    trace: StepTrace  # of one micro batch, in the dtype that it computes in
    weight_bytes: int  # of a parameter where it is replicated: 4, or 2 for weights kept in bf16
    compute_bytes: int  # of a parameter in the passes: 2 under bf16, else 4
    on_gpu: bool
    frozen: int = 0  # elements of the trained networks that do not learn (below adapters)
    frozen_bytes: int = 0  # of them where they are replicated
    costs: int = 0  # bytes: EMO's token costs
    teacher: int = 0  # bytes, whole
    pieces: Pieces | None = None  # how the ranks would share it under ZeRO-3; None: each has a whole one
    serving: int = 0  # bytes: target, served copies and caches of the online loop, caches of written answers


@dataclass(frozen=True)
class Rank:
    """Bytes on one rank: `always`, and what each phase adds."""

    stage: int
    world_size: int
    always: dict[str, int]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + sum(self.phases[self.phase].values())


def rank(load: Load, stage: int, world_size: int, zero: dict[str, Any] | None = None) -> Rank:
    """The memory of one rank.

    Args: stage: 0 (single or ddp), 1, 2 or 3. zero: the `zero_optimization` part of a DeepSpeed config (its buckets).
    """
    shared = load.pieces if stage == 3 else None
    teacher = load.teacher if shared is None else shared.held(world_size)
    frozen = {"costs": load.costs, "teacher": teacher, "serving": load.serving}
    if stage == REPLICATED:
        return Rank(stage, world_size, _replicated_states(load) | frozen, _replicated_phases(load, world_size))
    settings = zero or {}
    states = _sharded_states(load, stage, world_size, settings)
    return Rank(stage, world_size, states | frozen, _sharded_phases(load, stage, world_size, settings))


def _replicated_states(load: Load) -> dict[str, int]:
    count = load.parameters
    weights = count * load.weight_bytes + load.frozen_bytes
    return {"weights": weights, "optimizer": count * _MOMENTS * load.weight_bytes}


def _replicated_phases(load: Load, world_size: int) -> dict[str, dict[str, int]]:
    gradients = load.parameters * load.weight_bytes
    held = {"gradients": gradients, "buffers": gradients if world_size > 1 else 0}  # DDP reduces copies of them
    every = load.parameters + load.frozen
    copies = every * load.compute_bytes if load.compute_bytes < load.weight_bytes else 0  # autocast's
    backward = load.trace.backward() - load.trace.gradients
    return {
        # Lightning drops a step's gradients after the next forward pass
        "forward": {**held, "activations": load.trace.forward + copies},
        "backward": {**held, "activations": max(0, backward) + copies},
        "optimizer": {**held, "temporaries": _temporaries(load, load.weight_bytes)},
    }


def _temporaries(load: Load, size: int) -> int:
    """On GPUs AdamW takes all parameters at once and keeps one list of temporaries."""
    return load.parameters * size if load.on_gpu else _TEMPORARIES * load.largest * size


def _sharded_states(load: Load, stage: int, world_size: int, zero: dict[str, Any]) -> dict[str, int]:
    share = -(-load.parameters // world_size)
    # a CPU rank has nowhere else to put what is offloaded
    stays = not load.on_gpu or (zero.get("offload_optimizer") or {}).get("device", "none") == "none"
    states = {
        "weights": _at_work(load) if stage < 3 else -(-_at_work(load) // world_size),
        "masters": share * _MASTER if stays else 0,  # a copy also where the weights are float32 themselves
        "optimizer": share * _MOMENTS * _MASTER if stays else 0,
    }
    if stage == 3:
        states["gradients"] = share * _MASTER  # one buffer for the run's whole life
        states["buffers"] = _bucket(load, zero)  # likewise
        if load.on_gpu and (zero.get("offload_param") or {}).get("device", "none") != "none":
            states["weights"] = 0
    return states


def _at_work(load: Load) -> int:
    """Bytes of the trained networks as they compute."""
    return (load.parameters + load.frozen) * load.compute_bytes


def _live(zero: dict[str, Any]) -> int:
    """Elements that ZeRO-3 keeps gathered at most."""
    return int(zero.get("stage3_max_live_parameters", _DEFAULT_LIVE))


def _bucket(load: Load, zero: dict[str, Any]) -> int:
    """Bytes of the bucket in which gradients are reduced; two with overlap. On a CPU only what is filled is there."""
    size = _bucket_size(zero)
    filled = size if load.on_gpu else min(size, load.parameters)
    return filled * load.compute_bytes * (2 if zero.get("overlap_comm") else 1)


def _bucket_size(zero: dict[str, Any]) -> int:
    """Elements."""
    return int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET))


def _sharded_phases(load: Load, stage: int, world_size: int, zero: dict[str, Any]) -> dict[str, dict[str, int]]:
    share, trace = -(-load.parameters // world_size), load.trace
    bucket, size = _bucket(load, zero), _bucket_size(zero)
    temporaries = (1 if load.on_gpu else _TEMPORARIES) * share * _MASTER
    if stage == 3:
        # alone a rank has all of them
        gathered = min(_at_work(load), _live(zero) * load.compute_bytes) if world_size > 1 else 0
        teacher = 0 if load.pieces is None else load.pieces.gathered(world_size, zero)  # it runs before the others
        return {
            "forward": {"activations": trace.forward, "gathered": max(gathered, teacher)},
            "backward": {"activations": max(0, trace.backward(0.0)), "gathered": gathered},
            # reduce-scatter joins the bucket's parts in a copy, and gloo reduces a copy of that
            "reduction": {"gathered": gathered, "temporaries": bucket if load.on_gpu else 2 * bucket},
            "optimizer": {"temporaries": share * _MASTER + temporaries},
        }
    kept = share * load.compute_bytes  # this rank's part, copied out of the bucket
    return {
        "forward": {"activations": trace.forward},
        "backward": {"activations": max(0, trace.backward() - trace.gradients), "buffers": bucket},
        # several ranks reduce a copy of the bucket; this rank's part is copied out of it then, of earlier ones before
        "reduction": {
            "buffers": bucket,
            "temporaries": bucket if world_size > 1 else 0,
            "gradients": kept if world_size == 1 or load.parameters > size else 0,
        },
        "optimizer": {"gradients": kept + share * _MASTER, "temporaries": temporaries},
    }
