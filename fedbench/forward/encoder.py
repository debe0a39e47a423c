"""Encoder layers as one function each, forward and backward written out: for short texts on a CPU.

A step on a hundred tokens spends a fifth of its time not on arithmetic but on calling it, module by module and, for
gradients, node by node. Here a layer of a post-norm encoder (BERT, RoBERTa, DistilBERT) is one node: attention, FFN,
residuals and LayerNorms with frozen weights, and LoRA on any of its products. In fp32, on batches in blocks, with the
reordered copies of `fedbench.models.linear`. A layer that somebody watches or tunes otherwise (hooks, biases, dropout)
is computed by transformers' own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbench.compat import gelu_backward, layer_norm_backward, layer_norm_forward, watched
from fedbench.forward.attention import Bucket, attend, attend_backward
from fedbench.models.linear import AdaptedLinear, Adapter, FrozenLinear, adapt, adapt_backward
from fedbench.models.parts import Parts


@dataclass(frozen=True, eq=False)
class Linears:
    """The linear layers of a layer at a call: query, key, value, output, gate if any, up, down; and their LoRA."""

    bases: tuple[FrozenLinear, ...]
    adapters: tuple[Adapter | None, ...]

    @property
    def tuned(self) -> list[Tensor]:
        """a and b of each adapter there is, whose gradients `product_backward` gathers."""
        return [value for adapter in self.adapters if adapter is not None for value in adapter[:2]]

    def product(self, lows: list[Tensor | None], i: int, x: Tensor) -> Tensor:
        """What layer i makes of x [N, in]; appends LoRA's projection to `lows`, so layers are called in their order."""
        out, adapter = self.bases[i].product(x), self.adapters[i]
        lows.append(None if adapter is None else adapt(out, x, adapter))
        return out

    def product_backward(
        self,
        lows: Sequence[Tensor | None],
        gradients: dict[int, tuple[Tensor, ...]],
        i: int,
        grad: Tensor,
        x: Tensor,
        wanted: bool = True,
    ) -> Tensor:
        """The gradient of x, from that of what layer i made of it; None where it is not `wanted`.

        Puts those of a and b into `gradients`. x is looked at by LoRA alone.
        """
        adapter, low = self.adapters[i], lows[i]
        found = self.bases[i].product(grad, transposed=True) if wanted else None
        gradients[i] = () if adapter is None else adapt_backward(found, grad, x, cast(Tensor, low), adapter)
        return cast(Tensor, found)


