"""Layers of a decoder as one function each, forward and backward written out: for short texts on a CPU.

What `fedbench.forward.encoder` is for encoders this is for LLaMA and what is built alike (Touvron et al. 2023):
RMSNorm in front of attention and FFN, rotary positions, keys and values that queries share, and a gated FFN with SiLU.
LoRA goes on any of its products. Where attention does more than that (a window, norms of queries and keys)
transformers' own code runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbench.compat import silu_backward
from fedbench.forward.attention import Bucket, attend, attend_backward
from fedbench.forward.encoder import Layer, Linears, in_order
from fedbench.models.parts import Parts


def causal_layers_of(model: nn.Module) -> list[Layer]:
    """The layers of `model` that can be one function each: all those of a decoder like LLaMA, or none."""
    parts, config = Parts(model), cast(Any, model.config)
    family = parts.family
    if not (family.norms_before and family.reads == "last" and family.rotary and family.ffn_gate and not parts.stacked):
        return []
    if getattr(config, family.activation) not in ("silu", "swish"):
        return []
    layers = [CausalLayer(parts, i) for i in range(parts.count)]
    return [*layers] if all(layer.plain for layer in layers) else []


class CausalLayer(Layer):
    """A layer of a decoder, on a batch in blocks, whose masks hide what comes later."""

    def __init__(self, parts: Parts, i: int) -> None:
        super().__init__(parts, i)
        self.attention = parts.model.get_submodule(parts.attention_paths(i)[0].rpartition(".")[0])
        self.key_heads = int(cast(Any, parts.model.config).num_key_value_heads)

    @staticmethod
    def ffn_paths(parts: Parts, i: int) -> list[str]:
        return [str(parts.ffn_gate_path(i)), *Layer.ffn_paths(parts, i)]

    @property
    def plain(self) -> bool:
        """Whether attention has nothing but its four products, and sees all that lies before a token."""
        names = {name for name, _ in self.attention.named_children()}
        window = getattr(self.attention, "sliding_window", None)
        return len(names) == len(self.projections) and window is None

    def forward(
        self, blocks: Sequence[Bucket], first: Tensor, trimmed: bool, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """hidden [1, N, d] -> [1, N, d]; `position_embeddings`: cosine and sine of each token's angles, [1, N, d_h]."""
        linears, turns = self.linears(hidden, False), kwargs.get("position_embeddings")
        if linears is None or turns is None or hidden.dtype is not torch.float32:
            return type(self.module).forward(self.module, hidden, *args, **kwargs)
        cosine, sine = (x[0, :, None] for x in turns)
        out: Tensor = _Function.apply(hidden[0], self, linears, blocks, cosine, sine, *linears.tuned)
        return out[None]


class _Function(torch.autograd.Function):
    """hidden [N, d], cosine and sine [N, 1, d_h] -> [N, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: CausalLayer,
        linears: Linears,
        blocks: Sequence[Bucket],
        cosine: Tensor,
        sine: Tensor,
        *values: Tensor,
    ) -> Tensor:
        lows: list[Tensor | None] = []
        linear = partial(linears.product, lows)

        width = cosine.shape[-1]
        normed, unit, inverse = _norm(hidden, layer.norms[0])
        query, key, value = (linear(i, normed).unflatten(1, (-1, width)) for i in range(3))
        query, key = (_turned(x, cosine, sine) for x in (query, key))
        shared = layer.heads // layer.key_heads
        if shared > 1:
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        scale = width**-0.5
        heads, weights = attend(query, key, value, blocks, scale)
        mixed = heads.flatten(1)
        mid = linear(3, mixed).add_(hidden)
        inner, mid_unit, mid_inverse = _norm(mid, layer.norms[1])
        gate, wide = linear(4, inner), linear(5, inner)
        active = nn.functional.silu(gate)
        gated = active * wide
        out = linear(6, gated).add_(mid)
        ffn = [inner if any(low is not None for low in lows[4:6]) else None, gated if lows[6] is not None else None]
        ctx.save_for_backward(
            unit, inverse, normed, query, key, value, mixed, mid_unit, mid_inverse, *ffn, gate, wide, active,
            cosine, sine, *lows, *weights,
        )  # fmt: skip
        ctx.layer, ctx.linears, ctx.blocks, ctx.scale, ctx.shared = layer, linears, blocks, scale, shared
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, normed, query, key, value, mixed, mid_unit, mid_inverse, *saved = ctx.saved_tensors
        inner, gated, gate, wide, active, cosine, sine = saved[:7]
        lows, weights, norms = saved[7:14], saved[14:], ctx.layer.norms
        gradients: dict[int, tuple[Tensor, ...]] = {}

        back = partial(ctx.linears.product_backward, lows, gradients)

        grad = grads[0].contiguous()
        of_gated = back(6, grad, gated)
        of_inner = back(5, of_gated * active, inner).add_(back(4, silu_backward(of_gated.mul_(wide), gate), inner))
        grad = _norm_backward(of_inner, mid_unit, mid_inverse, norms[1]).add_(grad)
        heads = back(3, grad, mixed).view_as(query)
        parts = list(attend_backward(heads, query, key, value, weights, ctx.blocks, ctx.scale))
        if ctx.shared > 1:
            parts[1:] = [x.unflatten(1, (-1, ctx.shared)).sum(2) for x in parts[1:]]
        parts[:2] = [_turned(x, cosine, -sine) for x in parts[:2]]
        wanted = ctx.needs_input_grad[0]
        below = [back(i, part.flatten(1), normed, wanted) for i, part in enumerate(parts)]
        total = None
        if wanted:
            of_normed = below[0].add_(below[1]).add_(below[2])
            total = _norm_backward(of_normed, unit, inverse, norms[0]).add_(grad)
        return total, None, None, None, None, None, *in_order(gradients)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [N, heads, d_h] turned by its tokens' angles; with -sine, turned back, which is the gradient's way.

    Dimension i is turned with dimension i + d_h / 2, as LLaMA's weights have it, and both by the same angle.
    """
    half = x.shape[-1] // 2
    out = x * cosine
    out[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return out


def _norm(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x [N, d] (Zhang & Sennrich 2019); x over its root mean square, and the inverse of that, [N, 1]."""
    inverse = x.square().mean(-1, keepdim=True).add_(cast(float, layer.variance_epsilon)).rsqrt_()
    unit = x * inverse
    return unit * cast(Tensor, layer.weight), unit, inverse


def _norm_backward(grad: Tensor, unit: Tensor, inverse: Tensor, layer: nn.Module) -> Tensor:
    """The gradient of what went in, from that of what came out and what `_norm` gave beside it."""
    grad = grad * cast(Tensor, layer.weight)
    along = (grad * unit).mean(-1, keepdim=True)
    return grad.addcmul_(unit, along, value=-1).mul_(inverse)
