"""`fedbench run`: one method on one scenario with one seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbench.cli.console import loading, make_console, stoppable
from fedbench.cli.options import (
    FM,
    CacheDir,
    DataDir,
    Device,
    Executor,
    ExecutorOption,
    MethodName,
    Plugins,
    Precision,
    PrecisionOption,
    Profile,
    Results,
    Rounds,
    ScenarioName,
    Seed,
    Settings,
    SiloTimeout,
    Workers,
    asked,
    known,
)
from fedbench.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from fedbench.run.prepare import Prepared


def run_command(
    method: MethodName,
    scenario: ScenarioName,
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
    executor: ExecutorOption = Executor.auto,
    workers: Workers = None,
    host: Annotated[
        str,
        typer.Option(
            help="Where server and clients live: here (in this process), apart (in a process each), fedml (server and "
            "silos over FedML), or a plugin's; see [bold]fedbench list hosts[/bold]."
        ),
    ] = "here",
    silos: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of --host fedml: processes that hold the clients; default: 2."),
    ] = None,
    silo_timeout: SiloTimeout = 600.0,
) -> None:
    """Run one method on one scenario with one seed.

    A run whose record is already there is made again and compared with it: the two have to agree in everything
    but time, peak memory and provenance, else the exit code is 1.
    """
    known(plugin, [method], [scenario])
    console = make_console()
    with loading(console):
        from fedbench.run.prepare import prepare

        request = asked(
            method=method, scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile,
            device=device, data_dir=data_dir, results=results, cache=cache, plugins=plugin,
            executor=executor.value, precision=precision.value, workers=workers, host=host,
            silos=silos, silo_timeout=silo_timeout,
        )  # fmt: skip
        prepared = prepare(request)
    make_record(prepared, console)


def make_record(prepared: Prepared, console: Console) -> None:
    """Make the run's record and show it; exits with 1 where one that was there before says otherwise."""
    from fedbench.cli.progress import ConsoleProgress
    from fedbench.records import store
    from fedbench.records.differences import differences
    from fedbench.run.run import run
    from fedbench.tables import report

    for note in prepared.notes:
        console.print(printable(note), style="dim", highlight=False, markup=False)
    path = store.record_path(
        prepared.request.results / "records",
        prepared.scenario.name,
        prepared.method.name,
        prepared.request.seed,
        prepared.key,
    )
    before = store.load(path) if path.exists() else None
    again = "the same command goes on after the last finished round"
    with stoppable(console, again), ConsoleProgress(console) as progress:
        record = run(prepared, progress)
    console.print(report.summary(record))
    console.print(printable(f"record: {path}"), highlight=False, markup=False, soft_wrap=True)
    if before is not None and before.status == "complete":
        different = differences(before, record)
        if different:
            console.print("differs from the record that was there before in: " + ", ".join(different), soft_wrap=True)
            raise typer.Exit(1)
        console.print("identical to the record that was there before, but for times, peak memory and provenance")
