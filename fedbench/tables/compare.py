"""Comparisons: what records say, methods beside each other. Pure functions of records, without torch.

Numbers of several seeds are mean ± sample standard deviation with their count n; with one seed there is no
deviation. Differences between methods carry an interval for seeds and test rows at large, from the seeds they share.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedbench.errors import FedbenchError
from fedbench.models.zoo.names import FMS, fm_label, is_called, recorded_label
from fedbench.records.store import Record, diverged, no_upload, rounds_without_upload, unpack_correct
from fedbench.tables.formats import MEGA, seeds_text
from fedbench.tables.statistics import (
    SEEDS_FOR_TEST,
    Difference,
    Summary,
    binomial_standard_error,
    holm,
    paired_test,
)

if TYPE_CHECKING:
    from fedbench.grid.cells import Cell
    from fedbench.grid.file import Reported

REFERENCES = ("zero-shot", "head-only", "centralised-lora")
"""Methods that mark floor and ceiling; tests between pairs of methods leave them out."""

CEILING, FLOOR = "fedavg-lora", "head-only"
"""A scenario can rank methods only where the first clearly beats the second: its headroom."""

FLAG = "†"


@dataclass
class Row:
    """One line of a scenario's table: a method, in one of its settings where there are several.

    `runs` are the complete records by seed, `scored` those with an accuracy; `state` is what to print where there is
    none: "missing", "failed", "diverged" or "not available". `expected` counts the seeds a grid asks for, None where
    there is no grid. `name` is the grid's row, `departures` what its runs do not share with the setting of the figures
    they stand beside. `faults`: why runs are not to be ranked, whatever they stand beside; `flag`: that, and why they
    cannot be compared with the other rows.
    """

    method: str
    label: str
    name: str = ""
    departures: tuple[str, ...] = ()
    runs: dict[int, Record] = field(default_factory=dict)
    failed: int = 0
    expected: int | None = None
    flag: str = ""

    @property
    def scored(self) -> dict[int, Record]:
        return {
            seed: run for seed, run in self.runs.items() if _at(run, ("accuracy", "plug_in", "accuracy")) is not None
        }

    @property
    def state(self) -> str:
        if any(diverged(run.accuracy.get("plug_in")) for run in self.runs.values()):
            return "diverged"
        if self.runs:
            return "not available"
        return "failed" if self.failed else "missing"

    @property
    def faults(self) -> tuple[str, ...]:
        seeds: dict[str, list[int]] = defaultdict(list)
        for seed, run in sorted(self.runs.items()):
            if diverged(run.accuracy.get("plug_in")):
                seeds["diverged: the loss on the test set is not a finite number, so there is no score"].append(seed)
            elif run.accuracy.get("plug_in") and (why := no_upload(run)):
                seeds[why].append(seed)
        return tuple(
            why if len(those) == len(self.runs) else f"{why} ({_seeds(those)})" for why, those in seeds.items()
        )

    def summary(self, *path: str, scale: float = 1.0) -> Summary | None:
        """Of the value at `path` in each run, times `scale`."""
        values = [_at(run, path) for _, run in sorted(self.runs.items())]
        return Summary.of(None if value is None else value * scale for value in values)


@dataclass
class Section:
    """All rows of one scenario with one FM."""

    scenario: str
    fm: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    headroom: Difference | None = None
    differences: list[Difference] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.scenario}, {self.fm}" if self.fm else self.scenario


@dataclass(frozen=True)
class Beside:
    """Accuracy of our runs with `fm` over the figures a publication reports with `reported_fm`, rows by scenarios.

    `cells` and `figures` by row and scenario; figures in % by test set. `tests`: the test sets to show of a scenario.
    """

    fm: str
    reported_fm: str
    cells: Mapping[tuple[str, str], Row]
    figures: Mapping[tuple[str, str], Mapping[str, float]]
    tests: Mapping[str, Sequence[str]]
    notes: list[str]

    @property
    def title(self) -> str:
        return f"Accuracy in %: ours with {self.fm}, reported with {self.reported_fm}"


@dataclass
class Comparison:
    """Everything the tables show: one section a scenario and FM, and reported figures beside them if a grid has any."""

    sections: list[Section]
    title: str = ""
    beside: list[Beside] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """One line a method and scenario, all measures as plain numbers (shares 0 to 1, megabytes, counts)."""
        lines = []
        for section in self.sections:
            for row in section.rows:
                line: dict[str, Any] = {
                    "scenario": section.scenario,
                    "fm": section.fm,
                    "method": row.method,
                    "variant": row.label.removeprefix(row.method).strip(" []"),
                    "state": "complete" if row.scored else row.state,
                    "seeds": len(row.runs),
                    "seeds_expected": row.expected,
                    "failed": row.failed,
                    "not_comparable": row.flag,
                }
                for name, path, scale in _MEASURES:
                    found = row.summary(*path, scale=scale)
                    line[name] = found.mean if found else None
                    line[f"{name}_std"] = found.std if found else None
                for test in _extra_tests(row):
                    extra = row.summary(*test_path(row, test))
                    line[f"accuracy_{test}"] = extra.mean if extra else None
                    line[f"accuracy_{test}_std"] = extra.std if extra else None
                if self.beside:
                    line |= self._reported(section, row)
                lines.append(line)
        frame = pd.DataFrame(lines)
        for column in ("seeds_expected",):
            if column in frame:
                frame[column] = frame[column].astype("Int64")
        return frame

    def _reported(self, section: Section, row: Row) -> dict[str, Any]:
        """The figures beside a row, as shares by the FM and test set they were reported of, and the row's scale."""
        run = next(iter(row.runs.values()), None)
        line: dict[str, Any] = {
            "clients": run and _at(run, ("scenario", "split", "clients")),
            "fraction": run and _at(run, ("scenario", "federation", "fraction")),
            "rounds": run and _at(run, ("scenario", "federation", "rounds")),
            "train_rows": run and _train_rows(run),
            "not_as_reported": "; ".join(row.departures),
        }
        for beside in self.beside:
            if beside.fm == section.fm:
                for test, figure in beside.figures.get((row.name, section.scenario), {}).items():
                    line["_".join(filter(None, ("reported", beside.reported_fm, test)))] = round(figure / 100, 6)
        return line


