"""What tables show only where they are asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.names import nearest
from fedbench.tables.budgets import Budget, parse_budget, parse_target
from fedbench.tables.measures import ASKED, MEASURES, Measure
from fedbench.tables.profiles import Profile, chosen_profiles
from fedbench.tables.simulated import SIMULATED, time_measures

BY = ("method", "scenario", "fm")
"""What there may be a table for each of."""


@dataclass(frozen=True)
class Asked:
    """What tables show only where they are asked for it.

    measures: a column each at the end. within: budgets, whose table says what was reached within all of them. target:
    accuracy as a share, whose table says what it cost. profiles: clients that simulated time is of. rank: groups of
    rows that cannot be told apart, and how often one beats another. pareto: the front of accuracy against costs. by: a
    table of `metric` alone for each method, scenario or fm, in place of all others.
    """

    measures: Sequence[Measure] = ()
    within: Sequence[Budget] = ()
    target: float | None = None
    profiles: Sequence[Profile] = ()
    rank: bool = False
    pareto: bool = False
    by: str = ""
    metric: Measure = MEASURES[0]

    @classmethod
    def of(
        cls,
        measures: Sequence[str] = (),
        profile: Sequence[str] = (),
        profiles: Path | None = None,
        within: Sequence[str] = (),
        to: str | float | None = None,
        rank: bool = False,
        pareto: bool = False,
        by: str = "",
        metric: str = "",
    ) -> Asked:
        """As the options of `fedbench table` say it.

        `profile` are names of client profiles, all without any, of the package or of the file `profiles`. Raises
        FedbenchError for a measure or profile that there is none of, and for what is no budget or target.
        """
        chosen = chosen_profiles(profile, profiles)
        if by not in ("", *BY):
            raise FedbenchError(f"--by {by}: no such thing; use {', '.join(BY)}")
        shown = asked_measures([metric or MEASURES[0].name], chosen, "--metric")
        if len(shown) > 1:
            raise FedbenchError(f"--metric {metric}: it is one for each client profile; give one with --profile")
        return cls(
            asked_measures(measures, chosen),
            tuple(parse_budget(text, chosen) for text in within),
            None if to is None else parse_target(str(to)),
            tuple(chosen),
            rank,
            pareto,
            by or ("fm" if metric else ""),
            shown[0],
        )


def asked_measures(names: Sequence[str], profiles: Sequence[Profile], option: str = "--measure") -> tuple[Measure, ...]:
    """The measures of these names; simulated time is one for each profile.

    Raises FedbenchError for a name that there is no measure of.
    """
    timed = time_measures(profiles)
    by_name = {measure.name: [measure] for measure in (*MEASURES, *ASKED, *timed)} | {SIMULATED: timed}
    for name in names:
        if name not in by_name:
            raise FedbenchError(f"{option} {name}: no such measure; {nearest(name, by_name)}")
    return tuple(dict.fromkeys(measure for name in names for measure in by_name[name]))
