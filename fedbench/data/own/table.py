"""A table of a user's file, column by column, with the place of each row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbench.data.labels import shown
from fedbench.errors import FedbenchError
from fedbench.names import nearest


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


class BadRow(Exception):
    """Why a row cannot be used: the fault, and what more there is to say of it."""


def missing(cell: Any) -> bool:
    """Whether a cell holds nothing."""
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def column(table: Table, name: str, setting: str) -> Sequence[Any]:
    """A column by its name, whatever its case where that is clear. Raises FedbenchError where there is none."""
    if name in table.columns:
        return table.columns[name]
    alike = [own for own in table.columns if own.strip().lower() == name.strip().lower()]
    if len(alike) == 1:
        return table.columns[alike[0]]
    known = ", ".join(repr(own) for own in [*table.columns][:12])
    close = nearest(name, table.columns)
    raise FedbenchError(
        f"{table.where}: has no column {name!r}, which dataset.{setting} names; it has {known}"
        + (f"; {close}" if close.startswith("did") else "")
    )


def text_of_cell(cell: Any) -> str:
    """A cell that holds text. Raises BadRow for any other."""
    if missing(cell):
        raise BadRow("has no text")
    if not isinstance(cell, str):
        raise BadRow("has no text", f", but {shown(cell)}")
    return cell


def rows_from_1(count: int) -> list[str]:
    """The places of rows in a file without lines."""
    return [f"row {number}" for number in range(1, count + 1)]
