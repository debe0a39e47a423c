"""The command line that makes a record, worked out from what the record says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fedbench.errors import FedbenchError
from fedbench.models.zoo.names import recorded_label
from fedbench.records.record import Record
from fedbench.registry import Registry
from fedbench.scenario.load import load_scenario
from fedbench.scenario.settings import as_text
from fedbench.scenario.tables import Scenario, flatten
from fedbench.scenario.toml import read_toml

_NAMES = ("name", "title", "fm")
"""Of a scenario's settings those that are no settings of the run."""


@dataclass(frozen=True)
class Origin:
    """How a run is asked for.

    parts: the command and each of its options with its value, quoted for a shell. profile: the one whose settings the
    run has, "" for none. notes: what is not known.
    """

    parts: tuple[str, ...]
    profile: str
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join(self.parts)


class Origins:
    """Works out commands. Scenarios and methods are looked up among those installed here, and nothing is imported."""

    @cached_property
    def _registry(self) -> Registry:
        return Registry()

    def of(self, record: Record) -> Origin:
        """The command that asks for the run of `record` again, every setting in it that is not its scenario's.

        A setting is left out where the scenario, as it is installed here, has the same value. Data folders are no part
        of a record, so they are no part of the command.
        """
        who = record.identity
        notes = []
        profile, scenario, rest = self._nearest(record)
        options = [("--method", who.method), ("--scenario", who.scenario)]
        options += [("--profile", profile)] if profile else []
        options.append(("--seed", str(who.seed)))
        if who.fm and (scenario is None or recorded_label(who.fm) != recorded_label(scenario.fm)):
            options.append(("--fm", recorded_label(who.fm)))
        if who.precision and who.precision != "fp32":
            options.append(("--precision", who.precision))
        settings = record.method.settings
        if settings.get("lora_dropout") and record.provenance.executor:
            options.append(("--executor", record.provenance.executor))
        tables = scenario.methods.get(who.method, {}) if scenario else {}
        mine = {name: value for name, value in settings.items() if name not in tables or tables[name] != value}
        for name, value in {**rest, **mine}.items():
            options.append(("--set", f"{name}={'none' if value is None else as_text(value)}"))
        if who.method not in self._registry.methods:
            options.append(("--plugin", "FILE"))
            notes.append(f"{who.method} is a plugin's; FILE stands for it")
        if scenario is None:
            notes.append(f"{who.scenario} is not a scenario installed here; its settings are those of its file")
        if record.status == "failed" and not settings:
            notes.append("the run failed before its settings were known")
        return Origin(("fedbench run", *map(shlex.join, options)), profile, tuple(notes))

    def _nearest(self, record: Record) -> tuple[str, Scenario | None, dict[str, Any]]:
        """The profile that leaves the fewest settings to be given, its scenario, and those settings.

        Without a profile where that leaves no more than with one, and where the record does not say all that one sets.
        """
        has = _settings(record)
        found: list[tuple[int, int, str, Scenario, dict[str, Any]]] = []
        scenarios = _scenarios(self._registry, record.identity.scenario)
        bare = flatten(scenarios[""].identity()) if scenarios else {}
        for place, (profile, scenario) in enumerate(scenarios.items()):
            usual = flatten(scenario.identity())
            if any(name not in has and bare.get(name) != value for name, value in usual.items()):
                continue
            rest = {name: value for name, value in has.items() if name not in usual or usual[name] != value}
            found.append((len(rest), place, profile, scenario, rest))
        if not found:
            return "", None, {}
        _, _, profile, scenario, rest = min(found, key=lambda item: item[:2])
        return profile, scenario, rest


def _settings(record: Record) -> dict[str, Any]:
    """The scenario's settings that a run was asked for, by dotted name: without those its method planned itself."""
    planned = set(record.method.planned or ()) | set(_NAMES)
    if record.scenario.split and (record.scenario.split.model_extra or {}).get("kind") == "natural":
        planned.add("split.clients")  # counted in the data
    content: Mapping[str, Any] = record.scenario.to_json()
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    return {name: value for name, value in flatten(tables).items() if name not in planned}


@lru_cache(maxsize=64)
def _scenarios(registry: Registry, name: str) -> dict[str, Scenario]:
    """The scenario `name` by profile, "" first for none; nothing where it is not known or cannot be read here."""
    try:
        path, split = registry.find_scenario(name)
        profiles = read_toml(path).get("profiles", {})
        return {profile: load_scenario(path, split, profile or None) for profile in ("", *profiles)}
    except FedbenchError:
        return {}
