"""What a file brings, read from its text: nothing is imported, so that nothing is slow and a broken file hurts nobody.

That is why names are written out in a plugin: `name: ClassVar[str] = "mine"`, `DataSet(name="mine", ...)`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fedbench.errors import FedbenchError, printable
from fedbench.names import bad_name, plugin_name
from fedbench.registry.entries import DATA_SETS, FAMILIES, HOSTS, METHODS, SCENARIOS, Entry, Kind
from fedbench.scenario.toml import read_toml, splits_of

VALUES = {"DataSet": DATA_SETS, "Family": FAMILIES}
"""Type of a module-level value -> the kind that it is."""


def python_file(path: Path, module: str, origin: str, only: Kind | None = None) -> Iterator[Entry]:
    """What a Python file brings: all kinds, or `only` one.

    A file in which nothing has a name is taken for a method that goes by the file's stem with `_` written as `-`.
    """
    stem = printable(plugin_name(path.stem))
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        about = f"{printable(str(path))} cannot be parsed: {type(error).__name__}: {error}"
        yield Entry(only or METHODS, stem, origin, module, path, error=about)
        return
    summary = printable((ast.get_docstring(tree) or "").partition("\n")[0])
    found: list[tuple[Kind, str, str | None, str, str]] = []
    classes = _classes(tree, only)
    for kind, name, owner in classes:
        # Of several in a file each is told from the others by its own words.
        own = printable((ast.get_docstring(owner) or "").partition("\n")[0]) if len(classes) > 1 else ""
        found.append((kind, name, None, own or summary, _says(owner, "needs") or ""))
    found += [
        (kind, name, attribute, printable(about) or summary, "") for kind, name, attribute, about in _values(tree)
    ]
    found = [thing for thing in found if only in (None, thing[0])]
    if not found and only in (None, METHODS):
        found = [(METHODS, plugin_name(path.stem), None, summary, "")]
    for kind, name, attribute, about, needs in found:
        if why := bad_name(name):
            yield Entry(kind, stem, origin, module, path, summary=about, error=f"{printable(str(path))}: {why}")
        else:
            yield Entry(kind, name, origin, module, path, attribute, summary=about, needs=printable(needs))


def scenario_file(path: Path, origin: str) -> Iterator[Entry]:
    """The splits of a scenario file; one entry with an error where it cannot be read."""
    name = plugin_name(path.stem)
    try:
        content = read_toml(path)
        splits, title = splits_of(path, content), str(content.get("title", ""))
    except FedbenchError as error:
        yield Entry(SCENARIOS, printable(name), origin, path=path, error=str(error))
        return
    for split in splits:
        yield Entry(SCENARIOS, f"{name}-{split}", origin, path=path, split=split, summary=title)


def _classes(tree: ast.Module, only: Kind | None) -> list[tuple[Kind, str, ast.ClassDef]]:
    """Methods and hosts by what their classes call themselves: `name = "..."` or `name: ClassVar[str] = "..."`.

    Anything else annotated is a field, not a name. A class is a host where a base is one: imported from the package of
    hosts, called so, or another host of this file.
    """
    hosts: set[str] = set()
    found: dict[tuple[Kind, str], ast.ClassDef] = {}
    for owner in tree.body:
        if isinstance(owner, ast.ImportFrom) and (owner.module or "").startswith(HOSTS.package):
            hosts |= {alias.asname or alias.name for alias in owner.names}
        if not isinstance(owner, ast.ClassDef) or not owner.bases:
            continue
        bases = [ast.unparse(base).split(".") for base in owner.bases]
        is_host = any(base[0] in hosts or base[-1].endswith("Host") for base in bases)
        if is_host:
            hosts.add(owner.name)
        kind = only or (HOSTS if is_host else METHODS)
        if (name := _says(owner, "name")) is not None:
            found.setdefault((kind, name), owner)
    return [(kind, name, owner) for (kind, name), owner in found.items()]


def _says(owner: ast.ClassDef, wanted: str) -> str | None:
    """The text that a class's body gives a class variable; None where it gives none."""
    for line in owner.body:
        if isinstance(line, ast.Assign):
            targets: list[ast.expr] = line.targets
        elif isinstance(line, ast.AnnAssign) and "ClassVar" in ast.unparse(line.annotation):
            targets = [line.target]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == wanted for target in targets):
            found = _text(line.value)
            if found is not None:
                return found
    return None


def _values(tree: ast.Module) -> Iterator[tuple[Kind, str, str, str]]:
    """Data sets and families: kind, name, variable, and the line that says what it is.

    They are values of a module, `MINE = DataSet(name="mine", ...)`, or of any other call where the variable says what
    it makes: `MINE: Family = replace(BERT, name="mine", ...)`.
    """
    for line in tree.body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1:
            target, annotation = line.targets[0], ""
        elif isinstance(line, ast.AnnAssign):
            target, annotation = line.target, _last(line.annotation)
        else:
            continue
        if not isinstance(target, ast.Name) or not isinstance(line.value, ast.Call):
            continue
        call = line.value
        kind = VALUES.get(annotation) or VALUES.get(_last(call.func))
        given = {keyword.arg: _text(keyword.value) for keyword in call.keywords}
        if _last(call.func) in VALUES and call.args:  # the name is the first field of both
            given.setdefault("name", _text(call.args[0]))
        if kind and (name := given.get("name")) is not None:
            yield kind, name, target.id, given.get("about") or ""


def _last(expression: ast.expr) -> str:
    return ast.unparse(expression).strip("\"'").rpartition(".")[2]


def _text(value: ast.expr | None) -> str | None:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
