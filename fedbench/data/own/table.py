"""A table of a user's file, column by column, with the place of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """What a file of rows holds, before it is known what is asked of it.

    where: the file, for messages. columns: cells by the name of the column, [n] each; None where a cell is missing.
    places: what each row is called in messages, [n]: "line 7" or "row 7". about: how the file was read, for notes.
    broken: rows that could not be read at all, (place, fault, detail) each. names: the names of the
    classes in a column whose cells are their numbers, where the file says them.
    """

    where: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    about: str
    broken: Sequence[tuple[str, str, str]] = ()
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)


def rows_from_1(count: int) -> list[str]:
    """The places of rows in a file without lines."""
    return [f"row {number}" for number in range(1, count + 1)]
