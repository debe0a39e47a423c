"""The command line. Every command imports what it needs when it runs: `fedbench list` loads no torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbench.errors import FedbenchError, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedbench.records.record import Record
    from fedbench.registry import Registry
    from fedbench.run.request import RunRequest

app = typer.Typer(
    name="fedbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: [bold]fedbench run --method fedpft --scenario tweets-noniid[/bold]",
    help=(
        "The benchmark suite for federated fine-tuning of foundation models.\n\n"
        "A [bold]run[/bold] is one method on one scenario (a data set and how it is split over clients) with one "
        "seed; it ends in a record, one JSON file. A [bold]grid[/bold] is many runs. A [bold]table[/bold] is made "
        "from records."
    ),
)


def _given(option: str) -> Callable[[str], str]:
    """A parser of text that may not be empty, as it is where a shell's variable is not set."""

    def parse(text: str) -> str:
        if not text.strip():
            raise FedbenchError(f"{option}: an empty value; leave the option out for its default")
        return text

    return parse


def _folder(option: str) -> Callable[[str], Path]:
    """A parser of a folder, which may be one yet to be made."""

    def parse(text: str | Path) -> Path:  # typer parses defaults too
        path = text if isinstance(text, Path) else Path(_given(option)(text))
        if path.exists() and not path.is_dir():
            raise FedbenchError(f"{option} {path}: a file is there, not a folder; name a folder")
        return path

    return parse


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE|DIR|MODULE",
        parser=_given("--plugin"),
        help="Methods or scenarios of your own; may be repeated.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        parser=_folder("--data-dir"),
        help="Folder with data sets on disk; also [bold]$FEDBENCH_DATA[/bold].",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        parser=_folder("--cache"),
        help="Folder for what is reused; also [bold]$FEDBENCH_CACHE[/bold].",
    ),
]
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", parser=_folder("--results"), help="Where the records go.")
]
FM = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|ID|PATH",
        parser=_given("--fm"),
        help="Foundation model: a name, a hub id or a folder with a checkpoint; default: the scenario's.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter of the method ([bold]lr=1e-3[/bold]) or a dotted key of the scenario "
        "([bold]federation.fraction=0.5[/bold]); may be repeated. `fedbench show` lists both.",
    ),
]
Rounds = Annotated[int | None, typer.Option(min=0, help="Short for --set federation.rounds=N.")]
Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="A profile of the scenario file; [bold]smoke[/bold] takes seconds.")
]


Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Worker processes on a CPU; default: one per core. Changes no result."),
]


class Kind(StrEnum):
    """What `fedbench list` can be narrowed to."""

    methods = "methods"
    scenarios = "scenarios"
    fms = "fms"


