"""Questions with answers to choose from in a user's tables, as the tasks of multiple choice write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fedbench.data.labels import WRITTEN, shown
from fedbench.data.own.table import BadRow, Table, column, missing, text_of_cell
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import DatasetSettings, listed

QUESTIONS = ("question", "query", "ctx", "goal", "question_stem", "context", "prompt", "text")
CHOICES = ("choices", "endings", "options")
RIGHT = ("label", "gold", "answer", "answerkey", "correct", "answer_index", "target")
"""What such columns are called, the likeliest first."""


def named_or_found(table: Table, asked: str, default: str, known: Sequence[str], setting: str) -> str:
    """The column that the scenario names, or, where it says the default, the first of these that the table has."""
    if asked != default or asked in table.columns:
        return asked
    own = {name.strip().lower(): name for name in table.columns}
    found = next((own[name] for name in known if name in own), None)
    if found is None:
        raise FedbenchError(
            f"{table.where}: no column of {', '.join(known)} is there for dataset.{setting}; it has "
            f"{', '.join(table.columns)}; name the column"
        )
    return found


def questions_of(
    table: Table, settings: DatasetSettings
) -> tuple[Callable[[int], tuple[str, tuple[str, ...], int]], str]:
    """What takes a row's number for its question, its choices and the number of the right one; and the columns' names.

    The former raises BadRow. Raises FedbenchError for a column that is not there.
    """
    names = settings.segments
    if names == ("text",):
        names = (named_or_found(table, "text", "text", QUESTIONS, "text"),)
    asked = [column(table, name, "text") for name in names]
    where = listed(settings.choices)
    if where == ("choices",):
        where = (named_or_found(table, "choices", "choices", CHOICES, "choices"),)
    offered = [column(table, name, "choices") for name in where]
    label = named_or_found(table, settings.label, "label", RIGHT, "label")
    right = column(table, label, "label")

    def question(i: int) -> tuple[str, tuple[str, ...], int]:
        words = " ".join(text_of_cell(cells[i]) for cells in asked)
        if len(offered) > 1:
            texts, called = [text_of_cell(cells[i]) for cells in offered], None
        else:
            texts, called = choices_of(offered[0][i])
        return words, tuple(texts), right_of(right[i], texts, called)

    about = f"questions in {' and '.join(map(repr, names))}, choices in {' and '.join(map(repr, where))}"
    return question, f"{about}, the right one in {label!r}"


def choices_of(cell: Any) -> tuple[list[str], list[str] | None]:
    """The choices in a cell, and what they are called there: a list of texts, or ARC's `text` and `label`.

    Raises BadRow for any other, and for fewer than two.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise BadRow("has no list of choices", f", but {shown(cell)}") from None
    called = None
    if isinstance(cell, dict):
        called, cell = cell.get("label"), cell.get("text")
        called = [str(name) for name in called] if isinstance(called, list) else None
    if not isinstance(cell, list) or not all(isinstance(text, str) and text.strip() for text in cell):
        raise BadRow("has no list of choices", f", but {shown(cell)}")
    if len(cell) < 2:
        raise BadRow("has fewer than two choices")
    return cell, called if called and len(called) == len(cell) else None


def right_of(cell: Any, choices: Sequence[str], called: Sequence[str] | None = None) -> int:
    """The number of the right choice, from 0: by its name, its number from 0, its letter, or its text.

    Raises BadRow where that is none of them, or could be two.
    """
    if missing(cell):
        raise BadRow("has no label")
    if isinstance(cell, bool) or (isinstance(cell, float) and not cell.is_integer()):
        raise BadRow("has a label that names no choice", f", {shown(cell)}")
    said = str(int(cell)) if isinstance(cell, float) else str(cell).strip()
    if called is not None:
        if said not in called:
            raise BadRow("has a label that names no choice", f", {shown(cell)}")
        return called.index(said)
    found = {i for i, text in enumerate(choices) if isinstance(cell, str) and text.strip() == said}
    if WRITTEN.fullmatch(said) and len(said) < 9:
        found |= {int(said.partition(".")[0])} & {*range(len(choices))}
    elif len(said) == 1 and not found:
        found |= {ord(said.upper()) - ord("A")} & {*range(len(choices))}
    if len(found) != 1:
        many = "could name several choices" if found else "names no choice"
        raise BadRow(f"has a label that {many}", f", {shown(cell)}")
    return found.pop()
