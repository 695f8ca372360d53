"""Matrix products of a served network: the same numbers, three ways to lay and to multiply a weight.

Decoding multiplies a few rows (1 for a step, g + 1 for a verification) by weights that are read from memory once each.
On the CPU in float32 torch's own `linear` (MKL) does that with one thread for one row and with poor kernels for a few;
oneDNN's kernel is faster for large weights, most of all on a weight that was re-laid for it (`docs/engine.md`). Small
matrices stay with `linear`, whose calls are cheaper.

Shape letters: N rows, I in, O out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 18  # numbers in a weight from which oneDNN's dearer call pays for itself
_ONE_DNN: bool = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Dense:
    """x -> x W^T + b by torch's `linear`; works under autograd."""

    __slots__ = ("bias", "transposed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight  # [O, I]
        self.bias = bias  # [O]
        self.transposed = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return F.linear(x, self.weight, self.bias)

    def plus(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [N, O] + the product of x [N, I]"""
        if self.bias is None:
            return torch.addmm(residual, x, self.transposed)
        return residual + F.linear(x, self.weight, self.bias)


class OneDNN:
    """The same by oneDNN; the weight is an ordinary tensor, or one that `packed` has re-laid."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return y

    def plus(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y


Matrix = Dense | OneDNN


def suits_one_dnn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this weight faster."""
    return _ONE_DNN and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LARGE


def matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """The fastest product that reads the weight where it lies: changes in place are seen."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    return OneDNN(weight, bias) if suits_one_dnn(weight) else Dense(weight, bias)


def packed(weight: Tensor, bias: Tensor | None) -> OneDNN:
    """The product with a re-laid copy of a weight that suits oneDNN. The copy does not follow the original."""
    relaid = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return OneDNN(relaid, None if bias is None else bias.detach().clone())


def joined(linears: Sequence[nn.Linear]) -> Dense:
    """The product of several linears at once, differentiable in their parameters."""
    if len(linears) == 1:
        return Dense(linears[0].weight, linears[0].bias)
    bias = None if linears[0].bias is None else torch.cat([x.bias for x in linears])
    return Dense(torch.cat([x.weight for x in linears]), bias)


def fused(linears: Sequence[nn.Linear], copy: bool = True) -> Matrix:
    """As `joined`, in one storage of which the linears' parameters become views; unset without `copy`."""

    def join(parameters: list[Tensor]) -> Tensor:
        if len(parameters) == 1:
            return parameters[0]
        first = parameters[0]
        shape = (sum(p.shape[0] for p in parameters), *first.shape[1:])
        with torch.inference_mode(False), torch.no_grad():
            joint, start = torch.empty(shape, dtype=first.dtype, device=first.device), 0
            for parameter in parameters:
                part = joint.narrow(0, start, parameter.shape[0])
                if copy:
                    part.copy_(parameter)
                parameter.data = part
                start += parameter.shape[0]
        return joint

    bias = None if linears[0].bias is None else join([x.bias for x in linears])
    return matrix(join([x.weight for x in linears]), bias)
