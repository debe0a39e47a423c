"""The boundary: every message is serialised, measured, checked and decoded on its way.

The wire format is safetensors (no pickle anywhere). The ledger holds the true length of each payload, so the
communication cost of a method is what would cross a network, not an estimate from parameter counts.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from fedbench.api.messages import KINDS, ClientId, Message, TensorSpec
from fedbench.compat import writes
from fedbench.errors import MessageError, one_line

Direction = Literal["down", "up"]
SETUP_KINDS = ("fm", "sub_fm")
META_BYTES = 1 << 16
"""What an upload may take beside its tensors' values: plain values, names, shapes."""
REASON_CHARACTERS = 300
"""Reasons of refusals are cut to this length: they quote what came from outside."""
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger: a message that crossed. `bytes` is the payload's length."""

    round: int
    direction: Direction
    client: ClientId
    kind: str
    bytes: int
    elements: int

    def to_json(self) -> list[Any]:
        return [self.round, self.direction, self.client, self.kind, self.bytes, self.elements]


@dataclass(slots=True)
class Ledger:
    """What crossed, message by message."""

    entries: list[Entry] = field(default_factory=list)

    def total(self, direction: Direction, kinds: Iterable[str] | None = None, round: int | None = None) -> int:
        """Bytes in one direction, over all rounds and kinds unless told."""
        wanted = None if kinds is None else set(kinds)
        return sum(
            e.bytes
            for e in self.entries
            if e.direction == direction and (wanted is None or e.kind in wanted) and (round is None or e.round == round)
        )

    def by_kind(self, direction: Direction) -> dict[str, dict[str, int]]:
        """kind -> bytes, elements and number of messages."""
        out: dict[str, dict[str, int]] = defaultdict(lambda: {"bytes": 0, "elements": 0, "messages": 0})
        for e in self.entries:
            if e.direction == direction:
                cell = out[e.kind]
                cell["bytes"] += e.bytes
                cell["elements"] += e.elements
                cell["messages"] += 1
        return {kind: dict(out[kind]) for kind in sorted(out)}

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> Ledger:
        return cls([Entry(*row) for row in rows])


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the harness knows of a client, so that its upload can be held to it.

    most: the largest value of plain values, by name: `num_examples` is at most the client's rows, `tokens` what its
    local training can have seen. sent: the tunables the client was sent. max_update_norm: the largest L2 norm of what
    an upload's adapter changes of them, None for any.
    """

    most: Mapping[str, int] = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    max_update_norm: float | None = None


def check(message: Message, expected: Mapping[str, Mapping[str, TensorSpec]] | None) -> None:
    """Raise MessageError unless `message` may be let in: kind, names, shapes, dtypes, finite values."""
    if expected is not None:
        if message.kind not in expected:
            raise MessageError(
                f"{message.kind}: not expected in this round; expected {', '.join(expected) or 'nothing'}"
            )
        specs = expected[message.kind]
        if missing := sorted(set(specs) - set(message.tensors)):
            raise MessageError(f"{message.kind}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
        if extra := sorted(set(message.tensors) - set(specs)):
            raise MessageError(f"{message.kind}: tensor {extra[0]!r} was not asked for ({len(extra)} in all)")
        for name, spec in specs.items():
            got = TensorSpec.of(message.tensors[name])
            if got != spec:
                raise MessageError(
                    f"{message.kind}: tensor {name!r} is {list(got.shape)} {got.dtype}, "
                    f"expected {list(spec.shape)} {spec.dtype}"
                )
    for name, tensor in message.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MessageError(f"{message.kind}: tensor {name!r} holds values that are not finite")


def check_bounds(message: Message, bounds: Bounds) -> None:
    """Raise MessageError for plain values or an update beyond what this client can have sent in good faith."""
    for name, most in bounds.most.items():
        value = message.meta.get(name, 0)
        if isinstance(value, (int, float)) and value > most:
            raise MessageError(f"{message.kind}: {name} is {value}, but the client has no more than {most}")
    if bounds.max_update_norm is not None and message.kind == "adapter":
        norm = update_norm(message.tensors, bounds.sent)
        if norm > bounds.max_update_norm:
            raise MessageError(
                f"{message.kind}: its update has norm {norm:.3g}, above federation.max_update_norm "
                f"{bounds.max_update_norm:g}"
            )


def update_norm(tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> float:
    """L2 norm of `tensors` minus what was `sent` under the same names; a tensor that was not sent counts whole."""
    total = 0.0
    for name, tensor in tensors.items():
        before = sent.get(name)
        value = tensor.double()
        if before is not None and before.shape == tensor.shape:
            value = value - before.to(value.device).double()
        total += float(value.square().sum())
    return math.sqrt(total)


def size_limit(specs: Mapping[str, TensorSpec]) -> int:
    """The most bytes that a payload with these tensors may have."""
    values = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
    return values + META_BYTES + sum(len(json.dumps(name)) + 200 for name in specs)


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


@dataclass(slots=True)
class Transport:
    """Carries messages across the boundary and keeps the ledger.

    `refused` holds (round, client, reason) of every upload turned away.
    """

    ledger: Ledger = field(default_factory=Ledger)
    refused: list[tuple[int, ClientId, str]] = field(default_factory=list)
    _lent: list[tuple[str, Tensor, int]] = field(default_factory=list, repr=False)
    _constant: dict[str, tuple[int, Message]] = field(default_factory=dict, repr=False)

    def _charge(self, round: int, direction: Direction, client: ClientId, message: Message, size: int) -> None:
        elements = sum(t.numel() for t in message.tensors.values())
        self.ledger.entries.append(Entry(round, direction, client, message.kind, size, elements))

    def _lend(self, message: Message) -> Message:
        self._lent += [(f"{message.kind}: {n}", t, writes(t)) for n, t in message.tensors.items()]
        return message

    def _carry(self, message: Message) -> tuple[int, Message]:
        """The payload's length and the decoded message.

        A large message equal in every bit to the last one of its kind is that one: an FM sent to newcomers in every
        round is serialised and decoded once.
        """
        last = self._constant.get(message.kind)
        if last is not None and _equal(message, last[1]):
            return last
        payload = serialise(message)
        decoded = deserialise(payload)
        check(decoded, None)
        if len(payload) >= SHARED_FROM_BYTES:
            self._constant[message.kind] = (len(payload), decoded)
        return len(payload), decoded

    def download(
        self, round: int, outbox: Mapping[ClientId, Sequence[Message]]
    ) -> Iterator[tuple[ClientId, list[Message]]]:
        """Deliver a broadcast, client by client. Every recipient is charged; a large message is decoded once.

        Raises MessageError if the server sends what it may not: that is a fault in the method.
        """
        once: dict[int, tuple[int, Message]] = {}
        for client, messages in outbox.items():
            inbox = []
            for message in messages:
                # `outbox` keeps every message alive meanwhile, so an id stands for one message.
                size, decoded = once.get(id(message)) or self._carry(message)
                if size >= SHARED_FROM_BYTES:
                    once[id(message)] = size, decoded
                self._charge(round, "down", client, decoded, size)
                inbox.append(self._lend(decoded))
            yield client, inbox

    def upload(
        self,
        round: int,
        client: ClientId,
        messages: Sequence[Message],
        expected: Mapping[str, Mapping[str, TensorSpec]],
        accept: Callable[[int, Sequence[Message]], None] | None = None,
        bounds: Bounds | None = None,
    ) -> list[Message] | None:
        """Carry one client's upload to the server, or refuse the whole of it and say why in `refused`.

        `accept` is the server's own check, which raises MessageError to refuse; `bounds` what the harness knows of the
        client. A message is not read at all where it is longer than its tensors explain. What crossed is charged either
        way: the bytes were sent.
        """
        try:
            arrived = []
            for message in messages:
                payload = serialise(message)
                self._charge(round, "up", client, message, len(payload))
                limit = size_limit(expected.get(message.kind, {}))
                if len(payload) > limit:
                    raise MessageError(f"{message.kind}: {len(payload)} bytes, where its tensors explain {limit}")
                decoded = deserialise(payload)
                check(decoded, expected)
                if bounds is not None:
                    check_bounds(decoded, bounds)
                arrived.append(self._lend(decoded))
            if missing := sorted(set(expected) - {m.kind for m in arrived}):
                raise MessageError(f"{missing[0]}: missing from the upload")
            if len({m.kind for m in arrived}) < len(arrived):
                raise MessageError("two messages of one kind in one upload")
            if accept is not None:
                accept(round, arrived)
        except MessageError as error:
            why = one_line(str(error)[: REASON_CHARACTERS + 1])
            cut = why if len(why) <= REASON_CHARACTERS else f"{why[: REASON_CHARACTERS - 1]}…"
            self.refused.append((round, client, cut))
            return None
        return arrived

    def close_round(self) -> None:
        """Raise MessageError if a receiver changed a tensor it was sent in place; then forget this round's."""
        for name, tensor, version in self._lent:
            if writes(tensor) != version:
                raise MessageError(f"received tensor {name!r} was changed in place; clone it before writing to it")
        self._lent.clear()
