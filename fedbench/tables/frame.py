"""Records as a data frame, one row each: for plots and statistics of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedbench.errors import FedbenchError, one_line
from fedbench.records.record import Record
from fedbench.records.store import load_all, record_key
from fedbench.tables.conditions import conditions_of
from fedbench.tables.measures import ASKED, MEASURES, Measure, accuracy_on
from fedbench.tables.profiles import Profile, chosen_profiles
from fedbench.tables.simulated import time_measures

WHOLE = ("seed", "clients", "rounds", "trainable_parameters", "resident_parameters", "local_steps")
"""Columns of whole numbers, some of which may be missing."""

TEXTS = (
    "scenario", "fm", "method", "status", "fault", "configuration", "settings", "precision", "key", "method_version",
    "data_hash", "fm_hash",
)  # fmt: skip
"""Columns that are no numbers; a method's version may be either. All others are measures."""


def read_frame(results: Path, profiles: Sequence[Profile] = ()) -> pd.DataFrame:
    """All records of a results folder, one row each. Raises FedbenchError where there is none.

    profiles: those that simulated time is given for, without any those of the package.
    """
    folder = results / "records"
    if not folder.is_dir():
        raise FedbenchError(f"{results}: there is no folder `records` in it; name the folder that --results named")
    found = load_all(folder)
    if not found:
        raise FedbenchError(f"{results}: there are no records; make some with `fedbench run`")
    return frame_of(found, profiles)


def frame_of(records: Iterable[Record], profiles: Sequence[Profile] = ()) -> pd.DataFrame:
    """One row a record, in the order given; what a record does not have is missing.

    `configuration` is a short hash of all that decides a result but the seed; a failed run has none. `profiles` as in
    `read_frame`.
    """
    measures = (*MEASURES, *ASKED, *time_measures(profiles or chosen_profiles()))
    records = list(records)
    conditions = conditions_of(records)
    rows = [_row(record, conditions.get(record.key), measures) for record in records]
    frame = pd.DataFrame(rows)
    for name in frame.columns:
        if name in WHOLE:
            frame[name] = pd.array([row[name] for row in rows], dtype="Int64")  # whole also beside missing ones
        elif name not in TEXTS:
            frame[name] = frame[name].astype("float64")
    return frame


def _row(record: Record, conditions: Mapping[str, Any] | None, measures: Sequence[Measure]) -> dict[str, Any]:
    who, scenario = record.identity, record.scenario
    settings = record.method.settings
    decides = {"scenario": who.scenario, "method": who.method, "version": who.method_version}
    configuration = record_key(decides | {"settings": settings, "conditions": conditions}) if conditions else ""
    seconds = record.compute.seconds or {}
    row: dict[str, Any] = {
        "scenario": who.scenario,
        "fm": who.fm,
        "method": who.method,
        "seed": who.seed,
        "status": record.status,
        "fault": _fault(record),
        "configuration": configuration[:12],
        "settings": json.dumps(settings, sort_keys=True),
        "clients": scenario.split.clients if scenario.split else None,
        "fraction": scenario.federation.fraction if scenario.federation else None,
        "rounds": scenario.federation.rounds if scenario.federation else None,
        "precision": who.precision,
    }
    for measure in measures:
        value = measure.read(record)
        row[measure.name] = value if value is None or measure.scale == 1.0 else value * measure.scale
    for test in record.accuracy.extra_tests or ():
        row[f"accuracy_{test}"] = accuracy_on(test)(record)
    row["seconds"] = sum(seconds.values()) if seconds else None
    row |= {f"seconds_{phase}": value for phase, value in sorted(seconds.items())}
    return row | {name: getattr(who, name) for name in ("key", "method_version", "data_hash", "fm_hash")}


def _fault(record: Record) -> str:
    """Why there is no accuracy, or one that is not to be ranked; nothing for a sound run."""
    if record.error:
        return one_line(f"{record.error.type}: {record.error.message}")
    plug_in = record.accuracy.plug_in
    if not plug_in:
        return one_line(record.accuracy.unavailable)
    if plug_in.diverged:
        return "diverged: the loss on the test set is not a finite number, so there is no score"
    return record.no_upload
