"""Reported figures beside ours, and in what our runs are not as reported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell
from fedbench.grid.file import Reported
from fedbench.models.zoo.names import fm_label
from fedbench.records.record import Record
from fedbench.tables.comparison import Beside, Section
from fedbench.tables.matching import asked_fm, departures
from fedbench.tables.measures import train_rows
from fedbench.tables.rows import FLAG, Row, extra_tests, seed_names


def reported_beside(sections: Sequence[Section], cells: Sequence[Cell], reported: Reported) -> list[Beside]:
    """One table for each FM of the publication, beside our runs with the same FM if the grid has it."""
    fms = [fm for fm in dict.fromkeys(map(asked_fm, cells)) if fm is not None]
    pairs = [(fm_label(fm), fm) for fm in reported.figures if fm_label(fm) in fms]
    pairs = pairs or [(fm, theirs) for theirs in reported.figures for fm in fms]
    for row in (row for section in sections for row in section.rows if row.runs):
        row.departures = tuple(departures(next(iter(row.runs.values())), reported.setting))
    names = list(dict.fromkeys(cell.row for cell in cells))
    scenarios = list(dict.fromkeys(cell.scenario for cell in cells))
    out = []
    for fm, theirs in pairs:
        shown, several = {}, False
        for section in sections:
            for name in names if section.fm == fm else ():
                rows = [row for row in section.rows if row.name == name]
                shown[name, section.scenario] = min(rows, key=lambda r: (len(r.departures), -len(r.scored), r.label))
                several |= len(rows) > 1
        figures = {
            (name, scenario): figure
            for name, given in reported.figures[theirs].items()
            for scenario, figure in given.items()
            if (name, scenario) in shown
        }
        tests = {
            scenario: _tests(
                scenario,
                [row for (_, s), row in shown.items() if s == scenario],
                [figure for (_, s), figure in figures.items() if s == scenario],
            )
            for scenario in scenarios
        }
        notes = [f"reported: {reported.source}", *reported.notes]
        notes += [f"{scenario}: test sets {' / '.join(each)}" for scenario, each in tests.items() if len(each) > 1]
        parameters = reported.parameters.get(theirs, {})
        if parameters:
            notes.append(
                "parameters: of ours, 10^6 that a client holds, embeddings and head included; reported: "
                + (reported.parameters_of or "as printed there")
            )
        notes += _scale_notes(fm, theirs, shown)
        notes += [
            f"{FLAG} {name} on {scenario}: {fault}" for (name, scenario), row in shown.items() for fault in row.faults
        ]
        if several:
            notes.append("where a cell has runs in several settings, those nearest to the reported one are shown here")
        out.append(Beside(fm, theirs, shown, figures, tests, notes, parameters))
    return out


def _tests(scenario: str, rows: Sequence[Row], figures: Sequence[Mapping[str, float]]) -> list[str]:
    """The test sets to print of a scenario, as reported figures name them, else as records do; "" for the only one.

    Raises FedbenchError where the records do not have a test set that a figure is reported of.
    """
    runs = [run for row in rows for run in row.scored.values()]
    have = list(dict.fromkeys(test for row in rows for test in extra_tests(row)))
    have = [str(runs[0].accuracy.test_name), *have] if have else [""]
    named = list(dict.fromkeys(test for figure in figures for test in figure))
    for test in named:
        if runs and test and test not in have:
            raise FedbenchError(
                f"reported.figures: {scenario} has no test set {test!r}; "
                f"its records have {', '.join(filter(None, have)) or 'one without a name'}"
            )
    return named or have


def _scale_notes(fm: str, theirs: str, shown: Mapping[tuple[str, str], Row]) -> list[str]:
    """At what FM and scale the runs in a table were made, and in what that is not the reported setting."""
    runs = {place: list(row.scored.values()) for place, row in shown.items() if row.scored}
    if not runs:
        return [f"ours: no results with {fm} yet"]
    scales: dict[str, list[tuple[str, str]]] = defaultdict(list)
    rows: dict[str, set[int]] = defaultdict(set)
    departures: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for place, found in runs.items():
        scales[_scale(found[0])].append(place)
        rows[place[1]] |= {train_rows(run) for run in found}
        for departure in shown[place].departures:
            departures[departure].append(place)
    notes = [f"ours: {fm}, {scale}{_where(places, runs)}" for scale, places in scales.items()]
    seeds = seed_names(sorted({run.identity.seed for found in runs.values() for run in found}))
    trained = ", ".join(f"{name} {' or '.join(f'{n:,}' for n in sorted(sizes))}" for name, sizes in rows.items())
    notes.append(f"ours: {seeds}; training rows: {trained}")
    told: dict[str, list[str]] = defaultdict(list)
    if fm != theirs:
        told[""].append(f"FM {fm} instead of {theirs}")
    for departure, places in departures.items():
        told[_where(places, runs)].append(departure)
    return notes + [f"not as reported{where}: {'; '.join(texts)}" for where, texts in told.items()]


def _scale(run: Record) -> str:
    """Clients, share sampled, rounds and local work of a run; what a record does not say is left out."""
    split, federation = run.scenario.split, run.scenario.federation
    parts = [f"{split.clients} clients"] if split else []
    if federation:
        epochs, steps = federation.local_epochs, federation.max_steps
        parts.append("" if federation.fraction is None else f"{federation.fraction:.0%} of them a round")
        parts.append(f"{federation.rounds} rounds")
        parts.append(f"{epochs} local epoch{'' if epochs == 1 else 's'}" if epochs else "")
        parts.append(f"of at most {steps} steps" if steps else "")
    return ", ".join(filter(None, parts)).replace(", of at most", " of at most")


def _where(places: Sequence[tuple[str, str]], among: Iterable[tuple[str, str]]) -> str:
    """Which cells (row, scenario) are meant, in few words; nothing where it is all of them."""
    chosen, every = set(places), set(among)
    rows, scenarios = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    if chosen == every:
        return ""
    if chosen == {place for place in every if place[1] in scenarios}:
        return f" on {', '.join(scenarios)}"
    if chosen == {place for place in every if place[0] in rows}:
        return f" in {', '.join(rows)}"
    return f" in {', '.join(f'{row} on {scenario}' for row, scenario in places)}"
