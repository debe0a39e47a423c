"""Whether two records of one key say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedbench.records.record import Record

VOLATILE = ("provenance", "compute.seconds", "compute.peak_memory_bytes", "identity.fm", "scenario.fm")
"""Dotted paths of what two runs of one key may differ in."""


def comparable(record: Record) -> dict[str, Any]:
    """The record without `VOLATILE`: what has to be identical whenever the same key is run on the same device."""
    content = record.to_json()
    for dotted in VOLATILE:
        *parents, last = dotted.split(".")
        block = content
        for parent in parents:
            block = block.get(parent, {})
        block.pop(last, None)
    return content


def differences(a: Record, b: Record) -> list[str]:
    """Dotted paths at which the comparable parts of two records differ, sorted; empty if they agree."""
    return sorted(_differences(comparable(a), comparable(b), ""))


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            below = f"{path}.{key}" if path else key
            if key in a and key in b:
                yield from _differences(a[key], b[key], below)
            else:
                yield below
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{path}.{index}")
    elif a != b or type(a) is not type(b):
        # A whole float is written 1.0 and an int 1, so the type is part of the bytes.
        yield path