class Executor(StrEnum):
    auto = "auto"
    packed = "packed"
    fused = "fused"
    reference = "reference"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Format(StrEnum):
    """How a table is rendered."""

    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Of training and evaluation; auto takes bf16 on CUDA devices that have it, else fp32. On CPUs with "
        "instructions for bf16 ([bold]fedbench doctor[/bold] says so) it is faster than fp32.",
    ),
]


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2, a reader that has gone (`head`) in silence and 141."""
    # Read when torch is loaded. Threads that spin while they wait make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # ± on a terminal that knows ASCII alone
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails here would fail when the interpreter ends, where nothing can answer it
    except FedbenchError as error:
        _stop(str(error))
    except BrokenPipeError:
        _leave_quietly()
    except OSError as error:
        _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # answered by rich or click, with exit code 1
            _leave_quietly()
        raise


def _stop(message: str) -> None:
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"fedbench: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def _leave_quietly() -> None:
    """End as a program does whose output is no longer read: 128 and the number of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _version(wanted: bool) -> None:
    if wanted:
        from fedbench import __version__

        print(f"fedbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("run", epilog="The same command after Ctrl-C or a crash goes on after the last finished round.")
def run_command(
    method: Annotated[str, typer.Option(help="Name of a method; see [bold]fedbench list methods[/bold].")],
    scenario: Annotated[str, typer.Option(help="Name of a scenario; see [bold]fedbench list scenarios[/bold].")],
    fm: FM = None,
    seed: Seed = 0,
    rounds: Rounds = None,
    settings: Settings = None,
    profile: Profile = None,
    device: Device = "auto",
    precision: PrecisionOption = Precision.auto,
    data_dir: DataDir = None,
    results: Results = Path("runs"),
    cache: CacheDir = None,
    plugin: Plugins = None,
    executor: Annotated[
        Executor,
        typer.Option(
            help="How local training is executed: packed (client by client, without padding), fused (a round's clients "
            "in one pass) or the padded reference; auto takes fused on CUDA, else packed."
        ),
    ] = Executor.auto,
    workers: Workers = None,
) -> None:
    """Run one method on one scenario with one seed.

    A run whose record is already there is made again and compared with it: the two have to agree in everything
    but time, peak memory and provenance, else the exit code is 1.
    """
    from fedbench.registry import Registry

    # Names are checked before torch is loaded, so that a typing error is answered at once.
    registry = Registry(tuple(plugin or ()))
    registry.find_method(method)
    registry.find_scenario(scenario)
    console = _console()
    with console.status("loading") if console.is_terminal else _nothing():
        from fedbench.cli.progress import ConsoleProgress
        from fedbench.records.differences import differences
        from fedbench.records.store import load, record_path
        from fedbench.run import loop as engine
        from fedbench.run.prepare import prepare
        from fedbench.tables import report

        request = _request(
            method=method, scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile,
            device=device, data_dir=data_dir, results=results, cache=cache, plugins=plugin,
            executor=executor.value, precision=precision.value, workers=workers,
        )  # fmt: skip
        prepared = prepare(request)
    for note in prepared.notes:
        console.print(printable(note), style="dim", highlight=False, markup=False)
    path = record_path(results / "records", prepared.scenario.name, method, seed, prepared.key)
    before = load(path) if path.exists() else None
    try:
        with ConsoleProgress(console) as progress:
            record = engine.run(prepared, progress)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on after the last finished round")
        raise typer.Exit(130) from None
    console.print(report.summary(record))
    console.print(printable(f"record: {path}"), highlight=False, markup=False, soft_wrap=True)
    if before is not None and before.status == "complete":
        different = differences(before, record)
        if different:
            console.print("differs from the record that was there before in: " + ", ".join(different), soft_wrap=True)
            raise typer.Exit(1)
        console.print("identical to the record that was there before, but for times, peak memory and provenance")


@app.command("list")
def list_command(
    kind: Annotated[Kind | None, typer.Argument(help="Only these.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Import every method and say what is broken.")] = False,
    plugin: Plugins = None,
) -> None:
    """List methods, scenarios and foundation models; nothing is imported unless --check is given."""
    from fedbench.registry import Registry

    registry = Registry(tuple(plugin or ()))
    console = _console()
    if kind in (None, Kind.methods):
        errors = {name: entry.error for name, entry in registry.methods.items()}
        if check:
            errors |= {name: _import_error(registry, name) for name, error in errors.items() if not error}
        rows = [
            (e.name, errors[e.name] or e.summary, e.origin, bool(errors[e.name])) for e in registry.methods.values()
        ]
        console.print(_listing("methods", rows))
    if kind in (None, Kind.scenarios):
        rows = [(e.name, e.error or e.summary, e.origin, bool(e.error)) for e in registry.scenarios.values()]
        console.print(_listing("scenarios", rows))
    if kind in (None, Kind.fms):
        from fedbench.models.zoo.names import FMS

        console.print(_listing("foundation models", [(name, text, "", False) for name, text in FMS.items()]))
        console.print("--fm also takes the hub id or the folder of any BERT, RoBERTa, DistilBERT or ViT checkpoint.")


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A method, a scenario, a foundation model or a checkpoint's folder.")],
    scenario: Annotated[
        str | None, typer.Option(help="For a method: its hyper-parameters as this scenario sets them.")
    ] = None,
    rounds: Rounds = None,
    settings: Settings = None,
    profile: Profile = None,
    plugin: Plugins = None,
) -> None:
    """Show the resolved settings of a method or scenario and where each came from; or what a model is."""
    from fedbench.models.zoo.names import FMS, fm_folder
    from fedbench.names import nearest
    from fedbench.registry import Registry

    registry = Registry(tuple(plugin or ()))
    console = _console()
    given = _pairs(settings, rounds)
    if name in registry.methods:
        _show_method(console, registry, name, scenario, given, profile)
    elif name in registry.scenarios:
        from fedbench.scenario.load import load_scenario

        path, split = registry.find_scenario(name)
        found = load_scenario(path, split, profile, given)
        console.print(_headline(name, printable(f"{found.title}\n{path}", but="\n")), soft_wrap=True)
        console.print(_settings_table(found.provenance()))
    elif name in FMS or fm_folder(name):
        _show_fm(console, name, FMS.get(name, "a checkpoint in a folder"))
    else:
        known = [*registry.methods, *registry.scenarios, *FMS]
        raise FedbenchError(f"there is no method, scenario or foundation model {name!r}; {nearest(name, known)}")


