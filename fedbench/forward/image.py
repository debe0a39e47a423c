"""Layers of a vision transformer as one function each, forward and backward written out: for images on a CPU.

Images have no padding to lose. What there is to gain is what `fedbench.forward.encoder` gains for short texts, calls,
and the last layer behind its keys and values, of which a head reads nothing but the first token. A layer here is
pre-norm (Dosovitskiy et al. 2021): LayerNorms with frozen weights stand in front of attention and FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedbench.compat import gelu_backward, softmax_backward
from fedbench.forward.encoder import Layer, Linears, in_order, norm, norm_backward
from fedbench.models.parts import Parts

SHORT = 128
"""The most tokens of an image whose scores are kept: for more torch's kernel, which keeps none, is as fast."""


def image_layers_of(model: nn.Module) -> list[Layer]:
    """The layers of `model` that can be one function each: all those of a pre-norm encoder with GELU, or none."""
    parts, config = Parts(model), cast(Any, model.config)
    possible = (
        parts.family.modality == "image"
        and parts.family.norms_before
        and getattr(config, parts.family.activation) == "gelu"
    )
    return [ImageLayer(parts, i) for i in range(parts.count)] if possible else []


class ImageLayer(Layer):
    """A layer and its parts."""

    def forward(self, trimmed: bool, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden [B, T, d] -> [B, T, d]; `trimmed`: of each image's first token, [B, 1, d]."""
        linears = self.linears(hidden, False)
        if linears is None or any(mask is not None for mask in (*args, kwargs.get("attention_mask"))):
            out = type(self.module).forward(self.module, hidden, *args, **kwargs)
            return out[:, :1] if trimmed else out
        return _Function.apply(hidden, self, linears, trimmed, *linears.tuned)


class _Function(torch.autograd.Function):
    """hidden [B, T, d] -> [B, T, d], or [B, 1, d] of first tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: ImageLayer, linears: Linears, trimmed: bool, *values: Tensor
    ) -> Tensor:
        lows: list[Tensor | None] = []
        linear = partial(linears.product, lows)

        images = len(hidden)
        whole = hidden.flatten(0, 1)
        normed, *statistics = norm(whole, layer.norms[0])
        residual, asked = whole, normed
        if trimmed:
            residual, asked = hidden[:, 0], normed.unflatten(0, (images, -1))[:, 0].contiguous()
        qkv = [
            linear(i, x).view(images, -1, layer.heads, x.shape[1] // layer.heads)
            for i, x in enumerate((asked, normed, normed))
        ]
        mixed, *kept = _attend(*qkv)
        mid = linear(3, mixed).add_(residual)
        inner, *mid_statistics = norm(mid, layer.norms[1])
        wide = linear(4, inner)
        active = nn.functional.gelu(wide)
        out = linear(5, active).add_(mid)
        # A tensor that no adapter reads is not kept.
        tuned = [adapter is not None for adapter in linears.adapters]
        ctx.save_for_backward(
            whole if ctx.needs_input_grad[0] else None,
            *statistics,
            asked if tuned[0] else None,
            normed if any(tuned[1:3]) else None,
            mixed if tuned[3] else None,
            inner if tuned[4] else None,
            active if tuned[5] else None,
            mid,
            *mid_statistics,
            wide,
            *lows,
            *kept,
        )
        ctx.layer, ctx.linears, ctx.trimmed, ctx.images = layer, linears, trimmed, images
        return out.view(images, -1, hidden.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, mean, deviation, asked, normed, mixed, inner, active, mid, *saved = ctx.saved_tensors
        mid_statistics, wide, lows, kept = saved[:2], saved[2], saved[3:9], saved[9:]
        norms, gradients = ctx.layer.norms, dict[int, tuple[Tensor, ...]]()

        back = partial(ctx.linears.product_backward, lows, gradients)

        grad = grads[0].flatten(0, 1).contiguous()
        of_wide = gelu_backward(back(5, grad, active), wide)
        grad = norm_backward(back(4, of_wide, inner), mid, mid_statistics, norms[1]).add_(grad)
        heads = back(3, grad, mixed)
        parts = _attend_backward(heads, ctx.images, ctx.layer.heads, kept)
        wanted = ctx.needs_input_grad[0]
        below = [
            back(i, part, x, wanted) for i, (part, x) in enumerate(zip(parts, (asked, normed, normed), strict=True))
        ]
        total = None
        if wanted:
            of_query, of_key, of_value = below
            total = of_key.add_(of_value)
            first = total.view(ctx.images, -1, total.shape[1])[:, 0] if ctx.trimmed else total
            first.add_(of_query)
            total = norm_backward(total, whole, (mean, deviation), norms[0])
            first = total.view(ctx.images, -1, total.shape[1])[:, 0] if ctx.trimmed else total
            first.add_(grad)
            total = total.view(ctx.images, -1, total.shape[1])
        return total, None, None, None, *in_order(gradients)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """query [B, Q, heads, d], key and value [B, T, heads, d] -> [B·Q, heads·d], and what its gradients need."""
    scale = query.shape[3] ** -0.5
    if query.shape[1] == key.shape[1] > SHORT:
        with torch.enable_grad():
            q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (query, key, value))
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.detach().transpose(1, 2).flatten(2).flatten(0, 1), out, q, k, v
    q, k, v = (_by_head(x) for x in (query, key, value))
    weights = torch.bmm(q, k.mT).mul_(scale).softmax(-1)
    return _by_token(torch.bmm(weights, v), len(query)), weights, q, k, v


def _attend_backward(grad: Tensor, images: int, heads: int, kept: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of query, key and value, as rows [B·Q or B·T, heads·d], from the output's and what was kept."""
    by_head = grad.view(images, -1, heads, grad.shape[1] // heads)
    if kept[0].ndim == 4:
        out, *leaves = kept
        found = torch.autograd.grad(out, leaves, by_head.transpose(1, 2))
        return [x.transpose(1, 2).flatten(2).flatten(0, 1) for x in found]
    weights, q, k, v = kept
    g, scale = _by_head(by_head), q.shape[2] ** -0.5
    scores = softmax_backward(torch.bmm(g, v.mT), weights, -1, weights.dtype)
    dq, dk = (torch.baddbmm(q, a, b, beta=0, alpha=scale) for a, b in ((scores, k), (scores.mT, q)))
    return [_by_token(x, images) for x in (dq, dk, torch.bmm(weights.mT, g))]


def _by_head(x: Tensor) -> Tensor:
    """[B, T, heads, d] -> [B·heads, T, d]."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_token(x: Tensor, images: int) -> Tensor:
    """[B·heads, T, d] -> [B·T, heads·d]."""
    return x.unflatten(0, (images, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
