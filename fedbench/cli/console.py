"""What the commands print with: a console, tables of plain columns, and an end by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

from fedbench.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def make_console() -> Console:
    """A console on standard output, wide where that is no terminal."""
    from rich.console import Console

    console = Console()
    # A pipe or a file has no width; names must not be cut there.
    return console if console.is_terminal else Console(width=200)


def loading(console: Console) -> AbstractContextManager[Any]:
    """Says on a terminal that something is being loaded, for the time of the block."""
    return console.status("loading") if console.is_terminal else nullcontext()


@contextmanager
def stoppable(console: Console, then: str) -> Iterator[None]:
    """Answers Ctrl-C in the block with a line that says what happens `then`, and with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; {then}")
        raise typer.Exit(130) from None


def column_table(*columns: str) -> Table:
    """A table without lines; its first column is never broken."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def settings_table(settings: dict[str, tuple[Any, str]]) -> Table:
    """Settings by name: their value, and where it came from."""
    from rich.text import Text

    table = column_table("setting", "value", "from")
    for key, (value, source) in settings.items():
        table.add_row(Text(printable(key)), Text(printable(str(value))), Text(printable(source), style="dim"))
    return table


def headline(name: str, text: str) -> Text:
    """A name in bold, and text beside it."""
    from rich.text import Text

    return Text.assemble((name, "bold"), f"  {text}")
