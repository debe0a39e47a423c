"""Who beats whom, and how often: letters for those that cannot be told apart, and the probability of improvement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedbench.tables.statistics import LEVEL


@dataclass(frozen=True)
class Improvement:
    """How often `a` beats `b` in a run of the same scenario and seed (after Agarwal et al. 2021, appendix A.1).

    That paper compares every run with every run of a task. Here a seed is one partition, one series of cohorts and
    one initialisation for all methods, so runs of one seed are compared. The interval is Clopper and Pearson's (1934)
    on the number of pairs that were won. It is made for one scenario; over several, in which the chance may differ, the
    number of wins varies less, so that the interval is too wide rather than too narrow (Hoeffding 1956). A tie is half
    a win, and in the interval whatever widens it.
    """

    a: str
    b: str
    wins: int
    ties: int
    pairs: int
    scenarios: int

    @property
    def probability(self) -> float:
        return (self.wins + self.ties / 2) / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """Of `LEVEL`."""
        from scipy.special import betaincinv

        tail, n = (1 - LEVEL) / 2, self.pairs
        least, most = self.wins, self.wins + self.ties
        low = 0.0 if least == 0 else float(betaincinv(least, n - least + 1, tail))
        high = 1.0 if most == n else float(betaincinv(most + 1, n - most, 1 - tail))
        return low, high


def letters(names: Sequence[str], apart: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The compact letter display: two names share a letter exactly where they are not `apart` (Piepho 2004).

    Names come in the order in which letters are to be given, the best first.
    """
    different = {frozenset(pair) for pair in apart}
    groups = [frozenset(names)] if names else []
    for pair in sorted(map(sorted, different)):  # insert: a group that holds both becomes two, each without one of them
        for group in [group for group in groups if group.issuperset(pair)]:
            groups.remove(group)
            groups += [group - {name} for name in pair]
        groups = [group for group in groups if not any(group < other for other in groups)]  # absorb
        groups = list(dict.fromkeys(groups))
    place = {name: index for index, name in enumerate(names)}
    groups.sort(key=lambda group: sorted(place[name] for name in group))
    return {name: "".join(_letter(i) for i, group in enumerate(groups) if name in group) for name in names}


def _letter(index: int) -> str:
    """a to z, then a1, b1, ..."""
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")
