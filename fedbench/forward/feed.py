"""Packed execution: a text batch without its padding.

The rows of a batch are sorted by length, laid end to end into one row [1, N], and attention runs within each row. FFNs,
projections and LayerNorms, which treat tokens one by one, never notice; they just no longer see most of the padding.

Attention runs in buckets of rows of like length, padded to the longest, which makes them views of the packed tensors; a
bucket is closed where that padding would exceed `SLACK`. On a CPU, rows of up to `SHORT` tokens form blocks instead:
end to end without any padding, each token scored against all of its block, and scores between rows removed. That takes
few calls, on products large enough to be worth one. (Where several clients share a pass in segments of equal size,
`Layout.of_segments`, attention gathers its buckets.)

A head reads the first token of each row, so whatever follows the attention of the last layer is computed for first
tokens only: an eighth of a model of six layers, which nothing would have read.

No encoder is rewritten: the attention goes in through transformers' own registries. The same mathematics as a padded
batch, to rounding (tests hold the two together), in a half to a quarter of the time on CPU for short texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fedbench.data.examples import Batch
from fedbench.forward.attention import Bucket, attend, attend_backward
from fedbench.forward.encoder import whole_layers
from fedbench.models.linear import stock
from fedbench.models.parts import Parts, family_of

NAME = "fedbench_packed"
SLACK = 0.15
"""A row joins a bucket if it is at most this share shorter than the bucket's longest."""
BLOCK = 64
"""Most tokens in a block of several rows."""
SHORT = 128
"""The longest row that goes into a block: for longer ones torch's kernel, which keeps no scores, is as fast."""
SEGMENT_SLACK = 0.5
"""The same where only attention pays for a bucket's padding, and every bucket costs calls."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch [B, T] lie in the packed row [1, N].

    source: [N] index into the flattened padded batch. position: [N] place in its own row. real: [1, N] False for
    padding. first: packed place of each row's first token, in the batch's own order. sizes: positions of each client,
    whose rows lie together. blocks: whether its buckets are blocks. gather, scatter: [M] and [N], from the packed row
    to that of the buckets and back; None where the two are one.
    """

    source: Tensor
    position: Tensor
    real: Tensor
    first: Tensor
    buckets: tuple[Bucket, ...]
    sizes: tuple[int, ...]
    blocks: bool = False
    gather: Tensor | None = None
    scatter: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor) -> Layout:
        """The layout of a right-padded batch, from its mask [B, T]."""
        return cls.of_clients([attention_mask.sum(1).tolist()], attention_mask.shape[1], attention_mask.device)

    @classmethod
    def of_clients(cls, lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Layout:
        """The layout of a batch that holds the rows of one client after another, each client in buckets of its own.

        `lengths`: tokens of each row of each client. `width`: of the padded batch. Nothing but the padding inside
        buckets is added, which suits a device where time goes by tokens. In blocks on a CPU, where no row is long.
        """
        sources, positions, reals, buckets, sizes, first = [], [], [], [], [], []
        blocks = device.type == "cpu" and max(map(max, lengths)) <= SHORT
        start = before = 0
        for own in lengths:
            places = [0] * len(own)
            begin = start
            for rows in _filled(own, BLOCK) if blocks else _alike(own, SLACK):
                row, tokens = torch.tensor(rows), torch.tensor([own[r] for r in rows])
                held = tokens if blocks else tokens[:1].expand(len(rows))  # the positions of each row
                offset = held.cumsum(0) - held
                place = torch.arange(int(held.sum())) - offset.repeat_interleave(held)
                real = place < tokens.repeat_interleave(held)
                sources.append((row + before).repeat_interleave(held) * width + place)
                positions.append(place)
                reals.append(real)
                if blocks:
                    whose = row.repeat_interleave(held)
                    mask = torch.zeros(len(place), len(place)).masked_fill(whose[:, None] != whose, -torch.inf)
                    buckets.append(Bucket(start, 1, len(place), mask[None, None] if len(rows) > 1 else None, offset))
                else:
                    buckets.append(Bucket(start, len(rows), own[rows[0]], _padding([own[r] for r in rows], device)))
                for r, o in zip(rows, offset.tolist(), strict=True):
                    places[r] = start + o
                start += len(place)
            before += len(own)
            first += places
            sizes.append(start - begin)
        return cls(
            torch.cat(sources).to(device),
            torch.cat(positions).to(device),
            torch.cat(reals)[None].to(device),
            torch.tensor(first, device=device),
            tuple(buckets),
            tuple(sizes),
            blocks,
        )

    @classmethod
    def of_segments(cls, lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Layout:
        """The same in a segment of equal size for each client, with buckets over the rows of all clients.

        Every segment is as long as the longest client's tokens, and `first` holds as many rows for each client as the
        largest has. Few buckets and one batched product for all clients suit a device where time goes by calls.
        """
        size, most = max(map(sum, lengths)), max(map(len, lengths))
        source = torch.empty(len(lengths), size, dtype=torch.int64)
        position = torch.zeros(len(lengths), size, dtype=torch.int64)
        real = torch.zeros(len(lengths), size, dtype=torch.bool)
        first = torch.empty(len(lengths), most, dtype=torch.int64)
        starts: list[int] = []
        row = 0
        for c, own in enumerate(lengths):
            # Whatever fills up is the client's own: no value of one client, not even NaN, ever reaches another.
            source[c], first[c] = row * width, c * size
            place = 0
            for i, n in enumerate(own):
                source[c, place : place + n] = torch.arange(row * width, row * width + n)
                position[c, place : place + n] = torch.arange(n)
                first[c, i] = c * size + place
                starts.append(c * size + place)
                place += n
                row += 1
            real[c, :place] = True
        every = [n for own in lengths for n in own]
        gathers, buckets, start = [], [], 0
        slots = torch.empty(len(every), dtype=torch.int64)
        scatter = torch.empty(len(lengths) * size, dtype=torch.int64)
        for rows in _alike(every, SEGMENT_SLACK):
            longest = every[rows[0]]
            place_of, mask = torch.arange(longest), _padding([every[row] for row in rows], device)
            last = torch.tensor([every[row] - 1 for row in rows])[:, None]
            gathers.append((torch.tensor([starts[row] for row in rows])[:, None] + place_of.minimum(last)).flatten())
            buckets.append(Bucket(start, len(rows), longest, mask))
            for i, row in enumerate(rows):
                slots[row] = start + i * longest
                scatter[starts[row] : starts[row] + every[row]] = torch.arange(every[row]) + slots[row]
            start += longest * len(rows)
        row = 0
        for c, own in enumerate(lengths):
            scatter[c * size + sum(own) : (c + 1) * size] = slots[row]
            row += len(own)
        return cls(
            source.flatten().to(device),
            position.flatten().to(device),
            real.view(1, -1).to(device),
            first.flatten().to(device),
            tuple(buckets),
            (size,) * len(lengths),
            gather=torch.cat(gathers).to(device),
            scatter=scatter.to(device),
        )


def _alike(lengths: Sequence[int], slack: float) -> list[list[int]]:
    """Rows in groups of like length, longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[row] >= (1 - slack) * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _filled(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in groups of at most `most` tokens, or of one row: the longest first, each where it first fits."""
    groups: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for i, left in enumerate(free):
            if lengths[row] <= left:
                groups[i].append(row)
                free[i] -= lengths[row]
                break
        else:
            groups.append([row])
            free.append(most - lengths[row])
    return groups


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask of a bucket of rows side by side, the longest first."""
    if lengths[-1] == lengths[0]:
        return None
    return (torch.arange(lengths[0]) < torch.tensor(lengths)[:, None])[:, None, None].to(device)


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
    layout = _layout.get()
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, d], as the projections lie in memory
    if layout.gather is not None:
        tokens = [x.index_select(0, layout.gather) for x in tokens]
    if query.device.type == "cpu":
        # The kernel for a CPU takes seven times as long for gradients in bf16.
        tokens = [x.float() if x.dtype is torch.bfloat16 else x for x in tokens]
    if layout.blocks and not dropout:
        with torch.autocast("cpu", enabled=False):
            mixed: Tensor = _Blocks.apply(*tokens, layout.buckets, width**-0.5 if scaling is None else scaling)
        return mixed[None], None
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    parts = [x.split([b.rows * b.length for b in layout.buckets]) for x in tokens]
    out = []
    with torch.autocast("cpu", enabled=False):
        for b, *qkv in zip(layout.buckets, *parts, strict=True):
            q, k, v = (x.unflatten(0, (b.rows, b.length)).transpose(1, 2) for x in qkv)
            mask = b.mask.to(q.dtype) if b.mask is not None and layout.blocks else b.mask
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
            out.append(mixed.transpose(1, 2).reshape(b.rows * b.length, heads, width))
    joined = torch.cat(out) if len(out) > 1 else out[0]
    return (joined if layout.scatter is None else joined.index_select(0, layout.scatter))[None], None


class _Blocks(torch.autograd.Function):
    """Attention in blocks: query, key, value [N, heads, d] -> [N, heads, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Bucket, ...], scale: float
    ) -> Tensor:
        out, kept = attend(query, key, value, blocks, scale)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        return (*attend_backward(grads[0], query, key, value, kept, ctx.blocks, ctx.scale), None, None)


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


def packs(model: nn.Module) -> bool:
    """Whether batches for `model` are packed: that is enabled, and its family has positions to give."""
    return not stock.get() and family_of(model).position_offset is not None


@contextmanager
def feeding(
    model: nn.Module, batch: Batch, gather: bool = True, layout: Layout | None = None, observed: Collection[str] = ()
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The inputs to call `model` with inside the block, and the mask [B, T] or [1, N] of their real tokens.

    Packed where `packs`, by `layout` if one is given, else as they are. With `gather`, what follows the last layer sees
    the first tokens [B, 1, d] in the batch's order, as a pooler or head expects; without, states stay packed.
    `observed`: paths of modules whose output is wanted for all tokens.
    """
    family = family_of(model)
    if stock.get() or batch.mask is None or family.position_offset is None:
        yield batch.inputs, batch.mask
        return
    layout = layout or Layout.of(batch.mask)
    config: Any = model.config
    offset = config.pad_token_id + 1 if family.position_offset == "after padding token" else family.position_offset
    before = config._attn_implementation
    parts = Parts(model)
    last = parts.layer_path(parts.count - 1)
    trim = gather and family.residual is not None and not any(path.startswith(f"{last}.") for path in observed)

    def first_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        gathered = (hidden[0] if trim else hidden[0].index_select(0, layout.first))[:, None]
        return (gathered, *output[1:]) if isinstance(output, tuple) else gathered

    def first_only(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.index_select(1, layout.first) for x in inputs)

    hooks = []
    if gather:
        hooks.append(model.get_submodule(last).register_forward_hook(first_tokens))
    if trim:
        hooks.append(model.get_submodule(f"{last}.{family.residual}").register_forward_pre_hook(first_only))
    token = _layout.set(layout)
    config._attn_implementation = NAME
    try:
        with whole_layers(model, layout.buckets, layout.first, trim) if layout.blocks else nullcontext():
            yield pack(batch.inputs, layout, offset), layout.real
    finally:
        config._attn_implementation = before
        _layout.reset(token)
        for hook in hooks:
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
