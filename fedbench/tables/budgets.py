"""Quality under a budget, and what a target costs: from the rounds of a run and its scores on validation rows.

After a round a run has spent the sum of what its rounds so far cost. The test set is scored once, so what a run had
reached by then is the accuracy of the FM with the tuned parameters plugged in on the validation rows, in those rounds
in which that was scored.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from fedbench.errors import FedbenchError
from fedbench.names import nearest
from fedbench.records.record import Record
from fedbench.tables import measures
from fedbench.tables.formats import MEGA
from fedbench.tables.profiles import Profile
from fedbench.tables.rows import Row
from fedbench.tables.simulated import round_seconds
from fedbench.tables.statistics import Summary

Spent = Callable[[Record], list[float] | None]
"""What a run has spent after each round; None where its record does not say."""

SCALES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "s": 1, "min": 60, "h": 3600}
"""Units of a budget, in bytes and in seconds."""


@dataclass(frozen=True)
class Cost:
    """What rounds cost: its name as `--within` takes it, its header with the unit, that unit, and how it is read."""

    name: str
    header: str
    unit: float
    spent: Spent


def _rounds(run: Record) -> list[float]:
    return [float(r + 1) for r in range(len(run.rounds))]


def _traffic(run: Record) -> list[float] | None:
    each = run.communication.per_round
    return None if each is None else [float(s) for s in itertools.accumulate(e.up + e.down for e in each)]


def _up(run: Record) -> list[float] | None:
    each = run.communication.per_round
    return None if each is None else [float(s) for s in itertools.accumulate(e.up for e in each)]


def _memory(run: Record) -> list[float] | None:
    held = measures.client_memory(run)
    return None if held is None else [held] * len(run.rounds)


def _time(profile: Profile, run: Record) -> list[float] | None:
    times = round_seconds(run, profile)
    return None if times is None else list(itertools.accumulate(times))


ROUNDS = Cost("rounds", "rounds", 1.0, _rounds)
TRAFFIC = Cost("traffic", "MB both ways", MEGA, _traffic)
UP = Cost("up", "MB up", MEGA, _up)
MEMORY = Cost("memory", "client MB", MEGA, _memory)


def time_cost(profile: Profile) -> Cost:
    """Simulated seconds with clients of this profile."""
    return Cost("time", f"s, {profile.name}", 1.0, partial(_time, profile))


@dataclass(frozen=True)
class Budget:
    """At most `limit` of `cost`, in bytes or seconds; `text` is how it was asked for."""

    cost: Cost
    limit: float
    text: str

    def __str__(self) -> str:
        amount = self.text.rpartition("=")[2].strip()
        about = {
            "traffic": "traffic (both directions, set-up included, all clients)",
            "up": "uploads (all clients)",
            "memory": "client memory (the parameters it holds, 4 bytes each)",
            "time": f"simulated time ({self.cost.header.removeprefix('s, ')})",
        }
        return f"{amount} of {about[self.cost.name]}"


def parse_budget(text: str, profiles: Sequence[Profile] = ()) -> Budget:
    """A budget as `--within` takes it: 10MB, up=10MB, memory=80MB, 30min, time=2h.

    Bytes without a name are traffic. Time takes one profile. Raises FedbenchError for what is no budget.
    """
    name, equals, amount = text.rpartition("=")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", amount)
    if found is None or (unit := found[2].lower()) not in SCALES:
        raise FedbenchError(f"--within {text}: write a number and a unit, as 10MB, up=500kB, memory=80MB or time=2h")
    of_time = unit in ("s", "min", "h")
    name = name.strip() if equals else "time" if of_time else TRAFFIC.name
    known = {cost.name: cost for cost in (TRAFFIC, UP, MEMORY)}
    if name == "time":
        if len(profiles) != 1:
            raise FedbenchError(f"--within {text}: simulated time is that of one client profile; give --profile phone")
        known["time"] = time_cost(profiles[0])
    if name not in known:
        raise FedbenchError(f"--within {text}: no such budget; {nearest(name, [*known, 'time'])}")
    if of_time != (name == "time"):
        raise FedbenchError(f"--within {text}: {name} is given in {'bytes' if of_time else 'seconds, min or h'}")
    limit = float(Fraction(found[1]) * SCALES[unit])  # exact: 65.6 MB are 65,600,000 bytes
    if not 0 < limit < math.inf:
        raise FedbenchError(f"--within {text}: a budget is above 0")
    return Budget(known[name], limit, text)


def parse_target(text: str) -> float:
    """A target accuracy as `--to` takes it, 0.8 or 80%, as a share. Raises FedbenchError for what is none."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise FedbenchError(f"--to {text}: write a share or per cent of accuracy, as 0.8 or 80%")
    return value


