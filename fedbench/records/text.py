"""Values as a record's file holds them: plain, rounded, and as JSON that reads well in a diff."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fedbench.errors import FedbenchError, one_line

SIGNIFICANT_DIGITS = 9
"""Floats of a record are rounded to this many digits: enough for any measure, and stable under one more rounding."""

WIDTH = 120

_LONG = 300
"""Digits from which on a whole number may be too large for a float."""

_DEPTH = 32
"""How deep a record's tables may be nested; ours are six deep."""


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: rounded floats, lists for tuples, mappings for
    blocks, null for what is not a finite number.

    Raises TypeError for a value that has no JSON form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0: equal numbers have to be equal text.
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") + 0.0 if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        # Of a large population a record holds lists of a million numbers.
        return list(value) if _whole_numbers(value) else [plain(item) for item in value]
    if isinstance(value, BaseModel):
        return plain(value.model_dump(by_alias=True, exclude_unset=True))
    raise TypeError(f"{type(value).__name__} cannot be kept in a record")


def _whole_numbers(value: Sequence[Any]) -> bool:
    return {*map(type, value)} == {int}


def canonical_json(obj: Any) -> str:
    """The one JSON text of `obj`: sorted keys, no blanks, floats in full. Raises FedbenchError for NaN or infinity."""
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FedbenchError(f"settings that enter a record's key have to be plain finite values: {error}") from None


def parse(text: str) -> Any:
    """JSON as a record has it: finite numbers, no name twice, whole characters. Raises ValueError for other JSON."""

    def number(literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            raise ValueError(f"{literal[:20]} is not a finite number")
        return value

    def whole(literal: str) -> int:
        if len(literal) > _LONG:
            number(literal)
        return int(literal)

    def table(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{shown(name)} is there twice in one table")
            found[name] = value
        return found

    content = json.loads(text, parse_float=number, parse_constant=number, parse_int=whole, object_pairs_hook=table)
    _sound(content, ())
    return content


def _sound(value: Any, place: tuple[str | int, ...]) -> None:
    """Raise ValueError where tables are nested too deeply, or a text holds half a character, which no file can."""
    wrong = "nested too deeply" if len(place) > _DEPTH else ""
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value[:1] if _whole_numbers(value) else value)  # one number stands for all
    if not wrong:
        for name, item in inner:
            if isinstance(name, str):
                _sound(name, place)
            _sound(item, (*place, name))
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                wrong = f"{shown(value)} is not a text"
    if wrong:
        raise ValueError(f"{one_line('.'.join(map(str, place)))[:120]}: {wrong}")


def shown(value: Any) -> str:
    """A value for a message: one short line of plain characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def pack_correct(correct: NDArray[np.bool_]) -> str:
    """Which test rows were answered rightly [n], as base64 of packed bits, first row in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpack_correct(text: str, rows: int) -> NDArray[np.bool_]:
    """Undo `pack_correct` for `rows` rows. Raises FedbenchError if the text does not hold that many."""
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        raise FedbenchError("correct: not base64 of packed bits") from None
    if len(packed) != (rows + 7) // 8:
        raise FedbenchError(f"correct: {len(packed)} bytes cannot hold {rows} rows")
    return np.unpackbits(packed, count=rows).astype(bool)


def dumps(content: Any) -> str:
    """JSON that reads well in a diff: sorted keys, indented, one row of a table a line, number lists filled."""
    return _text(content, 0, 0) + "\n"


def _scalar(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def _text(value: Any, indent: int, used: int) -> str:
    """JSON of `value` whose first line begins after `indent` blanks and `used` more characters."""
    inner = " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = []
        for key in sorted(value):
            name = _flat(key) + ": "
            lines.append(inner + name + _text(value[key], indent + 1, len(name)))
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(value, list) and value:
        flat = _flat(value)
        if all(map(_scalar, value)):
            if indent + used + len(flat) <= WIDTH or len(value) == 1:
                return flat
            items = flat[1:-1].split(", ") if _whole_numbers(value) else [_flat(item) for item in value]
            return "[\n" + _fill(items, inner) + "\n" + " " * indent + "]"
        return "[\n" + ",\n".join(inner + _row(item, indent + 1) for item in value) + "\n" + " " * indent + "]"
    return _flat(value)


def _row(item: Any, indent: int) -> str:
    """An entry of a list: on one line if it is a mapping of scalars that fits, like a row of a table."""
    if isinstance(item, dict) and all(map(_scalar, item.values())):
        flat = _flat(item)
        if indent + len(flat) <= WIDTH:
            return flat
    return _text(item, indent, 0)


def _flat(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _fill(items: list[str], prefix: str) -> str:
    """Items separated by commas, as many a line as fit."""
    lines: list[str] = []
    line = ""
    for index, item in enumerate(items):
        text = item + ("," if index + 1 < len(items) else "")
        if line and len(prefix) + len(line) + 1 + len(text) > WIDTH:
            lines.append(prefix + line)
            line = text
        else:
            line = f"{line} {text}" if line else text
    lines.append(prefix + line)
    return "\n".join(lines)