_MEASURES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("accuracy", ("accuracy", "plug_in", "accuracy"), 1.0),
    ("macro_f1", ("accuracy", "plug_in", "macro_f1"), 1.0),
    ("proxy_accuracy", ("accuracy", "proxy", "accuracy"), 1.0),
    ("gap", ("accuracy", "gap"), 1.0),
    ("untouched_accuracy", ("accuracy", "untouched", "accuracy"), 1.0),
    ("client_accuracy_mean", ("accuracy", "per_client", "mean"), 1.0),
    ("client_accuracy_worst_tenth", ("accuracy", "per_client", "worst_tenth"), 1.0),
    ("mb_up", ("communication", "up", "bytes"), 1 / MEGA),
    ("mb_down", ("communication", "down_after_setup"), 1 / MEGA),
    ("mb_setup", ("communication", "setup_bytes"), 1 / MEGA),
    ("mb_up_per_client_round", ("communication", "up_per_client_round"), 1 / MEGA),
    ("gradient_error_start", ("gradient_error", "start"), 1.0),
    ("gradient_error_mean", ("gradient_error", "mean"), 1.0),
    ("gradient_error_final", ("gradient_error", "final"), 1.0),
    ("exposed_verbatim", ("exposure", "verbatim", "all"), 1.0),
    ("exposed_verbatim_without_embeddings", ("exposure", "verbatim", "without_embeddings"), 1.0),
    ("exposed_within_1_percent", ("exposure", "within_1_percent", "all"), 1.0),
    ("exposed_within_1_percent_without_embeddings", ("exposure", "within_1_percent", "without_embeddings"), 1.0),
    ("trainable_parameters", ("compute", "trainable_parameters"), 1.0),
    ("resident_parameters", ("compute", "resident_parameters"), 1.0),
    ("local_steps", ("compute", "local_steps"), 1.0),
    ("gflop_per_step", ("compute", "step_flops"), 1e-9),
    ("peak_memory_mb", ("compute", "peak_memory_bytes"), 1 / MEGA),
)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _at(run: Record, path: Sequence[str]) -> float | None:
    """The number at `path` of the record, or None; two measures of communication are derived from others.

    A model that diverged has no measure of accuracy.
    """
    if path == ("communication", "down_after_setup"):
        down, setup = _at(run, ("communication", "down", "bytes")), _at(run, ("communication", "setup_bytes"))
        return None if down is None or setup is None else down - setup
    if path == ("communication", "up_per_client_round"):
        up = _at(run, ("communication", "up", "bytes"))
        uploads = sum(len(r.get("arrived", ())) + len(r.get("refused", ())) for r in run.rounds)
        return None if up is None or not uploads else up / uploads
    if path[0] == "accuracy":
        scores = run.accuracy.get("plug_in"), run.accuracy.get("proxy")
        if (path[1] == "gap" and any(map(diverged, scores))) or (path[1] == "per_client" and diverged(scores[0])):
            return None
    value: Any = getattr(run, path[0])
    for name in path[1:]:
        value = value.get(name) if isinstance(value, Mapping) and not diverged(value) else None
    return value if isinstance(value, (int, float)) else None


