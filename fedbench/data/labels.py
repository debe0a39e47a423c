"""Labels as files give them: numbers of classes, or their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from fedbench.errors import FedbenchError

WRITTEN = re.compile(r"[+-]?[0-9]+(\.0*)?")
"""A whole number in text; what wrote `1.0` took a column with holes for one of fractions."""


def class_numbers(where: str, labels: Iterable[Any], classes: Sequence[str], first: int = 0) -> np.ndarray:
    """Labels as numbers of classes from 0, int64 [n].

    A label is the name of a class in any case, or a whole number counted from `first`; names that are numbers
    themselves do not count as names. Raises FedbenchError, which begins with `where` and the row, for anything else:
    fractions, holes, and true and false, which do not say which class is which.
    """
    by_name = {name.casefold(): number for number, name in enumerate(classes) if not name.isdecimal()}
    numbers: list[int] = []
    for row, label in enumerate(labels, start=1):
        named = by_name.get(label.strip().casefold()) if isinstance(label, str) else None
        number = named if named is not None else _whole(label)
        if number is None:
            names = ", ".join(classes) if len(by_name) in range(1, 11) else "the classes' names"
            expected = f"a whole number or one of {names}" if by_name else "a whole number"
            raise FedbenchError(f"{where}: row {row} has label {shown(label)}, expected {expected}")
        if named is None:
            number -= first
        if not 0 <= number < len(classes):
            span = f"{first} to {len(classes) - 1 + first}"
            raise FedbenchError(f"{where}: row {row} has label {shown(label)}, expected {span}")
        numbers.append(number)
    return np.array(numbers, dtype=np.int64)


def _whole(label: Any) -> int | None:
    """A label as a whole number of any size; None where it is none."""
    if isinstance(label, str):
        # int() and float() take more than a file means (`1_0`, digits of other scripts, `1e0`), and int() refuses
        # thousands of digits.
        written = label.strip()
        return int(written.partition(".")[0]) if WRITTEN.fullmatch(written) and len(written) < 1000 else None
    if isinstance(label, bool | np.bool_):
        return None
    if isinstance(label, int | np.integer):
        return int(label)
    if isinstance(label, float | np.floating | Decimal) and float(label).is_integer():
        return int(label)
    return None


def shown(value: Any) -> str:
    """A value of a file, short enough for a message of one line."""
    text = " ".join(repr(value.item() if isinstance(value, np.generic) else value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
