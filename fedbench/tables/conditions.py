"""Whether the rows of a section can be compared: the conditions they were made under."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

from fedbench.records.record import Record
from fedbench.tables.comparison import Section
from fedbench.tables.matching import flat, value_text
from fedbench.tables.rows import FLAG


def conditions_of(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By record key: all that has to agree between two rows for their numbers to be comparable.

    That is the scenario without the methods' own settings, data, FM, what that makes of the data, and precision. What a
    reference changes by its nature (`method.planned`: a partition of one client, no rounds) does not make it another
    scenario.
    """
    out = {}
    for record in records:
        if record.status != "complete":
            continue
        found = {
            path: value
            for path, value in flat(record.scenario.to_json()).items()
            if path not in ("title", "name", "fm") and not path.startswith("methods.") and path != "methods"
        }
        who = record.identity
        found |= {"data_hash": who.data_hash, "fm_hash": who.fm_hash, "precision": who.precision}
        # Of the tokenizer or image processor; records did not always say it.
        if who.inputs_hash:
            found["inputs_hash"] = who.inputs_hash
        for path in record.method.planned or ():
            found.pop(path, None)
        out[record.key] = found
    return out


def flag_rows(section: Section, conditions: Mapping[str, Mapping[str, Any]], axis: Set[str] = frozenset()) -> None:
    """Mark the rows with faults, and those whose conditions are not those of most runs in the section; say why.

    axis: settings that rows are to differ in, since that is what the table is about.
    """
    for row in section.rows:
        row.flag = "; ".join(row.faults)
        section.notes += [f"{FLAG} {row.label}: {fault}" for fault in row.faults]
    own = []
    for row in section.rows:
        if row.runs:
            stated = conditions[next(iter(row.runs.values())).key]
            own.append((row, {path: value for path, value in stated.items() if path not in axis}))
    if not own:
        return

    def agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        return all(repr(a[path]) == repr(b[path]) for path in a.keys() & b.keys())

    def support(candidate: Mapping[str, Any]) -> tuple[int, int]:
        """Runs under these conditions that could be ranked, and how many of the conditions are stated."""
        agreeing = (row for row, other in own if agree(candidate, other))
        return sum(0 if row.faults else len(row.runs) for row in agreeing), len(candidate)

    found = sorted((about for _, about in own), key=support, reverse=True)
    usual: dict[str, Any] = {}
    for about in found:
        # What the most usual conditions leave unsaid, the next that agree with them say.
        if agree(about, usual):
            usual = {**about, **usual}
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, about in own:
        different = sorted(p for p in about.keys() & usual.keys() if repr(about[p]) != repr(usual[p]))
        if different:
            reason = ", ".join(
                f"{p} {value_text(p, about[p])} instead of {value_text(p, usual[p])}" for p in different[:3]
            ) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            row.flag = "; ".join(filter(None, (row.flag, reason)))
            reasons[reason].append(row.label)
    for reason, labels in reasons.items():
        section.notes.append(f"{FLAG} not comparable with the rest: {', '.join(labels)}: {reason}")