def in_order(gradients: Mapping[int, tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """The gradients of `Linears.tuned`."""
    return (gradient for i in range(len(gradients)) for gradient in gradients[i])


class Layer:
    """An encoder layer and its parts."""

    def __init__(self, parts: Parts, i: int) -> None:
        get = parts.model.get_submodule
        family, path = parts.family, parts.layer_path(i)
        self.module = parts.layer(i)
        self.projections = [get(p) for p in parts.attention_paths(i)]
        self.ffn = [get(p) for p in self.ffn_paths(parts, i)]
        norms = family.norms_before or (family.attention_norm, family.ffn_norm)
        self.norms = [cast(nn.LayerNorm, get(f"{path}.{p}")) for p in norms]
        self.residual = get(f"{path}.{family.residual}") if family.residual else None
        inside = {m for p in (*self.projections, *self.ffn) for m in p.modules()}
        self.others = [m for m in self.module.modules() if m is not self.module and m not in inside]
        config: Any = parts.model.config
        self.heads = config.num_attention_heads

    @staticmethod
    def ffn_paths(parts: Parts, i: int) -> list[str]:
        """Where the FFN's linear layers are, in the order in which they are called."""
        return [parts.ffn_in_path(i), parts.ffn_out_path(i)]

    def linears(self, hidden: Tensor, trimmed: bool) -> Linears | None:
        """The linear layers, if `_Function` computes what the module would; else None."""
        if self.module.training or any(p.requires_grad for norm in self.norms for p in norm.parameters()):
            return None
        if any(watched(m) for m in self.others if not (trimmed and m is self.residual)):
            return None
        bases, adapters = [], []
        for layer in (*self.projections, *self.ffn):
            adapter = layer.plain_adapter() if isinstance(layer, AdaptedLinear) else None
            base = layer if adapter is None else layer.base_layer
            if watched(layer) or not isinstance(base, FrozenLinear) or base.dtype_for(hidden) is not torch.float32:
                return None
            if base.bias is not None and base.bias.requires_grad:
                return None
            bases.append(base)
            adapters.append(adapter)
        return Linears(tuple(bases), tuple(adapters))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What takes the place of the module's own forward pass."""
        raise NotImplementedError


class TextLayer(Layer):
    """A layer of a post-norm encoder, on a batch in blocks."""

    def forward(
        self, blocks: Sequence[Bucket], first: Tensor, trimmed: bool, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """hidden [1, N, d] -> [1, N, d]; `trimmed`: of each row's first token, [1, B, d], in the batch's order.

        first: packed place of each row's first token, [B], in the batch's order. Where `trimmed`, a hook gives first
        tokens only to the module that adds a layer's input, so that transformers' own code does the same.
        """
        linears = self.linears(hidden, trimmed)
        if linears is None:
            return type(self.module).forward(self.module, hidden, *args, **kwargs)
        # In the blocks rows lie in another order than in the batch.
        in_blocks, row = first.sort() if trimmed else (None, None)
        out: Tensor = _Function.apply(hidden[0], self, linears, blocks, in_blocks, *linears.tuned)
        return out[None] if row is None else out.index_select(0, row.argsort())[None]


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of `model` that can be one function each: all those of a post-norm encoder with GELU, or none."""
    parts, config = Parts(model), cast(Any, model.config)
    possible = parts.family.attention_norm and getattr(config, parts.family.activation) == "gelu"
    return [TextLayer(parts, i) for i in range(parts.count)] if possible else []


@contextmanager
def whole_layers(layers: Sequence[Layer], trimmed: bool, *where: Any) -> Iterator[None]:
    """Inside the block a model computes these layers as one function each, where it can.

    layers: all of the model's, as `layers_of` gives them, or none. trimmed: whether the last one is to give first
    tokens only. where: what the layers' `forward` takes before that: where the batch's tokens lie.
    """
    for layer in layers:
        layer.module.forward = partial(layer.forward, *where, trimmed and layer is layers[-1])
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.__dict__["forward"]


class _Function(torch.autograd.Function):
    """hidden [N, d] -> [N, d]; or [B, d], of the tokens `first` [B], which begin the rows as they lie in the blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: TextLayer,
        linears: Linears,
        blocks: Sequence[Bucket],
        first: Tensor | None,
        *values: Tensor,
    ) -> Tensor:
        residual = hidden if first is None else hidden.index_select(0, first)
        lows: list[Tensor | None] = []
        linear = partial(linears.product, lows)

        query, key, value = (
            linear(i, x).unflatten(1, (layer.heads, -1)) for i, x in enumerate((residual, hidden, hidden))
        )
        scale = query.shape[2] ** -0.5
        heads, weights = attend(query, key, value, blocks, scale, first is not None)
        mixed = heads.flatten(1)
        mid = linear(3, mixed).add_(residual)
        normed, *mid_norm = norm(mid, layer.norms[0])
        wide = linear(4, normed)
        active = nn.functional.gelu(wide)
        end = linear(5, active).add_(normed)
        out, *end_norm = norm(end, layer.norms[1])
        qkv = query, key, value
        # What the FFN's products are given is kept for the gradients of their LoRA alone.
        given = [x if low is not None else None for x, low in zip((normed, active), lows[4:], strict=True)]
        ctx.save_for_backward(
            hidden, residual, first, mixed, mid, *mid_norm, wide, end, *end_norm, *qkv, *given, *lows, *weights
        )
        ctx.layer, ctx.linears, ctx.blocks, ctx.scale = layer, linears, blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, residual, first, mixed, mid, *saved = ctx.saved_tensors
        mid_norm, wide, end, end_norm = saved[:2], saved[2], saved[3], saved[4:6]
        (query, key, value), (normed, active), lows, weights = saved[6:9], saved[9:11], saved[11:17], saved[17:]
        norms, gradients = ctx.layer.norms, dict[int, tuple[Tensor, ...]]()

        back = partial(ctx.linears.product_backward, lows, gradients)

        grad = norm_backward(grads[0].contiguous(), end, end_norm, norms[1])
        inner = gelu_backward(back(5, grad, active), wide)
        grad = norm_backward(back(4, inner, normed).add_(grad), mid, mid_norm, norms[0])
        heads = back(3, grad, mixed).view_as(query)
        parts = attend_backward(heads, query, key, value, weights, ctx.blocks, ctx.scale, first is not None)
        wanted = ctx.needs_input_grad[0]
        below = [
            back(i, part.flatten(1), x, wanted)
            for i, (part, x) in enumerate(zip(parts, (residual, hidden, hidden), strict=True))
        ]
        total = None
        if wanted:
            of_query, of_key, of_value = below
            grad, total = grad.add_(of_query), of_key.add_(of_value)
            total = total.add_(grad) if first is None else total.index_add_(0, first, grad)
        return total, None, None, None, None, *in_order(gradients)


def norm(x: Tensor, layer: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """What `layer` makes of x [N, d], and the mean and inverse deviation of each row, [N, 1]."""
    return layer_norm_forward(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def norm_backward(grad: Tensor, x: Tensor, statistics: Sequence[Tensor], layer: nn.LayerNorm) -> Tensor:
    """The gradient of x [N, d], from that of what `layer` made of it and those statistics."""
    shape, wanted = layer.normalized_shape, [True, False, False]
    return layer_norm_backward(grad, x, shape, *statistics, layer.weight, layer.bias, wanted)[0]
