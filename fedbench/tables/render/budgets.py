"""Tables of quality under a budget and of what a target costs, as frames of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from fedbench.records.record import Record
from fedbench.tables.asked import Asked
from fedbench.tables.budgets import (
    Budget,
    Cost,
    Reached,
    accuracy_within,
    cost_to,
    costs_of,
    round_within,
    scored_rounds,
)
from fedbench.tables.comparison import Section
from fedbench.tables.formats import three_digits
from fedbench.tables.rows import FLAG, Row
from fedbench.tables.simulated import why_unknown

Printed = tuple[str, pd.DataFrame, list[str]]


def budget_tables(section: Section, asked: Asked) -> list[Printed]:
    """The tables that were asked for of a scenario, each with its title and notes."""
    out = []
    if asked.within:
        limits = ", ".join(map(str, asked.within))
        notes = _untimed(section) if any(budget.cost.name == "time" for budget in asked.within) else []
        title = f"{section.title}: within {limits}"
        out.append((title, _within(section, asked.within), [*notes, *_notes(section)]))
    if asked.target is not None:
        title = f"{section.title}: cost to {100 * asked.target:g}% on validation rows"
        notes = ["to the first round that was scored at that or more; a run that never was is not reached, of any cost"]
        timed = any(not why_unknown(run) for row in section.rows for run in row.scored.values())
        profiles = asked.profiles if timed else ()
        notes += [*(f"s, {profile}" for profile in profiles), *_untimed(section), *_notes(section)]
        out.append((title, _to(section, asked.target, costs_of(profiles)), notes))
    return out


def _label(row: Row) -> str:
    return row.label + (f" {FLAG}" if row.flag else "")


def _within(section: Section, budgets: Sequence[Budget]) -> pd.DataFrame:
    lines = []
    for row in section.rows:
        accuracy = Reached.of(row, partial(accuracy_within, budgets=budgets), 100)
        rounds = Reached.of(row, partial(_number_within, budgets=budgets))
        shown = [accuracy.text("{:.1f}".format), rounds.text("{:.1f}".format)] if row.scored else [row.state, "–"]
        lines.append([_label(row), *shown])
    return pd.DataFrame(lines, columns=["method", "validation accuracy %", "after round"])


def _number_within(run: Record, budgets: Sequence[Budget]) -> float | None:
    last = round_within(run, budgets)
    return None if last is None else last + 1


def _to(section: Section, target: float, costs: Sequence[Cost]) -> pd.DataFrame:
    forms = ["{:.1f}".format, *[three_digits] * (len(costs) - 1)]
    lines = []
    for row in section.rows:
        each = [Reached.of(row, partial(cost_to, target=target, cost=cost), 1 / cost.unit) for cost in costs]
        texts = [reached.text(form) for reached, form in zip(each, forms, strict=True)]
        lines.append([_label(row), *(texts if row.scored else [row.state, *["–"] * (len(costs) - 1)])])
    return pd.DataFrame(lines, columns=["method", *(cost.header for cost in costs)])


def _untimed(section: Section) -> list[str]:
    """Why rows have no simulated time."""
    reasons: dict[str, list[str]] = {}
    for row in section.rows:
        for reason in sorted({why_unknown(run) for run in row.scored.values()} - {""}):
            reasons.setdefault(reason, []).append(row.label)
    return [f"no simulated time: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def _notes(section: Section) -> list[str]:
    """On what accuracy this is of, when it was scored, and who did not get there."""
    runs = {row.label: list(row.scored.values()) for row in section.rows if row.scored}
    rows = sorted({str((run.scenario.dataset or {}).get("validation")) for of in runs.values() for run in of})
    held = f" ({rows[0]} rows)" if len(rows) == 1 and rows[0] != "None" else ""
    notes = [
        f"validation rows{held}: the FM with the tuned parameters plugged in, as it was scored along the run; the test "
        "set is scored once, so these are no test accuracies",
        "k of n: so many runs got there; a mean is of all runs or of none",
    ]
    scored = {label: {round for run in of for round in scored_rounds(run)} for label, of in runs.items()}
    if len({frozenset(rounds) for rounds in scored.values()}) > 1:
        told = ", ".join(f"{label} in {len(rounds)} rounds" for label, rounds in scored.items())
        notes.append(f"scored in different rounds, so that who is scored less often gets there later: {told}")
    return notes
