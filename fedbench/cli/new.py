"""`fedbench new`: files to begin with, proposed from what a user has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.console import make_console
from fedbench.errors import FedbenchError, printable

new_app = typer.Typer(no_args_is_help=True, help="Propose a file to begin with.")


@new_app.command("scenario", epilog="Then: fedbench run --method fedavg-lora --scenario NAME.toml")
def scenario_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="Rows of your own: CSV, TSV, JSON lines, JSON, parquet; a folder of them, of images, of save_to_disk.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The scenario's file; default: called like the source, here."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it is there.")] = False,
) -> None:
    """Look at rows of your own, and write a scenario for them, with comments on what was recognised."""
    from fedbench.data.own.propose import propose
    from fedbench.files import write_text
    from fedbench.names import bad_name, plugin_name
    from fedbench.scenario.toml import split_names

    target = output or Path(f"{source.resolve().name.partition('.')[0]}.toml")
    if target.suffix != ".toml":
        raise FedbenchError(f"-o {target}: a scenario is a .toml file")
    if why := bad_name(plugin_name(target.stem)):
        raise FedbenchError(f"{target}: a scenario is called as its file, and {why}; name another one with -o")
    if target.exists() and not force:
        raise FedbenchError(f"{target}: is there already; name another file with -o, or give --force")
    console = make_console()
    proposal = propose(source, target)
    write_text(target, proposal.text)
    for line in proposal.said:
        console.print(printable(line), highlight=False, markup=False)
    console.print(printable(f"written: {target}, with the splits {', '.join(split_names(target))}"), highlight=False,
                  markup=False)  # fmt: skip
    console.print(
        printable(f"next: fedbench run --method fedavg-lora --scenario {target}"), highlight=False, markup=False
    )