# Building


def compare(
    records: Iterable[Record],
    cells: Sequence[Cell] | None = None,
    title: str = "",
    reported: Reported | None = None,
) -> Comparison:
    """Sort records into sections and rows.

    With the `cells` of a grid, rows and columns are the grid's and what is not there yet shows as missing; records
    that do not belong to a cell are left out. Without, every record is shown. `reported` figures stand beside the
    cells of their FM; where no cell has one of their FMs, beside those of every FM.
    """
    records = list(records)
    names = fm_names(records, [cell.fm for cell in cells or () if cell.fm is not None])
    if cells is not None:
        records = [record for record in records if any(_belongs(record, cell, names) for cell in cells)]
    by_section: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.identity["scenario"], str(r.identity.get("fm")), r.key)):
        by_section[record.identity["scenario"], _fm(record, records, names)].append(record)
    order: dict[tuple[str, str | None], int] = {}
    for cell in cells or ():
        asked = _asked(cell)
        order.setdefault((cell.scenario, asked), len(order))
        if asked is not None:
            by_section.setdefault((cell.scenario, asked), [])
        elif not any(scenario == cell.scenario for scenario, _ in by_section):
            by_section[cell.scenario, ""] = []

    def place(section: tuple[str, str]) -> tuple[int, tuple[str, str]]:
        return order.get(section, order.get((section[0], None), 0)), section

    sections = []
    for scenario, fm in sorted(by_section, key=place):
        wanted = None if cells is None else [c for c in cells if c.scenario == scenario and _asked(c) in (None, fm)]
        sections.append(_section(scenario, fm, by_section[scenario, fm], wanted, names))
    if cells is None:
        _add_absent(sections)
    return Comparison(sections, title, _beside(sections, cells, reported) if cells and reported else [])


def fm_names(records: Iterable[Record], asked: Sequence[str] = ()) -> dict[str, str]:
    """What each FM is called, by its hash: one name, whatever its folder was called from run to run.

    That is the name it has among `asked`, FMs as a user gives them, else one that comes with the project, else the
    first.
    """
    called: dict[str, set[str]] = defaultdict(set)
    for record in records:
        digest, name = record.identity.get("fm_hash"), record.identity.get("fm")
        if digest and name:
            called[str(digest)].add(str(name))
    out = {}
    for digest, names in called.items():
        wanted = [fm_label(given) for given in asked if any(is_called(name, given) for name in names)]
        known = sorted(map(recorded_label, names), key=lambda name: (name not in FMS, name))
        out[digest] = [*wanted, *known][0]
    return out


def of_fm(records: Sequence[Record], fm: str) -> list[Record]:
    """The records of the FM given as `fm`, under whatever names they have it."""
    names = fm_names(records, [fm])
    return [record for record in records if is_called(_fm(record, (), names), fm)]


def _asked(cell: Cell) -> str | None:
    """What records call the FM that a cell asks for; None where it leaves that to its scenario."""
    return None if cell.fm is None else fm_label(cell.fm)


def _fm(record: Record, records: Sequence[Record], names: Mapping[str, str]) -> str:
    """The record's FM. A run that failed before its FM was known goes with the others of its scenario."""
    own = record.identity.get("fm")
    if own:
        return names.get(str(record.identity.get("fm_hash")), recorded_label(str(own)))
    scenario = record.identity["scenario"]
    others = [r for r in records if r.identity["scenario"] == scenario and r.identity.get("fm")]
    return min((_fm(other, (), names) for other in others), default="")


