"""What the server's side lets in: nothing that was not asked for, is not finite, or cannot be a client's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedbench.api.messages import Message, TensorSpec
from fedbench.errors import MessageError, one_line
from fedbench.run.payloads import Parcel

META_BYTES = 1 << 16
"""What an upload may take beside its tensors' values: plain values, names, shapes."""
REASON_CHARACTERS = 300
"""Reasons of refusals are cut to this length: they quote what came from outside."""


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


def let_in(
    parcels: Sequence[Parcel],
    expected: Mapping[str, Mapping[str, TensorSpec]],
    bounds: Bounds | None = None,
    accept: Callable[[Sequence[Message]], None] | None = None,
) -> list[Message]:
    """The messages of one client's upload. Raises MessageError, which says why, to refuse the whole of it.

    A parcel is not opened at all where it is longer than its tensors explain. `bounds`: what the harness knows of the
    client; `accept`: the server's own check.
    """
    arrived = []
    for parcel in parcels:
        limit = size_limit(expected.get(parcel.kind, {}))
        if parcel.size > limit:
            raise MessageError(f"{parcel.kind}: {parcel.size} bytes, where its tensors explain {limit}")
        message = parcel.open()
        check(message, expected)
        if bounds is not None:
            check_bounds(message, bounds)
        arrived.append(message)
    if missing := sorted(set(expected) - {m.kind for m in arrived}):
        raise MessageError(f"{missing[0]}: missing from the upload")
    if len({m.kind for m in arrived}) < len(arrived):
        raise MessageError("two messages of one kind in one upload")
    if accept is not None:
        accept(arrived)
    return arrived


def reason(error: MessageError) -> str:
    """Why an upload was refused, for a record: one printable line, which quotes what came from outside and is cut."""
    why = one_line(str(error)[: REASON_CHARACTERS + 1])
    return why if len(why) <= REASON_CHARACTERS else f"{why[: REASON_CHARACTERS - 1]}…"
