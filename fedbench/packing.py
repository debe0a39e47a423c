"""Packed execution: a text batch without its padding.

The rows of a batch are sorted by length, laid end to end into one row [1, N], and attention runs within each row, in a
few buckets of like length. FFNs, projections and LayerNorms, which treat tokens one by one, never notice; they just no
longer see most of the padding. Within a bucket rows are padded to its longest, so attention is a view of the packed
tensors and needs no gather; a bucket is closed where that padding would exceed `SLACK`.

No encoder is rewritten: the attention goes in through transformers' own registries. The same mathematics as a padded
batch, to rounding (tests hold the two together), in a half to a quarter of the time on CPU for short texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fedbench.data import Batch
from fedbench.linear import stock
from fedbench.models import Parts, family_of

NAME = "fedbench_packed"
SLACK = 0.15
"""A row joins a bucket if it is at most this share shorter than the bucket's longest."""


@dataclass(frozen=True)
class Bucket:
    """`rows` rows of `length` positions each, from `start` of the packed axis; mask [rows, 1, 1, length] or None."""

    start: int
    rows: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch [B, T] lie in the packed row [1, N].

    source: [N] index into the flattened padded batch. position: [N] place in its own row. real: [1, N] False for
    padding left inside a bucket. first: [B] packed place of each row's first token, in the batch's own order.
    """

    source: Tensor
    position: Tensor
    real: Tensor
    first: Tensor
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, attention_mask: Tensor) -> Layout:
        """The layout of a right-padded batch, from its mask [B, T]."""
        device, width = attention_mask.device, attention_mask.shape[1]
        lengths = attention_mask.sum(1).tolist()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for row in order:
            if groups and lengths[row] >= (1 - SLACK) * lengths[groups[-1][0]]:
                groups[-1].append(row)
            else:
                groups.append([row])
        sources, positions, reals, buckets = [], [], [], []
        first = [0] * len(lengths)
        start = 0
        for rows in groups:
            longest = lengths[rows[0]]
            place = torch.arange(longest)
            own = torch.tensor([lengths[row] for row in rows])
            real = place < own[:, None]
            sources.append((torch.tensor(rows)[:, None] * width + place).flatten())
            positions.append(place.repeat(len(rows)))
            reals.append(real.flatten())
            mask = None if lengths[rows[-1]] == longest else real[:, None, None].to(device)
            buckets.append(Bucket(start, len(rows), longest, mask))
            for i, row in enumerate(rows):
                first[row] = start + i * longest
            start += longest * len(rows)
        return cls(
            torch.cat(sources).to(device),
            torch.cat(positions).to(device),
            torch.cat(reals)[None].to(device),
            torch.tensor(first, device=device),
            tuple(buckets),
        )


_layout: ContextVar[Layout] = ContextVar("layout")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each row: query, key, value [1, heads, N, d] -> [1, N, heads, d]."""
    heads, width = query.shape[1], query.shape[3]
    out = []
    for b in _layout.get().buckets:
        end = b.start + b.rows * b.length
        q, k, v = (x[0, :, b.start : end].unflatten(1, (b.rows, b.length)).transpose(0, 1) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=b.mask, dropout_p=dropout, scale=scaling)
        out.append(mixed.transpose(1, 2).reshape(b.rows * b.length, heads, width))
    return (torch.cat(out) if len(out) > 1 else out[0])[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout keeps rows apart; no mask over [N, N] is ever built."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


def pack(inputs: Mapping[str, Tensor], layout: Layout, position_offset: int) -> dict[str, Tensor]:
    """The packed inputs of a padded text batch; positions count from `position_offset` (RoBERTa's is 2)."""
    packed = {
        name: value.flatten().index_select(0, layout.source)[None]
        for name, value in inputs.items()
        if name != "attention_mask"
    }
    return packed | {"position_ids": (layout.position + position_offset)[None]}


@contextmanager
def packing(enabled: bool) -> Iterator[None]:
    """Inside the block batches are packed; or left padded and run by stock modules (the reference executor)."""
    token = stock.set(not enabled)
    try:
        yield
    finally:
        stock.reset(token)


@contextmanager
def feeding(model: nn.Module, batch: Batch, gather: bool = True) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The inputs to call `model` with inside the block, and the mask [B, T] or [1, N] of their real tokens.

    Packed where that is enabled and the family allows it, else as they are. With `gather`, what follows the last layer
    sees the first tokens [B, 1, d] in the batch's order, as a pooler or head expects; without, states stay packed.
    """
    family = family_of(model)
    if stock.get() or batch.mask is None or family.position_offset is None:
        yield batch.inputs, batch.mask
        return
    layout = Layout.of(batch.mask)
    config: Any = model.config
    offset = config.pad_token_id + 1 if family.position_offset == "after padding token" else family.position_offset
    before = config._attn_implementation

    def first_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        gathered = hidden[0].index_select(0, layout.first)[:, None]
        return (gathered, *output[1:]) if isinstance(output, tuple) else gathered

    last = model.get_submodule(family.layers)[-1]  # type: ignore[index]
    hook = last.register_forward_hook(first_tokens) if gather else None
    token = _layout.set(layout)
    config._attn_implementation = NAME
    try:
        yield pack(batch.inputs, layout, offset), layout.real
    finally:
        config._attn_implementation = before
        _layout.reset(token)
        if hook is not None:
            hook.remove()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's answer to a batch, [B, C], in the batch's order."""
    with feeding(model, batch) as (inputs, _):
        out: Tensor = model(**inputs).logits
    return out


def layer_outputs(model: nn.Module, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
    """Hidden states after each transformer layer, [B, T, d] or packed [1, N, d], and the mask of real tokens."""
    parts = Parts(model)
    out: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        out.append(output[0] if isinstance(output, tuple) else output)

    hooks = [parts.layer(i).register_forward_hook(keep) for i in range(parts.count)]
    try:
        with feeding(model, batch, gather=False) as (inputs, mask):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return out, mask
