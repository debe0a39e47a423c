"""Look-up of methods and scenarios by name: one lazy registry, three doors.

Built in: every file of `methods/` and `scenarios/`. Entry points: the groups `fedbench.methods` (a Method class)
and `fedbench.scenarios` (a TOML file inside a package, `package:file.toml`). `--plugin`: a file, a folder or a module.

A method is called what its class says, `name: ClassVar[str] = "..."`; a file in which no class says so goes by its stem
with `_` written as `-`, an entry point by its key. A scenario's name is its file's stem and the name of its split.
Discovery parses and never imports, so it neither loads torch nor fails on a broken plugin; `load_method` imports.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedbench.errors import FedbenchError, printable

if TYPE_CHECKING:
    from fedbench.api.sides import Method

from fedbench.names import bad_name, nearest, plugin_name

METHODS_GROUP = "fedbench.methods"
SCENARIOS_GROUP = "fedbench.scenarios"


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A method that was found, not yet imported.

    `module` is what to import; `path` its file where known, which alone says what to load for a loose file;
    `attribute` names the class where an entry point does.
    """

    name: str
    origin: str
    module: str
    path: Path | None = None
    attribute: str | None = None
    summary: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScenarioEntry:
    """One split of a scenario file; `split` is empty and `error` set where the file cannot be read."""

    name: str
    origin: str
    path: Path
    split: str
    summary: str = ""
    error: str | None = None


Entry = TypeVar("Entry", MethodEntry, ScenarioEntry)


class Registry:
    """Everything reachable through the three doors; `methods` and `scenarios` are sorted by name.

    Raises FedbenchError if two plugins share a name, or if one of `plugins` (the values of `--plugin`) names
    nothing that exists.
    """

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        methods: dict[str, MethodEntry] = {}
        scenarios: dict[str, ScenarioEntry] = {}
        self._brought: dict[str, list[str]] = {}
        for entry in chain(_built_in(), _entry_points()):
            _add(methods, entry) if isinstance(entry, MethodEntry) else _add(scenarios, entry)
        for plugin in plugins:
            names = self._brought.setdefault(plugin, [])
            for entry in _given(plugin):
                names.append(entry.name)
                _add(methods, entry) if isinstance(entry, MethodEntry) else _add(scenarios, entry)
        self.methods = dict(sorted(methods.items()))
        self.scenarios = dict(sorted(scenarios.items()))

    def load_method(self, name: str) -> type[Method]:
        """The method's class; imports its module. Raises FedbenchError for an unknown or a broken method."""
        return import_method(self.find_method(name))

    def find_method(self, name: str) -> MethodEntry:
        """Where the method is, without importing it. Raises FedbenchError for an unknown one."""
        if name not in self.methods:
            raise FedbenchError(f"there is no method {name!r}; {nearest(name, self.methods)}{self._plugins()}")
        return self.methods[name]

    def find_scenario(self, name: str) -> tuple[Path, str]:
        """The scenario's TOML file and split. Raises FedbenchError for an unknown or unreadable one."""
        entry = self.scenarios.get(name)
        if entry is None:
            for broken in self.scenarios.values():
                if broken.error and name.startswith(broken.name + "-"):
                    raise FedbenchError(broken.error)
            known = [known for known, entry in self.scenarios.items() if not entry.error]
            raise FedbenchError(f"there is no scenario {name!r}; {nearest(name, known)}{self._plugins()}")
        if entry.error:
            raise FedbenchError(entry.error)
        return entry.path, entry.split

    def _plugins(self) -> str:
        """What each `--plugin` brought, for an error about a name that is in none of them."""
        return "".join(
            f"; --plugin {plugin} brings {', '.join(names) or 'nothing'}" for plugin, names in self._brought.items()
        )


