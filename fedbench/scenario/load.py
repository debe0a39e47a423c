"""Scenarios: data set, split and federation, as TOML. One file per data set, with its named splits."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedbench.errors import FedbenchError
from fedbench.names import nearest, plugin_name
from fedbench.scenario.settings import mistake, parse_value
from fedbench.scenario.tables import KEYS, Scenario, flatten
from fedbench.scenario.toml import read_toml, splits_of, tables_of

_TABLES = (
    *("title", "fm", "dataset", "public", "objective", "privacy"),
    *("federation", "evaluation", "methods", "splits", "profiles"),
)


def load_scenario(
    path: Path, split: str, profile: str | None = None, overrides: Mapping[str, str] | None = None
) -> Scenario:
    """The scenario of one split of the file at `path`.

    `profile` names a [profiles.NAME] table laid over the file's own; `overrides` maps dotted keys to values as in
    `--set federation.rounds=3`. Raises FedbenchError naming file, field and fix.
    """
    raw = read_toml(path)
    known_splits = splits_of(path, raw)
    if extra := sorted(set(raw) - set(_TABLES)):
        raise FedbenchError(f"{path}: unknown field {extra[0]!r}; {nearest(extra[0], _TABLES)}")
    if split not in known_splits:
        raise FedbenchError(f"{path}: no split {split!r}; it has {', '.join(known_splits)}")
    tables_of(path, raw, "methods")
    profiles = tables_of(path, raw, "profiles")
    splits = tables_of(path, raw, "splits")
    # A split may carry tables of its own (federation, evaluation, methods), which win over the file's.
    own = dict(splits[split])
    tables = ("federation", "evaluation", "methods", "public", "privacy")
    nested = {table: own.pop(table) for table in tables if isinstance(own.get(table), dict)}
    layers: list[tuple[str, dict[str, Any]]] = [
        (path.name, {k: v for k, v in raw.items() if k not in ("splits", "profiles")}),
        (f"{path.name} [splits.{split}]", {"split": own, **nested}),
    ]
    if profile is not None:
        if profile not in profiles:
            raise FedbenchError(f"{path}: no profile {profile!r}; it has {', '.join(profiles) or 'none'}")
        layers.append((f"{path.name} [profiles.{profile}]", profiles[profile]))
    merged: dict[str, Any] = {"name": f"{plugin_name(path.stem)}-{split}"}
    sources: dict[str, str] = {}
    for label, layer in layers:
        _merge(merged, layer)
        sources |= dict.fromkeys(flatten(layer), label)
    known = [*KEYS, *flatten({"methods": merged.get("methods", {})})]
    for key, text in (overrides or {}).items():
        # Hyper-parameters are checked by their method; here only that the scenario has such a method's table.
        if key not in known and not key.startswith(tuple(f"methods.{m}." for m in merged.get("methods", {}))):
            raise FedbenchError(f"--set {key}: no such setting; {nearest(key, known)}")
        layer = _nest(key.split("."), parse_value(key, text))
        _merge(merged, layer)
        sources |= dict.fromkeys(flatten(layer), "--set")
    try:
        scenario = Scenario.model_validate(merged)
    except ValidationError as error:
        wrong = mistake(error)
        where = ".".join(wrong.place)
        message = f"unknown field; {nearest(where, known)}" if wrong.unknown else wrong.message
        place = f"--set {where}" if sources.get(where) == "--set" else f"{path}: {where}"
        raise FedbenchError(f"{place}: {message}") from None
    scenario._sources.update(sources)
    scenario._folder = path.resolve().parent
    return scenario


def _nest(parts: list[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nest(parts[1:], value) if len(parts) > 1 else value}


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)
