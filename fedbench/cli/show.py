"""`fedbench show`: the settings of a method or scenario, or what a foundation model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbench.cli.console import column_table, headline, make_console, settings_table
from fedbench.cli.options import Plugins, Profile, Rounds, Settings, known, pairs
from fedbench.errors import FedbenchError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from fedbench.registry import Registry
    from fedbench.scenario.tables import Scenario


def show_command(
    name: Annotated[str, typer.Argument(help="A method, a scenario, a foundation model or a checkpoint's folder.")],
    scenario: Annotated[
        str | None, typer.Option(help="For a method: its hyper-parameters as this scenario sets them.")
    ] = None,
    rounds: Rounds = None,
    settings: Settings = None,
    profile: Profile = None,
    plugin: Plugins = None,
) -> None:
    """Show the resolved settings of a method or scenario and where each came from; or what a model is."""
    from fedbench.models.zoo.names import FMS, fm_folder
    from fedbench.names import nearest

    registry = known(plugin)
    console = make_console()
    changes = pairs(settings, rounds)
    if name in registry.methods:
        _show_method(console, registry, name, scenario, changes, profile)
    elif name in registry.scenarios or ".toml" in name:
        _show_scenario(console, registry, name, changes, profile)
    elif name in FMS or fm_folder(name):
        registry.add_families()
        _show_fm(console, name, FMS.get(name, "a checkpoint in a folder"))
    else:
        everything = [*registry.methods, *registry.scenarios, *FMS]
        raise FedbenchError(f"there is no method, scenario or foundation model {name!r}; {nearest(name, everything)}")


def _show_method(
    console: Console, registry: Registry, name: str, scenario: str | None, changes: dict[str, str], profile: str | None
) -> None:
    """Print what a method is, and its hyper-parameters with where each value came from."""
    from inspect import cleandoc

    from fedbench.run.prepare import make_method, parse_values, scenario_settings, split_settings
    from fedbench.run.request import RunRequest
    from fedbench.scenario.load import load_scenario

    entry, kind = registry.find_method(name), registry.load_method(name)
    console.print(headline(name, printable(f"version {kind.version}, of {entry.origin}")), soft_wrap=True)
    fields = kind.model_fields
    # The class describes the method, the bases that declare hyper-parameters describe those.
    described = [c for c in kind.__mro__ if c is kind or (set(vars(c).get("__annotations__", ())) & set(fields))]
    for owner in described:
        if owner.__doc__:
            console.print(printable(cleandoc(owner.__doc__), but="\n") + "\n", highlight=False, markup=False)
    mine, rest = split_settings(changes, list(fields), name)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, "default")
    if scenario:
        path, split = registry.find_scenario(scenario)
        found = load_scenario(path, split, profile, rest)
        for field, (value, table) in scenario_settings(kind, found).items():
            values[field], sources[field] = value, f"{path.name} [methods.{table}]"
    elif rest:
        raise FedbenchError(f"--set {next(iter(rest))}: a setting of scenarios; name one with --scenario")
    values |= parse_values(mine)
    sources |= dict.fromkeys(mine, "--set")
    method = make_method(kind, values, RunRequest(method=name, scenario=scenario or "the command line"))
    console.print(settings_table({field: (getattr(method, field), sources[field]) for field in fields}))


def _show_scenario(
    console: Console, registry: Registry, name: str, changes: dict[str, str], profile: str | None
) -> None:
    """Print a scenario's title and file, and its settings with where each value came from."""
    from fedbench.scenario.load import load_scenario

    path, split = registry.find_scenario(name)
    found = load_scenario(path, split, profile, changes)
    console.print(headline(found.name, printable(f"{found.title}\n{path}", but="\n")), soft_wrap=True)
    console.print(settings_table(found.provenance()))
    if found.dataset.kind is not None or found.split.kind == "natural":
        _show_rows(console, registry, found)


def _show_rows(console: Console, registry: Registry, scenario: Scenario) -> None:
    """Print what was recognised in rows of the user's own, and how unlike the clients are that the data has."""
    from fedbench.data.load import load_data
    from fedbench.data.natural import skew_of
    from fedbench.run.prepare import sets_of
    from fedbench.tables.report import split_line

    data_set, _, natural = sets_of(registry, scenario)
    data = load_data(data_set, None, scenario.dataset, None, None, natural)
    for note in data.notes:
        console.print(printable(note), highlight=False, markup=False)
    if data.clients is not None:
        sizes, skew = skew_of(data)
        console.print(f"split: {split_line(sizes, skew)}", highlight=False, markup=False)


def _show_fm(console: Console, name: str, description: str) -> None:
    """Print what a foundation model is and where it came from; this loads it."""
    from rich.text import Text

    console.print(headline(printable(name), description), soft_wrap=True)
    from fedbench.machine.paths import cache_folder
    from fedbench.models.zoo.load import load_fm

    fm = load_fm(name, num_labels=2, cache=cache_folder())
    table = column_table("what", "value")
    widths = sorted(set(fm.spec.ffn_widths))
    rows = {
        "family": f"{fm.spec.model_type} ({fm.family.modality})",
        "layers": len(fm.spec.ffn_widths),
        "width": fm.spec.config.get("hidden_size", fm.spec.config.get("dim")),
        "FFN width": ", ".join(map(str, widths)),
        "parameters": f"{sum(tensor.numel() for tensor in fm.state.values()):,} without head",
        "content hash": fm.content_hash,
        **fm.provenance,
    }
    for key, value in rows.items():
        table.add_row(key, Text(printable(str(value))))
    console.print(table)
