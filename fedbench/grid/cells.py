"""Grids: methods x scenarios x FMs x seeds from one TOML file, run cell by cell, stoppable at any time.

A grid file:

    title = "AG News, label skew"
    methods = ["head-only", "fedpft"]
    scenarios = ["agnews-noniid"]
    seeds = 3                           # 0, 1, 2; or a list
    fms = ["minilm-l6", "bert-base"]    # optional, default: each scenario's own

    [[overrides]]                       # optional, in order; as --set would take them
    methods = ["fedpft"]                # optional, default: all; the same for scenarios
    set = { "federation.rounds" = 20, lr = 1e-3 }

    [[variants]]                        # optional: each makes a row of its own of every method, "fedpft [t 5]"
    label = "t 5"
    set = { t = 5 }                     # after the overrides

    [reported]                          # optional: what a publication reports, printed beside ours
    source = "Authors (year), table 1"
    notes = ["No deviation is reported."]
    setting = { "federation.rounds" = 100, "methods.fedpft.t" = 10 }    # what differs from it in ours is said

    [reported.figures.bert-base]        # accuracy in %, by FM, row and scenario; by test set where there are several
    "fedpft [t 5]" = { agnews-noniid = 87.5, mnli-iid = { matched = 78.6, mismatched = 79.0 } }

An FM of [reported.figures] with an empty table is one whose figures are not at hand: they print as "not available".

A finished cell is one whose key has a complete record, so nothing but the records has to be kept for a grid to go on
after Ctrl-C or SIGKILL.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from fedbench.errors import ClaimedError, FedbenchError
from fedbench.files import try_folder
from fedbench.models.zoo.names import fm_label
from fedbench.names import bad_name, nearest
from fedbench.records.record import Record
from fedbench.records.schema import SCHEMA
from fedbench.records.store import load, record_key, record_path, save
from fedbench.run.claims import claim
from fedbench.scenario.load import read_toml
from fedbench.scenario.settings import mistake

Status = Literal["skipped", "complete", "failed"]
WAIT = 2.0
"""Seconds between two looks at cells that other processes are at."""

MOST_SEEDS = 10_000
"""Seeds that a number may stand for."""

LARGEST_SEED = 2**63 - 1
"""Tables hold seeds as 64-bit integers."""


class Overrides(BaseModel):
    """Settings for some cells of a grid; without methods or scenarios, for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: list[str] | None = None
    scenarios: list[str] | None = None
    set: dict[str, Any]

    def apply_to(self, method: str, scenario: str) -> bool:
        return (self.methods is None or method in self.methods) and (
            self.scenarios is None or scenario in self.scenarios
        )


class Variant(BaseModel):
    """Settings under which every method of the grid runs as well, in a row called `label`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field(min_length=1)
    set: dict[str, Any]


Figure = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=100, strict=True)]],
    Field(min_length=1),
    BeforeValidator(lambda value: {"": value} if isinstance(value, (int, float)) else value),
]
"""Reported accuracy in %, by name of the test set; "" where there is only one."""


class Reported(BaseModel):
    """What a publication reports: `figures` by FM, row and scenario, and the `setting` they were measured under.

    Keys and values of `setting` are as `--set` takes them; one that a run does not have is not compared. `notes` are
    printed as they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    notes: list[str] = Field(default_factory=list)
    setting: dict[str, Any] = Field(default_factory=dict)
    figures: dict[str, dict[str, dict[str, Figure]]] = Field(min_length=1)


