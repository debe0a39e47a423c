"""Messages as bytes and back: safetensors, with kind and plain values in the header."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from fedbench.api.messages import KINDS, Message
from fedbench.errors import MessageError

SHARED_FROM_BYTES = 1 << 20
"""Payloads from this size on are decoded once and shared read-only by their recipients."""


def serialise(message: Message) -> bytes:
    """The payload of `message`: safetensors, with kind and meta as one JSON text in the header.

    Raises MessageError for an unknown kind, meta that is not plain, or tensors that are not dense.
    """
    if message.kind not in KINDS:
        raise MessageError(f"message kind {message.kind!r} is unknown; use one of {', '.join(KINDS)}")
    _check_meta(message.kind, message.meta)
    tensors = {}
    for name, tensor in message.tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise MessageError(f"{message.kind}: {name!r} is not a dense tensor")
        # safetensors refuses storages shared between names, so each tensor gets one of its own where needed.
        dense = tensor.detach().to("cpu").contiguous()
        whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
        tensors[name] = dense if whole else dense.clone()
    # One header entry: safetensors writes the entries of a larger mapping in an order that varies between runs.
    header = json.dumps({"kind": message.kind, "meta": dict(message.meta)}, sort_keys=True, separators=(",", ":"))
    try:
        return safetensors_save(tensors, metadata={"fedbench": header})
    except RuntimeError:  # two names for one tensor: send each
        return safetensors_save({n: t.clone() for n, t in tensors.items()}, metadata={"fedbench": header})


def header_length(payload: bytes) -> int:
    """Bytes before the tensors' own: the 8-byte length field and the JSON header it announces."""
    return 8 + int(struct.unpack("<Q", payload[:8])[0])


def deserialise(payload: bytes) -> Message:
    """The message in `payload`, in fresh memory. Raises MessageError for anything that is not one."""
    try:
        header = json.loads(payload[8 : header_length(payload)])
        about = json.loads(header["__metadata__"]["fedbench"])
        kind, meta = about["kind"], about["meta"]
        tensors = safetensors_load(payload)
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise MessageError(f"not a message: {type(error).__name__}: {error}") from error
    if kind not in KINDS:
        raise MessageError(f"message kind {kind!r} is unknown")
    _check_meta(kind, meta)
    # The library gives tensors in an order that varies; sums over them, a gradient's norm say, would vary with it.
    ordered = {name: tensors[name] for name in sorted(tensors)}
    return Message(kind=kind, tensors=MappingProxyType(ordered), meta=MappingProxyType(meta))


def _check_meta(kind: str, meta: Any) -> None:
    """Raise MessageError unless `meta` maps names to plain values that any receiver can hold."""
    if not isinstance(meta, Mapping):
        raise MessageError(f"{kind}: meta is not a mapping of plain values")
    for name, value in meta.items():
        if not isinstance(value, (int, float, str, bool)):
            raise MessageError(f"{kind}: meta {name!r} is a {type(value).__name__}; use int, float, str or bool")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise MessageError(f"{kind}: meta {name!r} is a whole number of more than 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise MessageError(f"{kind}: meta {name!r} is {value}, not a finite number")


@dataclass(slots=True)
class Parcel:
    """A message under way: its kind, payload, length in bytes and elements.

    Of payload and message at least one is there; a message that is there is shared by all who open the parcel.
    """

    kind: str
    size: int
    elements: int
    payload: bytes | None = None
    message: Message | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process go bytes alone.
        if self.payload is None:
            raise TypeError("this parcel has given its payload away")
        return Parcel, (self.kind, self.size, self.elements, self.payload)

    @classmethod
    def of(cls, message: Message) -> Parcel:
        """The parcel of a message. Raises MessageError for one that may not cross."""
        payload = serialise(message)
        return cls(message.kind, len(payload), sum(t.numel() for t in message.tensors.values()), payload)

    def open(self) -> Message:
        """The message, as its receiver gets it. Raises MessageError for a payload that holds none."""
        if self.message is not None:
            return self.message
        assert self.payload is not None
        message = deserialise(self.payload)
        if self.size >= SHARED_FROM_BYTES:
            self.message = message
        return message
