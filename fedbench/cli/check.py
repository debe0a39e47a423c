"""`fedbench check`: the contract suite on one method."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbench.cli.console import make_console
from fedbench.cli.options import FM, DataDir, Plugins, known
from fedbench.errors import FedbenchError, printable

if TYPE_CHECKING:
    from fedbench.check.suite import CheckResult


def check_command(
    method: Annotated[str, typer.Argument(help="Name of a method, built in or not.")],
    scenario: Annotated[str, typer.Option(help="Scenario to check it on, in its smoke profile.")] = "tweets-noniid",
    fm: FM = None,
    model: Annotated[
        str | None,
        typer.Option(help="On a tiny random model instead, in seconds: encoder, vit, decoder, or all of them."),
    ] = None,
    data_dir: DataDir = None,
    plugin: Plugins = None,
) -> None:
    """Run the contract suite on a method: it trains and learns, a seed gives one record, both sides can be apart."""
    known(plugin, [method], [scenario])
    from fedbench.check.kinds import KINDS, tiny_model
    from fedbench.check.suite import check_method

    if model is not None and fm is not None:
        raise FedbenchError("--model makes a model and --fm gives one; leave one of them out")
    console = make_console()

    def show(result: CheckResult) -> None:
        mark = "[green]ok[/green]  " if result.ok else "[red]fails[/red]"
        console.print(mark, result.name, highlight=False, soft_wrap=True)
        if result.detail:
            detail = printable(result.detail, but="\n")
            console.print(f"      {detail}", style="dim", highlight=False, markup=False, soft_wrap=True)
        sys.stdout.flush()  # a clause takes seconds, and a pipe is buffered

    def check(where: str, **asked: Any) -> int:
        results = check_method(method, tuple(plugin or ()), data_dir=data_dir, report=show, **asked)
        broken = sum(not result.ok for result in results)
        console.print(f"{method} on {where}: {len(results) - broken} of {len(results)} clauses hold", highlight=False)
        return broken

    if model is None:
        broken = check(scenario, scenario=scenario, fm=fm)
    else:
        broken = 0
        for kind in KINDS if model == "all" else (model,):
            with tiny_model(kind) as folder:
                broken += check(f"a tiny {kind}", scenario=KINDS[kind], fm=str(folder), whole=False)
    if broken:
        raise typer.Exit(1)
