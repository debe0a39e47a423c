"""Statistics of runs: mean and deviation over seeds, paired differences with intervals, tests.

Seeds are paired: one seed is one partition, one series of cohorts and one initialisation for all methods.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbench.formats import p_value, seeds_text, signed

SEEDS_FOR_TEST = 6
"""With fewer paired seeds no exact two-sided test can pass 0.05 once Holm has been applied to anything."""

RESAMPLES = 2000
LEVEL = 0.95


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

    `low` to `high` is the bootstrap interval; `p` is the paired test's, after Holm, where there were seeds enough.
    """

    a: str
    b: str
    mean: float
    low: float
    high: float
    seeds: int
    p: float | None = None

    def __str__(self) -> str:
        test = "" if self.p is None else f", p {p_value(self.p)}"
        return (
            f"{self.a} minus {self.b}: {signed(self.mean)} points, {LEVEL:.0%} interval {signed(self.low)} to "
            f"{signed(self.high)} ({seeds_text(self.seeds)}){test}"
        )


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


def bootstrap(
    correct: Mapping[str, Mapping[int, NDArray[np.bool_]]], pairs: Sequence[tuple[str, str]], resamples: int = RESAMPLES
) -> list[Difference]:
    """Difference in accuracy of each pair, with a percentile interval over shared seeds and shared test rows.

    `correct[method][seed]` says for each test row [n] whether it was answered rightly. In every resample the rows are
    drawn once for all runs, because all runs face the same rows, and so are the seeds that both of a pair have; with a
    single seed only the rows vary. An interval depends on the runs of its pair alone: not on other methods in a table.
    """
    runs = [(method, seed) for method, seeds in correct.items() for seed in sorted(seeds)]
    if not runs:
        return []
    answers = np.stack([correct[method][seed] for method, seed in runs], axis=1).astype(np.float32)  # [n, runs]
    rows = len(answers)
    rng = np.random.default_rng(0)
    scores = np.empty((resamples, len(runs)))
    chunk = max(1, 4_000_000 // rows)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        weights = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float32)
        scores[start : start + size] = weights @ answers / rows
    place = {run: index for index, run in enumerate(runs)}
    out = []
    for a, b in pairs:
        shared = sorted(correct[a].keys() & correct[b].keys())
        mine, theirs = [place[a, s] for s in shared], [place[b, s] for s in shared]
        each = scores[:, mine] - scores[:, theirs]  # [resamples, seeds]
        means = np.take_along_axis(each, _seeds_drawn(len(shared), resamples), axis=1).mean(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        observed = float((answers[:, mine].mean(axis=0) - answers[:, theirs].mean(axis=0)).mean())
        out.append(Difference(a, b, 100 * observed, 100 * float(low), 100 * float(high), len(shared)))
    return out


def _seeds_drawn(seeds: int, resamples: int) -> NDArray[np.int64]:
    """Which of so many seeds each resample has, [resamples, seeds].

    Few seeds have few resamples of their own (27 for three), and an interval's end can lie at the edge of one. So all
    of them are taken in turn where that is possible, which leaves nothing to the draw.
    """
    if seeds**seeds <= resamples:
        every = np.array(list(itertools.product(range(seeds), repeat=seeds)), dtype=np.int64)
        return every[np.arange(resamples) % len(every)]
    return np.random.default_rng(seeds).integers(seeds, size=(resamples, seeds))
