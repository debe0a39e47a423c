"""fedbench: the benchmark suite for federated fine-tuning of foundation models.

    import fedbench

    record = fedbench.run_method(method="fedpft", scenario="tweets-noniid", settings={"lr": 1e-3})
    fedbench.run_grid("agnews", seeds=3)
    print(fedbench.make_table("runs"))
    frame = fedbench.read_records("runs")

Beside these four are the classes that a method is made of (`Method`, `Server`, `Client`, `Message`, `LocalTask`,
`LocalResult`, `AdamW`), what is asked and what comes out (`RunRequest`, `Record`), and the one error of bad input
(`FedbenchError`). Each is imported when it is first used: `import fedbench` loads next to nothing.

The functions are called by a verb and its object because `fedbench.run`, `fedbench.grid` and `fedbench.records` are
packages: a function of such a name would be replaced by the package as soon as anybody imports from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    import pandas as pd

    from fedbench.api.local import AdamW, LocalResult, LocalTask
    from fedbench.api.messages import Message
    from fedbench.api.sides import Client, Method, Server
    from fedbench.errors import FedbenchError
    from fedbench.grid.cells import Outcome
    from fedbench.records.record import Record
    from fedbench.run.progress import Progress
    from fedbench.run.request import RunRequest

    __version__: str

__all__ = [
    "AdamW",
    "Client",
    "FedbenchError",
    "LocalResult",
    "LocalTask",
    "Message",
    "Method",
    "Record",
    "RunRequest",
    "Server",
    "__version__",
    "make_table",
    "read_records",
    "run_grid",
    "run_method",
]

_HOMES = {
    "AdamW": "fedbench.api.local",
    "Client": "fedbench.api.sides",
    "FedbenchError": "fedbench.errors",
    "LocalResult": "fedbench.api.local",
    "LocalTask": "fedbench.api.local",
    "Message": "fedbench.api.messages",
    "Method": "fedbench.api.sides",
    "Record": "fedbench.records.record",
    "RunRequest": "fedbench.run.request",
    "Server": "fedbench.api.sides",
}
"""The module that each class is imported from, when it is first asked for."""

# In the root of a checkout Python finds the source folder before an installed package, and there `methods` and
# `scenarios` lie beside it.
_here = Path(__file__).resolve().parent
_beside = [_here.parent / name / "__init__.py" for name in ("methods", "scenarios")]
if not (_here / "methods").is_dir() and all(path.is_file() for path in _beside):
    __path__.append(str(_here.parent))


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name):
        from importlib import import_module

        if name == "__version__":
            found = import_module("fedbench.package").own_version()
        elif name in _HOMES:
            found = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module 'fedbench' has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__})


@overload
def run_method(request: RunRequest, /, *, progress: Progress | None = None) -> Record: ...


@overload
def run_method(
    *,
    method: str,
    scenario: str,
    seed: int = 0,
    fm: str | Path | None = None,
    settings: Mapping[str, Any] = ...,
    profile: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    data_dir: str | Path | None = None,
    results: str | Path = "runs",
    cache: str | Path | None = None,
    plugins: str | Path | Iterable[str | Path] = (),
    executor: str = "auto",
    workers: int | None = None,
    host: str = "here",
    silos: int | None = None,
    silo_timeout: float = 600.0,
    progress: Progress | None = None,
) -> Record: ...


def run_method(request: RunRequest | None = None, /, *, progress: Progress | None = None, **asked: Any) -> Record:
    """Run one method on one scenario with one seed, as `fedbench run` does, and return its record.

    Takes a `RunRequest`, or its fields as keyword arguments: `method` and `scenario`, and where wanted `seed`, `fm`,
    `settings` (hyper-parameters of the method and dotted keys of the scenario, by name), `profile`, `device`,
    `precision`, `data_dir`, `results`, `cache`, `plugins`, `executor`, `workers`, `host`, `silos` and `silo_timeout`.
    Each means what the option of its name means on the command line. `progress` is told how far the run is; without it
    nothing is printed.

    Returns the `Record`, which is also written to `<results>/records`. A run that was stopped goes on after its last
    finished round when it is asked for again; one whose record is there is made again, and its record replaced.

    Raises FedbenchError for bad input, for data or a model that is not at hand, for training that diverged, and where
    another process is making the same run; TypeError for a field that a request does not have.
    """
    if request is None:
        request = _request(**asked)
    elif asked:
        raise TypeError(f"run_method takes a request or its fields, not both; leave out {', '.join(asked)}")
    _find([request.method], [request.scenario], request.plugins)
    from fedbench.run.prepare import prepare
    from fedbench.run.run import run

    return run(prepare(request), progress)


def run_grid(
    grid: str | Path,
    *,
    methods: str | Iterable[str] = (),
    scenarios: str | Iterable[str] = (),
    seeds: int | Sequence[int] | None = None,
    fm: str | Path | None = None,
    profile: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    data_dir: str | Path | None = None,
    results: str | Path = "runs",
    cache: str | Path | None = None,
    plugins: str | Path | Iterable[str | Path] = (),
    executor: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run methods x scenarios x FMs x seeds, as `fedbench grid` does, and return what became of every cell.

    `grid` is the name of a built-in grid or a TOML file. `methods` and `scenarios` narrow it; `seeds` (a number N for
    the seeds 0 to N-1, or the seeds) and `fm` take the place of the grid's own. The rest is as in `run_method`.

    Returns an `Outcome` a cell, in the order of the grid: its `cell`, its `status` ("complete", "skipped" where the
    record was there already, "failed") and its `record`. A cell that fails is recorded with its error, and the rest
    goes on; it raises nothing. Calling again goes on where a call was stopped.

    Raises FedbenchError, before anything is run, for a grid that cannot be read and for a name that nothing has.
    """
    from fedbench.grid.cells import LoopRunner, run_cells
    from fedbench.grid.file import load_grid

    chosen = load_grid(str(grid)).only(_texts(methods), _texts(scenarios), seeds, None if fm is None else str(fm))
    given = _texts(plugins)
    _find(chosen.methods, chosen.scenarios, given)
    runner = LoopRunner(
        Path(results), progress, profile=profile, device=device, precision=precision, data_dir=_path(data_dir),
        cache=_path(cache), plugins=given, executor=executor, workers=workers,
    )  # fmt: skip
    return run_cells(chosen.cells(), runner, Path(results) / "records")


