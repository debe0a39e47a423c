"""`fedbench list`: everything that can be asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fedbench.cli.console import column_table, make_console
from fedbench.cli.options import Plugins, known
from fedbench.errors import FedbenchError, printable

if TYPE_CHECKING:
    from rich.table import Table

    from fedbench.registry import Registry


class Kind(StrEnum):
    """What the list can be narrowed to."""

    methods = "methods"
    scenarios = "scenarios"
    fms = "fms"
    datasets = "datasets"
    families = "families"
    hosts = "hosts"


def list_command(
    kind: Annotated[Kind | None, typer.Argument(help="Only these.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Import every method and say what is broken.")] = False,
    plugin: Plugins = None,
) -> None:
    """List methods, scenarios and foundation models; nothing is imported unless --check is given.

    Data sets, model families and hosts are listed when they are asked for.
    """
    registry = known(plugin)
    console = make_console()
    if kind in (None, Kind.methods):
        errors = {name: entry.error for name, entry in registry.methods.items()}
        if check:
            errors |= {name: _import_error(registry, name) for name, error in errors.items() if not error}
        methods = registry.methods.values()
        rows = [(e.name, errors[e.name] or e.summary, e.origin, bool(errors[e.name])) for e in methods]
        console.print(_listing("methods", rows, {e.name: e.needs for e in methods}))
    if kind in (None, Kind.scenarios):
        rows = [(e.name, e.error or e.summary, e.origin, bool(e.error)) for e in registry.scenarios.values()]
        console.print(_listing("scenarios", rows))
    others = {Kind.datasets: "data sets", Kind.families: "model families", Kind.hosts: "hosts"}
    if kind in others:
        entries = getattr(registry, kind)  # parsed here: the other kinds' files stay unread
        rows = [(e.name, e.error or e.summary, e.origin, bool(e.error)) for e in entries.values()]
        console.print(_listing(others[kind], rows))
    if kind in (None, Kind.fms):
        from fedbench.models.zoo.names import FMS

        console.print(_listing("foundation models", [(name, text, "", False) for name, text in FMS.items()]))
        families = ", ".join(sorted(registry.families))
        console.print(f"--fm also takes the hub id or the folder of a checkpoint of these families: {families}.")


def _import_error(registry: Registry, name: str) -> str | None:
    try:
        registry.load_method(name)
    except FedbenchError as error:
        return str(error)
    return None


def _listing(title: str, rows: list[tuple[str, str, str, bool]], needs: Mapping[str, str] | None = None) -> Table:
    """A table of name, text and origin, a row each; a row that is broken says so in red.

    needs: what a server needs of its clients' uploads, a column of its own.
    """
    from rich.text import Text

    table = column_table(title, *(["needs"] if needs is not None else []), "", "")
    for name, text, origin, broken in rows:
        origin = "" if origin == "fedbench" else origin
        shown = Text(printable(text), style="red" if broken else "")
        middle = [Text(needs.get(name, ""))] if needs is not None else []
        table.add_row(Text(name), *middle, shown, Text(printable(origin), style="dim"))
    return table
