"""The leaderboard: the lines of the tables with every number as text and as a value, and which is best, if any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedbench.report.figures import Figures
from fedbench.report.shown import Shown
from fedbench.tables import measures
from fedbench.tables.comparison import Comparison, Section
from fedbench.tables.formats import MEGA, seeds_text, signed, three_digits
from fedbench.tables.render.frames import accuracy_text
from fedbench.tables.roles import REFERENCES
from fedbench.tables.rows import Row
from fedbench.tables.statistics import LEVEL, Difference


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
    Column("MB up", "Sent by clients in the whole run, 10^6 bytes.", measures.up, three_digits, 1 / MEGA),
    Column(
        "MB down", "Sent to clients in the whole run, without set-up.", measures.down_after_setup, three_digits,
        1 / MEGA,
    ),
    Column("MB set-up", "First download of a model by each client.", measures.setup, three_digits, 1 / MEGA),
    Column(
        "grad. error, start", "Gradient on the proxy against the FM's: relative norm, before the first round.",
        measures.gradient_error_start, _two,
    ),
    Column("grad. error, mean", "The same, mean of the run.", measures.gradient_error_mean, _two),
    Column("exposed %", "Share of the FM's weights at a client verbatim.", measures.verbatim, _one, 100),
    Column("within 1%", "Share of the FM's weights at a client within 1%.", measures.near, _one, 100),
    Column("trained M", "10^6 parameters that a client trains.", measures.trained, three_digits, 1 / MEGA),
    Column("held M", "10^6 parameters that a client holds in memory.", measures.held, three_digits, 1 / MEGA),
)  # fmt: skip
"""Of each the mean over the runs of a line."""


@dataclass(frozen=True)
class Cell:
    """A number as it is printed, and as it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of the leaderboard: a method in one setting over its seeds.

    behind: its accuracy minus that of the highest line of its section, with the interval. runs: names of its records
    and their seeds. flag: why it cannot be ranked.
    """

    section: str
    scenario: str
    fm: str
    method: str
    label: str
    profiles: tuple[str, ...]
    accuracy: Cell
    behind: Cell
    cells: tuple[Cell, ...]
    best: bool
    flag: str
    runs: tuple[tuple[str, int], ...]


def leaderboard(comparison: Comparison, runs: Sequence[Shown]) -> list[Line]:
    """All lines, section by section, in the order of the tables; those without any run are left out.

    runs: where the profile of a record is known.
    """
    profiles = {run.name: run.origin.profile for run in runs}
    out = []
    for section in comparison.sections:
        top, best = highest(section), best_of(section)
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
                    tuple(_cell(row, column) for column in COLUMNS),
                    row is best,
                    row.flag,
                    names,
                )
            )
    return out


def _ranked(section: Section) -> list[Row]:
    """The lines of a section that can be ranked: those with an accuracy, comparable, and no mere references."""
    return [row for row in section.rows if row.scored and not row.flag and row.method not in REFERENCES]


def highest(section: Section) -> Row | None:
    """The line with the highest mean accuracy of those that can be ranked, whether or not it is better than others."""
    return max(_ranked(section), key=_mean, default=None)


def best_of(section: Section) -> Row | None:
    """The highest line, where the interval of its difference from every other one lies above 0; else none.

    Nothing is best that has no other beside it.
    """
    top, others = highest(section), len(_ranked(section)) - 1
    if top is None or others < 1:
        return None
    ahead = [found for row in _ranked(section) if row is not top and (found := _between(section, row, top))]
    clear = [found for found in ahead if found.interval is not None and found.interval[1] < 0]
    return top if len(clear) == others else None


def standing(section: Section) -> str:
    """Whether a line of the section is best, and if none is, what keeps the highest from it."""
    top, best = highest(section), best_of(section)
    if top is None:
        return "Nothing can be ranked yet."
    if best is not None:
        return f"{best.label} is best: each {LEVEL:.0%} interval of another method minus it lies below 0."
    others = [row for row in _ranked(section) if row is not top]
    if not others:
        return f"{top.label} has no other method to be compared with."
    open_ = []
    for row in others:
        found = _between(section, row, top)
        if found is None or found.interval is None or found.interval[1] >= 0:
            open_.append(row.label)
    return f"None is marked as best: {top.label} is highest, but not clearly above {', '.join(open_)}."


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


def accuracy_by_traffic(lines: Sequence[Line], comparison: Comparison) -> Figures:
    """Accuracy of each line over the MB of its runs, with and without set-up, and whether it lies on the front.

    The first column is the number of the line. On the front is what no other line of its section beats in one without
    being beaten in the other. Lines that cannot be ranked are left out.
    """
    numbers = {(line.section, line.label): number for number, line in enumerate(lines)}
    rows: list[list[float | int | bool | None]] = []
    for section in comparison.sections:
        found = []
        for row in _ranked(section):
            accuracy = row.summary(measures.plug_in, 100)
            up, down, setup = (
                row.summary(read, 1 / MEGA) for read in (measures.up, measures.down_after_setup, measures.setup)
            )
            if accuracy and up and down and setup:
                rest = up.mean + down.mean
                found.append((numbers[section.title, row.label], accuracy, rest + setup.mean, rest))
        whole = on_front([(mb, accuracy.mean) for _, accuracy, mb, _ in found])
        after = on_front([(mb, accuracy.mean) for _, accuracy, _, mb in found])
        rows += [
            [number, accuracy.mean, accuracy.std, accuracy.n, mb, rest, *fronts]
            for (number, accuracy, mb, rest), *fronts in zip(found, whole, after, strict=True)
        ]
    columns = ("line", "accuracy", "std", "seeds", "mb", "mb_after_setup", "front", "front_after_setup")
    return Figures(columns, rows)


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, gain) pairs: whether no other has at most the cost and at least the gain, and one of them better."""
    return [not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points) for cost, gain in points]
