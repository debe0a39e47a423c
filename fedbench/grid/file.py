"""What a grid file says: methods x scenarios x FMs x seeds, from one TOML file. Nothing here loads torch.

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

    [reported.parameters.bert-base]     # optional: of a client, as the publication prints them
    "fedpft [t 5]" = "47M"

An FM of [reported.figures] with an empty table is one whose figures are not at hand: they print as "not available".
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell
from fedbench.names import bad_name, nearest
from fedbench.run.request import LARGEST_SEED
from fedbench.scenario.settings import as_text, mistake
from fedbench.scenario.toml import read_toml

MOST_SEEDS = 10_000
"""Seeds that a number may stand for."""


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
    printed as they are. `parameters` of a client by FM and row, as they are printed there, are of what `parameters_of`
    says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    notes: list[str] = Field(default_factory=list)
    setting: dict[str, Any] = Field(default_factory=dict)
    figures: dict[str, dict[str, dict[str, Figure]]] = Field(min_length=1)
    parameters: dict[str, dict[str, str]] = Field(default_factory=dict)
    parameters_of: str = ""


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
            if ".toml" in name:
                raise ValueError(f"{name!r} is a file: bring it with --plugin, and name its scenario FILE-SPLIT")
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
        grid does not have, and for seeds that are none.
        """
        chosen: dict[str, Any] = {}
        for what, names, known in (("methods", methods, self.methods), ("scenarios", scenarios, self.scenarios)):
            for name in names:
                if name not in known:
                    raise FedbenchError(f"--{what} {name}: the grid has no such {what[:-1]}; {nearest(name, known)}")
            chosen[what] = [name for name in known if name in names] if names else known
        chosen["seeds"] = self.seeds if seeds is None else seeds
        chosen["fms"] = self.fms if fm is None else [fm]
        rest = {name: getattr(self, name) for name in ("title", "overrides", "variants", "reported")}
        try:
            return Grid(**chosen, **rest)
        except ValidationError as error:
            wrong = mistake(error)
            raise FedbenchError(f"--{wrong.place[0]} {chosen[wrong.place[0]]}: {wrong.message}") from None

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
        return {key: as_text(value) for key, value in settings.items()}


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
    parameters = grid.reported.parameters if grid.reported else {}
    _known(f"{path}: reported.parameters", parameters, list(figures))
    for fm, counts in parameters.items():
        _known(f"{path}: reported.parameters.{fm}", counts, grid.rows())
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