@app.command("grid", epilog="Stop it at any time: the same command skips what is finished and goes on.")
def grid_command(
    grid: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A grid of scenarios/grids, or a TOML file.")],
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Only these methods.")] = None,
    scenarios: Annotated[str | None, typer.Option(metavar="A,B", help="Only these scenarios.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Seeds 0 to N-1 instead of the grid's own.")
    ] = None,
    fm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|ID|PATH", parser=_given("--fm"), help="Run every cell once, at this FM instead of the grid's."
        ),
    ] = None,
    device: Device = "auto",
    precision: PrecisionOption = Precision.auto,
    data_dir: DataDir = None,
    results: Results = Path("runs"),
    cache: CacheDir = None,
    profile: Profile = None,
    plugin: Plugins = None,
    workers: Workers = None,
) -> None:
    """Run methods x scenarios x FMs x seeds, skipping what is finished; a failed cell is recorded, the rest goes on."""
    from fedbench.cli.progress import ConsoleProgress
    from fedbench.grid.cells import Cell, EngineRunner, Outcome, load_grid, run_grid
    from fedbench.registry import Registry

    registry = Registry(tuple(plugin or ()))
    chosen = load_grid(grid).only(_names(methods), _names(scenarios), seeds, fm)
    for method in chosen.methods:
        registry.find_method(method)
    for scenario in chosen.scenarios:
        registry.find_scenario(scenario)
    cells = chosen.cells()
    console = _console()

    def before(index: int, cell: Cell) -> None:
        console.print(f"{index + 1}/{len(cells)}  {cell}", highlight=False, markup=False)

    def claimed(index: int, cell: Cell) -> None:
        console.print("    another process is at it; looked at again later", highlight=False, markup=False)

    def after(index: int, outcome: Outcome) -> None:
        text = printable(f"    {outcome.status}{_score(outcome.record)}")
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        with ConsoleProgress(console) as progress:
            runner = EngineRunner(
                results, progress, device=device, data_dir=data_dir, cache=cache, profile=profile,
                plugins=tuple(plugin or ()), precision=precision.value, workers=workers,
            )  # fmt: skip
            outcomes = run_grid(cells, runner, results / "records", before, after, claimed)
    except KeyboardInterrupt:
        console.print("stopped; the same command skips what is finished and goes on")
        raise typer.Exit(130) from None
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    console.print(f"{len(outcomes) - failed} of {len(outcomes)} cells finished, {failed} failed", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command("table", epilog="Example: fedbench table --results results --format markdown --scenario agnews-noniid")
def table_command(
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with records; ./runs if it exists, else ./results.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Rows and columns of this grid, missing cells visible; beside them the figures it reports, if any.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.terminal,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; may be repeated.")] = None,
    fm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|ID|PATH", parser=_given("--fm"), help="Only records of this FM, instead of the grid's."
        ),
    ] = None,
) -> None:
    """Compare methods: accuracy ± deviation, proxy gap, traffic, gradient error, exposure, parameters."""
    from fedbench.grid.cells import load_grid
    from fedbench.models.zoo.names import FMS
    from fedbench.names import nearest
    from fedbench.records.store import load_all
    from fedbench.tables.compare import compare
    from fedbench.tables.matching import of_fm
    from fedbench.tables.render.forms import render
    from fedbench.tables.render.terminal import terminal

    folder = results or next((Path(name) for name in ("runs", "results") if Path(name).is_dir()), Path("runs"))
    if results and not results.is_dir():
        raise FedbenchError(f"--results {results}: no such folder")
    chosen = load_grid(grid).only(fm=fm) if grid else None
    cells = chosen.cells() if chosen else None
    found = load_all(folder / "records")
    if fm:
        known = {*FMS, *(str(record.identity.fm) for record in found)}
        found = of_fm(found, fm)
        if not found and fm not in FMS:
            raise FedbenchError(f"--fm {fm}: {folder} has no records of it; {nearest(fm, known)}")
    if scenario:
        found = [record for record in found if record.identity.scenario in scenario]
        cells = [cell for cell in cells if cell.scenario in scenario] if cells is not None else None
    if not found and not cells:
        only = [*(scenario or ()), *([fm] if fm else ())]
        what = f"records of {', '.join(only)}" if only else "records"
        raise FedbenchError(f"{folder}: there are no {what}; make some with `fedbench run`, or give --results DIR")
    comparison = compare(found, cells, chosen.title if chosen else "", chosen.reported if chosen else None)
    if format is Format.terminal:
        _console().print(terminal(comparison))
    else:
        print(render(comparison, format.value), end="")