class Grid(BaseModel):
    """What a grid file says. Orders of methods, scenarios and FMs are those of its tables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = ""
    methods: list[str] = Field(min_length=1)
    scenarios: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    fms: list[str] = Field(default_factory=list)
    overrides: list[Overrides] = Field(default_factory=list)
    variants: list[Variant] = Field(default_factory=list)
    reported: Reported | None = None

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        """A number N stands for the seeds 0 to N-1."""
        if not isinstance(seeds, int) or isinstance(seeds, bool):
            return seeds
        if seeds > MOST_SEEDS:
            raise ValueError(f"{seeds} seeds are more than {MOST_SEEDS}; list those to run")
        return list(range(seeds))

    @field_validator("methods", "scenarios", "seeds", "fms", "variants")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        names = [value.label if isinstance(value, Variant) else value for value in values]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"{name!r} is there twice")
        if any(isinstance(value, int) and not 0 <= value <= LARGEST_SEED for value in values):
            raise ValueError(f"seeds are 0 or larger, up to {LARGEST_SEED}")
        return values

    @field_validator("methods", "scenarios")
    @classmethod
    def _named(cls, names: list[str]) -> list[str]:
        """They become folders of records, those of cells that fail among them."""
        for name in names:
            if why := bad_name(name):
                raise ValueError(why)
        return names

    def only(
        self,
        methods: Sequence[str] = (),
        scenarios: Sequence[str] = (),
        seeds: int | Sequence[int] | None = None,
        fm: str | None = None,
    ) -> Grid:
        """The part of the grid with these methods and scenarios (all where none are named), or with other seeds.

        With `fm` every cell is there once, at that FM, whatever FMs the grid has. Raises FedbenchError for a name the
        grid does not have.
        """
        chosen: dict[str, Any] = {}
        for what, names, known in (("methods", methods, self.methods), ("scenarios", scenarios, self.scenarios)):
            for name in names:
                if name not in known:
                    raise FedbenchError(f"--{what} {name}: the grid has no such {what[:-1]}; {nearest(name, known)}")
            chosen[what] = [name for name in known if name in names] if names else known
        chosen["seeds"] = self.seeds if seeds is None else seeds
        chosen["fms"] = self.fms if fm is None else [fm]
        return Grid(
            **chosen, title=self.title, overrides=self.overrides, variants=self.variants, reported=self.reported
        )

    def rows(self) -> list[str]:
        """The names of the rows of its tables: methods, each with every variant."""
        return list(dict.fromkeys(cell.row for cell in self.cells()))

    def cells(self) -> list[Cell]:
        """All cells: FM by FM, scenario by scenario, seed by seed, so that early results already compare all rows."""
        fms: list[str | None] = [*self.fms] or [None]
        variants: list[Variant | None] = [*self.variants] or [None]
        return [
            Cell(
                method, scenario, seed, fm, self._settings(method, scenario, variant), variant.label if variant else ""
            )
            for fm, scenario, seed, method, variant in itertools.product(
                fms, self.scenarios, self.seeds, self.methods, variants
            )
        ]

    def _settings(self, method: str, scenario: str, variant: Variant | None) -> dict[str, str]:
        settings: dict[str, Any] = {}
        for entry in self.overrides:
            if entry.apply_to(method, scenario):
                settings |= entry.set
        settings |= variant.set if variant else {}
        return {key: _as_text(value) for key, value in settings.items()}


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
    """Executes cells. `run` saves the complete record under the root given to `run_grid`, and returns it."""

    def prepare(self, cell: Cell) -> Any: ...
    def run(self, prepared: Any) -> Record: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a cell; `record` is the complete or the failed one."""

    cell: Cell
    status: Status
    record: Record


def run_grid(
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
    folders.add(str(Path(__file__).resolve().parents[2]))
    for folder in sorted(folders, key=len, reverse=True):
        if folder != "/":
            text = text.replace(f'File "{folder}/', 'File "')
    return text


class EngineRunner:
    """Runs cells with `fedbench.run.loop`; `options` are further fields of its RunRequest (device, data_dir, ...)."""

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
        from fedbench.run import loop

        return loop.run(prepared, self.progress)


def load_grid(name: str) -> Grid:
    """The built-in grid called `name`, or the grid in the file `name`.

    Raises FedbenchError, with file, field and fix, for what is neither or not a grid.
    """
    path = Path(name).expanduser()
    if path.suffix != ".toml":
        known = {entry.stem: entry for folder in _folders() for entry in sorted(folder.glob("*.toml"))}
        if name not in known:
            raise FedbenchError(f"there is no grid {name!r}; {nearest(name, known)}; or give a .toml file")
        path = known[name]
    try:
        grid = Grid.model_validate(read_toml(path))
    except ValidationError as error:
        wrong = mistake(error)
        place = ".".join(wrong.place).rstrip(".")
        message = wrong.message
        if wrong.unknown:
            table = wrong.place[0] if len(wrong.place) > 1 else ""
            inner: dict[str, type[BaseModel]] = {"overrides": Overrides, "variants": Variant, "reported": Reported}
            message = f"unknown field; {nearest(wrong.place[-1], inner.get(table, Grid).model_fields)}"
        raise FedbenchError(f"{path}: {place}: {message}") from None
    for entry in grid.overrides:
        _known(f"{path}: overrides", entry.methods or (), grid.methods)
        _known(f"{path}: overrides", entry.scenarios or (), grid.scenarios)
    figures = grid.reported.figures if grid.reported else {}
    _known(f"{path}: reported.figures", figures, grid.fms)
    for fm, rows in figures.items():
        _known(f"{path}: reported.figures.{fm}", rows, grid.rows())
        for row, scenarios in rows.items():
            _known(f"{path}: reported.figures.{fm}.{row}", scenarios, grid.scenarios)
    return grid


def _known(place: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise FedbenchError for the first of `names` that the grid does not have."""
    for name in names:
        if name not in known:
            raise FedbenchError(f"{place}: {name!r} is not in the grid; {nearest(name, known)}")


def grid_names() -> list[str]:
    """The built-in grids."""
    return sorted(path.stem for folder in _folders() for path in folder.glob("*.toml"))


def _folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("fedbench.scenarios")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield Path(folder) / "grids"


def _as_text(value: Any) -> str:
    """A TOML value as `--set` takes it: text as it is; numbers, truth values and lists as JSON, which is TOML too."""
    if isinstance(value, str):
        return value
    # But for these, which JSON has other words for.
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)
