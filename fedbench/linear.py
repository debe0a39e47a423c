"""Linear layers with frozen weights, laid out once for the CPU's matrix kernels.

Two thirds of a local step are products with frozen weights. oneDNN is some 15% faster at them when the weight has been
reordered beforehand into the blocks its kernels read, which pays only where a weight stays as it is: in training,
evaluation and distillation alike a frozen weight is used thousands of times. The backward pass needs the transposed
weight, kept in the same way. fp32 on a CPU; everywhere else, and in the reference executor, this is `nn.Linear`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

stock: ContextVar[bool] = ContextVar("stock", default=False)
"""Set in the reference executor, which runs stock modules on padded batches."""

# The operator behind torch.compile's CPU linear layers; a build of torch without oneDNN lacks it.
_available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that uses a reordered copy of its weight while the weight is frozen.

    The copy is made at first use and made anew when the weight has changed. It costs the weight's memory once more, and
    twice where gradients pass through.
    """

    _reordered: tuple[tuple[int, int], dict[bool, Tensor]] | None = None

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        """Make `linear` one of these, in place; its parameters stay the same objects."""
        linear.__class__ = cls

    def reordered(self, transposed: bool) -> Tensor:
        """The weight, or its transpose, in oneDNN's blocks."""
        stamp = (self.weight.data_ptr(), self.weight._version)
        if self._reordered is None or self._reordered[0] != stamp:
            self._reordered = (stamp, {})
        copies = self._reordered[1]
        if transposed not in copies:
            with torch.no_grad():
                weight = self.weight.t().contiguous() if transposed else self.weight
                copies[transposed] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return copies[transposed]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            not _available
            or stock.get()
            or weight.requires_grad
            or weight.dtype is not torch.float32
            or input.dtype is not torch.float32
            or weight.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out: Tensor = _Product.apply(input, self.bias, self)
            return out
        return _product(input, self.reordered(False), self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """input [.., in] -> [.., out]; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _product(input, layer.reordered(False), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        wants_input, wants_bias, _ = ctx.needs_input_grad
        return (
            _product(grad.contiguous(), ctx.layer.reordered(True), None) if wants_input else None,
            grad.flatten(0, -2).sum(0) if wants_bias else None,
            None,
        )
