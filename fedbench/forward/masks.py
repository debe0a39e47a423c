"""Which tokens of a row may see which others, where not all see all: in decoders, and within a window.

And what is added to the scores of two tokens by their distance, in MPNet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedbench.forward.attention import Bucket
from fedbench.forward.layout import Layout


class Masks:
    """The buckets of one batch with masks for each kind of attention of a model; made once, used by all its layers."""

    def __init__(self, bias: Callable[[int], Tensor] | None = None) -> None:
        """bias: length -> what is added to the scores of a row of that length, [1, heads, length, length]."""
        self._bias = bias
        self._made: dict[tuple[bool, int | None], tuple[Bucket, ...]] = {}

    def buckets(self, layout: Layout, causal: bool, window: int | None) -> tuple[Bucket, ...]:
        """The layout's buckets, for tokens that see what lies less than `window` from them, and if `causal` no later.

        window: None for all of the row.
        """
        if window is not None and window >= max(b.length for b in layout.buckets):
            window = None
        if not causal and window is None and self._bias is None:
            return layout.buckets
        if (causal, window) not in self._made:
            device = layout.position.device
            made = layout.buckets
            if causal or window is not None:
                made = tuple(_masked(b, layout.blocks, causal, window, device) for b in made)
            if self._bias is not None:
                bias = self._bias(max(b.length for b in made))
                made = tuple(_biased(b, bias) for b in made)
            self._made[causal, window] = made
        return self._made[causal, window]


def _masked(bucket: Bucket, block: bool, causal: bool, window: int | None, device: torch.device) -> Bucket:
    # Within a block rows lie end to end, so distances within a row are those within the block.
    place = torch.arange(bucket.length, device=device)
    back = place[:, None] - place  # how far a query lies behind a key
    hidden = torch.zeros_like(back, dtype=torch.bool)
    if causal:
        hidden |= back < 0
    if window is not None:
        hidden |= back.abs() >= window
    return replace(bucket, mask=_joined(bucket.mask, hidden[None, None], block))


def _biased(bucket: Bucket, bias: Tensor) -> Bucket:
    # Rows lie end to end in a block, so the distance of two tokens of a row is that of their places.
    mask, added = bucket.mask, bias[..., : bucket.length, : bucket.length]
    if mask is not None and not mask.is_floating_point():
        mask = torch.zeros(mask.shape, dtype=bias.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return replace(bucket, mask=added if mask is None else added + mask)


def _joined(mask: Tensor | None, hidden: Tensor, block: bool) -> Tensor:
    """`mask`, as `Bucket` describes it, without the scores that are `hidden` [1, 1, length, length]."""
    if block:
        added = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return added if mask is None else added + mask
    if mask is None:
        return ~hidden
    # Padding sees itself: what sees nothing becomes NaN, which no mask keeps from others.
    itself = torch.eye(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
    return ~hidden & mask | itself
