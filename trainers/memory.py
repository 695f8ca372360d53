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
_MASTER = 4  # bytes of a float32
_MOMENTS = 2  # of AdamW, in the dtype of what it updates
_TEMPORARIES = 2  # AdamW one tensor at a time: sqrt(v), and the denominator made of it


@dataclass(frozen=True)
class Load:
    """What is trained, and in which form."""

    parameters: int  # elements, tied ones once
    largest: int  # elements of the largest parameter
    trace: StepTrace  # of one micro batch, in the dtype that it computes in
    weight_bytes: int  # of a parameter where it is replicated: 4, or 2 for weights kept in bf16
    compute_bytes: int  # of a parameter in the passes: 2 under bf16, else 4
    on_gpu: bool
    teacher: int = 0  # bytes
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
    frozen = {"teacher": load.teacher, "serving": load.serving}
    if stage == REPLICATED:
        return Rank(stage, world_size, _replicated_states(load) | frozen, _replicated_phases(load, world_size))
    settings = zero or {}
    states = _sharded_states(load, stage, world_size, settings)
    return Rank(stage, world_size, states | frozen, _sharded_phases(load, stage, world_size, settings))


def _replicated_states(load: Load) -> dict[str, int]:
    count = load.parameters
    return {"weights": count * load.weight_bytes, "optimizer": count * _MOMENTS * load.weight_bytes}


def _replicated_phases(load: Load, world_size: int) -> dict[str, dict[str, int]]:
    gradients = load.parameters * load.weight_bytes
    held = {"gradients": gradients, "buffers": gradients if world_size > 1 else 0}  # DDP reduces copies of them
    copies = load.parameters * load.compute_bytes if load.compute_bytes < load.weight_bytes else 0  # autocast's
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
        "weights": (load.parameters if stage < 3 else share) * load.compute_bytes,
        "masters": share * _MASTER if stays else 0,  # a copy also where the weights are float32 themselves
        "optimizer": share * _MOMENTS * _MASTER if stays else 0,
    }
    if stage == 3:
        states["gradients"] = share * _MASTER  # one buffer for the run's whole life
        states["buffers"] = _bucket(load, zero)  # likewise
        if load.on_gpu and (zero.get("offload_param") or {}).get("device", "none") != "none":
            states["weights"] = 0
    return states


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
        gathered = load.parameters * load.compute_bytes if world_size > 1 else 0  # alone a rank has all of them
        return {
            "forward": {"activations": trace.forward, "gathered": gathered},
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