UNKNOWN = math.nan
"""In the place of a number that a record does not say."""


def scored_rounds(run: Record) -> dict[int, float]:
    """Accuracy of the plug-in on validation rows, by round in which it was scored."""
    return {e.round: e.plug_in_validation for e in run.rounds if e.plug_in_validation is not None}


def round_within(run: Record, budgets: Iterable[Budget]) -> float | None:
    """The last round that was scored and lies within all `budgets`; None where none does, `UNKNOWN` likewise."""
    spent = [(budget.cost.spent(run), budget.limit) for budget in budgets]
    fitting = [r for r in scored_rounds(run) if all(each[r] <= limit for each, limit in spent if each is not None)]
    unknown = any(each is None for each, _ in spent)
    return UNKNOWN if fitting and unknown else max(fitting, default=None)


def accuracy_within(run: Record, budgets: Iterable[Budget]) -> float | None:
    """The accuracy in that round."""
    last = round_within(run, budgets)
    return last if last is None or math.isnan(last) else scored_rounds(run)[int(last)]


def cost_to(run: Record, target: float, cost: Cost) -> float | None:
    """What the rounds cost up to the first that was scored at `target` or more; None where none was."""
    first = next((r for r, accuracy in sorted(scored_rounds(run).items()) if accuracy >= target), None)
    if first is None:
        return None
    spent = cost.spent(run)
    return UNKNOWN if spent is None else spent[first]


@dataclass(frozen=True)
class Reached:
    """A number of each of a row's runs that has one; `missed` did not get there, and `unknown` do not say."""

    values: tuple[float, ...]
    missed: int
    unknown: int

    @classmethod
    def of(cls, row: Row, read: Callable[[Record], float | None], scale: float = 1.0) -> Reached:
        """Of the runs of `row` that have an accuracy, read from each."""
        found = [read(run) for _, run in sorted(row.scored.items())]
        known = tuple(value * scale for value in found if value is not None and not math.isnan(value))
        missed = sum(value is None for value in found)
        return cls(known, missed, len(found) - missed - len(known))

    @property
    def runs(self) -> int:
        return len(self.values) + self.missed + self.unknown

    @property
    def summary(self) -> Summary | None:
        """Over all runs; None where some did not get there: a mean of those that did would flatter the row."""
        return Summary.of(self.values) if self.values and not self.missed and not self.unknown else None

    def text(self, form: Callable[[float], str]) -> str:
        """Mean ± deviation (n), or how many of the runs got there, or do not say."""
        if found := self.summary:
            return f"{form(found.mean)}{'' if found.std is None else f' ± {form(found.std)}'} ({found.n})"
        if self.unknown:
            return f"not known ({self.unknown} of {self.runs})"
        return f"not reached ({len(self.values)} of {self.runs})" if self.runs else "–"


def budget_columns(
    row: Row, within: Sequence[Budget], target: float | None, profiles: Sequence[Profile]
) -> dict[str, Any]:
    """What a row reached within budgets, and what a target cost it, as plain numbers by name.

    A mean is missing where not every run got there.
    """
    line: dict[str, Any] = {}
    if within:
        accuracy = Reached.of(row, partial(accuracy_within, budgets=within))
        line |= _plain("accuracy_within", accuracy) | {"within_reached": len(accuracy.values)}
    if target is not None:
        for cost in costs_of(profiles):
            reached = Reached.of(row, partial(cost_to, target=target, cost=cost), 1 / cost.unit)
            name = cost.header.lower().replace(" both ways", "").replace(", ", "_").replace(" ", "_")
            line |= _plain(f"{name}_to_target", reached)
            line["target_reached"] = len(reached.values) + reached.unknown
    return line


def _plain(name: str, reached: Reached) -> dict[str, Any]:
    found = reached.summary
    return {name: found.mean if found else None, f"{name}_std": found.std if found else None}


def costs_of(profiles: Sequence[Profile]) -> list[Cost]:
    """What a target may cost: rounds, bytes, and seconds with each of `profiles`."""
    return [ROUNDS, TRAFFIC, UP, *map(time_cost, profiles)]