def import_method(entry: MethodEntry) -> type[Method]:
    """Import what was found and return its Method class; a failure of any kind becomes a FedbenchError."""
    from inspect import isabstract

    from fedbench.api.sides import Method

    if entry.error:
        raise FedbenchError(entry.error)
    try:
        module = _import_file(entry.path) if entry.path and not entry.module else importlib.import_module(entry.module)
    except (Exception, SystemExit) as error:
        raise FedbenchError(
            f"method {entry.name!r} of {entry.origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if entry.attribute:
        found: Any = module
        for part in entry.attribute.split("."):
            found = getattr(found, part, None)
        candidates = [found]
    else:
        candidates = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes = [c for c in candidates if isinstance(c, type) and issubclass(c, Method)]
    for candidate in classes:
        if getattr(candidate, "name", None) == entry.name:
            if isabstract(candidate):
                lacking = " and ".join(sorted(candidate.__abstractmethods__))
                raise FedbenchError(
                    f"method {entry.name!r} of {entry.origin}: {candidate.__name__} does not define {lacking}; "
                    "docs/adding-a-method.md says what a method needs"
                )
            return candidate
    names = sorted(str(c.name) for c in classes if hasattr(c, "name"))
    raise FedbenchError(
        f'{entry.origin} should define a Method with name: ClassVar[str] = "{entry.name}"; '
        + (f"it defines {', '.join(names)}" if names else "it defines no Method with a name")
    )


def _add(known: dict[str, Entry], entry: Entry) -> None:
    """Take in an entry; the same file may come through two doors, another plugin of its name may not."""
    other = known.setdefault(entry.name, entry)
    if not _same(other, entry):
        raise FedbenchError(
            f"two plugins are called {entry.name!r}: one of {other.origin}, one of {entry.origin}; rename or remove one"
        )


def _same(a: MethodEntry | ScenarioEntry, b: MethodEntry | ScenarioEntry) -> bool:
    if a is b:
        return True
    if isinstance(a, MethodEntry) and isinstance(b, MethodEntry) and None in (a.path, b.path):
        return (a.module, a.attribute) == (b.module, b.attribute)
    return a.path is not None and b.path is not None and a.path.resolve() == b.path.resolve()


def _import_file(path: Path) -> Any:
    """Import a loose file once, under a name of its own; its neighbours can be imported after everything else."""
    path = path.resolve()
    name = f"fedbench_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _built_in() -> Iterator[MethodEntry | ScenarioEntry]:
    for group in (METHODS_GROUP, SCENARIOS_GROUP):
        if not _folders(group):
            raise FedbenchError(
                f"{Path(__file__).parent} comes without {group}; install fedbench, or use a whole clone"
            )
    for folder in _folders(METHODS_GROUP):
        for path in _sources(folder):
            yield from _method_file(path, f"{METHODS_GROUP}.{path.stem}", "fedbench")
    for folder in _folders(SCENARIOS_GROUP):
        for path in sorted(folder.glob("*.toml")):
            yield from _scenario_file(path, "fedbench")


def _entry_points() -> Iterator[MethodEntry | ScenarioEntry]:
    for point in entry_points(group=METHODS_GROUP):
        name, origin = plugin_name(point.name), _distribution(point)
        yield MethodEntry(
            name=printable(name),
            origin=origin,
            module=point.module,
            attribute=point.attr or None,
            summary=printable(str(point.dist.metadata["Summary"] or "")) if point.dist else "",
            error=f"a method of {origin}: {why}" if (why := bad_name(name)) else None,
        )
    for point in entry_points(group=SCENARIOS_GROUP):
        name, origin = plugin_name(point.name), _distribution(point)
        paths = [path for folder in _folders(point.module) if (path := folder / point.attr).is_file()]
        # Records carry the file's name, so it has to be the one the scenario is asked for by.
        if paths and plugin_name(paths[0].stem) == name:
            yield from _scenario_file(paths[0], origin)
        else:
            error = (
                f"scenario {name!r} of {origin}: its entry point {point.value!r} should be 'package:file.toml', "
                f"a file in the package that is called {name.replace('-', '_')}.toml"
            )
            yield ScenarioEntry(name, origin, Path(point.attr), "", error=error)


def _given(plugin: str) -> Iterator[MethodEntry | ScenarioEntry]:
    path = Path(plugin).expanduser()
    if path.is_dir():
        for source in _sources(path):
            yield from _method_file(source, "", f"--plugin {source}")
        for table in sorted(path.glob("*.toml")):
            yield from _scenario_file(table, f"--plugin {table}")
    elif path.is_file() and path.suffix == ".toml":
        yield from _scenario_file(path, f"--plugin {plugin}")
    elif path.is_file() and path.suffix == ".py":
        yield from _method_file(path, "", f"--plugin {plugin}")
    elif not all(part.isidentifier() for part in plugin.split(".")):
        raise FedbenchError(f"--plugin {plugin}: no such .py or .toml file, folder or module")
    else:
        yield from _given_module(plugin)


def _given_module(plugin: str) -> Iterator[MethodEntry | ScenarioEntry]:
    origin = f"--plugin {plugin}"
    spec = _find_spec(plugin)
    if spec is None:
        raise FedbenchError(f"--plugin {plugin}: no such .py or .toml file, folder or module")
    if spec.submodule_search_locations is None:
        path = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
        stem = plugin.rpartition(".")[2]
        yield from _method_file(path, plugin, origin) if path else [MethodEntry(plugin_name(stem), origin, plugin)]
        return
    for folder in map(Path, spec.submodule_search_locations):
        for source in _sources(folder):
            yield from _method_file(source, f"{plugin}.{source.stem}", origin)
        for table in sorted(folder.glob("*.toml")):
            yield from _scenario_file(table, origin)


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


def _method_file(path: Path, module: str, origin: str) -> Iterator[MethodEntry]:
    """The methods in a Python file: one for each name its classes give, else one of the file's own name."""
    stem = printable(plugin_name(path.stem))
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        about = f"{printable(str(path))} cannot be parsed: {type(error).__name__}: {error}"
        yield MethodEntry(stem, origin, module, path, error=about)
        return
    summary = printable((ast.get_docstring(tree) or "").partition("\n")[0])
    for name in _class_names(tree) or [plugin_name(path.stem)]:
        if why := bad_name(name):
            yield MethodEntry(stem, origin, module, path, summary, error=f"{printable(str(path))}: {why}")
        else:
            yield MethodEntry(name, origin, module, path, summary=summary)


def _class_names(tree: ast.Module) -> list[str]:
    """What the classes of a file call themselves: `name = "..."` or `name: ClassVar[str] = "..."` in a subclass.

    Anything else annotated is a field, not a name.
    """
    names = []
    for owner in tree.body:
        for line in owner.body if isinstance(owner, ast.ClassDef) and owner.bases else ():
            if isinstance(line, ast.Assign):
                targets: list[ast.expr] = line.targets
            elif isinstance(line, ast.AnnAssign) and "ClassVar" in ast.unparse(line.annotation):
                targets = [line.target]
            else:
                continue
            called = any(isinstance(target, ast.Name) and target.id == "name" for target in targets)
            if called and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
                names.append(line.value.value)
    return list(dict.fromkeys(names))


def _scenario_file(path: Path, origin: str) -> Iterator[ScenarioEntry]:
    from fedbench.scenario.load import read_toml, split_names

    name = plugin_name(path.stem)
    try:
        splits = split_names(path)
        title = str(read_toml(path).get("title", ""))
    except FedbenchError as error:
        yield ScenarioEntry(printable(name), origin, path, "", error=str(error))
        return
    for split in splits:
        yield ScenarioEntry(f"{name}-{split}", origin, path, split, summary=title)
