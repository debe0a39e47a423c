"""`fedbench check`: the contract suite on one method."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedbench.cli.console import make_console
from fedbench.cli.options import FM, DataDir, Plugins, known
from fedbench.errors import printable

if TYPE_CHECKING:
    from fedbench.check.suite import CheckResult


def check_command(
    method: Annotated[str, typer.Argument(help="Name of a method, built in or not.")],
    scenario: Annotated[str, typer.Option(help="Scenario to check it on, in its smoke profile.")] = "tweets-noniid",
    fm: FM = None,
    data_dir: DataDir = None,
    plugin: Plugins = None,
) -> None:
    """Run the contract suite on a method: it trains and learns, a seed gives one record, both sides can be apart."""
    known(plugin, [method], [scenario])
    from fedbench.check.suite import check_method

    console = make_console()

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
