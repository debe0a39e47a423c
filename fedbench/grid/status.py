"""How far a grid is: which of its cells are done, running, failed or left, and how long the rest may take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell, Prepared, Runner
from fedbench.records.record import Record
from fedbench.records.store import load, load_all, record_path
from fedbench.run.claims import claimed

State = Literal["done", "running", "failed", "left"]
STATES: tuple[State, ...] = ("done", "running", "failed", "left")


@dataclass(frozen=True)
class CellStatus:
    """Of one cell. seconds: what it may take, by runs like it, None where there is none; 0 where it is done.

    why: what a failed cell failed of, or why one that is left cannot be made ready.
    """

    cell: Cell
    state: State
    seconds: float | None = 0.0
    why: str = ""


def grid_status(cells: Sequence[Cell], runner: Runner, results: Path) -> list[CellStatus]:
    """The state of each cell in the results folder `results`.

    A cell is done where its key has a complete record, as for `run_cells`, and running where a process holds the claim
    on its key. What one that is not done may take is the mean of the complete records of its method, scenario and FM,
    with any seed: of those with its settings if there are any. Raises FedbenchError for a record that cannot be read.
    """
    past = [record for record in load_all(results / "records") if record.status == "complete"]
    return [_status(cell, runner, results, past) for cell in cells]


def _status(cell: Cell, runner: Runner, results: Path, past: Sequence[Record]) -> CellStatus:
    prepared: Prepared | None = None
    why = ""
    try:
        prepared = runner.prepare(cell)
    except FedbenchError as error:
        why = str(error)
    root = results / "records"
    keys = [*([prepared.key] if prepared else []), cell.key]  # one that failed before its key was known has the other
    found = [_found(record_path(root, cell.scenario, cell.method, cell.seed, key)) for key in keys]
    if prepared and found[0] is not None and found[0].status == "complete":
        return CellStatus(cell, "done")
    expected = expected_seconds(cell, prepared, past)
    if prepared and claimed(results, prepared.key):
        return CellStatus(cell, "running", expected)
    for failure in (record.error for record in found if record is not None and record.error is not None):
        return CellStatus(cell, "failed", expected, f"{failure.type}: {failure.message}")
    return CellStatus(cell, "left", expected, why)


def _found(path: Path) -> Record | None:
    return load(path) if path.exists() else None


def expected_seconds(cell: Cell, prepared: Prepared | None, past: Sequence[Record]) -> float | None:
    """Mean seconds of past runs like this cell; None where there is none."""
    like = [r for r in past if (r.identity.method, r.identity.scenario) == (cell.method, cell.scenario)]
    if prepared is not None:
        like = [r for r in like if r.identity.fm == prepared.fm_name]
        settings = dict(prepared.identity.get("method", {})).get("settings")
        rounds = dict(prepared.identity.get("scenario", {})).get("federation")
        same = [r for r in like if r.method.settings == settings and _federation(r) == rounds]
        like = same or like
    taken = [sum(record.compute.seconds.values()) for record in like if record.compute.seconds]
    return statistics.fmean(taken) if taken else None


def _federation(record: Record) -> object:
    return None if record.scenario.federation is None else record.scenario.federation.to_json()
