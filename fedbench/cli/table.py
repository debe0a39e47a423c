"""`fedbench table`: methods beside each other, from records."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.console import make_console
from fedbench.cli.options import given
from fedbench.errors import FedbenchError, printable


class By(StrEnum):
    """What there is a table for each of."""

    method = "method"
    scenario = "scenario"
    fm = "fm"


class Format(StrEnum):
    """How a table is rendered."""

    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


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
            metavar="NAME|ID|PATH", parser=given("--fm"), help="Only records of this FM, instead of the grid's."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A column for this measure too: aggregation_error, say, or simulated_time; may be repeated.",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Simulate clients of this profile alone: phone, laptop or silo; may be repeated."
        ),
    ] = None,
    profiles: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Client profiles (link and speed) from this TOML file instead."),
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET",
            help="What was reached within 10MB (traffic), up=10MB, memory=80MB or, with one --profile, 2h; repeated, "
            "within all.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="ACCURACY", help="What it cost to reach 0.8 (or 80%): rounds, bytes, seconds."),
    ] = None,
    rank: Annotated[
        bool, typer.Option("--rank", help="Letters for methods that cannot be told apart; who beats whom how often.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", parser=given("--baseline"), help="Differences from this method alone."),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Which methods are not dominated in accuracy, traffic, memory and exposure."),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Pareto front as a picture, .svg or .png; implies --pareto.")
    ] = None,
    by: Annotated[
        By | None, typer.Option(help="One measure alone, in a table for each method, scenario or FM.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="That measure; any that --measure takes, accuracy by default.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Fail where a table in the folder's `tables` is not what its records say now."),
    ] = False,
) -> None:
    """Compare methods: accuracy ± deviation, proxy gap, traffic, gradient error, exposure, parameters."""
    from fedbench.tables.asked import Asked
    from fedbench.tables.committed import stale_tables
    from fedbench.tables.folder import compare_folder
    from fedbench.tables.render.forms import render
    from fedbench.tables.render.ranking import pareto_picture
    from fedbench.tables.render.terminal import terminal

    folder = results or next((Path(name) for name in ("runs", "results") if Path(name).is_dir()), Path("runs"))
    if results and not results.is_dir():
        raise FedbenchError(f"--results {results}: no such folder")
    if check:
        stale = list(stale_tables(folder))
        for line in stale:
            print(printable(line))
        if stale:
            raise typer.Exit(1)
        return
    front = pareto or picture is not None
    asked = Asked.of(
        measure or (), profile or (), profiles, within or (), to, rank, front, by.value if by else "", metric or ""
    )
    comparison = compare_folder(folder, grid, scenario or (), fm, asked, baseline or "")
    if picture is not None:
        pareto_picture(comparison.sections, picture)
    if format is Format.terminal:
        make_console().print(terminal(comparison))
    else:
        print(render(comparison, format.value), end="")
