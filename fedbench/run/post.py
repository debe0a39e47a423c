"""Carries messages across the boundary: packed by the sender, opened by the receiver.

A sender packs a message into a `Parcel`, which says what it costs; a receiver opens it. Where both sides live in one
process, a large message is decoded once for all its recipients, and one that is equal to the last of its kind is not
packed again: the FM that newcomers are sent in every round is serialised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedbench.api.messages import ClientId, Message
from fedbench.compat import writes
from fedbench.errors import MessageError
from fedbench.run.gate import check
from fedbench.run.payloads import Parcel


@dataclass(slots=True)
class Post:
    """Packs what a server sends.

    bytes_only: parcels leave this process, so each has to hold its payload; else a large one holds its message alone.
    """

    bytes_only: bool = False
    _constant: dict[str, Parcel] = field(default_factory=dict, repr=False)

    def pack(self, outbox: Mapping[ClientId, Sequence[Message]]) -> dict[ClientId, list[Parcel]]:
        """The parcels of a broadcast, by client; clients who are sent one message share its parcel.

        Raises MessageError if the server sends what it may not: that is a fault in the method.
        """
        # `outbox` keeps every message alive meanwhile, so an id stands for one message.
        once: dict[int, Parcel] = {}
        packed = {}
        for client, messages in outbox.items():
            packed[client] = [once.setdefault(id(m), once.get(id(m)) or self._parcel(m)) for m in messages]
        return packed

    def _parcel(self, message: Message) -> Parcel:
        last = self._constant.get(message.kind)
        if last is not None and _equal(message, last.open()):
            return last
        parcel = Parcel.of(message)
        check(parcel.open(), None)
        if parcel.message is not None:  # large enough to be shared
            self._constant[message.kind] = parcel
            if not self.bytes_only:
                parcel.payload = None
        return parcel


@dataclass(slots=True)
class Lent:
    """Watches over tensors that were received: they are shared, so nobody may write to them."""

    _tensors: list[tuple[str, Tensor, int]] = field(default_factory=list, repr=False)

    def lend(self, message: Message) -> Message:
        """The same message, watched until `close`."""
        self._tensors += [(f"{message.kind}: {n}", t, writes(t)) for n, t in message.tensors.items()]
        return message

    def close(self) -> None:
        """Raise MessageError if a receiver changed a tensor it was sent in place; then forget all."""
        for name, tensor, version in self._tensors:
            if writes(tensor) != version:
                raise MessageError(f"received tensor {name!r} was changed in place; clone it before writing to it")
        self._tensors.clear()


def _equal(a: Message, b: Message) -> bool:
    """Whether two messages have the same payload."""
    return (
        a.kind == b.kind
        and dict(a.meta) == dict(b.meta)
        and set(a.tensors) == set(b.tensors)
        and all(
            t.dtype == b.tensors[n].dtype and t.shape == b.tensors[n].shape and torch.equal(t.cpu(), b.tensors[n])
            for n, t in a.tensors.items()
        )
    )