def make_table(
    results: str | Path = "runs",
    *,
    grid: str | Path | None = None,
    scenarios: str | Iterable[str] = (),
    fm: str | Path | None = None,
    measures: str | Iterable[str] = (),
    profile: str | Iterable[str] = (),
    profiles: str | Path | None = None,
    within: str | Iterable[str] = (),
    to: str | float | None = None,
    rank: bool = False,
    baseline: str = "",
    pareto: bool = False,
    by: Literal["", "method", "scenario", "fm"] = "",
    metric: str = "",
    format: Literal["markdown", "latex", "csv"] = "markdown",
) -> str:
    """Compare the methods that a results folder has records of, as `fedbench table` does, and return the text.

    With a `grid`, a name or a TOML file, rows and columns are the grid's: what is not there shows as missing, and the
    figures that the grid reports stand beside ours. `scenarios` and `fm` leave the records of others out. `measures`
    are names of measures that get a column too; "simulated_time" has one for each client profile, or for those of the
    names in `profile`, which come with the package or are read from the TOML file `profiles`. `within` ("10MB", "2h")
    adds what was reached within budgets, `to` (0.8) what it cost to get there. `rank` marks the methods that cannot be
    told apart, and adds how often one beats another; `pareto` adds the front of accuracy against traffic, client memory
    and exposure. With a `baseline`, differences are those from that method. `by` gives a table of one measure, `metric`
    or accuracy, for each method, scenario or FM, and no other.

    Returns Markdown, LaTeX or CSV. Raises FedbenchError where no record is left, for a record or a grid that cannot be
    read, and for another format.
    """
    from fedbench.errors import FedbenchError
    from fedbench.tables.asked import Asked
    from fedbench.tables.folder import compare_folder
    from fedbench.tables.render.forms import render

    if format not in ("markdown", "latex", "csv"):
        raise FedbenchError(f"format {format!r}: no such format; use markdown, latex or csv")
    asked = Asked.of(_texts(measures), _texts(profile), _path(profiles), _texts(within), to, rank, pareto, by, metric)
    named, model = (None if given is None else str(given) for given in (grid, fm))
    return render(compare_folder(Path(results), named, _texts(scenarios), model, asked, baseline), format)


def read_records(results: str | Path = "runs", *, profiles: str | Path | None = None) -> pd.DataFrame:
    """Read every record of a results folder, and return a data frame with one row a record.

    The columns say what was run (`method`, `scenario`, `fm`, `seed`, `settings` as JSON, `key` ...), whether the record
    is `complete` or `failed` (`status`), what came out and what it cost. Measures have the names and units that they
    have in `fedbench table --format csv`: shares from 0 to 1, megabytes of 10^6 bytes, counts. `seconds` is the time of
    all phases, `seconds_local` and its like of one. `simulated_time_phone` and its like are seconds that the rounds
    would take with clients of a profile; `profiles` is a TOML file of others. What a run does not have is missing.

    `fault` says why a row has no accuracy, or one that is not to be ranked; it is empty for a sound run.
    `configuration` stands for all that decides a result but the seed: only rows that share it are to be averaged. Rows
    come in the order of the records' paths.

    Raises FedbenchError where the folder has no records, and for the first that cannot be read.
    """
    from fedbench.tables.frame import read_frame
    from fedbench.tables.profiles import chosen_profiles

    return read_frame(Path(results), chosen_profiles((), _path(profiles)))


def _request(
    *,
    fm: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    results: str | Path = "runs",
    cache: str | Path | None = None,
    plugins: str | Path | Iterable[str | Path] = (),
    **rest: Any,
) -> RunRequest:
    """A request whose fields may be given as Python has them: numbers as settings, texts as folders."""
    from fedbench.run.request import RunRequest
    from fedbench.scenario.settings import as_text

    return RunRequest(
        fm=None if fm is None else str(fm),
        settings={key: as_text(value) for key, value in (settings or {}).items()},
        data_dir=_path(data_dir),
        results=Path(results),
        cache=_path(cache),
        plugins=_texts(plugins),
        **rest,
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _texts(given: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """One text or several, as several."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def _find(methods: Iterable[str], scenarios: Iterable[str], plugins: Sequence[str]) -> None:
    """Raise FedbenchError for a name that nothing has, before anything heavy is loaded."""
    from fedbench.registry import Registry

    registry = Registry(tuple(plugins))
    for method in methods:
        registry.find_method(method)
    for scenario in scenarios:
        registry.find_scenario(scenario)
