"""Which FM a record is of, which cell of a grid it belongs to, and in what its settings depart from others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedbench.grid.cells import Cell
from fedbench.models.zoo.names import FMS, fm_label, is_called, recorded_label
from fedbench.records.record import Record


def fm_names(records: Iterable[Record], asked: Sequence[str] = ()) -> dict[str, str]:
    """What each FM is called, by its hash: one name, whatever its folder was called from run to run.

    That is the name it has among `asked`, FMs as a user gives them, else one that comes with the project, else the
    first.
    """
    called: dict[str, set[str]] = defaultdict(set)
    for record in records:
        digest, name = record.identity.fm_hash, record.identity.fm
        if digest and name:
            called[digest].add(name)
    out = {}
    for digest, names in called.items():
        wanted = [fm_label(given) for given in asked if any(is_called(name, given) for name in names)]
        known = sorted(map(recorded_label, names), key=lambda name: (name not in FMS, name))
        out[digest] = [*wanted, *known][0]
    return out


def of_fm(records: Sequence[Record], fm: str) -> list[Record]:
    """The records of the FM given as `fm`, under whatever names they have it."""
    names = fm_names(records, [fm])
    return [record for record in records if is_called(fm_of(record, (), names), fm)]


def asked_fm(cell: Cell) -> str | None:
    """What records call the FM that a cell asks for; None where it leaves that to its scenario."""
    return None if cell.fm is None else fm_label(cell.fm)


def fm_of(record: Record, records: Sequence[Record], names: Mapping[str, str]) -> str:
    """The record's FM. A run that failed before its FM was known goes with the others of its scenario."""
    who = record.identity
    if who.fm:
        return names.get(who.fm_hash or "", recorded_label(who.fm))
    others = [r for r in records if r.identity.scenario == who.scenario and r.identity.fm]
    return min((fm_of(other, (), names) for other in others), default="")


def belongs(record: Record, cell: Cell, names: Mapping[str, str]) -> bool:
    """Whether the record is of this cell, as far as names and the cell's own settings tell."""
    who = record.identity
    if (who.method, who.scenario, who.seed) != (cell.method, cell.scenario, cell.seed):
        return False
    if cell.fm is not None and not is_called(fm_of(record, (), names), cell.fm):
        return False
    return not departures(record, cell.settings)


def departures(record: Record, settings: Mapping[str, Any]) -> list[str]:
    """Which of `settings`, keys and values as `--set` takes them, are others in the record.

    One that the record does not have is not compared: it belongs to another method, or the run failed before its
    settings were resolved. Nor is one that the method changes by its nature (`method.planned`).
    """
    method, planned = record.identity.method, record.method.planned or ()
    have = {**flat(record.scenario.to_json()), **method_settings(record)}
    out = []
    for key, value in settings.items():
        name = key.removeprefix("method.").removeprefix(f"methods.{method}.")
        name = "federation.rounds" if name == "rounds" else name
        name = name if name in have else name.replace("-", "_")
        if name in have and name not in planned and not _equal(have[name], value):
            wanted = value if isinstance(value, str) else str(value).lower()
            out.append(f"{name} {value_text(name, have[name])} instead of {wanted}")
    return out


def method_settings(record: Record) -> dict[str, Any]:
    """The settings of a record's method by dotted path, with those that are left out where they say nothing."""
    found = flat(record.method.settings)
    return {**({"lora_targets": "attention"} if "lora_r" in found else {}), **found}


def _equal(found: Any, value: Any) -> bool:
    """Whether a setting is `value`, which may be its text."""
    try:
        return math.isclose(float(found), float(value), rel_tol=1e-8)
    except (TypeError, ValueError, OverflowError):
        text = str(value).lower()  # which may be quoted, as where a word is not to be read as null
        return str(found).lower() in (text, text.strip('"'))


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def setting_text(path: str, value: Any) -> str:
    return f"{path.rpartition('.')[2]} {value_text(path, value)}"


def value_text(path: str, value: Any) -> str:
    return str(value)[:8] if path.endswith("_hash") else str(value).lower()
