"""What may be ranked: methods that can be told apart, how often one beats another, and the Pareto front.

Among several pairs some differ by luck, so these go by intervals that hold all of a table's differences at once: each
of level 1 - (1 - 95%) / m for m pairs (Bonferroni).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fedbench.tables import measures
from fedbench.tables.comparison import Section
from fedbench.tables.formats import MEGA
from fedbench.tables.measures import Measure
from fedbench.tables.roles import REFERENCES
from fedbench.tables.rows import Row
from fedbench.tables.standing import Improvement, letters
from fedbench.tables.statistics import LEVEL


def ranked_rows(section: Section) -> list[Row]:
    """The rows that are compared with each other: scored, comparable, and no mere reference."""
    return [row for row in section.rows if row.scored and not row.flag and row.method not in REFERENCES]


def adjusted_level(section: Section) -> float | None:
    """The level of each interval with which all of a section's hold together; None where it has none."""
    pairs = sum(difference.interval is not None for difference in section.differences)
    return 1 - (1 - LEVEL) / pairs if pairs else None


def ordered_pairs(section: Section) -> list[tuple[str, str]]:
    """Pairs of labels (better, worse) whose adjusted interval lies off 0."""
    level, out = adjusted_level(section), []
    for difference in section.differences:
        interval = None if level is None else difference.interval_of(level)
        if interval is not None and interval[0] > 0:
            out.append((difference.a, difference.b))
        elif interval is not None and interval[1] < 0:
            out.append((difference.b, difference.a))
    return out


def groups(section: Section) -> dict[str, str]:
    """Letters by label, the best mean first: rows that share one cannot be told apart. Empty without intervals."""
    if adjusted_level(section) is None or section.baseline:
        return {}
    rows = sorted(ranked_rows(section), key=lambda row: -_accuracy(row))
    return letters([row.label for row in rows], ordered_pairs(section))


def best(section: Section) -> str | None:
    """The label of the row that is better than every other ranked one by its adjusted interval; None where none is."""
    labels, above = [row.label for row in ranked_rows(section)], set(ordered_pairs(section))
    for label in labels:
        if len(labels) > 1 and all((label, other) in above for other in labels if other != label):
            return label
    return None


def standing_against(section: Section) -> dict[str, str]:
    """By label, how a row stands to the section's baseline: above, below, or open."""
    above = set(ordered_pairs(section))
    out = {}
    for difference in section.differences:
        pair = difference.a, difference.b
        out[difference.a] = "above" if pair in above else "below" if pair[::-1] in above else "open"
    return out


def _accuracy(row: Row) -> float:
    found = row.summary(measures.plug_in)
    return found.mean if found else 0.0


def improvements(sections: Sequence[Section], baseline: str = "") -> list[Improvement]:
    """Of each pair of rows over all sections that have both, or of each row with the baseline."""
    of = {id(section): {row.label: row for row in ranked_rows(section)} for section in sections}
    if baseline:
        for section in sections:
            of[id(section)] |= {row.label: row for row in section.rows if row.label == section.baseline and row.scored}
    labels = list(dict.fromkeys(label for section in sections for label in of[id(section)]))
    bases = {section.baseline for section in sections if section.baseline}
    against = [(a, b) for b in sorted(bases) for a in labels if a != b]
    wanted = against if baseline else itertools.combinations(labels, 2)
    out = []
    for a, b in wanted:
        wins = ties = pairs = scenarios = 0
        for section in sections:
            if a in of[id(section)] and b in of[id(section)]:
                mine, theirs = of[id(section)][a].scores, of[id(section)][b].scores
                shared = [s for s in mine.keys() & theirs.keys() if mine[s].rows == theirs[s].rows]
                each = [(mine[seed].accuracy or 0.0) - (theirs[seed].accuracy or 0.0) for seed in shared]
                wins += sum(difference > 0 for difference in each)
                ties += sum(difference == 0 for difference in each)
                pairs, scenarios = pairs + len(each), scenarios + bool(each)
        if pairs:
            out.append(Improvement(a, b, wins, ties, pairs, scenarios))
    return out


PARETO = (
    Measure("MB both ways", measures.traffic, 1 / MEGA),
    Measure("client MB", measures.client_memory, 1 / MEGA),
    Measure("exposed %", measures.verbatim, 100),
)


@dataclass(frozen=True)
class Standing:
    """A row on the Pareto front, off it, or open.

    costs: means in the order of `PARETO`. below: rows that cost no more in anything, and are better by the adjusted
    interval. beside: rows that cost no more, less in something, and cannot be told apart: the front may pass this row.
    """

    row: Row
    accuracy: float
    costs: tuple[float, ...]
    below: tuple[str, ...]
    beside: tuple[str, ...]


def standings(section: Section) -> tuple[list[Standing], list[str]]:
    """How each ranked row stands, and the labels of rows of which a cost is not known, which are left out."""
    known, unknown = [], []
    for row in ranked_rows(section):
        means = [cost.mean for measure in PARETO if (cost := row.summary(measure.read, measure.scale))]
        if len(means) < len(PARETO):
            unknown.append(row.label)
        else:
            known.append((row, tuple(means)))
    above = set(ordered_pairs(section))
    out = []
    for row, costs in known:
        cheaper = [other for other, _ in known if other is not row and _costs_no_more(other, row)]
        below = tuple(other.label for other in cheaper if (other.label, row.label) in above)
        beside = tuple(
            other.label
            for other in cheaper
            if not {(other.label, row.label), (row.label, other.label)} & above and not _costs_no_more(row, other)
        )
        out.append(Standing(row, _accuracy(row), costs, below, beside))
    return out, unknown


def _costs_no_more(a: Row, b: Row) -> bool:
    """Whether a costs at most what b does, in every measure and in every seed that both have."""
    shared = a.scored.keys() & b.scored.keys()
    pairs = [(measure.read(a.runs[seed]), measure.read(b.runs[seed])) for seed in shared for measure in PARETO]
    return bool(pairs) and all(x is not None and y is not None and x <= y for x, y in pairs)
