"""The runs of a report: each record with what the tables call it, where its file lies, and how it is made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbench.records.record import Record
from fedbench.records.store import path_of
from fedbench.report.command import Origin, Origins
from fedbench.tables.comparison import Comparison
from fedbench.tables.matching import fm_names, fm_of

BY_ROW = ("correct", "correct_norm", "exact", "rouge_l_rows")
"""Of a score: what it says of each test row."""

LONGEST_LIST = 24
"""Lists of an excerpt that are longer are cut."""

LONGEST_TEXT = 4000
"""Texts of an excerpt that are longer are cut."""


@dataclass(frozen=True)
class Shown:
    """One run of a report: `label` is its line in the tables, `file` where its record lies below the results folder."""

    record: Record
    label: str
    fm: str
    file: str
    origin: Origin

    @property
    def name(self) -> str:
        """What links to it: the first twelve digits of its key."""
        return self.record.key[:12]

    @property
    def section(self) -> str:
        """The scenario and FM that it is compared in."""
        scenario = self.record.identity.scenario
        return f"{scenario}, {self.fm}" if self.fm else scenario


def shown_runs(records: Sequence[Record], comparison: Comparison) -> list[Shown]:
    """Every record with its line in `comparison`; one that has none there is called as its method."""
    names = fm_names(records)
    labels = {
        run.key: row.label for section in comparison.sections for row in section.rows for run in row.runs.values()
    }
    origins = Origins()
    return [
        Shown(
            record,
            labels.get(record.key, record.identity.method),
            fm_of(record, records, names),
            path_of(record, Path("records")).as_posix(),
            origins.of(record),
        )
        for record in records
    ]


def excerpt(record: Record) -> dict[str, Any]:
    """The record as it lies in its file, without answers by row, and with long lists and texts cut, which it says."""
    content = record.to_json()
    return {name: _cut(block, BY_ROW if name == "accuracy" else ()) for name, block in content.items()}


def _cut(value: Any, left_out: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {name: _cut(item, left_out) for name, item in value.items() if name not in left_out}
    if isinstance(value, list):
        kept = [_cut(item, left_out) for item in value[:LONGEST_LIST]]
        return kept if len(value) <= LONGEST_LIST else [*kept, f"… {len(value) - LONGEST_LIST:,} more in the file"]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]}… {len(value) - LONGEST_TEXT:,} more characters in the file"
    return value
