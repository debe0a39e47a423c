"""The families that are known in this process: the files beside this one, and what plugins add."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from fedbench.errors import FedbenchError
from fedbench.models import families
from fedbench.models.families.family import Family


def _built_in() -> dict[str, Family]:
    """Every family that a file of this package describes, in the order of the files' names."""
    names = [module.name for module in pkgutil.iter_modules(families.__path__) if module.name != "known"]
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    described = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {family.name: family for family in described}


FAMILIES: dict[str, Family] = _built_in()
"""Families by transformers' `model_type`, those of plugins once they were looked up."""

_plugins: dict[str, Callable[[], Family]] = {}
"""Families of plugins by name -> what imports them."""


def add_family(name: str, load: Callable[[], Family]) -> None:
    """Make a plugin's family known in this process; `load`, which imports it, is called when it is first looked up.

    Raises FedbenchError where another description of that name is in use here already: models that were built by it
    would be taken for others.
    """
    if name in FAMILIES and load() != FAMILIES[name]:
        raise FedbenchError(
            f"the family {name!r} is described in two ways in one process; use one of them, or start another process"
        )
    _plugins[name] = load


def is_built_in(name: str) -> bool:
    """Whether the description of this `model_type` is one of fedbench's own."""
    return name not in _plugins


def is_known(name: object) -> bool:
    """Whether there is a description of this `model_type`."""
    return name in FAMILIES or name in _plugins


def family_called(name: str | None) -> Family:
    """The description of a `model_type`. Raises FedbenchError for one that nobody describes."""
    if name not in FAMILIES and name in _plugins:
        FAMILIES[name] = _plugins[name]()
    if name not in FAMILIES:
        raise FedbenchError(unknown(name))
    return FAMILIES[name]


def unknown(name: object) -> str:
    """What to say about a `model_type` that nobody describes."""
    known = ", ".join(sorted({*FAMILIES, *_plugins}))
    return (
        f"model_type {name!r} is not supported; known: {known}; docs/adding-a-family.md says how a plugin adds another"
    )
