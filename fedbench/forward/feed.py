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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fedbench.compat import attention_of, set_attention
from fedbench.data.examples import Batch
from fedbench.forward.attention import Bucket, attend, attend_backward
from fedbench.forward.causal import causal_layers_of
from fedbench.forward.encoder import Layer, layers_of, whole_layers
from fedbench.forward.image import image_layers_of
from fedbench.forward.layout import Layout
from fedbench.forward.masks import Masks
from fedbench.machine.device import Execution
from fedbench.models.decoder import NextToken, body_of
from fedbench.models.linear import reordered
from fedbench.models.mpnet import distance_bias
from fedbench.models.parts import Parts, adds_tokens, family_of
from fedbench.models.spec import POOLING

NAME = "fedbench_packed"


_layout: ContextVar[tuple[Layout, Masks]] = ContextVar("layout")


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
    layout, masks = _layout.get()
    shared = heads // key.shape[1]  # queries that share a key and a value (Ainslie et al. 2023)
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, d], as the projections lie in memory
    buckets = masks.buckets(layout, bool(getattr(module, "is_causal", False)), kwargs.get("sliding_window"))
    if layout.gather is not None:
        tokens = [x.index_select(0, layout.gather) for x in tokens]
    if query.device.type == "cpu":
        # The kernel for a CPU takes seven times as long for gradients in bf16.
        tokens = [x.float() if x.dtype is torch.bfloat16 else x for x in tokens]
    if layout.blocks and not dropout:
        with torch.autocast("cpu", enabled=False):
            mixed: Tensor = _Blocks.apply(*tokens, buckets, width**-0.5 if scaling is None else scaling)
        return mixed[None], None
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    parts = [x.split([b.rows * b.length for b in buckets]) for x in tokens]
    out = []
    with torch.autocast("cpu", enabled=False):
        for b, *qkv in zip(buckets, *parts, strict=True):
            q, k, v = (x.unflatten(0, (b.rows, b.length)).transpose(1, 2) for x in qkv)
            mask = b.mask.to(q.dtype) if b.mask is not None and b.mask.is_floating_point() else b.mask
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


class _Enough(Exception):
    """Ends a forward pass of which no more is wanted."""


