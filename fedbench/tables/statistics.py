"""Statistics of runs: mean and deviation over seeds, paired differences with intervals, tests.

Seeds are paired: one seed is one partition, one series of cohorts and one initialisation for all methods. An interval
is about seeds and test rows at large: where it lies above 0, another draw of both would have the same sign.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbench.tables.formats import p_value, seeds_text, signed

SEEDS_FOR_TEST = 6
"""With fewer paired seeds no exact two-sided test can pass 0.05 once Holm has been applied to anything."""

LEVEL = 0.95

POWER = 0.8
"""The probability with which a difference is to be seen where seeds are counted for it."""


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (null for fewer than two values) and count of a measure over seeds."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary | None:
        """Of the values that exist; None if there are none."""
        found = [float(value) for value in values if value is not None]
        if not found:
            return None
        # Exact arithmetic: equal values have that mean and a deviation of 0, not of 1e-17.
        return cls(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Difference:
    """Accuracy of method `a` minus that of `b` in points, over shared seeds and test rows.

    `mean` estimates the difference over all seeds and all test rows there could be. Two things keep it from that.
    `seed_variance` is the sample variance of the seeds' differences, of which a mean over n seeds keeps the n-th part.
    `row_variance` is the part of the mean's own variance that comes from which rows are tested; more seeds do not
    lessen it, since all are tested on the same rows. Both in squared points, None where there is one seed or one row.
    `p` is the paired test's, after Holm, where there were seeds enough.
    """

    a: str
    b: str
    mean: float
    seeds: int
    seed_variance: float | None
    row_variance: float | None
    p: float | None = None

    @classmethod
    def of(cls, a: str, b: str, answers: NDArray[np.floating]) -> Difference:
        """From `answers` [seeds, rows]: 1 where only `a` answered rightly, -1 where only `b` did, else 0."""
        seeds, rows = answers.shape
        each = (100 * answers.mean(axis=1, dtype=np.float64)).tolist()
        seed_variance = row_variance = None
        if seeds > 1 and rows > 1:
            # The covariance over rows of two seeds' answers, mean over the pairs of seeds: what a row has in all seeds.
            # What it has in one seed alone is in that seed's difference, and so in the variance over seeds.
            own = answers.var(axis=1, ddof=1, dtype=np.float64).sum()
            shared = (answers.sum(axis=0, dtype=np.float64).var(ddof=1) - own) / (seeds * (seeds - 1))
            seed_variance, row_variance = statistics.variance(each), 100**2 * max(0.0, float(shared)) / rows
        return cls(a, b, statistics.fmean(each), seeds, seed_variance, row_variance)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of `LEVEL` about `mean`; None where there is one seed: how far seeds differ is then unknown."""
        return self.interval_of(LEVEL)

    def interval_of(self, level: float) -> tuple[float, float] | None:
        """The interval of another level, as `interval` is of `LEVEL`."""
        if self.seed_variance is None or self.row_variance is None:
            return None
        half = half_width(self.seeds, self.seed_variance, self.row_variance, level)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        text = f"{self.a} minus {self.b}: {signed(self.mean)} points"
        if self.interval is None:
            return f"{text} ({seeds_text(self.seeds)}, no interval)"
        low, high = map(signed, self.interval)
        test = "" if self.p is None else f", p {p_value(self.p)}"
        return f"{text}, {LEVEL:.0%} interval {low} to {high} ({seeds_text(self.seeds)}){test}"


def half_width(seeds: int, seed_variance: float, row_variance: float, level: float = LEVEL) -> float:
    """Half the interval of `level` about a mean difference over two or more seeds, in the unit of the variances' roots.

    A t interval on the mean's variance, `seed_variance` / `seeds` + `row_variance`, with Satterthwaite's degrees of
    freedom; the part of the rows, which are many, counts as known. It is never narrower than the t interval over the
    seeds alone: few seeds that happen to agree would raise the degrees of freedom too far.
    """
    over_seeds, total, df = _spread(seeds, seed_variance, row_variance)
    return max(_quantile(seeds - 1, level) * math.sqrt(over_seeds), _quantile(df, level) * math.sqrt(total))


def _spread(seeds: int, seed_variance: float, row_variance: float) -> tuple[float, float, float]:
    """Variance of a mean over seeds that comes from seeds, and in all; degrees of freedom (Satterthwaite)."""
    over_seeds = seed_variance / seeds
    total = over_seeds + row_variance
    ratio = total / over_seeds if over_seeds else math.inf
    return over_seeds, total, (seeds - 1) * ratio * ratio


def seeds_needed(points: float, seed_variance: float, row_variance: float) -> int | None:
    """The fewest seeds whose interval is no wider than ± `points`; None where the rows alone leave more than that."""
    if _quantile(math.inf) ** 2 * row_variance >= points**2:
        return None
    return _fewest(points, lambda n: half_width(n, seed_variance, row_variance))


def seeds_to_detect(points: float, seed_variance: float, row_variance: float, power: float = POWER) -> int | None:
    """The fewest seeds whose interval lies off 0 with probability `power` where the difference is ± `points`.

    Half the interval and the quantile of `power` of the same distribution have to fit into the difference, as for a
    paired t test (Cohen 1988). None where the rows alone leave more than that.
    """
    from scipy.special import stdtrit

    if (_quantile(math.inf) + stdtrit(math.inf, power)) ** 2 * row_variance >= points**2:
        return None

    def needed(n: int) -> float:
        over_seeds, total, df = _spread(n, seed_variance, row_variance)
        beyond = max(stdtrit(n - 1, power) * math.sqrt(over_seeds), stdtrit(df, power) * math.sqrt(total))
        return half_width(n, seed_variance, row_variance) + float(beyond)

    return _fewest(points, needed)


def _fewest(points: float, needed: Callable[[int], float]) -> int:
    """The fewest seeds, two or more, for which what is `needed`, which falls with their number, fits into `points`."""
    enough = 2
    while needed(enough) > points:
        enough *= 2
    between = range(max(2, enough // 2), enough + 1)
    return between[bisect_left(between, -points, key=lambda n: -needed(n))]


def variances(differences: Iterable[Difference]) -> tuple[float, float] | None:
    """The mean variance over seeds, weighted by degrees of freedom, and the largest of the rows' parts.

    Of the differences that have an interval; None if none has. A variance over few seeds says little by itself, so
    those of a table are taken together; a rows' part is well known, and the largest one bounds what seeds can do.
    """
    found = [
        (d.seeds - 1, d.seed_variance, d.row_variance)
        for d in differences
        if d.seed_variance is not None and d.row_variance is not None
    ]
    if not found:
        return None
    over_seeds = sum(df * variance for df, variance, _ in found) / sum(df for df, _, _ in found)
    return over_seeds, max(variance for _, _, variance in found)


def _quantile(df: float, level: float = LEVEL) -> float:
    """Of Student's t, two-sided at `level`; infinite degrees of freedom are the normal distribution's."""
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + level) / 2))


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


def binomial_standard_error(accuracy: float, rows: int) -> float:
    """Standard deviation of the accuracy on `rows` independent test rows: sqrt(a (1 - a) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / rows)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): family-wise error, valid under any dependence."""
    m = len(p_values)
    adjusted = [0.0] * m
    highest = 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation (sign-flip) test on the mean difference; exact up to 16 pairs."""
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=np.float64)
    if not values.any():
        return 1.0
    result = permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=2**16,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
