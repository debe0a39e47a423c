"""Attention within the rows of a packed batch, in blocks: for short rows on a CPU.

Half the time of torch's kernel, which keeps no scores, calculates them again for gradients, and goes row by row and
head by head. Here rows lie end to end in blocks of some 64 tokens; a block's scores are kept, those between rows
removed, and each step is one batched product over its heads, on views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbench.compat import softmax_backward


@dataclass(frozen=True)
class Bucket:
    """`rows` rows of `length` positions each, from `start` of the packed axis; a block is one row made of several.

    mask: True where there is a token, [rows, 1, 1, length]. Of a block what is added to its scores, [1, 1, length,
    length]: 0 within a row, -inf between rows. None where all count. starts: of a block, where its rows begin in it.
    """

    start: int
    rows: int
    length: int
    mask: Tensor | None
    starts: Tensor | None = None


def _pieces(
    queries: Sequence[Tensor], keys: Sequence[Tensor], blocks: Sequence[Bucket], first_only: bool
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Of each block its part of `queries` and of `keys`, [heads, n, d]."""
    start = 0
    for b in blocks:
        n = len(b.starts) if first_only and b.starts is not None else b.length
        parts = [x.narrow(0, start, n).transpose(0, 1) for x in queries]
        yield parts, [x.narrow(0, b.start, b.length).transpose(0, 1) for x in keys]
        start += n


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Bucket], scale: float, first_only: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """query, key, value [N, heads, d] -> [N, heads, d], and each block's weights [heads, n, n], for the gradients.

    `first_only`: there are queries of each row's first token alone, in the order of the rows.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    kept = []
    for b, ((q, o), (k, v)) in zip(blocks, _pieces((query, out), (key, value), blocks, first_only), strict=True):
        if b.mask is None:
            scores = torch.bmm(q, k.mT).mul_(scale)
        else:
            mask = b.mask.index_select(2, b.starts) if first_only and b.starts is not None else b.mask
            scores = torch.baddbmm(mask[0].to(q.dtype), q, k.mT, alpha=scale)
        kept.append(scores.softmax(-1))
        o.copy_(torch.bmm(kept[-1], v))
    return out, kept


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
    blocks: Sequence[Bucket],
    scale: float,
    first_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of the output and what `attend` kept."""
    dquery, dkey, dvalue = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    pieces = _pieces((grad, query, dquery), (key, value, dkey, dvalue), blocks, first_only)
    for weights, ((g, q, dq), (k, v, dk, dv)) in zip(kept, pieces, strict=True):
        dv.copy_(torch.bmm(weights.mT, g))
        scores = softmax_backward(torch.bmm(g, v.mT), weights, -1, weights.dtype)
        dq.copy_(torch.baddbmm(q, scores, k, beta=0, alpha=scale))
        dk.copy_(torch.baddbmm(k, scores.mT, q, beta=0, alpha=scale))
    return dquery, dkey, dvalue