def _belongs(record: Record, cell: Cell, names: Mapping[str, str]) -> bool:
    """Whether the record is of this cell, as far as names and the cell's own settings tell."""
    who = record.identity
    if (who["method"], who["scenario"], who["seed"]) != (cell.method, cell.scenario, cell.seed):
        return False
    if cell.fm is not None and not is_called(_fm(record, (), names), cell.fm):
        return False
    return not _departures(record, cell.settings)


def _departures(record: Record, settings: Mapping[str, Any]) -> list[str]:
    """Which of `settings`, keys and values as `--set` takes them, are others in the record.

    One that the record does not have is not compared: it belongs to another method, or the run failed before its
    settings were resolved. Nor is one that the method changes by its nature (`method.planned`).
    """
    method, planned = record.identity["method"], record.method.get("planned") or ()
    have = {**_flat(record.scenario), **_flat(record.method.get("settings", {}))}
    out = []
    for key, value in settings.items():
        name = key.removeprefix("method.").removeprefix(f"methods.{method}.")
        name = "federation.rounds" if name == "rounds" else name
        name = name if name in have else name.replace("-", "_")
        if name in have and name not in planned and not _equal(have[name], value):
            wanted = value if isinstance(value, str) else str(value).lower()
            out.append(f"{name} {_value(name, have[name])} instead of {wanted}")
    return out


def _equal(found: Any, value: Any) -> bool:
    """Whether a setting is `value`, which may be its text."""
    try:
        return math.isclose(float(found), float(value), rel_tol=1e-8)
    except (TypeError, ValueError, OverflowError):
        return str(found).lower() == str(value).lower()


def _section(
    scenario: str, fm: str, records: list[Record], cells: Sequence[Cell] | None, names: Mapping[str, str]
) -> Section:
    rows: list[Row] = []
    conditions = _conditions(records)
    # What a grid asks for, or what is there: name of the row -> method, variant, records, seeds expected.
    asked: dict[str, tuple[str, str, list[Record], int | None]] = {}
    if cells is None:
        for method in sorted({r.identity["method"] for r in records}, key=_method_order):
            asked[method] = method, "", [r for r in records if r.identity["method"] == method], None
    else:
        for name in dict.fromkeys(cell.row for cell in cells):
            group = [cell for cell in cells if cell.row == name]
            own = [r for r in records if any(_belongs(r, cell, names) for cell in group)]
            asked[name] = group[0].method, group[0].variant, own, len(group)
    twice: list[str] = []
    for name, (method, variant, own, expected) in asked.items():
        complete = [r for r in own if r.status == "complete"]
        done = {r.identity["seed"] for r in complete}
        failed = {r.identity["seed"] for r in own if r.status == "failed"} - done
        groups = _variants(complete, conditions)
        for told, runs in groups or [("", [])]:
            label = ", ".join(filter(None, (variant, told)))
            row = Row(method, f"{method} [{label}]" if label else method, name, expected=expected)
            row.runs = {r.identity["seed"]: r for r in runs}
            if len(row.runs) < len(runs):
                seeds = [r.identity["seed"] for r in runs]
                twice.append(
                    f"{row.label}: several records of {_seeds(sorted({s for s in seeds if seeds.count(s) > 1}))} "
                    "with the same settings; one of each is shown"
                )
            rows.append(row)
        # A failed seed has no settings worth telling apart; it is shown with the first row of its name.
        rows[-max(1, len(groups))].failed = len(failed)
    section = Section(scenario, fm, rows, twice)
    _flag(section, conditions)
    _describe(section)
    _differences(section)
    return section


def _beside(sections: Sequence[Section], cells: Sequence[Cell], reported: Reported) -> list[Beside]:
    """One table for each FM of the publication, beside our runs with the same FM if the grid has it."""
    fms = [fm for fm in dict.fromkeys(map(_asked, cells)) if fm is not None]
    pairs = [(fm_label(fm), fm) for fm in reported.figures if fm_label(fm) in fms]
    pairs = pairs or [(fm, theirs) for theirs in reported.figures for fm in fms]
    for row in (row for section in sections for row in section.rows if row.runs):
        row.departures = tuple(_departures(next(iter(row.runs.values())), reported.setting))
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
        notes += _scale_notes(fm, theirs, shown)
        notes += [
            f"{FLAG} {name} on {scenario}: {fault}" for (name, scenario), row in shown.items() for fault in row.faults
        ]
        if several:
            notes.append("where a cell has runs in several settings, those nearest to the reported one are shown here")
        out.append(Beside(fm, theirs, shown, figures, tests, notes))
    return out