@app.command("gradient", epilog="Example: fedbench gradient --method fedpft --method fedot --scenario tweets-noniid")
def gradient_command(
    method: Annotated[list[str], typer.Option(help="A method with a proxy; may be repeated.")],
    scenario: Annotated[str, typer.Option(help="Name of a scenario; see [bold]fedbench list scenarios[/bold].")],
    fm: FM = None,
    seed: Seed = 0,
    rounds: Rounds = None,
    settings: Settings = None,
    profile: Profile = None,
    device: Device = "auto",
    precision: PrecisionOption = Precision.auto,
    data_dir: DataDir = None,
    results: Results = Path("runs"),
    cache: CacheDir = None,
    plugin: Plugins = None,
    workers: Workers = None,
) -> None:
    """Study gradient error: of gradients, of updates and of the aggregate, against a run on the FM itself.

    The run on the FM is `fedavg-lora` with the same seed, cohorts, batches and local optimiser. A setting of one method
    alone is written as [bold]--set methods.fedpft.t=2[/bold].
    """
    from fedbench.registry import Registry

    registry = Registry(tuple(plugin or ()))
    for name in method:
        registry.find_method(name)
    registry.find_scenario(scenario)
    console = _console()
    with console.status("loading") if console.is_terminal else _nothing():
        from fedbench.cli.progress import ConsoleProgress
        from fedbench.run.prepare import prepare
        from fedbench.study import report as study_report
        from fedbench.study import study

        asked = partial(
            _request,
            scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile, device=device,
            data_dir=data_dir, results=results, cache=cache, plugins=plugin, precision=precision.value,
            workers=workers,
        )  # fmt: skip
        prepared = [prepare(asked(method=name)) for name in dict.fromkeys(method)]
    for note in prepared[0].notes:
        console.print(printable(note), style="dim", highlight=False, markup=False)
    try:
        with ConsoleProgress(console) as progress:
            studies = study.study(prepared, progress)
    except KeyboardInterrupt:
        console.print("stopped; a study starts from the beginning")
        raise typer.Exit(130) from None
    path = study_report.save(studies, results)
    console.print(study_report.terminal(studies))
    about = printable(f"tables: {path}; picture: {path.with_suffix('.png').name}")
    console.print(about, highlight=False, markup=False, soft_wrap=True)


