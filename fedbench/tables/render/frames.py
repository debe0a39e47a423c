"""Comparisons as frames of text, which every format prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from fedbench.errors import one_line
from fedbench.tables import measures
from fedbench.tables.asked import Asked
from fedbench.tables.comparison import Beside, Comparison, Section
from fedbench.tables.formats import MEGA, signed, three_digits
from fedbench.tables.ranking import best
from fedbench.tables.render.budgets import budget_tables
from fedbench.tables.render.comments import comments
from fedbench.tables.render.pivots import Printed, pivot_tables
from fedbench.tables.render.ranking import group_column, group_notes, improvement_table, pareto_table
from fedbench.tables.rows import FLAG, Row, accuracy_in

_HEADERS = (
    "method", "accuracy %", "proxy %", "gap", "MB up", "MB down", "MB set-up", "grad. error", "exposed %",
    "trained M", "held M",
)  # fmt: skip

LEGEND = (
    "accuracy: FM with the tuned parameters plugged in, on the test set, mean ± standard deviation (n seeds)",
    "proxy, gap: the model clients train, and plug-in minus proxy, in points; – where clients train the FM itself",
    "MB: 10^6 bytes of payload, a run's total over all clients; down is without set-up (first download of a model)",
    "grad. error: proxy against FM, relative norm, at the start / mean of the run; exposed: share of the FM's weights",
    "a client ends up with, verbatim / within 1%; trained, held: 10^6 parameters at a client",
)


def _columns() -> list[tuple[str, Callable[[Row], str]]]:
    """Headers with how each is written, after the method and its accuracy."""

    def value(read: measures.Reader, form: Callable[[float], str], scale: float = 1.0) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            found = row.summary(read, scale)
            return form(found.mean) if found else "–"

        return text

    def both(a: Callable[[Row], str], b: Callable[[Row], str]) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            return "–" if (x := a(row)) == (y := b(row)) == "–" else f"{x} / {y}"

        return text

    one, two = "{:.1f}".format, "{:.2f}".format
    writers = (
        value(measures.proxy, one, 100),
        value(measures.gap, signed, 100),
        value(measures.up, three_digits, 1 / MEGA),
        value(measures.down_after_setup, three_digits, 1 / MEGA),
        value(measures.setup, three_digits, 1 / MEGA),
        both(value(measures.gradient_error_start, two), value(measures.gradient_error_mean, two)),
        both(value(measures.verbatim, one, 100), value(measures.near, one, 100)),
        value(measures.trained, three_digits, 1 / MEGA),
        value(measures.held, three_digits, 1 / MEGA),
    )
    return list(zip(_HEADERS[2:], writers, strict=True))


def section_frame(section: Section, asked: Asked) -> pd.DataFrame:
    """A scenario's table as text: one line a method, with columns at the end for what was asked for."""
    more = {measure.name.replace("_", " "): measure for measure in asked.measures}
    header, cells = group_column(section) if asked.rank else ("", {})
    lines = []
    for row in section.rows:
        line = {"method": row.label + (f" {FLAG}" if row.flag else ""), "accuracy %": accuracy_text(row)}
        line |= {name: write(row) if row.scored else "–" for name, write in _columns()}
        for name, measure in more.items():
            found = row.summary(measure.read, measure.scale)
            line[name] = three_digits(found.mean) if found else "–"
        if header:
            line[header] = cells.get(row.label, "–")
        lines.append(line)
    frame = pd.DataFrame(lines, columns=[*_HEADERS, *more, *([header] if header else [])])
    if header:
        frame.insert(2, header, frame.pop(header))
    return frame


def _asked_notes(section: Section, asked: Sequence[measures.Measure]) -> list[str]:
    """On measures that were asked for: what they are, and why a row has none."""
    out = [measure.about for measure in asked if measure.about]
    for measure in asked:
        for row in section.rows:
            reasons = dict.fromkeys(filter(None, map(measure.unknown, row.scored.values()))) if measure.unknown else ()
            out += [f"{row.label}: no {measure.name.replace('_', ' ')}: {reason}" for reason in reasons]
    return out


def overview_frame(comparison: Comparison) -> pd.DataFrame:
    """Accuracy as text, methods x scenarios."""
    columns: dict[str, dict[str, str]] = {}
    rows = [row for section in comparison.sections for row in section.rows]
    order = list(dict.fromkeys(row.method for row in rows))
    labels = dict.fromkeys(row.label for row in sorted(rows, key=lambda row: order.index(row.method)))
    for section in comparison.sections:
        texts = {row.label: accuracy_text(row) + (f" {FLAG}" if row.flag else "") for row in section.rows}
        columns[section.title] = {label: texts.get(label, "–") for label in labels}
    frame = pd.DataFrame(columns, index=list(labels))
    return frame.rename_axis("method").reset_index()