def _tests(scenario: str, rows: Sequence[Row], figures: Sequence[Mapping[str, float]]) -> list[str]:
    """The test sets to print of a scenario, as reported figures name them, else as records do; "" for the only one.

    Raises FedbenchError where the records do not have a test set that a figure is reported of.
    """
    runs = [run for row in rows for run in row.scored.values()]
    have = list(dict.fromkeys(test for row in rows for test in _extra_tests(row)))
    have = [str(runs[0].accuracy["test_name"]), *have] if have else [""]
    named = list(dict.fromkeys(test for figure in figures for test in figure))
    for test in named:
        if runs and test and test not in have:
            raise FedbenchError(
                f"reported.figures: {scenario} has no test set {test!r}; "
                f"its records have {', '.join(filter(None, have)) or 'one without a name'}"
            )
    return named or have


def _extra_tests(row: Row) -> list[str]:
    """The names of further test sets that the row's runs were scored on."""
    return list(dict.fromkeys(test for run in row.scored.values() for test in run.accuracy.get("extra_tests") or ()))


def test_path(row: Row, test: str) -> tuple[str, ...]:
    """Where a record holds the accuracy on a test set; "" is the first one, whatever its name."""
    extra = ("extra_tests", test) if test in _extra_tests(row) else ()
    return ("accuracy", *extra, "plug_in", "accuracy")


def _train_rows(run: Record) -> int:
    return sum(run.partition.get("sizes") or ())


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
        rows[place[1]] |= {_train_rows(run) for run in found}
        for departure in shown[place].departures:
            departures[departure].append(place)
    notes = [f"ours: {fm}, {scale}{_where(places, runs)}" for scale, places in scales.items()]
    seeds = _seeds(sorted({run.identity["seed"] for found in runs.values() for run in found}))
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
    split, federation = run.scenario.get("split", {}), run.scenario.get("federation", {})
    epochs, steps = federation.get("local_epochs"), federation.get("max_steps")
    parts = [f"{split['clients']} clients" if "clients" in split else ""]
    parts.append(f"{federation['fraction']:.0%} of them a round" if "fraction" in federation else "")
    parts.append(f"{federation['rounds']} rounds" if "rounds" in federation else "")
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


def _add_absent(sections: list[Section]) -> None:
    """Without a grid: show a method that ran in one scenario as missing in the others."""
    methods = {row.method for section in sections for row in section.rows}
    for section in sections:
        section.rows += [Row(m, m) for m in methods - {row.method for row in section.rows}]
        section.rows.sort(key=lambda row: _method_order(row.method))


