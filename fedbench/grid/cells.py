"""The cells of a grid, run one by one, stoppable at any time.

A finished cell is one whose key has a complete record, so nothing but the records has to be kept for a grid to go on
after Ctrl-C or SIGKILL.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fedbench.errors import ClaimedError, FedbenchError
from fedbench.files import try_folder
from fedbench.models.zoo.names import fm_label
from fedbench.package import HOME
from fedbench.records.record import Record
from fedbench.records.schema import SCHEMA
from fedbench.records.store import load, record_key, record_path, save
from fedbench.run.claims import claim

Status = Literal["skipped", "complete", "failed"]
WAIT = 2.0
"""Seconds between two looks at cells that other processes are at."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid; `settings` as `--set` takes them, those of its variant among them."""

    method: str
    scenario: str
    seed: int
    fm: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""

    def __str__(self) -> str:
        at = f", {self.fm}" if self.fm else ""
        return f"{self.row} on {self.scenario}{at}, seed {self.seed}"

    @property
    def row(self) -> str:
        """The row of the grid's tables that it belongs to."""
        return f"{self.method} [{self.variant}]" if self.variant else self.method

    @property
    def key(self) -> str:
        """Stands in for the run's key where a cell fails before that is known."""
        return record_key({"cell": [self.method, self.scenario, self.seed, self.fm, dict(self.settings)]})


class Prepared(Protocol):
    """A cell made ready: its key, what the key is the hash of, and what records call its FM."""

    @property
    def key(self) -> str: ...
    @property
    def fm_name(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...


class Runner(Protocol):
    """Executes cells. `run` saves the complete record under the root given to `run_cells`, and returns it."""

    def prepare(self, cell: Cell) -> Any: ...
    def run(self, prepared: Any) -> Record: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a cell; `record` is the complete or the failed one."""

    cell: Cell
    status: Status
    record: Record


def run_cells(
    cells: Sequence[Cell],
    runner: Runner,
    root: Path,
    before: Callable[[int, Cell], None] = lambda index, cell: None,
    after: Callable[[int, Outcome], None] = lambda index, outcome: None,
    claimed: Callable[[int, Cell], None] = lambda index, cell: None,
) -> list[Outcome]:
    """Run the cells that have no complete record under `root` yet.

    An exception in a cell becomes a record with status "failed" and its traceback, and the grid goes on; the next
    time the cell is tried again. KeyboardInterrupt goes up at once: calling again goes on where it stopped. A cell that
    another process is at is left for later, and then taken as that process left it. Raises FedbenchError where records
    cannot be written under `root`.
    """
    try_folder(root, "--results")
    outcomes: dict[int, Outcome] = {}
    left = deque(enumerate(cells))
    waiting: set[int] = set()
    idle = 0  # cells in a row that other processes are at
    while left:
        index, cell = left.popleft()
        if index not in waiting:
            before(index, cell)
        try:
            outcome = _run_cell(cell, runner, root)
        except ClaimedError:
            if index not in waiting:
                claimed(index, cell)
            waiting.add(index)
            left.append((index, cell))
            idle += 1
            if idle >= len(left):
                time.sleep(WAIT)
            continue
        if index in waiting:
            before(index, cell)
        after(index, outcome)
        outcomes[index], idle = outcome, 0
    return [outcomes[index] for index in range(len(cells))]


def _run_cell(cell: Cell, runner: Runner, root: Path) -> Outcome:
    prepared: Prepared | None = None
    try:
        prepared = runner.prepare(cell)
        path = record_path(root, cell.scenario, cell.method, cell.seed, prepared.key)
        with claim(root.parent, prepared.key):  # before looking, so that nobody ends the run in between
            finished = _complete(path)
            record = finished or runner.run(prepared)
    except ClaimedError:
        raise
    except Exception as error:
        record = failure(cell, prepared, error)
        save(record, root)
        return Outcome(cell, "failed", record)
    # Only a cell that has failed before its key was known leaves a record of another name behind.
    record_path(root, cell.scenario, cell.method, cell.seed, cell.key).unlink(missing_ok=True)
    return Outcome(cell, "skipped" if finished else "complete", record)


def _complete(path: Path) -> Record | None:
    """The record at `path` if it is one and complete; anything else there is made anew."""
    if not path.exists():
        return None
    try:
        record = load(path)
    except FedbenchError:
        return None
    return record if record.status == "complete" else None


def failure(cell: Cell, prepared: Prepared | None, error: BaseException) -> Record:
    """The record of a cell that ended in `error`; `prepared` is None where it did so before its key was known."""
    identity = prepared.identity if prepared else {}
    method = dict(identity.get("method", {"name": cell.method, "version": None, "settings": dict(cell.settings)}))
    return Record.model_validate(
        {
            "schema": SCHEMA,
            "status": "failed",
            "error": {"type": type(error).__name__, "message": str(error), "traceback": _traceback(error)},
            "identity": {
                "key": prepared.key if prepared else cell.key,
                "method": cell.method,
                "method_version": method.get("version"),
                "scenario": cell.scenario,
                "seed": cell.seed,
                "fm": prepared.fm_name if prepared else cell.fm and fm_label(cell.fm),
                "data_hash": identity.get("data_hash"),
                "fm_hash": identity.get("fm_hash"),
                "precision": identity.get("precision"),
            },
            "scenario": dict(identity.get("scenario", {})),
            "method": method,
        }
    )


def _traceback(error: BaseException) -> str:
    """The traceback, with files named from their import folder on: records are shared, home folders are not."""
    text = "".join(traceback.format_exception(error))
    folders = {str(Path(entry or ".").resolve()) for entry in sys.path}
    folders.add(str(HOME.parent))
    for folder in sorted(folders, key=len, reverse=True):
        if folder != "/":
            text = text.replace(f'File "{folder}/', 'File "')
    return text


class LoopRunner:
    """Runs cells with `fedbench.run`; `options` are further fields of its RunRequest (device, data_dir, ...)."""

    def __init__(self, results: Path, progress: Any = None, **options: Any) -> None:
        self.results, self.progress, self.options = results, progress, options

    def prepare(self, cell: Cell) -> Any:
        from fedbench.run.prepare import prepare
        from fedbench.run.request import RunRequest

        return prepare(
            RunRequest(
                method=cell.method,
                scenario=cell.scenario,
                seed=cell.seed,
                fm=cell.fm,
                settings=cell.settings,
                results=self.results,
                **self.options,
            )
        )

    def run(self, prepared: Any) -> Record:
        from fedbench.run.run import run

        return run(prepared, self.progress)
