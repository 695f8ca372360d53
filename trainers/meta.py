"""Runs steps on the `meta` device: shapes and dtypes without data, so that a step of any size is looked at in seconds.

What needs data is answered as a worst case: every position of a mask counts, every number read is finite, of several
ids all but one differ (a repeat is what makes callers keep a copy). Attention takes the fused kernel where the real
device would, since the plain one stores a T x T matrix that real runs do not.
Limits: memory that a kernel takes for itself is not seen, and work that depends on values follows the answers.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_CROSSING = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Within, reads of a meta tensor are answered: numbers are 1, copies to the host are zeros, masks are all true.

    `reads` counts them by kind; each is a synchronisation on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # composite calls arrive whole there
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _check(func, args, kwargs)
        if args and isinstance(args[0], Tensor) and args[0].device.type == "meta":
            return self.run(func, args, kwargs)
        return self.seen(func(*args, **kwargs))

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One call whose first argument is a meta tensor."""
        tensor: Tensor = args[0]
        if func is aten._local_scalar_dense.default:
            self.reads["number"] += 1
            return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.reads["copy"] += 1
            return torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        if func is aten.nonzero.default:
            self.reads["mask"] += 1
            return self.seen(torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device="meta"))
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.reads["mask"] += 1
            args = (tensor, _whole(args[1]))
        if func is aten._unique2.default:
            self.reads["mask"] += 1
            distinct = tensor.new_empty(max(tensor.numel() - 1, min(tensor.numel(), 1)))
            places = torch.empty(tensor.shape, dtype=torch.int64, device="meta")
            return self.seen((distinct, places, distinct.new_empty(0, dtype=torch.int64)))
        return self.seen(func(*args, **kwargs))

    def seen(self, result: Any) -> Any:
        """Every result passes here."""
        return result


def _check(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What a GPU would refuse and the meta device lets pass: tensors of two devices, products of two dtypes."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    kinds = {x.device.type for x in tensors if x.dim() > 0}  # numbers may come from the CPU
    if len(kinds) > 1 and func not in _CROSSING:
        raise RuntimeError(f"{func} got tensors of the devices {', '.join(sorted(kinds))}: expected one")
    if func in _PRODUCTS and len({x.dtype for x in tensors}) > 1:
        raise RuntimeError(f"{func} got tensors of {', '.join(str(x.dtype) for x in tensors)}: expected one dtype")


def _whole(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices whose masks select everything."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [torch.empty(index.numel(), dtype=torch.int64, device="meta") for _ in range(index.dim())]
    return found


@contextmanager
def fused_attention(kind: str) -> Iterator[None]:
    """Within, attention over meta tensors is the kernel that the device `kind` ("cpu", "cuda") would choose.

    The function itself is replaced: a torch function mode is left when a backward pass recomputes activations.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if query.device.type != "meta" or not _fused(kind, query, key, value, settings):
            return plain(query, key, value, *args, **kwargs)
        # its meta kernel takes grouped heads as they are, as fused kernels do
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            float(settings.get("dropout_p", 0.0)),
            bool(settings.get("is_causal", False)),
            attn_mask=settings.get("attn_mask"),
            scale=settings.get("scale"),
        )[0]
        return out

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _fused(kind: str, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether the device takes a fused kernel. GPUs do; the CPU is asked with tensors of one row and two tokens."""
    if kind != "cpu":
        return True
    small = [torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype) for x in (query, key, value)]
    mask = settings.get("attn_mask")
    choice = torch._fused_sdp_choice(
        small[0],
        small[1],
        small[2],
        attn_mask=None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask.dtype),
        is_causal=bool(settings.get("is_causal", False)),
        enable_gqa=bool(settings.get("enable_gqa", False)),
    )
    return choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


@dataclass
class StepTrace:
    """Bytes of a step over its allocations."""

    parameters: int = 0  # of the trained networks
    gradients: int = 0  # of all of them, once made
    largest_gradient: int = 0
    events: list[tuple[int, int]] = field(default_factory=list)  # (bytes beyond parameters, gradients among them)
    forward_events: int = 0  # how many of them come before the backward pass
    reads: Counter[str] = field(default_factory=Counter)

    @property
    def forward(self) -> int:
        """The most that was alive in the forward pass beyond the parameters."""
        return max((live for live, _ in self.events[: self.forward_events]), default=0)

    def backward(self, gradients_kept: float = 1.0) -> int:
        """The most in the backward pass, were only that share of finished gradients kept."""
        events = self.events[self.forward_events :]
        return max((round(live - (1.0 - gradients_kept) * grads) for live, grads in events), default=0)


class _LiveBytes(HostReads):  # type: ignore[no-untyped-call]  # as above
    """Counts the bytes of storages that are alive."""

    def __init__(self, trace: StepTrace) -> None:
        super().__init__()
        self.trace = trace
        self.live = 0
        self.finished = 0  # bytes of gradients that lie in .grad
        self._known: dict[int, int] = {}  # address of a storage -> its bytes

    def seen(self, result: Any) -> Any:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                at, count = storage._cdata, storage.nbytes()
                if at not in self._known and count:
                    self._known[at] = count
                    self.live += count
                    weakref.finalize(storage, self._gone, at)
                    self.trace.events.append((self.live, self.finished))
        return result

    def skip(self, tensor: Tensor) -> None:
        """Leave a tensor out of the count: it was there before."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def _gone(self, at: int) -> None:
        self.live -= self._known.pop(at, 0)

    def finish(self, parameter: Tensor) -> None:
        """A gradient is complete."""
        assert parameter.grad is not None
        count = parameter.grad.untyped_storage().nbytes()
        self.finished += count
        self.trace.largest_gradient = max(self.trace.largest_gradient, count)


def trace_step(
    loss: Callable[[], Tensor], trained: Sequence[nn.Module], held: Iterable[Tensor], device: str
) -> StepTrace:
    """One forward and backward pass on the meta device. `loss` makes a scalar; all modules lie on `meta`.

    Args: held: what lies there beside the trained networks (a teacher's weights), and is no part of the step.
    """
    trace = StepTrace()
    mode = _LiveBytes(trace)
    parameters = list({id(p): p for net in trained for p in net.parameters()}.values())
    trace.parameters = sum(p.numel() * p.element_size() for p in parameters)
    for tensor in (*held, *(t for net in trained for t in (*net.parameters(), *net.buffers()))):
        mode.skip(tensor)
    hooks = []
    for p in parameters:
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(mode.finish))  # type: ignore[no-untyped-call]  # as above
    try:
        with mode, fused_attention(device):
            value = loss()
            trace.forward_events = len(trace.events)
            value.backward()  # type: ignore[no-untyped-call]  # as above
    finally:
        for hook in hooks:
            hook.remove()
    trace.gradients, trace.reads = mode.finished, mode.reads
    for p in parameters:
        p.grad = None
    return trace