def accuracy_text(row: Row, tests: Sequence[str] = ("",)) -> str:
    """87.3 ± 0.4 (3), in per cent; (2/3) where a grid expects more; or why there is none. Several test sets: a / b."""
    found = [summary for test in tests if (summary := row.summary(accuracy_in(row, test), scale=100))]
    if not found:
        return row.state
    scores = (f"{each.mean:.1f}" + ("" if each.std is None else f" ± {each.std:.1f}") for each in found)
    of = f"/{row.expected}" if row.expected and row.expected != found[0].n else ""
    return f"{' / '.join(scores)} ({found[0].n}{of})"


def beside_frame(beside: Beside) -> pd.DataFrame:
    """Our accuracy as text over the reported one, rows x scenarios; a client's parameters where they are reported."""
    lines = []
    for name in dict.fromkeys(name for name, _ in beside.cells):
        ours, theirs = [name], ["  reported"]
        for scenario, tests in beside.tests.items():
            row = beside.cells[name, scenario]
            ours.append(accuracy_text(row, tests) + (f" {FLAG}" if row.faults else ""))
            theirs.append(_figure_text(beside.figures.get((name, scenario), {}), tests))
        if beside.parameters:
            of_row = [row for (called, _), row in beside.cells.items() if called == name]
            held = [found.mean for row in of_row if (found := row.summary(measures.held, 1 / MEGA))]
            ours.append(f"{three_digits(sum(held) / len(held))}M" if held else "–")
            theirs.append(beside.parameters.get(name, "not available"))
        lines += [ours, theirs]
    return pd.DataFrame(lines, columns=["method", *beside.tests, *(["parameters"] if beside.parameters else [])])


def _figure_text(figure: Mapping[str, float], tests: Sequence[str]) -> str:
    """Reported accuracies by test set: a / b."""
    if not figure:
        return "not available"
    return " / ".join(f"{figure[test]:.1f}" if test in figure else "–" for test in tests)


def printed(comparison: Comparison) -> list[Printed]:
    """Title, table and comments of each table to print; accuracy over scenarios first, reported figures beside it.

    Names and notes come from records and may hold anything, so all texts are made lines of printable characters.
    """
    if comparison.asked.by:
        return [_one_line(table) for table in pivot_tables(comparison)]
    out = [Printed(beside.title, beside_frame(beside), beside.notes) for beside in comparison.beside]
    if len(comparison.sections) > 1 and not out:
        out.append(Printed("Accuracy in %, methods by scenarios", overview_frame(comparison), []))
    for each in comparison.sections:
        asked = comparison.asked
        notes = [*comments(each), *(group_notes(each) if asked.rank else ()), *_asked_notes(each, asked.measures)]
        first = best(each) if asked.rank else None
        bold = frozenset((i, _HEADERS[1]) for i, row in enumerate(each.rows) if row.label == first)
        out.append(Printed(each.title, section_frame(each, asked), notes, bold))
        out += [Printed(*table) for table in budget_tables(each, asked)]
        out += [Printed(*table) for table in pareto_table(each)] if asked.pareto else []
    if comparison.asked.rank:
        baseline = next((each.baseline for each in comparison.sections if each.baseline), "")
        out += [Printed(*table) for table in improvement_table(comparison.sections, baseline)]
    return [_one_line(table) for table in out]


def _one_line(table: Printed) -> Printed:
    frame = table.frame.map(one_line).rename(columns=one_line)
    bold = frozenset((row, one_line(header)) for row, header in table.bold)
    return Printed(one_line(table.title), frame, [one_line(note) for note in table.notes], bold)


def pieces_of(
    frame: pd.DataFrame, room: float, gap: float, measure: Callable[[str], float]
) -> tuple[list[pd.DataFrame], float]:
    """The table in as few pieces as fit into `room`, each with the first column, which names the rows; and its width.

    Names keep their width where the whole table fits with it, else they get a third of the room.
    """
    widths = [max(map(measure, [str(name), *frame.iloc[:, i]])) for i, name in enumerate(frame.columns)]
    first = min(widths[0], max(room - sum(gap + width for width in widths[1:]), room / 3))
    pieces: list[list[int]] = []
    used = math.inf
    for i, width in enumerate(widths[1:], start=1):
        if used + gap + width > room:
            pieces.append([0])
            used = first
        pieces[-1].append(i)
        used += gap + width
    return [frame.iloc[:, columns] for columns in pieces or [[0]]], first