def _method_order(name: str) -> tuple[int, str]:
    """Floor first, ceilings last, the methods under test by name between them."""
    ends = {"zero-shot": 0, "head-only": 1, CEILING: 3, "centralised-lora": 4}
    return ends.get(name, 2), name


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _conditions(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By record key: all that has to agree between two rows for their numbers to be comparable.

    That is the scenario without the methods' own settings, data, FM, what that makes of the data, and precision. What a
    reference changes by its nature (`method.planned`: a partition of one client, no rounds) does not make it another
    scenario.
    """
    out = {}
    for record in records:
        if record.status != "complete":
            continue
        found = {
            path: value
            for path, value in _flat(record.scenario).items()
            if path not in ("title", "name", "fm") and not path.startswith("methods.") and path != "methods"
        }
        for name in ("data_hash", "fm_hash", "precision"):
            found[name] = record.identity.get(name)
        # Of the tokenizer or image processor; records did not always say it.
        if inputs := record.identity.get("inputs_hash"):
            found["inputs_hash"] = inputs
        for path in record.method.get("planned") or ():
            found.pop(path, None)
        out[record.key] = found
    return out


def _variants(records: Sequence[Record], conditions: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Record]]]:
    """Records of one method, grouped by everything but the seed; each group with what tells it from the others."""
    groups: dict[str, list[Record]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    for record in records:
        about = {
            **conditions[record.key],
            **_flat(record.method.get("settings", {})),
            "version": record.identity.get("method_version"),
        }
        name = repr(sorted((path, repr(value)) for path, value in about.items()))
        groups[name].append(record)
        settings[name] = about
    paths = sorted({path for about in settings.values() for path in about})
    telling = [p for p in paths if len({repr(about.get(p)) for about in settings.values()}) > 1]
    labelled = [(", ".join(_setting(p, settings[name].get(p)) for p in telling), groups[name]) for name in groups]
    # The group with most seeds first: where results were collected over time that is the one they are about.
    return sorted(labelled, key=lambda item: (-len(item[1]), item[0]))


def _setting(path: str, value: Any) -> str:
    return f"{path.rpartition('.')[2]} {_value(path, value)}"


def _value(path: str, value: Any) -> str:
    return str(value)[:8] if path.endswith("_hash") else str(value).lower()


def _flag(section: Section, conditions: Mapping[str, Mapping[str, Any]]) -> None:
    """Mark the rows with faults, and those whose conditions are not those of most runs in the section; say why."""
    for row in section.rows:
        row.flag = "; ".join(row.faults)
        section.notes += [f"{FLAG} {row.label}: {fault}" for fault in row.faults]
    own = [(row, conditions[next(iter(row.runs.values())).key]) for row in section.rows if row.runs]
    if not own:
        return

    def agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        return all(repr(a[path]) == repr(b[path]) for path in a.keys() & b.keys())

    def support(candidate: Mapping[str, Any]) -> tuple[int, int]:
        """Runs under these conditions that could be ranked, and how many of the conditions are stated."""
        agreeing = (row for row, other in own if agree(candidate, other))
        return sum(0 if row.faults else len(row.runs) for row in agreeing), len(candidate)

    found = sorted((about for _, about in own), key=support, reverse=True)
    usual: dict[str, Any] = {}
    for about in found:
        # What the most usual conditions leave unsaid, the next that agree with them say.
        if agree(about, usual):
            usual = {**about, **usual}
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, about in own:
        different = sorted(p for p in about.keys() & usual.keys() if repr(about[p]) != repr(usual[p]))
        if different:
            reason = ", ".join(f"{p} {_value(p, about[p])} instead of {_value(p, usual[p])}" for p in different[:3]) + (
                f" and {len(different) - 3} more" if len(different) > 3 else ""
            )
            row.flag = "; ".join(filter(None, (row.flag, reason)))
            reasons[reason].append(row.label)
    for reason, labels in reasons.items():
        section.notes.append(f"{FLAG} not comparable with the rest: {', '.join(labels)}: {reason}")


def _describe(section: Section) -> None:
    """Notes on the scenario: test set and its standard error, the FM untouched, reasons, seeds that are not there."""
    scored = [run for row in section.rows for run in row.scored.values()]
    if scored:
        best = max(run.accuracy["plug_in"]["accuracy"] for run in scored)
        rows = scored[0].accuracy["plug_in"]["rows"]
        error = binomial_standard_error(best, rows)
        section.notes.append(
            f"test set: {rows:,} rows; binomial standard error {100 * error:.2f} points at {100 * best:.1f}%"
        )
        untouched = [u for run in scored if (u := _at(run, ("accuracy", "untouched", "accuracy"))) is not None]
        text = f"{100 * untouched[0]:.1f}%" if untouched else "not available (no head trained for this task)"
        section.notes.append(f"FM untouched: {text}")
        if any((run.scenario.get("public") or {}).get("in_domain") for run in scored):
            section.notes.append("the public corpus is in-domain, which flatters proxies")
        section.notes += _budget(section)
        section.notes.append(f"made with {', '.join(_sources(scored))}")
    for row in section.rows:
        reasons = sorted({str(run.accuracy.get("unavailable")) for run in row.runs.values() if not _plug_in(run)})
        section.notes += [f"{row.label}: not available: {reason}" for reason in reasons]
        without = {
            seed: f"{n} of {len(run.rounds)} (seed {seed})"
            for seed, run in sorted(row.scored.items())
            if (n := rounds_without_upload(run)) and not no_upload(run)
        }
        if without:
            section.notes.append(f"{row.label}: rounds without any upload: {', '.join(without.values())}")
        if row.failed:
            section.notes.append(f"{row.label}: {seeds_text(row.failed)} failed; the tracebacks are in the records")


def _sources(runs: Sequence[Record]) -> list[str]:
    """What the runs were made with: commits, a changed source told from a clean one, or the version; and not fp32."""
    found = set()
    for run in runs:
        about = run.provenance
        git = about.get("git")
        dirty = " with changes" if git and git["dirty"] else ""
        code = f"commit {git['commit'][:7]}{dirty}" if git else f"fedbench {about.get('fedbench')}"
        found.add(f"{code} in {precision}" if (precision := run.identity.get("precision")) != "fp32" else code)
    return sorted(found)


def _budget(section: Section) -> list[str]:
    """What is not equal between the proxy methods: parameters held within 2%, local optimiser steps, distillation."""
    rows = [row for row in section.rows if row.summary("accuracy", "proxy", "accuracy") and not row.flag]
    out = []
    for what, tolerance, measure in (
        ("parameters held at a client", 0.02, lambda run: _at(run, ("compute", "resident_parameters"))),
        ("local steps", 0.0, lambda run: _at(run, ("compute", "local_steps"))),
        ("public rows distilled on, alignments included", 0.0, _distilled),
    ):
        each = {row.label: Summary.of(measure(run) for run in row.runs.values()) for row in rows}
        found = {label: value.mean for label, value in each.items() if value}
        if len(found) > 1 and max(found.values()) > (1 + tolerance) * min(found.values()):
            told = ", ".join(f"{label} {value:,.0f}" for label, value in found.items())
            out.append(f"budgets of the proxy methods differ: {what}: {told}")
    return out


def _distilled(run: Record) -> float | None:
    """Public rows that a run's distillation steps took, before and during training; None where it does not say.

    Steps are those of the settings. An alignment follows every t-th round but the last.
    """
    settings, rounds = run.method.get("settings", {}), _at(run, ("scenario", "federation", "rounds"))
    if not run.distillation or rounds is None or not {"distil_steps", "distil_batch"} <= settings.keys():
        return None
    steps, t = settings["distil_steps"], settings.get("t")
    if t:
        steps += (int(rounds) - 1) // t * settings["align_steps"]
    return float(steps * settings["distil_batch"])


def _plug_in(run: Record) -> Any:
    return run.accuracy.get("plug_in")


def _differences(section: Section) -> None:
    """Headroom and the differences between methods, among comparable rows with per-row correctness."""
    rows = {row.label: row for row in section.rows if row.scored and not row.flag}
    correct: dict[str, dict[int, NDArray[np.bool_]]] = {}
    sizes: dict[int, int] = defaultdict(int)
    for row in rows.values():
        for run in row.scored.values():
            sizes[run.accuracy["plug_in"]["rows"]] += 1
    usual = max(sizes, key=lambda size: sizes[size]) if sizes else 0
    for label, row in rows.items():
        blocks = {seed: run.accuracy["plug_in"] for seed, run in row.scored.items()}
        correct[label] = {
            seed: unpack_correct(block["correct"], block["rows"])
            for seed, block in blocks.items()
            if block.get("correct") and block["rows"] == usual
        }

    def paired(a: str, b: str) -> bool:
        return bool(correct[a].keys() & correct[b].keys())

    first = {row.method: label for label, row in reversed(rows.items())}
    pairs = []
    if CEILING in first and FLOOR in first and paired(first[CEILING], first[FLOOR]):
        pairs.append((first[CEILING], first[FLOOR]))
    ranked = [label for label, row in rows.items() if row.method not in REFERENCES]
    pairs += [(a, b) for a, b in itertools.combinations(ranked, 2) if paired(a, b)]
    found = [_difference(a, b, correct[a], correct[b]) for a, b in pairs]
    if pairs and pairs[0][1] == first.get(FLOOR):
        section.headroom = found.pop(0)
    tested = [i for i, difference in enumerate(found) if difference.seeds >= SEEDS_FOR_TEST]
    raw = []
    for i in tested:
        a, b = correct[found[i].a], correct[found[i].b]
        raw.append(paired_test([float(a[s].mean() - b[s].mean()) for s in sorted(a.keys() & b.keys())]))
    for i, p in zip(tested, holm(raw), strict=True):
        found[i] = replace(found[i], p=p)
    section.differences = found


def _difference(
    a: str, b: str, mine: Mapping[int, NDArray[np.bool_]], theirs: Mapping[int, NDArray[np.bool_]]
) -> Difference:
    """Of two methods by what each answered rightly in a seed [rows]: of this pair and its shared seeds alone."""
    shared = sorted(mine.keys() & theirs.keys())
    return Difference.of(a, b, np.stack([mine[s].astype(np.float64) - theirs[s] for s in shared]))
