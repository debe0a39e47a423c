"""Rows of a user's tables: columns picked, cells looked at, and bad rows counted and named."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.data.formats.images import image_cell, images_of
from fedbench.data.image_files import EncodedImage
from fedbench.data.labels import WRITTEN, shown
from fedbench.data.own.chats import chats_of, words_of
from fedbench.data.own.choices import questions_of
from fedbench.data.own.table import BadRow, Table, column, missing, text_of_cell
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import DatasetSettings

NAMED = 5
"""How many bad rows are named, of however many there are."""

FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9][0-9]*")


@dataclass
class BadRows:
    """Rows that cannot be used: where they are, the fault, and what more there is to say of it."""

    found: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, where: str, place: str, fault: str, detail: str = "") -> None:
        self.found.append((f"{where}: {place}", fault, detail))

    def said(self) -> str:
        """How many there are of each fault, and the first of them by file and line."""
        counts = Counter(fault for _, fault, _ in self.found)
        counted = ", ".join(_so_many(count, fault) for fault, count in counts.items())
        named = "; ".join(f"{where} {fault}{detail}" for where, fault, detail in self.found[:NAMED])
        more = f"; and {len(self.found) - NAMED} more" if len(self.found) > NAMED else ""
        return f"{counted}: {named}{more}"


def _so_many(count: int, fault: str) -> str:
    verb, _, rest = fault.partition(" ")
    return f"1 row that {fault}" if count == 1 else f"{count} rows that {'have' if verb == 'has' else 'are'} {rest}"


@dataclass
class Rows:
    """The rows of a role before their labels are numbers: columns [n] each, and the place of each row."""

    inputs: list[list[Any]]
    labels: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    places: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, rows: Sequence[int]) -> Rows:
        """Some rows, in this order."""
        groups = {name: [column[i] for i in rows] for name, column in self.groups.items()}
        inputs = [[column[i] for i in rows] for column in self.inputs]
        return Rows(inputs, [self.labels[i] for i in rows], groups, [self.places[i] for i in rows])

    def same(self) -> list[str]:
        """What makes two rows the same, of each row: its words, whatever their case; of an image its content."""
        return ["\0".join(map(_sameness, row)) for row in zip(*self.inputs, strict=True)]

    def part(self, kind: str, numbers: np.ndarray) -> Part:
        """These rows with the numbers of their classes, [n]."""
        groups = {name: np.array(column, dtype=str) for name, column in self.groups.items()}
        if kind == "images":
            cells = self.inputs[0]
            images = np.stack(cells) if isinstance(cells[0], np.ndarray) else images_of(cells)
            return Part(numbers, images=images, groups=groups)
        if kind == "chat":
            return Part(numbers, [*map(words_of, self.inputs[0])], groups=groups, chats=self.inputs[0])
        if kind == "choices":
            return Part(numbers, self.inputs[0], groups=groups, choices=self.inputs[1])
        return Part(numbers, self.inputs[0], text_pairs=self.inputs[1] if len(self.inputs) > 1 else None, groups=groups)


def _sameness(cell: Any) -> str:
    import hashlib

    if isinstance(cell, str):
        return " ".join(cell.casefold().split())
    if isinstance(cell, tuple):
        return " ".join(json.dumps(cell, ensure_ascii=False).casefold().split())
    if isinstance(cell, Path):
        return hashlib.sha256(cell.read_bytes()).hexdigest()
    return hashlib.sha256(cell.content if isinstance(cell, EncodedImage) else cell.tobytes()).hexdigest()


def rows_of(
    tables: Sequence[Table], settings: DatasetSettings, label: str | None, groups: Sequence[str], bad: BadRows
) -> Rows:
    """The usable rows of some tables; what is not goes to `bad`. `groups`: columns to keep beside inputs and labels.

    label: the column of labels; None where rows have none. Raises FedbenchError for a column that is not there.
    """
    columns = 2 if settings.kind in ("pairs", "choices") else 1
    out = Rows([[] for _ in range(columns)], groups={name: [] for name in groups})
    for table in tables:
        for place, fault, detail in table.broken:
            bad.add(table.where, place, fault, detail)
        inputs_of = _reader(table, settings, label)
        beside = {name: column(table, name, "client") for name in groups}
        for i, place in enumerate(table.places):
            try:
                inputs, said = inputs_of(i)
                whose = {name: _whose(cells[i]) for name, cells in beside.items()}
            except BadRow as error:
                bad.add(table.where, place, *error.args)
                continue
            for cells, cell in zip(out.inputs, inputs, strict=True):
                cells.append(cell)
            out.labels.append(said)
            for name, cell in whose.items():
                out.groups[name].append(cell)
            out.places.append((table.where, place))
    return out


def _reader(table: Table, settings: DatasetSettings, label: str | None) -> Callable[[int], tuple[list[Any], str]]:
    """What takes a row's number for its inputs and its label, or raises BadRow."""
    if settings.kind == "choices":
        question, _ = questions_of(table, settings)

        def chosen(i: int) -> tuple[list[Any], str]:
            words, offered, right = question(i)
            return [words, offered], str(right)

        return chosen
    labels, named = None if label is None else column(table, label, "label"), table.names.get(label or "")
    inputs: Callable[[int], list[Any]]
    if settings.kind == "images":
        images, taken = column(table, settings.image, "image"), _image(table)
        inputs = lambda i: [taken(images[i], table.places[i])]  # noqa: E731
    elif settings.kind == "chat":
        chat = chats_of(table, settings)
        inputs = lambda i: [chat(i)]  # noqa: E731
    else:
        texts = [column(table, name, "text") for name in settings.segments]
        inputs = lambda i: [text_of_cell(cells[i]) for cells in texts]  # noqa: E731
    if settings.kind == "text":
        return lambda i: ([" ".join(inputs(i))], "" if labels is None else label_of(labels[i], named))
    return lambda i: (inputs(i), "" if labels is None else label_of(labels[i], named))


