"""Prefix tuning: learned keys and values that every token of a layer's attention sees (Li & Liang 2021).

They are parameters themselves, with no network before them (P-tuning v2, Liu et al. 2022, arXiv 2110.07602), and have
no positions: tokens keep theirs, and rotary positions turn no prefix. They go in through transformers' registry of
attentions, and batches are fed padded to models that have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fedbench.compat import set_attention
from fedbench.errors import FedbenchError
from fedbench.models.parts import Parts, _linear, note_added_tokens

NAME = "fedbench_prefix"


class Prefix(nn.Module):
    """Keys and values of `tokens` tokens before all others, [tokens, width] each; width is that of a projected key."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(tokens, width))
        self.values = nn.Parameter(torch.zeros(tokens, width))

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix and key, value [B, heads, T, d], together [B, heads, tokens + T, d]."""
        rows, heads = key.shape[:2]
        own = (p.to(key.dtype).unflatten(1, (heads, -1)).transpose(0, 1) for p in (self.keys, self.values))
        both = zip(own, (key, value), strict=True)
        first, second = (torch.cat([p.expand(rows, -1, -1, -1), x], 2) for p, x in both)
        return first, second


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
    """Attention to the prefix of `module` and to its own tokens: [B, heads, T, d] -> [B, T, heads, d]."""
    prefix = module.prefix
    assert isinstance(prefix, Prefix)
    tokens, length = len(prefix.keys), key.shape[2]
    key, value = prefix.before(key, value)
    shared = query.shape[1] // key.shape[1]  # queries that share a key and a value (Ainslie et al. 2023)
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    mask = attention_mask
    if mask is None and getattr(module, "is_causal", False):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        # Every token sees all of the prefix: nothing is added to its scores, or True where masks are of truth values.
        seen = torch.ones if mask.dtype is torch.bool else torch.zeros
        mask = torch.cat([seen(*mask.shape[:-1], tokens, dtype=mask.dtype, device=mask.device), mask], -1)
        mask = mask if mask.dtype is torch.bool else mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["eager"])  # which spells causal masks out


def add_prefix(model: nn.Module, tokens: int) -> None:
    """Give the attention of every layer a prefix of so many tokens.

    Raises FedbenchError for a family whose attention does not go through the registry.
    """
    parts = Parts(model)
    if parts.family.relative or not parts.family.packs:
        raise FedbenchError(f"prefix: a model of type {parts.family.name} computes attention in a way of its own")
    for i in range(parts.count):
        query, key, value, _ = parts.attention_paths(i)
        width = _linear(model, key).out_features // (3 if query == key == value else 1)
        owner = model.get_submodule(query.rpartition(".")[0])
        owner.add_module("prefix", Prefix(tokens, width))
    set_attention(model.config, NAME)
    note_added_tokens(model)
