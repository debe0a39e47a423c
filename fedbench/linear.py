"""Linear layers with frozen weights, laid out once for the CPU's matrix kernels.

Two thirds of a local step are products with frozen weights. oneDNN is some 15% faster at them when the weight has been
reordered beforehand into the blocks its kernels read, which pays only where a weight stays as it is: in training,
evaluation and distillation alike a frozen weight is used thousands of times. The backward pass needs the transposed
weight, kept in the same way. Under bf16 autocast the copies are in bf16, which spares casts of the weight; with
AVX512-BF16 such a product takes half the time. On a CPU, inside a `reordered` block; elsewhere this is `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

stock: ContextVar[bool] = ContextVar("stock", default=False)
"""Set in the reference executor, which runs stock modules on padded batches."""

# The operator behind torch.compile's CPU linear layers; a build of torch without oneDNN lacks it.
_available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def cpu_has_bf16() -> bool:
    """Whether oneDNN has kernels for bf16 on this CPU. Without them torch computes bf16 in ways slower than fp32."""
    return _available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that uses reordered copies of its weight while they are `live` and the weight is frozen.

    They cost the weight's memory once more, and twice where gradients pass through.
    """

    live: torch.dtype | None = None
    """The dtype to compute in with the copies; None outside of a block."""
    _copies: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        """Make `linear` one of these, in place; its parameters stay the same objects."""
        linear.__class__ = cls

    def __getstate__(self) -> dict[str, Any]:
        """Without the reordered copies: torch can neither copy nor pickle them, so neither a model that holds them."""
        return {name: value for name, value in self.__dict__.items() if name not in ("live", "_copies")}

    @property
    def usable(self) -> bool:
        """Whether reordered copies can stand in for the weight."""
        w = self.weight
        return not w.requires_grad and w.dtype is torch.float32 and w.device.type == "cpu"

    @torch.no_grad()
    def refresh(self, gradients: bool, dtype: torch.dtype) -> None:
        """Go live with copies that are, to the bit, the weight in `dtype`.

        It may have been written to in any way since the last time.
        """
        self.live = dtype
        if self._copies is not None:
            kept = self._copies[0]
            if not self.usable or kept.dtype is not dtype or not torch.equal(kept.to_dense(), self.weight.to(dtype)):
                self._copies = None
        if self.usable:
            self.copy(False)
            if gradients:
                self.copy(True)

    @torch.no_grad()
    def copy(self, transposed: bool) -> Tensor:
        """The weight, or its transpose, in oneDNN's blocks: both in the dtype that was live for the first of them."""
        reorder = torch.ops.mkldnn._reorder_linear_weight
        weight = self.weight.detach()
        if self._copies is None:
            self._copies = (reorder(weight.to(self.live or weight.dtype)), None)
        kept, turned = self._copies
        if not transposed:
            return kept
        if turned is None:
            turned = reorder(weight.t().to(kept.dtype).contiguous())
            self._copies = (kept, turned)
        return turned

    def forward(self, input: Tensor) -> Tensor:
        # What nn.Linear would compute in: autocast's dtype, or the input's own.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if dtype is not self.live or not self.usable:
            return super().forward(input)
        input = input.to(dtype)
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out: Tensor = _Product.apply(input, self.bias, self)
            return out
        return _product(input, self.copy(False), self.bias)


@contextmanager
def reordered(*models: nn.Module, gradients: bool = False, precision: str = "fp32") -> Iterator[None]:
    """Let the frozen linear layers of `models` use reordered weights inside the block, where nobody may write to them.

    Copies are made or checked against the weights on the way in, which takes some milliseconds: enter it around many
    batches, and before processes are forked. `gradients`: make the transposed copies there too. `precision`: that of
    the forward passes inside, "fp32" or, under autocast, "bf16". Blocks may nest. Nothing happens in the reference
    executor, or where torch lacks the operator or the CPU the precision.
    """
    layers = []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if _available and not stock.get() and (dtype is torch.float32 or cpu_has_bf16()):
        found = (m for model in set(models) for m in model.modules())
        layers = [m for m in found if isinstance(m, FrozenLinear) and m.live is None]
    for layer in layers:
        layer.refresh(gradients, dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.live = None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """input [.., in] -> [.., out]; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _product(input, layer.copy(False), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        wants_input, wants_bias, _ = ctx.needs_input_grad
        return (
            _product(grad.contiguous(), ctx.layer.copy(True), None) if wants_input else None,
            grad.flatten(0, -2).sum(0, dtype=torch.float32) if wants_bias else None,
            None,
        )