def _image(table: Table) -> Callable[[Any, str], Any]:
    """What takes a cell of this table for an image: a path from the file on, the file's bytes, or LEAF's numbers."""
    folder = Path(table.where).parent

    def taken(cell: Any, place: str) -> Any:
        if isinstance(cell, Path):
            return cell
        if missing(cell):
            raise BadRow("has no image")
        if isinstance(cell, str):
            path = folder / cell
            if not path.is_file():
                raise BadRow("has an image that is not there", f": {shown(cell)}")
            return path
        if isinstance(cell, list):
            return _pixels(cell)
        try:
            return image_cell(f"{table.where}: {place}", cell)
        except FedbenchError:
            raise BadRow("has no image") from None

    return taken


def _pixels(cell: list[Any]) -> np.ndarray:
    """LEAF's grey image, a list of numbers in 0..1, as float32 [H, H]."""
    try:
        pixels = np.asarray(cell, dtype=np.float32)
    except (ValueError, TypeError):
        raise BadRow("has no image", ", but a list of other things than numbers") from None
    side = math.isqrt(pixels.size)
    if side * side != pixels.size or not pixels.size or pixels.min() < 0 or pixels.max() > 1:
        raise BadRow("has no image", ", but numbers that are no square of grey values in 0..1")
    return pixels.reshape(side, side)


def label_of(cell: Any, named: Sequence[str] | None = None) -> str:
    """A label as text: the name of its class, or a whole number. `named`: names by number, where the file says them."""
    if missing(cell):
        raise BadRow("has no label")
    if isinstance(cell, bool | np.bool_):
        return str(bool(cell)).lower()
    if isinstance(cell, float) and not cell.is_integer():
        raise BadRow("has a fraction for a label", f", {cell}")
    text = str(int(cell)) if isinstance(cell, float) else " ".join(str(cell).split())
    if FRACTION.fullmatch(text):
        raise BadRow("has a fraction for a label", f", {text}")
    if WRITTEN.fullmatch(text) and len(text) < 1000:
        number = int(text.partition(".")[0])
        if named is not None:
            if not 0 <= number < len(named):
                raise BadRow("has no label")  # the hub's -1 stands for none
            return str(named[number])
        return str(number)
    return text


def _whose(cell: Any) -> str:
    if missing(cell):
        raise BadRow("has no client")
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else " ".join(str(cell).split())
