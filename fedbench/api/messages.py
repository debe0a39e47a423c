"""What crosses the boundary between server and clients, and what is kept of either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

ClientId = int
Kind = Literal["fm", "sub_fm", "adapter", "alignment", "statistics", "control"]
KINDS: tuple[str, ...] = ("fm", "sub_fm", "adapter", "alignment", "statistics", "control")
SETUP_KINDS = ("fm", "sub_fm")
"""Kinds that a client is sent once, before it can train."""


@dataclass(frozen=True, slots=True)
class Message:
    """The only thing that crosses between server and client.

    `tensors` are read-only at the receiver: the transport refuses a round in which one was changed in place.
    `meta` holds plain values; structured values travel as JSON text.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, int | float | str | bool] = field(default_factory=dict)


def adapters_of(uploads: Mapping[ClientId, Sequence[Message]]) -> list[Message]:
    """The adapters among a round's uploads, one a client."""
    return [m for messages in uploads.values() for m in messages if m.kind == "adapter"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor in an upload has to look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True, slots=True)
class State:
    """A checkpoint of one side: tensors by name, and plain (JSON) values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a frozen tensor of the proxy was taken from in the FM.

    `index` lists the rows (`dim` 0) or columns (`dim` 1) of the FM's tensor `name` that were kept, in order;
    None means the whole tensor.
    """

    name: str
    dim: int = 0
    index: Tensor | None = None