class Forward:
    """The forward pass of one model: how batches go in and what comes out; `forward` makes one.

    packed: whether text batches lose their padding on the way, for families with positions to give; not of a model that
    adds tokens of its own to each row, a prefix or a prompt.
    """

    def __init__(self, model: nn.Module, packed: bool = True, live: bool = False) -> None:
        """live: inside a `reordered` block, in which the structure of the model stays as it is."""
        self.model = model
        self.family = family_of(model)
        self.packed = packed and self.family.packed(getattr(model.config, POOLING, None)) and not adds_tokens(model)
        self._live = live
        self._layers: list[Layer] | None = None

    @contextmanager
    def feeding(
        self,
        batch: Batch,
        gather: bool = True,
        layout: Layout | None = None,
        observed: Collection[str] = (),
        padded: bool = False,
    ) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """The inputs to call the model with inside the block, and the mask [B, T] or [1, N] of their real tokens.

        Packed by `layout` if one is given; as they are where `padded`, or where nothing is packed. With `gather`, what
        follows the last layer sees the first tokens [B, 1, d] in the batch's order, as a pooler or head expects, and a
        decoder's head the last ones, and a language model is given what is asked of each token and answers in the rows
        of the batch, [B, T, 2]; without, states stay packed. `observed`: paths of modules whose output is wanted
        for all tokens.
        """
        model, family = self.model, self.family
        given, answers = batch.inputs, gather and isinstance(model, NextToken)
        if answers:
            given = {**given, "targets": batch.labels}
        parts = Parts(model)
        last = parts.layer_path(parts.count - 1)
        seen = any(path.startswith(f"{last}.") for path in observed)
        if padded or not self.packed or batch.mask is None:
            with whole_layers(self._whole(batch.mask is None and not padded), gather and not seen):
                yield given, batch.mask
            return
        chosen = layout or Layout.of(batch.mask)
        config: Any = model.config
        offset: Any = family.position_offset
        if offset == "after padding token":
            offset = config.pad_token_id + 1
        before = attention_of(config)
        trim = gather and family.residual is not None and not seen

        def first_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            gathered = (hidden[0] if trim else hidden[0].index_select(0, chosen.first))[:, None]
            return (gathered, *output[1:]) if isinstance(output, tuple) else gathered

        def first_only(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x.index_select(1, chosen.first) for x in inputs)

        def last_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            states = output.last_hidden_state
            output.last_hidden_state = states[0].index_select(0, chosen.last)[:, None]
            return output

        def in_rows(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            output.logits = chosen.unpack(output.logits, batch.labels.shape)
            return output

        hooks = []
        if answers:
            hooks.append(model.register_forward_hook(in_rows))
        elif gather and family.reads == "last":
            hooks.append(body_of(model).register_forward_hook(last_tokens))
        elif gather:
            hooks.append(model.get_submodule(last).register_forward_hook(first_tokens))
        if trim:
            hooks.append(model.get_submodule(f"{last}.{family.residual}").register_forward_pre_hook(first_only))
        masks = Masks(distance_bias(model))
        blocks = masks.buckets(chosen, causal=family.reads == "last", window=None)
        token = _layout.set((chosen, masks))
        set_attention(config, NAME)
        try:
            with whole_layers(self._whole(chosen.blocks), trim, blocks, chosen.first):
                yield pack(given, chosen, offset), chosen.real
        finally:
            set_attention(config, before)
            _layout.reset(token)
            for hook in hooks:
                hook.remove()

    def _whole(self, possible: bool) -> Sequence[Layer]:
        if not (self._live and possible):
            return ()
        if self._layers is None:
            self._layers = image_layers_of(self.model) or causal_layers_of(self.model) or layers_of(self.model)
        return self._layers

    def logits(self, batch: Batch, padded: bool = False) -> Tensor:
        """What the model makes of a batch, [B, ..], in the batch's order; `padded` where that is of every token."""
        with self.feeding(batch, padded=padded) as (inputs, _):
            out: Tensor = self.model(**inputs).logits
        return out

    def layer_outputs(self, batch: Batch, last: int | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states after each transformer layer, [B, T, d] or packed [1, N, d], and the mask of real tokens.

        `last`: the layer after which nothing is computed any more; None to go through the whole model.
        """
        out, mask, _ = self._watched(batch, last, False)
        return out, mask

    def layer_outputs_and_logits(self, batch: Batch) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """The same of all layers, and what the model makes of the batch, [B, ..]."""
        out, mask, logits = self._watched(batch, None, True)
        assert logits is not None
        return out, mask, logits

    def _watched(
        self, batch: Batch, last: int | None, gather: bool
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        parts = Parts(self.model)
        out: list[Tensor] = []
        logits: Tensor | None = None

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            out.append(output[0] if isinstance(output, tuple) else output)
            if last is not None and len(out) > last:
                raise _Enough

        hooks = [parts.layer(i).register_forward_hook(keep) for i in range(parts.count)]
        try:
            # Whoever observes the last layer has all of its tokens computed.
            inside = (f"{parts.layer_path(parts.count - 1)}.*",)
            with self.feeding(batch, gather=gather, observed=inside) as (inputs, mask), suppress(_Enough):
                logits = self.model(**inputs).logits
        finally:
            for hook in hooks:
                hook.remove()
        return out, mask, logits


@contextmanager
def forward(model: nn.Module, execution: Execution, gradients: bool = False) -> Iterator[Forward]:
    """The forward pass of `model`, as `execution` says, for the time of the block: enter it around many batches.

    Inside, nobody may write to frozen weights or change the structure of the model. `gradients`: whether gradients will
    pass through it. Blocks of one model may nest.
    """
    if not execution.packed:
        yield Forward(model, packed=False)
        return
    with reordered(model, gradients=gradients, precision=execution.precision):
        yield Forward(model, live=True)
