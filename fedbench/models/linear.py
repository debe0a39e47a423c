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
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fedbench.compat import cpu_has_bf16, has_onednn, laid_out, laid_out_product, plain_lora, watched


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

    def forget(self) -> None:
        """Give the copies up."""
        self._copies = None

    def copy(self, transposed: bool) -> Tensor:
        """The weight, or its transpose, in oneDNN's blocks: both in the dtype that was live for the first of them."""
        if self._copies is None:
            self._copies = (laid_out(self.weight.detach().to(self.live or self.weight.dtype)), None)
        kept, turned = self._copies
        if not transposed:
            return kept
        if turned is None:
            turned = laid_out(self.weight.detach().t().to(kept.dtype).contiguous())
            self._copies = (kept, turned)
        return turned

    def product(self, input: Tensor, transposed: bool = False) -> Tensor:
        """What this layer makes of an input [.., in]; transposed: the gradient of an input, from [.., out]."""
        # A gradient has a bias of zeros: oneDNN compiles a kernel for each number of tokens, in half a millisecond, and
        # with one the products of the two directions share them.
        bias = _zeros(self.in_features, input.dtype) if transposed else self.bias
        bias = None if bias is None else bias.to(input.dtype)
        out: Tensor = laid_out_product(input, self.copy(transposed), bias, "none", [], "")
        return out

    def dtype_for(self, input: Tensor) -> torch.dtype | None:
        """The dtype in which the copies serve an input; None where the weight itself has to."""
        # What nn.Linear would compute in: autocast's dtype, or the input's own.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        return dtype if dtype is self.live and self.usable else None

    def forward(self, input: Tensor) -> Tensor:
        if (dtype := self.dtype_for(input)) is None:
            return super().forward(input)
        input = input.to(dtype)
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out: Tensor = _Product.apply(input, self.bias, self)
            return out
        return self.product(input)


class AdaptedLinear(LoraLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA on a `FrozenLinear`, computed as one function while that layer's reordered copies are live."""

    @classmethod
    def adopt(cls, linear: LoraLinear) -> None:
        """Make `linear` one of these, in place; its parameters stay the same objects."""
        linear.__class__ = cls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            args
            or kwargs
            or (adapter := self.plain_adapter()) is None
            or (dtype := self.base_layer.dtype_for(x)) is None
        ):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        out = _Adapted.apply(x.to(dtype), self.base_layer.bias, *adapter[:2], self.base_layer, adapter[2])
        return out

    def plain_adapter(self) -> Adapter | None:
        """Its LoRA, where all this layer does is to add it to what a `FrozenLinear` computes; else None."""
        if (name := plain_lora(self)) is None or not isinstance(self.base_layer, FrozenLinear):
            return None
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        if any(watched(m) for m in parts):
            return None
        return parts[1].weight, parts[2].weight, self.scaling[name]


_kept: WeakSet[FrozenLinear] = WeakSet()
"""The layers whose copies outlive their block."""


@contextmanager
def reordered(
    *models: nn.Module, gradients: bool = False, precision: str = "fp32", keep: bool = False
) -> Iterator[None]:
    """Let the frozen linear layers of `models` use reordered weights inside the block, where nobody may write to them.

    Copies are made on the way in, which takes some milliseconds: enter it around many batches, and before processes are
    forked. `gradients`: make the transposed copies there too. `precision`: that of the forward passes inside, "fp32"
    or, under autocast, "bf16". `keep`: keep the copies until the next block that keeps some, which checks them against
    the weights; they take as much memory as the weights, twice with gradients. Blocks may nest. Nothing happens where
    torch lacks the operator or the CPU the precision.
    """
    layers = []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if has_onednn and (dtype is torch.float32 or cpu_has_bf16()):
        found = (m for model in set(models) for m in model.modules())
        layers = [m for m in found if isinstance(m, FrozenLinear) and m.live is None]
    for layer in layers:
        layer.refresh(gradients, dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.live = None
            if not keep:
                layer.forget()
        if keep:
            for layer in {*_kept} - {*layers}:
                layer.forget()
            _kept.clear()
            _kept.update(layers)


@cache
def _zeros(n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(n, dtype=dtype)


class _Product(torch.autograd.Function):
    """input [.., in] -> [.., out]; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        wants_input, wants_bias, _ = ctx.needs_input_grad
        return (
            ctx.layer.product(grad.contiguous(), transposed=True) if wants_input else None,
            grad.flatten(0, -2).sum(0, dtype=torch.float32) if wants_bias else None,
            None,
        )


Adapter = tuple[Tensor, Tensor, float]
"""LoRA's a [r, in] and b [out, r], and its scale."""


def adapt(out: Tensor, input: Tensor, adapter: Adapter) -> Tensor:
    """Add to out [N, out] what LoRA makes of input [N, in]; returns its projection [r, N], for `adapt_backward`.

    Products with a side of r elements take a third of the time where that side comes first, hence the transposes.
    """
    a, b, scale = adapter
    low = a.to(input.dtype) @ input.t()
    out.addmm_(low.t(), b.to(input.dtype).t(), alpha=scale)
    return low


def adapt_backward(
    back: Tensor | None, grad: Tensor, input: Tensor, low: Tensor, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b, from that of the output; adds to back [N, in], the gradient of the input, if given."""
    a, b, scale = adapter
    low_grad = (b.t().to(grad.dtype).contiguous() @ grad.t()).mul_(scale)  # [r, N]
    if back is not None:
        back.addmm_(low_grad.t(), a.to(grad.dtype))
    return (low_grad @ input).to(a.dtype), (low @ grad).mul_(scale).t().to(b.dtype)


class _Adapted(torch.autograd.Function):
    """LoRA on a frozen layer: input [.., in], bias [out], a [r, in], b [out, r] -> [.., out]."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, layer: FrozenLinear, scale: float
    ) -> Tensor:
        flat = input.flatten(0, -2)
        out = layer.product(flat)
        ctx.save_for_backward(flat, adapt(out, flat, (a, b, scale)), a, b)
        ctx.layer, ctx.scale, ctx.shape = layer, scale, input.shape
        return out.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, a, b = ctx.saved_tensors
        grad = grads[0].flatten(0, -2).contiguous()
        wants_input, wants_bias, *_ = ctx.needs_input_grad
        back = ctx.layer.product(grad, transposed=True) if wants_input else None
        of_a, of_b = adapt_backward(back, grad, flat, low, (a, b, ctx.scale))
        return (
            None if back is None else back.view(ctx.shape),
            grad.sum(0, dtype=torch.float32) if wants_bias else None,
            of_a,
            of_b,
            None,
            None,
        )
