"""What the tables show: sections of rows, and reported figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fedbench.tables.asked import Asked
from fedbench.tables.budgets import budget_columns
from fedbench.tables.measures import MEASURES, train_rows
from fedbench.tables.rows import Row, accuracy_in, extra_tests
from fedbench.tables.statistics import Difference


@dataclass
class Section:
    """All rows of one scenario with one FM.

    baseline: the label of the row that all differences are from, where one was asked for and is there.
    """

    scenario: str
    fm: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    headroom: Difference | None = None
    differences: list[Difference] = field(default_factory=list)
    baseline: str = ""

    @property
    def title(self) -> str:
        return f"{self.scenario}, {self.fm}" if self.fm else self.scenario


@dataclass(frozen=True)
class Beside:
    """Accuracy of our runs with `fm` over the figures a publication reports with `reported_fm`, rows by scenarios.

    `cells` and `figures` by row and scenario; figures in % by test set. `tests`: the test sets to show of a scenario.
    `parameters`: those of a client as they are reported, by row.
    """

    fm: str
    reported_fm: str
    cells: Mapping[tuple[str, str], Row]
    figures: Mapping[tuple[str, str], Mapping[str, float]]
    tests: Mapping[str, Sequence[str]]
    notes: list[str]
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"Accuracy in %: ours with {self.fm}, reported with {self.reported_fm}"


@dataclass
class Comparison:
    """Everything the tables show: one section a scenario and FM, and reported figures beside them if a grid has any."""

    sections: list[Section]
    title: str = ""
    beside: list[Beside] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)

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
                for measure in dict.fromkeys((*MEASURES, *self.asked.measures)):
                    found = row.summary(measure.read, measure.scale)
                    line[measure.name] = found.mean if found else None
                    line[f"{measure.name}_std"] = found.std if found else None
                for test in extra_tests(row):
                    extra = row.summary(accuracy_in(row, test))
                    line[f"accuracy_{test}"] = extra.mean if extra else None
                    line[f"accuracy_{test}_std"] = extra.std if extra else None
                line |= budget_columns(row, self.asked.within, self.asked.target, self.asked.profiles)
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
        split, federation = (run.scenario.split, run.scenario.federation) if run else (None, None)
        line: dict[str, Any] = {
            "clients": split and split.clients,
            "fraction": federation and federation.fraction,
            "rounds": federation and federation.rounds,
            "train_rows": run and train_rows(run),
            "not_as_reported": "; ".join(row.departures),
        }
        for beside in self.beside:
            if beside.fm == section.fm:
                for test, figure in beside.figures.get((row.name, section.scenario), {}).items():
                    line["_".join(filter(None, ("reported", beside.reported_fm, test)))] = round(figure / 100, 6)
        return line
