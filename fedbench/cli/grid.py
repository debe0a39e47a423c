"""`fedbench grid`: methods x scenarios x FMs x seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbench.cli.console import column_table, make_console, stoppable
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
    from collections.abc import Sequence

    from rich.console import Console

    from fedbench.grid.status import CellStatus
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
    status: Annotated[
        bool, typer.Option("--status", help="Run nothing: say what is done, running, failed and left, and how long.")
    ] = False,
) -> None:
    """Run methods x scenarios x FMs x seeds, skipping what is finished; a failed cell is recorded, the rest goes on."""
    from fedbench.cli.progress import ConsoleProgress
    from fedbench.grid.cells import Cell, LoopRunner, Outcome, run_cells
    from fedbench.grid.file import load_grid
    from fedbench.grid.status import grid_status

    chosen = load_grid(grid).only(names(methods), names(scenarios), seeds, fm)
    known(plugin, chosen.methods, chosen.scenarios)
    cells = chosen.cells()
    console = make_console()

    if status:
        runner = LoopRunner(
            results, None, device=device, data_dir=data_dir, cache=cache, profile=profile,
            plugins=tuple(plugin or ()), precision=precision.value, workers=workers,
        )  # fmt: skip
        _print_status(console, grid_status(cells, runner, results))
        return

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


def _print_status(console: Console, found: Sequence[CellStatus]) -> None:
    """Counts by row and scenario, what failed and why, and how long the rest may take in one process."""
    from fedbench.grid.status import STATES

    table = column_table("row", "scenario", *STATES)
    groups = dict.fromkeys((each.cell.row, each.cell.scenario, each.cell.fm or "") for each in found)
    for row, scenario, fm in groups:
        of = [e.state for e in found if (e.cell.row, e.cell.scenario, e.cell.fm or "") == (row, scenario, fm)]
        where = f"{scenario}, {fm}" if fm else scenario
        table.add_row(printable(row), printable(where), *(str(of.count(state) or "") for state in STATES))
    console.print(table)
    for each in found:
        if each.state == "running" or each.why:
            text = f"{each.state}: {each.cell}" + (f": {one_line(each.why)}" if each.why else "")
            console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
    counts = ", ".join(f"{sum(each.state == state for each in found)} {state}" for state in STATES)
    rest = [each.seconds for each in found if each.state != "done"]
    known = [seconds for seconds in rest if seconds is not None]
    text = f"{counts} of {len(found)} cells"
    if known:
        text += f"; what is not done takes about {_duration(sum(known))} in one process, by records of like runs"
    if len(known) < len(rest):
        text += f"; of {len(rest) - len(known)} there is no record to go by"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


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
