"""`fedbench grid`: methods x scenarios x FMs x seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbench.cli.console import make_console, stoppable
from fedbench.cli.options import (
    CacheDir,
    DataDir,
    Device,
    Plugins,
    Precision,
    PrecisionOption,
    Profile,
    Results,
    Workers,
    given,
    known,
    names,
)
from fedbench.errors import one_line, printable

if TYPE_CHECKING:
    from fedbench.records.record import Record


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
            metavar="NAME|ID|PATH", parser=given("--fm"), help="Run every cell once, at this FM instead of the grid's."
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
    from fedbench.grid.cells import Cell, LoopRunner, Outcome, run_cells
    from fedbench.grid.file import load_grid

    chosen = load_grid(grid).only(names(methods), names(scenarios), seeds, fm)
    known(plugin, chosen.methods, chosen.scenarios)
    cells = chosen.cells()
    console = make_console()

    def before(index: int, cell: Cell) -> None:
        console.print(f"{index + 1}/{len(cells)}  {cell}", highlight=False, markup=False)

    def claimed(index: int, cell: Cell) -> None:
        console.print("    another process is at it; looked at again later", highlight=False, markup=False)

    def after(index: int, outcome: Outcome) -> None:
        text = printable(f"    {outcome.status}{_score(outcome.record)}")
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    again = "the same command skips what is finished and goes on"
    with stoppable(console, again), ConsoleProgress(console) as progress:
        runner = LoopRunner(
            results, progress, device=device, data_dir=data_dir, cache=cache, profile=profile,
            plugins=tuple(plugin or ()), precision=precision.value, workers=workers,
        )  # fmt: skip
        outcomes = run_cells(cells, runner, results / "records", before, after, claimed)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    console.print(f"{len(outcomes) - failed} of {len(outcomes)} cells finished, {failed} failed", highlight=False)
    if failed:
        raise typer.Exit(1)


def _score(record: Record) -> str:
    """What came of a cell, in a few words."""
    if record.error:
        return one_line(f": {record.error.type}: {record.error.message}")
    plug_in = record.accuracy.plug_in
    if plug_in:
        return f": accuracy {plug_in.accuracy:.4f}"
    if personal := record.accuracy.personal:
        return f": personal models {personal.mean:.4f}"
    return f": not available: {record.accuracy.unavailable}"
