"""A line of a table: a method in one setting, over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedbench.records.record import Record
from fedbench.records.schema import Score
from fedbench.tables.measures import Reader, accuracy_on, plug_in
from fedbench.tables.statistics import Summary

FLAG = "†"


@dataclass
class Row:
    """One line of a scenario's table: a method, in one of its settings where there are several.

    `runs` are the complete records by seed, `scored` those with an accuracy; `state` is what to print where there is
    none: "missing", "failed", "diverged", "personal models" or "not available". `expected` counts the seeds a grid asks
    for, None where there is no grid. `name` is the grid's row, `departures` what its runs do not share with the setting
    of the figures they stand beside. `faults`: why runs are not to be ranked, whatever they stand beside; `flag`: that,
    and why they cannot be compared with the other rows.
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
        return {seed: run for seed, run in self.runs.items() if plug_in(run) is not None}

    @property
    def scores(self) -> dict[int, Score]:
        """Of the FM plugged in, by seed; none of a run that has no accuracy."""
        return {seed: score for seed, run in self.scored.items() if (score := run.accuracy.plug_in)}

    @property
    def state(self) -> str:
        if any(run.accuracy.diverged for run in self.runs.values()):
            return "diverged"
        if any(run.accuracy.personal for run in self.runs.values()):
            return "personal models"
        if self.runs:
            return "not available"
        return "failed" if self.failed else "missing"

    @property
    def faults(self) -> tuple[str, ...]:
        seeds: dict[str, list[int]] = defaultdict(list)
        for seed, run in sorted(self.runs.items()):
            if run.accuracy.diverged:
                seeds["diverged: the loss on the test set is not a finite number, so there is no score"].append(seed)
            elif run.accuracy.plug_in and (why := run.no_upload):
                seeds[why].append(seed)
        return tuple(
            why if len(those) == len(self.runs) else f"{why} ({seed_names(those)})" for why, those in seeds.items()
        )

    def summary(self, read: Reader, scale: float = 1.0) -> Summary | None:
        """Of what is read from each run, times `scale`."""
        values = [read(run) for _, run in sorted(self.runs.items())]
        return Summary.of(None if value is None else value * scale for value in values)


def seed_names(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def extra_tests(row: Row) -> list[str]:
    """The names of further test sets that the row's runs were scored on."""
    return list(dict.fromkeys(test for run in row.scored.values() for test in run.accuracy.extra_tests or ()))


def accuracy_in(row: Row, test: str) -> Reader:
    """How the accuracy on a test set is read from the row's runs; "" is the first one, whatever its name."""
    return accuracy_on(test) if test in extra_tests(row) else plug_in
