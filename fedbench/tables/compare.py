"""Comparisons: what records say, methods beside each other. Pure functions of records, without torch.

Numbers of several seeds are mean ± sample standard deviation with their count n; with one seed there is no
deviation. Differences between methods carry an interval for seeds and test rows at large, from the seeds they share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell
from fedbench.grid.file import Reported
from fedbench.names import nearest
from fedbench.records.record import Record
from fedbench.tables import roles
from fedbench.tables.beside import reported_beside
from fedbench.tables.comparison import Comparison, Section
from fedbench.tables.conditions import conditions_of, flag_rows
from fedbench.tables.matching import asked_fm, belongs, fm_names, fm_of, method_settings, setting_text
from fedbench.tables.notes import add_notes
from fedbench.tables.pairs import add_differences
from fedbench.tables.rows import Row, seed_names


def compare(
    records: Iterable[Record],
    cells: Sequence[Cell] | None = None,
    title: str = "",
    reported: Reported | None = None,
    baseline: str = "",
) -> Comparison:
    """Sort records into sections and rows.

    With the `cells` of a grid, rows and columns are the grid's and what is not there yet shows as missing; records
    that do not belong to a cell are left out. Without, every record is shown. `reported` figures stand beside the
    cells of their FM; where no cell has one of their FMs, beside those of every FM. With a `baseline`, a method or the
    label of a row, differences are those from it. Raises FedbenchError where no row is called so.
    """
    records = list(records)
    names = fm_names(records, [cell.fm for cell in cells or () if cell.fm is not None])
    if cells is not None:
        records = [record for record in records if any(belongs(record, cell, names) for cell in cells)]
    by_section: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.identity.scenario, str(r.identity.fm), r.key)):
        by_section[record.identity.scenario, fm_of(record, records, names)].append(record)
    order: dict[tuple[str, str | None], int] = {}
    for cell in cells or ():
        asked = asked_fm(cell)
        order.setdefault((cell.scenario, asked), len(order))
        if asked is not None:
            by_section.setdefault((cell.scenario, asked), [])
        elif not any(scenario == cell.scenario for scenario, _ in by_section):
            by_section[cell.scenario, ""] = []

    def place(section: tuple[str, str]) -> tuple[int, tuple[str, str]]:
        return order.get(section, order.get((section[0], None), 0)), section

    sections = []
    for scenario, fm in sorted(by_section, key=place):
        wanted = None if cells is None else [c for c in cells if c.scenario == scenario and asked_fm(c) in (None, fm)]
        sections.append(_section(scenario, fm, by_section[scenario, fm], wanted, names, baseline))
    known = {called for section in sections for row in section.rows for called in (row.label, row.name, row.method)}
    if baseline and baseline not in known:
        raise FedbenchError(f"--baseline {baseline}: no such method in these records; {nearest(baseline, known)}")
    if cells is None:
        _add_absent(sections)
    return Comparison(sections, title, reported_beside(sections, cells, reported) if cells and reported else [])


def _section(
    scenario: str, fm: str, records: list[Record], cells: Sequence[Cell] | None, names: Mapping[str, str], baseline: str
) -> Section:
    rows: list[Row] = []
    conditions = conditions_of(records)
    # What a grid asks for, or what is there: name of the row -> method, variant, records, seeds expected.
    asked: dict[str, tuple[str, str, list[Record], int | None]] = {}
    if cells is None:
        for method in sorted({r.identity.method for r in records}, key=roles.place):
            asked[method] = method, "", [r for r in records if r.identity.method == method], None
    else:
        for name in dict.fromkeys(cell.row for cell in cells):
            group = [cell for cell in cells if cell.row == name]
            own = [r for r in records if any(belongs(r, cell, names) for cell in group)]
            asked[name] = group[0].method, group[0].variant, own, len(group)
    twice: list[str] = []
    for name, (method, variant, own, expected) in asked.items():
        complete = [r for r in own if r.status == "complete"]
        done = {r.identity.seed for r in complete}
        failed = {r.identity.seed for r in own if r.status == "failed"} - done
        groups = _variants(complete, conditions)
        for told, runs in groups or [("", [])]:
            label = ", ".join(filter(None, (variant, told)))
            row = Row(method, f"{method} [{label}]" if label else method, name, expected=expected)
            row.runs = {r.identity.seed: r for r in runs}
            if len(row.runs) < len(runs):
                seeds = [r.identity.seed for r in runs]
                twice.append(
                    f"{row.label}: several records of {seed_names(sorted({s for s in seeds if seeds.count(s) > 1}))} "
                    "with the same settings; one of each is shown"
                )
            rows.append(row)
        # A failed seed has no settings worth telling apart; it is shown with the first row of its name.
        rows[-max(1, len(groups))].failed = len(failed)
    section = Section(scenario, fm, rows, twice)
    flag_rows(section, conditions, _axis(cells or ()))
    add_notes(section)
    add_differences(section, baseline)
    return section


def _axis(cells: Sequence[Cell]) -> set[str]:
    """Settings that a grid varies on purpose: those in which the cells of one method differ, dotted."""
    out = set()
    for method in {cell.method for cell in cells}:
        of_method = [cell.settings for cell in cells if cell.method == method]
        keys = {key for settings in of_method for key in settings}
        out |= {key for key in keys if len({settings.get(key) for settings in of_method}) > 1}
    return {"federation.rounds" if key == "rounds" else key for key in out}


def _add_absent(sections: list[Section]) -> None:
    """Without a grid: show a method that ran in one scenario as missing in the others."""
    methods = {row.method for section in sections for row in section.rows}
    for section in sections:
        section.rows += [Row(m, m) for m in methods - {row.method for row in section.rows}]
        section.rows.sort(key=lambda row: roles.place(row.method))


def _variants(records: Sequence[Record], conditions: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Record]]]:
    """Records of one method, grouped by everything but the seed; each group with what tells it from the others."""
    groups: dict[str, list[Record]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    for record in records:
        about = {
            **conditions[record.key],
            **method_settings(record),
            "version": record.identity.method_version,
        }
        name = repr(sorted((path, repr(value)) for path, value in about.items()))
        groups[name].append(record)
        settings[name] = about
    paths = sorted({path for about in settings.values() for path in about})
    telling = [p for p in paths if len({repr(about.get(p)) for about in settings.values()}) > 1]
    labelled = [(", ".join(setting_text(p, settings[name].get(p)) for p in telling), groups[name]) for name in groups]
    # The group with most seeds first: where results were collected over time that is the one they are about.
    return sorted(labelled, key=lambda item: (-len(item[1]), item[0]))
