"""One measure over methods, scenarios and FMs: a table for each of one of them, the two others as rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from fedbench.tables.asked import Asked
from fedbench.tables.comparison import Comparison, Section
from fedbench.tables.formats import three_digits
from fedbench.tables.measures import Measure
from fedbench.tables.ranking import best
from fedbench.tables.rows import FLAG, Row


class Printed(NamedTuple):
    """A table to print: title, text by row and column, notes, and which cells (row, header) are printed bold."""

    title: str
    frame: pd.DataFrame
    notes: list[str]
    bold: frozenset[tuple[int, str]] = frozenset()


def pivot_tables(comparison: Comparison) -> list[Printed]:
    """The tables that `asked.by` and `asked.metric` ask for."""
    asked = comparison.asked
    out: dict[str, dict[str, dict[str, str]]] = {}
    strong: dict[str, set[tuple[str, str]]] = {}
    for section in comparison.sections:
        first = best(section) if asked.metric.name == "accuracy" else None
        for row in section.rows:
            table, line, column = _place(section, row, asked)
            out.setdefault(table, {}).setdefault(line, {})[column] = _text(row, asked.metric)
            if row.label == first and asked.by != "method":
                strong.setdefault(table, set()).add((line, column))
    found = []
    for table, lines in out.items():
        columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
        header = "scenario" if asked.by == "method" else "method"
        frame = pd.DataFrame([[line, *(cells.get(c, "–") for c in columns)] for line, cells in lines.items()])
        frame.columns = pd.Index([header, *columns])
        places = {line: i for i, line in enumerate(lines)}
        bold = frozenset((places[line], column) for line, column in strong.get(table, ()))
        found.append(Printed(f"{table}: {asked.metric.name.replace('_', ' ')}", frame, _notes(asked, bool(bold)), bold))
    return found


def _place(section: Section, row: Row, asked: Asked) -> tuple[str, str, str]:
    """Table, line and column of a row's number."""
    fm = section.fm or "any FM"
    if asked.by == "method":
        return row.label, section.scenario, fm
    return (section.scenario, row.label, fm) if asked.by == "scenario" else (fm, row.label, section.scenario)


def _text(row: Row, metric: Measure) -> str:
    """Mean ± deviation (n), as per cent for shares of test rows; or why there is none."""
    if not row.scored:
        return row.state
    of_rows = metric.name.endswith("accuracy") or "accuracy" in metric.name or metric.name in ("gap", "macro_f1")
    found = row.summary(metric.read, metric.scale * (100 if of_rows else 1))
    if found is None:
        return "–"
    form: Callable[[float], str] = "{:.1f}".format if of_rows else three_digits
    of = f"/{row.expected}" if row.expected and row.expected != found.n else ""
    deviation = "" if found.std is None else f" ± {form(found.std)}"
    return f"{form(found.mean)}{deviation} ({found.n}{of})" + (f" {FLAG}" if row.flag else "")


def _notes(asked: Asked, bold: bool) -> list[str]:
    notes = ["mean ± standard deviation (n seeds); accuracies and gap in %, else the units of --format csv"]
    notes += [asked.metric.about] if asked.metric.about else []
    if bold:
        notes.append("bold: better than every other by intervals that hold all differences at once")
    return notes
