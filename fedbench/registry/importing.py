"""Importing what was found; whatever goes wrong in a plugin becomes a FedbenchError that names it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedbench.errors import FedbenchError
from fedbench.registry.entries import Entry

T = TypeVar("T")


def import_class(entry: Entry, base: type[Any], called: str) -> type[Any]:
    """Import what was found and return its class, a `base` of the entry's name that can be made.

    called: what messages call `base`.
    """
    module = _import(entry)
    if entry.attribute:
        candidates = [_attribute(module, entry.attribute)]
    else:
        candidates = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes: list[Any] = [c for c in candidates if isinstance(c, type) and issubclass(c, base)]
    for candidate in classes:
        if getattr(candidate, "name", None) == entry.name:
            if isabstract(candidate):
                lacking = " and ".join(sorted(candidate.__abstractmethods__))
                page = f"; {entry.kind.page} says what a {entry.kind.word} needs" if entry.kind.page else ""
                raise FedbenchError(
                    f"{entry.kind.word} {entry.name!r} of {entry.origin}: {candidate.__name__} does not define "
                    f"{lacking}{page}"
                )
            found: type[Any] = candidate
            return found
    names = sorted(str(c.name) for c in classes if hasattr(c, "name"))
    raise FedbenchError(
        f'{entry.origin} should define a {called} with name: ClassVar[str] = "{entry.name}"; '
        + (f"it defines {', '.join(names)}" if names else f"it defines no {called} with a name")
    )


def import_value(entry: Entry, kind: type[T]) -> T:
    """Import what was found and return its value, a `kind` of the entry's name."""
    module = _import(entry)
    values = [_attribute(module, entry.attribute)] if entry.attribute else [*vars(module).values()]
    found: list[Any] = [value for value in values if isinstance(value, kind)]
    for value in found:
        if value.name == entry.name:
            return value
    names = ", ".join(sorted(str(value.name) for value in found))
    raise FedbenchError(
        f'{entry.origin} should define a {kind.__name__}(name="{entry.name}", ...); it defines '
        f"{names or f'no {kind.__name__}'}; {entry.kind.page} shows one"
    )


def _import(entry: Entry) -> ModuleType:
    if entry.error:
        raise FedbenchError(entry.error)
    try:
        return _import_file(entry.path) if entry.path and not entry.module else importlib.import_module(entry.module)
    except (Exception, SystemExit) as error:
        raise FedbenchError(
            f"{entry.kind.word} {entry.name!r} of {entry.origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _attribute(module: ModuleType, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _import_file(path: Path) -> ModuleType:
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
