"""Letters between a server and its silos: plain values and payloads as one string of bytes.

A letter is written and read here alone, so whatever carries it carries opaque bytes: a JSON text says what the letter
is about, payloads follow as they are. Nothing that arrives is unpickled.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbench.errors import MessageError
from fedbench.run.payloads import Parcel

_MAGIC = b"fedbench-letter-1\n"
_PIECE = struct.Struct("<8sII")
PIECE_BYTES = 256 << 20
"""A longer letter is carried in pieces: gRPC limits the length of a message."""


def seal(about: Mapping[str, Any], payloads: Sequence[bytes] = ()) -> bytes:
    """The letter about these plain (JSON) values, with payloads."""
    header = json.dumps({"about": dict(about), "lengths": [len(payload) for payload in payloads]}).encode()
    return b"".join((_MAGIC, struct.pack("<Q", len(header)), header, *payloads))


def unseal(letter: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What a letter is about, and its payloads. Raises MessageError for bytes that are no letter."""
    start = len(_MAGIC) + 8
    try:
        if not letter.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        place = start + struct.unpack("<Q", letter[len(_MAGIC) : start])[0]
        header = json.loads(letter[start:place])
        about, lengths = header["about"], header["lengths"]
        if not isinstance(about, dict) or not all(type(length) is int and length >= 0 for length in lengths):
            raise ValueError("its header is none")
        if place + sum(lengths) != len(letter):
            raise ValueError(f"it has {len(letter)} bytes, its header says {place + sum(lengths)}")
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise MessageError(f"not a letter: {error}") from None
    payloads = []
    for length in lengths:
        payloads.append(letter[place : place + length])
        place += length
    return about, payloads


def cut(letter: bytes, size: int = PIECE_BYTES) -> Iterator[bytes]:
    """The letter in pieces of at most `size` bytes and a few more, in order; `Joiner` puts them together again."""
    name = secrets.token_bytes(8)
    count = max(1, -(-len(letter) // size))
    for index in range(count):
        yield _PIECE.pack(name, index, count) + letter[index * size : (index + 1) * size]


@dataclass(slots=True)
class Joiner:
    """Puts the pieces of one sender's letters together, which arrive in order."""

    _name: bytes = b""
    _pieces: list[bytes] = field(default_factory=list)

    def add(self, piece: bytes) -> bytes | None:
        """The letter that this piece completes. Raises MessageError for bytes that are no piece.

        A letter that its sender broke off, because it ended, is forgotten when the next one begins.
        """
        if not isinstance(piece, bytes) or len(piece) < _PIECE.size:
            raise MessageError("not a piece of a letter: it is too short")
        name, index, count = _PIECE.unpack_from(piece)
        if index == 0:
            self._name, self._pieces = name, []
        if name != self._name or index != len(self._pieces) or index >= count:
            raise MessageError(f"piece {index + 1} of {count} of a letter does not follow the one before it")
        self._pieces.append(piece[_PIECE.size :])
        if index + 1 < count:
            return None
        letter, self._pieces = b"".join(self._pieces), []
        return letter


@dataclass(slots=True)
class Packing:
    """The payloads of one letter, each of them once, however many parcels carry it."""

    payloads: list[bytes] = field(default_factory=list)
    _places: dict[int, tuple[Parcel, int]] = field(default_factory=dict)  # the parcel is kept, so its id stays its own

    def add(self, parcel: Parcel) -> list[Any]:
        """What a letter says of a parcel that it carries."""
        if id(parcel) not in self._places:
            assert parcel.payload is not None
            self._places[id(parcel)] = parcel, len(self.payloads)
            self.payloads.append(parcel.payload)
        return [parcel.kind, parcel.elements, self._places[id(parcel)][1]]


@dataclass(slots=True)
class Unpacking:
    """The parcels of a letter; those of one payload are one parcel, which is decoded once."""

    payloads: Sequence[bytes]
    _parcels: dict[int, Parcel] = field(default_factory=dict)

    def parcel(self, said: Any) -> Parcel:
        """The parcel that a letter says this of. Raises MessageError where the letter carries none such."""
        try:
            kind, elements, place = said
            if type(elements) is not int or elements < 0 or not isinstance(kind, str) or place < 0:
                raise ValueError(said)
            payload = self.payloads[place]
        except (ValueError, TypeError, IndexError):
            raise MessageError("not a letter: it names a parcel that it does not carry") from None
        found = self._parcels.setdefault(place, Parcel(kind, len(payload), elements, payload))
        return found if found.kind == kind else Parcel(kind, len(payload), elements, payload)
