"""The three doors: built in, entry points, and `--plugin`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from fedbench.errors import FedbenchError, printable
from fedbench.names import bad_name, plugin_name
from fedbench.package import HOME
from fedbench.registry.entries import DATA_SETS, FAMILIES, HOSTS, METHODS, SCENARIOS, Entry, Kind
from fedbench.registry.parsing import python_file, scenario_file

NOTHING = "no such .py or .toml file, folder or module"


def require_whole() -> None:
    """Raise FedbenchError for a package without its methods or scenarios."""
    for kind in (METHODS, SCENARIOS):
        if not _folders(kind.package):
            raise FedbenchError(f"{HOME} comes without {kind.package}; install fedbench, or use a whole clone")


def built_in(kind: Kind) -> Iterator[Entry]:
    """What comes with fedbench of a kind."""
    for folder in _folders(kind.package):
        if kind is SCENARIOS:
            for path in sorted(folder.glob("*.toml")):
                yield from scenario_file(path, "fedbench")
            continue
        for path in _sources(folder):
            yield from python_file(path, f"{kind.package}.{path.stem}", "fedbench", kind)


def installed() -> Iterator[Entry]:
    """What installed distributions bring by their entry points."""
    every = entry_points()  # read once: it looks through all distributions
    for kind in (METHODS, DATA_SETS, FAMILIES, HOSTS):
        for point in every.select(group=kind.group):
            yield _code(point, kind)
    for point in every.select(group=SCENARIOS.group):
        yield from _scenario(point)


def _code(point: EntryPoint, kind: Kind) -> Entry:
    origin = _distribution(point)
    # Of data sets and families the name is the value's own, not one made of a file's.
    name = plugin_name(point.name) if kind in (METHODS, HOSTS) else point.name
    why = bad_name(name)
    return Entry(
        kind=kind,
        name=printable(name),
        origin=origin,
        module=point.module,
        attribute=point.attr or None,
        summary=printable(str(point.dist.metadata["Summary"] or "")) if point.dist else "",
        error=f"a {kind.word} of {origin}: {why}" if why else None,
    )


def _scenario(point: EntryPoint) -> Iterator[Entry]:
    name, origin = plugin_name(point.name), _distribution(point)
    paths = [path for folder in _folders(point.module) if (path := folder / point.attr).is_file()]
    # Records carry the file's name, so it has to be the one the scenario is asked for by.
    if paths and plugin_name(paths[0].stem) == name:
        yield from scenario_file(paths[0], origin)
    else:
        error = (
            f"scenario {name!r} of {origin}: its entry point {point.value!r} should be 'package:file.toml', "
            f"a file in the package that is called {name.replace('-', '_')}.toml"
        )
        yield Entry(SCENARIOS, name, origin, path=Path(point.attr), error=error)


def given(plugin: str) -> Iterator[Entry]:
    """What a value of `--plugin` brings: a file, a folder or a module. Raises FedbenchError where it is none."""
    path = Path(plugin).expanduser()
    if path.is_dir():
        for source in _sources(path):
            yield from python_file(source, "", f"--plugin {source}")
        for table in sorted(path.glob("*.toml")):
            yield from scenario_file(table, f"--plugin {table}")
    elif path.is_file() and path.suffix == ".toml":
        yield from scenario_file(path, f"--plugin {plugin}")
    elif path.is_file() and path.suffix == ".py":
        yield from python_file(path, "", f"--plugin {plugin}")
    elif not all(part.isidentifier() for part in plugin.split(".")):
        raise FedbenchError(f"--plugin {plugin}: {NOTHING}")
    else:
        yield from _given_module(plugin)


def _given_module(plugin: str) -> Iterator[Entry]:
    origin = f"--plugin {plugin}"
    spec = _find_spec(plugin)
    if spec is None:
        raise FedbenchError(f"--plugin {plugin}: {NOTHING}")
    if spec.submodule_search_locations is None:
        path = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
        name = plugin_name(plugin.rpartition(".")[2])
        yield from python_file(path, plugin, origin) if path else [Entry(METHODS, name, origin, plugin)]
        return
    for folder in map(Path, spec.submodule_search_locations):
        for source in _sources(folder):
            yield from python_file(source, f"{plugin}.{source.stem}", origin)
        for table in sorted(folder.glob("*.toml")):
            yield from scenario_file(table, origin)


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent package that is absent or broken
        return None


def _folders(package: str) -> list[Path]:
    spec = _find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def _distribution(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else f"the entry point {point.name}"