@app.command("check")
def check_command(
    method: Annotated[str, typer.Argument(help="Name of a method, built in or not.")],
    scenario: Annotated[str, typer.Option(help="Scenario to check it on, in its smoke profile.")] = "tweets-noniid",
    fm: FM = None,
    data_dir: DataDir = None,
    plugin: Plugins = None,
) -> None:
    """Run the contract suite on a method: it trains and learns, a seed gives one record, both sides can be apart."""
    from fedbench.registry import Registry

    registry = Registry(tuple(plugin or ()))
    registry.find_method(method)
    registry.find_scenario(scenario)
    from fedbench.check.suite import CheckResult, check_method

    console = _console()

    def show(result: CheckResult) -> None:
        mark = "[green]ok[/green]  " if result.ok else "[red]fails[/red]"
        console.print(mark, result.name, highlight=False, soft_wrap=True)
        if result.detail:
            detail = printable(result.detail, but="\n")
            console.print(f"      {detail}", style="dim", highlight=False, markup=False, soft_wrap=True)
        sys.stdout.flush()  # a clause takes seconds, and a pipe is buffered

    results = check_method(method, tuple(plugin or ()), scenario=scenario, fm=fm, data_dir=data_dir, report=show)
    broken = sum(not result.ok for result in results)
    console.print(f"{method} on {scenario}: {len(results) - broken} of {len(results)} clauses hold", highlight=False)
    if broken:
        raise typer.Exit(1)


@app.command("export", epilog="Example: fedbench export runs/records/tweets-noniid/fedpft/s0-….json adapter")
def export_command(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="The record of a run, a JSON file.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=_folder("DIR"), help="Where the adapter goes.")],
    cache: CacheDir = None,
    fm: Annotated[
        str | None, typer.Option(metavar="PATH", help="The folder of the run's FM, where it was given as one.")
    ] = None,
) -> None:
    """Write a run's tuned adapter and head in peft's format, for use with plain transformers and peft."""
    from fedbench.machine.paths import cache_folder
    from fedbench.run.export import export_adapter

    done = export_adapter(record, folder, cache_folder(cache), fm)
    revision = f", revision={done.revision!r}" if done.revision else ""
    print(f"{folder}: adapter_config.json, adapter_model.safetensors; to use them:\n")
    print(f"from peft import PeftModel\nfrom transformers import {done.architecture}\n")
    print(f"base = {done.architecture}.from_pretrained(")
    print(f"    {done.base!r}{revision}, num_labels={done.num_labels}, ignore_mismatched_sizes=True")
    print(")")
    print(f"model = PeftModel.from_pretrained(base, {str(folder)!r})")


@app.command("doctor")
def doctor_command(data_dir: DataDir = None, cache: CacheDir = None) -> None:
    """Say what this machine has: device, bf16, caches, data and models found, hub reachable."""
    from rich.text import Text

    from fedbench.cli.doctor import facts

    table = _grid("what", "found")
    for name, found in facts(data_dir, cache):
        table.add_row(Text(name), Text(printable(found)))
    _console().print(table)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe or a file has no width; names must not be cut there.
    return console if console.is_terminal else Console(width=200)


