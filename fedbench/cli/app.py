"""The command line: one file a command, and the entry point, where every error ends in one line.

Every command imports what it needs when it runs: `fedbench list` loads no torch.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from fedbench.cli.check import check_command
from fedbench.cli.doctor import doctor_command
from fedbench.cli.export import export_command
from fedbench.cli.fetch import fetch_command
from fedbench.cli.gradient import gradient_command
from fedbench.cli.grid import grid_command
from fedbench.cli.list import list_command
from fedbench.cli.new import new_app
from fedbench.cli.plain import PlainCommand, PlainGroup
from fedbench.cli.report import report_command
from fedbench.cli.run import run_command
from fedbench.cli.server import server_command
from fedbench.cli.show import show_command
from fedbench.cli.silo import silo_command
from fedbench.cli.table import table_command
from fedbench.errors import FedbenchError, printable

app = typer.Typer(
    name="fedbench",
    cls=PlainGroup,
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

# In the order of the help.
app.command("run", epilog="The same command after Ctrl-C or a crash goes on after the last finished round.")(
    run_command
)
app.command("list", cls=PlainCommand)(list_command)
app.command("show")(show_command)
app.command("grid", epilog="Stop it at any time: the same command skips what is finished and goes on.")(grid_command)
app.command("table", epilog="Example: fedbench table --results results --format markdown --scenario agnews-noniid")(
    table_command
)
app.command("report", epilog="Example: fedbench report results -o report.html; docs/report.md shows what is in it")(
    report_command
)
app.command("gradient", epilog="Example: fedbench gradient --method fedpft --method fedot --scenario tweets-noniid")(
    gradient_command
)
app.command("check")(check_command)
app.command("export", epilog="Example: fedbench export runs/records/tweets-noniid/fedpft/s0-….json adapter")(
    export_command
)
app.command("server", epilog="docs/federation.md shows a server and its silos in terminals of their own.")(
    server_command
)
app.command(
    "silo", epilog="Example: fedbench silo 1 --addresses addresses.csv --method fedpft --scenario tweets-noniid"
)(silo_command)
app.add_typer(new_app, name="new")
app.command("fetch", epilog="Example: fedbench fetch mpnet-base")(fetch_command)
app.command("doctor")(doctor_command)


def _version(wanted: bool) -> None:
    if wanted:
        from fedbench.package import own_version

        print(f"fedbench {own_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


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


if __name__ == "__main__":
    main()
