"""The leaderboard: the lines of the tables with every number as text and as a value, and which is best, if any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedbench.records.record import Record
from fedbench.report.figures import Figures
from fedbench.report.shown import Shown
from fedbench.tables import measures
from fedbench.tables.comparison import Comparison, Section
from fedbench.tables.formats import MEGA, seeds_text, signed, three_digits
from fedbench.tables.profiles import chosen_profiles
from fedbench.tables.ranking import best, groups, ordered_pairs, ranked_rows, standings
from fedbench.tables.render.frames import accuracy_text
from fedbench.tables.rows import Row
from fedbench.tables.simulated import SIMULATED, time_measures
from fedbench.tables.statistics import Difference


@dataclass(frozen=True)
class Column:
    """A measure of the leaderboard: its title, what it says in a sentence, and how it is read, scaled and written."""

    title: str
    about: str
    read: measures.Reader
    form: Callable[[float], str]
    scale: float = 1.0


def _one(value: float) -> str:
    return f"{value:.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


COLUMNS = (
    Column("proxy %", "Accuracy of the model that clients train, where that is not the FM.", measures.proxy, _one, 100),
    Column("gap", "Plug-in minus proxy, in points.", measures.gap, signed, 100),
    Column(
        "personal %", "Mean accuracy of clients' own models, not to be compared with that of one model for all.",
        measures.personal_mean, _one, 100,
    ),
    Column("MB up", "Sent by clients in the whole run, 10^6 bytes.", measures.up, three_digits, 1 / MEGA),
    Column(
        "MB down", "Sent to clients in the whole run, without set-up.", measures.down_after_setup, three_digits,
        1 / MEGA,
    ),
    Column("MB set-up", "First download of a model by each client.", measures.setup, three_digits, 1 / MEGA),
    Column(
        "client MB", "Parameters that a client holds in memory, 4 bytes each.", measures.client_memory, three_digits,
        1 / MEGA,
    ),
    Column("trained M", "10^6 parameters that a client trains.", measures.trained, three_digits, 1 / MEGA),
    Column(
        "grad. error, start", "Gradient on the proxy against the FM's: relative norm, before the first round.",
        measures.gradient_error_start, _two,
    ),
    Column("grad. error, mean", "The same, mean of the run.", measures.gradient_error_mean, _two),
    Column("exposed %", "Share of the FM's weights at a client verbatim.", measures.verbatim, _one, 100),
    Column("within 1%", "Share of the FM's weights at a client within 1%.", measures.near, _one, 100),
)  # fmt: skip
"""Of each the mean over the runs of a line."""


def columns_of(records: Sequence[Record]) -> list[Column]:
    """The columns that some record has a number for; simulated time, with each client profile, among them."""
    timed = [
        Column(f"{each.name.removeprefix(SIMULATED)[1:]} s", f"{each.about}.", each.read, three_digits)
        for each in time_measures(chosen_profiles())
    ]
    return [column for column in (*COLUMNS, *timed) if any(column.read(record) is not None for record in records)]


@dataclass(frozen=True)
class Cell:
    """A number as it is printed, and as it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of the leaderboard: a method in one setting over its seeds.

    behind: its accuracy minus that of the highest line of its section, with the interval. group: letters that it shares
    with those it cannot be told apart from. runs: names of its records and their seeds. flag: why it cannot be ranked.
    """

    section: str
    scenario: str
    fm: str
    method: str
    label: str
    profiles: tuple[str, ...]
    accuracy: Cell
    behind: Cell
    group: str
    cells: tuple[Cell, ...]
    best: bool
    flag: str
    runs: tuple[tuple[str, int], ...]


def leaderboard(comparison: Comparison, runs: Sequence[Shown], columns: Sequence[Column] = COLUMNS) -> list[Line]:
    """All lines, section by section, in the order of the tables; those without any run are left out.

    runs: where the profile of a record is known.
    """
    profiles = {run.name: run.origin.profile for run in runs}
    out = []
    for section in comparison.sections:
        top, first, letters = highest(section), best(section), groups(section)
        for row in section.rows:
            if not row.runs and not row.failed:
                continue
            records = [run for _, run in sorted(row.runs.items())]
            found = row.summary(measures.plug_in, 100)
            names = tuple((run.key[:12], run.identity.seed) for run in records)
            out.append(
                Line(
                    section.title,
                    section.scenario,
                    section.fm,
                    row.method,
                    row.label,
                    tuple(dict.fromkeys(profiles.get(name, "") for name, _ in names)),
                    Cell(accuracy_text(row), found.mean if found else None),
                    _behind(section, row, top),
                    letters.get(row.label, "–"),
                    tuple(_cell(row, column) for column in columns),
                    row.label == first,
                    row.flag,
                    names,
                )
            )
    return out


def highest(section: Section) -> Row | None:
    """The line with the highest mean accuracy of those that can be ranked, whether or not it is better than others."""
    return max(ranked_rows(section), key=_mean, default=None)


def standing(section: Section) -> str:
    """Whether a line of the section is best, and if none is, what keeps the highest from it."""
    top, first = highest(section), best(section)
    if top is None:
        return "Nothing can be ranked yet."
    if first is not None:
        return f"{first} is best: better than every other by intervals that hold for all pairs at once."
    others = [row.label for row in ranked_rows(section) if row is not top]
    if not others:
        return f"{top.label} has no other method to be compared with."
    above = set(ordered_pairs(section))
    unclear = [label for label in others if (top.label, label) not in above]
    return f"None is marked as best: {top.label} is highest, but not clearly above {', '.join(unclear)}."


def _mean(row: Row) -> float:
    found = row.summary(measures.plug_in)
    return -1.0 if found is None else found.mean


def _between(section: Section, row: Row, top: Row) -> Difference | None:
    """`row` minus `top`, whichever way round the section has it."""
    for found in section.differences:
        if (found.a, found.b) == (row.label, top.label):
            return found
        if (found.b, found.a) == (row.label, top.label):
            return Difference(
                row.label, top.label, -found.mean, found.seeds, found.seed_variance, found.row_variance, found.p
            )
    return None


def _behind(section: Section, row: Row, top: Row | None) -> Cell:
    if row is top:
        return Cell("highest", 0.0)
    found = _between(section, row, top) if top is not None else None
    if found is None:
        return Cell("–")
    if found.interval is None:
        return Cell(f"{signed(found.mean)} ({seeds_text(found.seeds)}, no interval)", found.mean)
    low, high = map(signed, found.interval)
    return Cell(f"{signed(found.mean)} [{low}, {high}] ({found.seeds})", found.mean)


def _cell(row: Row, column: Column) -> Cell:
    found = row.summary(column.read, column.scale) if row.scored else None
    return Cell("–") if found is None else Cell(column.form(found.mean), found.mean)


def front(lines: Sequence[Line], comparison: Comparison) -> Figures:
    """Accuracy of each line over what it costs, and how it stands: on the front, open or dominated.

    The first column is the number of the line. Costs are MB both ways, MB of parameters at a client, and the share of
    the FM's weights there in per cent; lines without one of them, and those that cannot be ranked, are left out.
    """
    numbers = {(line.section, line.label): number for number, line in enumerate(lines)}
    rows: list[list[Any]] = []
    for section in comparison.sections:
        for each in standings(section)[0]:
            std = (found := each.row.summary(measures.plug_in, 100)) and found.std
            kind = "dominated" if each.below else "open" if each.beside else "front"
            number = numbers[section.title, each.row.label]
            rows.append([number, 100 * each.accuracy, std, len(each.row.scored), *each.costs, kind])
    return Figures(("line", "accuracy", "std", "seeds", "mb", "client_mb", "exposed", "standing"), rows)