class _nothing:
    """A context that does nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _grid(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def _headline(name: str, text: str) -> Text:
    from rich.text import Text

    return Text.assemble((name, "bold"), f"  {text}")


def _listing(title: str, rows: list[tuple[str, str, str, bool]]) -> Table:
    from rich.text import Text

    table = _grid(title, "", "")
    for name, text, origin, broken in rows:
        origin = "" if origin == "fedbench" else origin
        shown = Text(printable(text), style="red" if broken else "")
        table.add_row(Text(name), shown, Text(printable(origin), style="dim"))
    return table


def _settings_table(settings: dict[str, tuple[Any, str]]) -> Table:
    from rich.text import Text

    table = _grid("setting", "value", "from")
    for key, (value, source) in settings.items():
        table.add_row(Text(printable(key)), Text(printable(str(value))), Text(printable(source), style="dim"))
    return table


def _import_error(registry: Registry, name: str) -> str | None:
    try:
        registry.load_method(name)
    except FedbenchError as error:
        return str(error)
    return None


def _pairs(settings: list[str] | None, rounds: int | None) -> dict[str, str]:
    """`--set` pairs as a mapping, `--rounds` among them."""
    pairs: dict[str, str] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise FedbenchError(f"--set {setting}: write it as key=value")
        if key.strip() in pairs:
            raise FedbenchError(f"--set {key.strip()}: given twice; give it once")
        pairs[key.strip()] = value.strip()
    if rounds is not None:
        if pairs.keys() & {"rounds", "federation.rounds"}:
            raise FedbenchError("--rounds and --set both give the number of rounds; give one of them")
        pairs["federation.rounds"] = str(rounds)
    return pairs


def _request(*, rounds: int | None, settings: list[str] | None, plugins: list[str] | None, **rest: Any) -> RunRequest:
    from fedbench.grid.cells import LARGEST_SEED
    from fedbench.run.request import RunRequest

    if rest["seed"] > LARGEST_SEED:
        raise FedbenchError(f"--seed {rest['seed']}: too large; use at most {LARGEST_SEED}")
    return RunRequest(settings=_pairs(settings, rounds), plugins=tuple(plugins or ()), **rest)


def _show_fm(console: Console, name: str, description: str) -> None:
    """Print what a foundation model is and where it came from; this loads it."""
    from rich.text import Text

    console.print(_headline(printable(name), description), soft_wrap=True)
    from fedbench.machine.paths import cache_folder
    from fedbench.models.zoo.load import load_fm

    fm = load_fm(name, num_labels=2, cache=cache_folder())
    table = _grid("what", "value")
    widths = sorted(set(fm.spec.ffn_widths))
    rows = {
        "family": f"{fm.spec.model_type} ({fm.family.modality})",
        "layers": len(fm.spec.ffn_widths),
        "width": fm.spec.config.get("hidden_size", fm.spec.config.get("dim")),
        "FFN width": ", ".join(map(str, widths)),
        "parameters": f"{sum(tensor.numel() for tensor in fm.state.values()):,} without head",
        "content hash": fm.content_hash,
        **fm.provenance,
    }
    for key, value in rows.items():
        table.add_row(key, Text(printable(str(value))))
    console.print(table)


def _names(text: str | None) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _score(record: Record) -> str:
    """What came of a grid's cell, in a few words."""
    if record.error:
        return one_line(f": {record.error.type}: {record.error.message}")
    plug_in = record.accuracy.plug_in
    if plug_in is None:
        return f": not available: {record.accuracy.unavailable}"
    return ": diverged" if plug_in.accuracy is None else f": accuracy {plug_in.accuracy:.4f}"


def _show_method(
    console: Console, registry: Registry, name: str, scenario: str | None, given: dict[str, str], profile: str | None
) -> None:
    """Print what a method is, and its hyper-parameters with where each value came from."""
    from inspect import cleandoc

    from fedbench.run.prepare import make_method, parse_values, scenario_settings, split_settings
    from fedbench.run.request import RunRequest
    from fedbench.scenario.load import load_scenario

    entry, kind = registry.find_method(name), registry.load_method(name)
    console.print(_headline(name, printable(f"version {kind.version}, of {entry.origin}")), soft_wrap=True)
    fields = kind.model_fields
    # The class describes the method, the bases that declare hyper-parameters describe those.
    described = [c for c in kind.__mro__ if c is kind or (set(vars(c).get("__annotations__", ())) & set(fields))]
    for owner in described:
        if owner.__doc__:
            console.print(printable(cleandoc(owner.__doc__), but="\n") + "\n", highlight=False, markup=False)
    mine, rest = split_settings(given, list(fields), name)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    if scenario:
        path, split = registry.find_scenario(scenario)
        found = load_scenario(path, split, profile, rest)
        for field, (value, table) in scenario_settings(kind, found).items():
            values[field], sources[field] = value, f"{path.name} [methods.{table}]"
    elif rest:
        raise FedbenchError(f"--set {next(iter(rest))}: a setting of scenarios; name one with --scenario")
    values |= parse_values(mine)
    sources |= dict.fromkeys(mine, "--set")
    method = make_method(kind, values, RunRequest(method=name, scenario=scenario or "the command line"))
    console.print(_settings_table({field: (getattr(method, field), sources[field]) for field in fields}))


if __name__ == "__main__":
    main()
