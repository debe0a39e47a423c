"""How often 95% intervals of a difference hold the true one: a simulation on the variances of the committed records.

    python tests/studies/coverage.py [--draws 2000] [--random-seed 0]

Truth is built from the records of a scenario: every pair of methods that a table compares, in three seeds. A draw takes
test rows with replacement, the same for all methods and seeds; for each seed and row it takes all methods' answers from
one of the observed seeds at random, so that answers stay correlated between methods and between seeds. To a pair's
differences it adds an effect of each seed, with the variance over seeds that is observed beyond what the answers bring
along. What is estimated is the difference over all seeds and rows: that of the records, with no effect added. Effects
are normal; heavy-tailed (Student's t with 3 degrees of freedom); or skewed (exponential: one seed in a few is far off).

Coverage is a mean over the pairs; its standard error is that over draws, since the pairs of a draw share their rows.
Bootstraps draw rows through the normal approximation of their means, which 872 rows and more allow.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedbench.records.store import load_all
from fedbench.records.text import unpack_correct
from fedbench.tables.roles import CEILING, FLOOR, REFERENCES
from fedbench.tables.statistics import LEVEL, Difference, half_width

RECORDS = Path(__file__).parents[2] / "results" / "records"
SCENARIOS = ("agnews-noniid", "sst2-noniid", "sst2-iid")
SEEDS = (3, 6, 10)
RESAMPLES = 500

Array = NDArray[np.float64]
Interval = Callable[[Array, np.random.Generator], tuple[float, float]]
"""From the differences of a pair, [seeds, rows], to the ends of an interval."""


def _about(mean: float, half: float) -> tuple[float, float]:
    return mean - half, mean + half


def of_the_tables(each: Array, rng: np.random.Generator) -> tuple[float, float]:
    """What tables print."""
    interval = Difference.of("a", "b", each).interval
    assert interval is not None
    return interval[0] / 100, interval[1] / 100


def t_over_seeds(each: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Student's t on the seeds' differences; the test rows are not part of it."""
    seeds = each.mean(axis=1)
    return _about(seeds.mean(), half_width(len(seeds), seeds.var(ddof=1), 0.0))


def satterthwaite(each: Array, rng: np.random.Generator) -> tuple[float, float]:
    """t on the variance of seeds and rows, with Satterthwaite's degrees of freedom and no lower bound."""
    from scipy.special import stdtrit

    found = Difference.of("a", "b", each)
    assert found.seed_variance is not None and found.row_variance is not None
    over_seeds = found.seed_variance / found.seeds
    total = over_seeds + found.row_variance
    ratio = total / over_seeds if over_seeds else math.inf
    quantile = float(stdtrit((found.seeds - 1) * ratio * ratio, (1 + LEVEL) / 2))
    return _about(found.mean / 100, quantile * math.sqrt(total) / 100)


def _percentiles(means: Array) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(each: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles where seeds and rows are resampled, rows jointly for all seeds."""
    seeds, rows = each.shape
    values, vectors = np.linalg.eigh(np.cov(each) / rows)
    noise = rng.standard_normal((RESAMPLES, seeds)) @ (vectors * np.sqrt(values.clip(0))).T
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds))
    return _percentiles(np.take_along_axis(each.mean(axis=1) + noise, drawn, axis=1).mean(axis=1))


def hierarchical_bootstrap(each: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles where seeds are resampled, and in each seed that was drawn its rows by themselves."""
    seeds, rows = each.shape
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds))
    noise = rng.standard_normal((RESAMPLES, seeds)) * (each.std(axis=1, ddof=1) / math.sqrt(rows))[drawn]
    return _percentiles((each.mean(axis=1)[drawn] + noise).mean(axis=1))


INTERVALS: dict[str, Interval] = {
    "bootstrap, rows jointly": bootstrap,
    "bootstrap, rows in seeds": hierarchical_bootstrap,
    "t over seeds": t_over_seeds,
    "t over seeds and rows": satterthwaite,
    "the same, at least t over seeds": of_the_tables,
}

EFFECTS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy-tailed": lambda rng, n: rng.standard_t(3, n) / math.sqrt(3),
    "skewed": lambda rng, n: 1 - rng.standard_exponential(n),
}
"""Effects of n seeds, of mean 0 and variance 1."""


@dataclass(frozen=True)
class Coverage:
    """Share of intervals that hold the truth: over all pairs with its standard error, and of each pair."""

    mean: float
    error: float
    by_pair: tuple[float, ...]


@cache
def observed(scenario: str) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Methods that a table compares, and their answers as 0 or 1, [methods, seeds, rows]."""
    answers: dict[str, dict[int, NDArray[np.bool_]]] = {}
    for record in load_all(RECORDS):
        score, who = record.accuracy.plug_in, record.identity
        if who.scenario == scenario and (who.method not in REFERENCES or who.method == FLOOR):
            correct = unpack_correct(score.correct, score.rows)
            answers.setdefault(who.method, {})[who.seed] = correct
    methods = tuple(sorted(answers))
    stacked = np.stack([[answers[m][s] for s in sorted(answers[m])] for m in methods])
    return methods, stacked.astype(np.float32)


def simulate(
    scenario: str,
    seeds: int,
    draws: int,
    intervals: Sequence[str] = tuple(INTERVALS),
    effects: str = "normal",
    random_seed: int = 0,
) -> dict[str, Coverage]:
    """Coverage of each of `intervals` in `draws` draws of so many seeds."""
    rng = np.random.default_rng(random_seed)
    methods, answers = observed(scenario)
    place = {name: index for index, name in enumerate(methods)}
    ranked = [name for name in methods if name not in REFERENCES]
    pairs = [(place[CEILING], place[FLOOR])] + [(place[a], place[b]) for a, b in itertools.combinations(ranked, 2)]
    _, had, rows = answers.shape
    each = [answers[a] - answers[b] for a, b in pairs]
    truth = [float(d.mean(dtype=np.float64)) for d in each]
    # Drawing a row's answers from the seeds at random brings along the variance that they have within rows.
    spread = [math.sqrt(max(0.0, d.mean(axis=1).var(ddof=1) - d.var(axis=0).mean() / rows)) for d in each]
    held = np.zeros((len(intervals), draws, len(pairs)))
    for draw in range(draws):
        taken = answers[:, rng.integers(had, size=(seeds, rows)), rng.integers(rows, size=rows)]
        for p, (a, b) in enumerate(pairs):
            found = (taken[a] - taken[b]).astype(np.float64)
            found += spread[p] * EFFECTS[effects](rng, seeds)[:, None]
            for i, name in enumerate(intervals):
                low, high = INTERVALS[name](found, rng)
                held[i, draw, p] = low <= truth[p] <= high
    return {
        name: Coverage(
            float(held[i].mean()),
            float(held[i].mean(axis=1).std(ddof=1) / math.sqrt(draws)),
            tuple(held[i].mean(axis=0).tolist()),
        )
        for i, name in enumerate(intervals)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--random-seed", type=int, default=0)
    asked = parser.parse_args()
    used = list(INTERVALS)[-1]
    cases = [("normal", list(INTERVALS)), ("heavy-tailed", [used]), ("skewed", [used])]
    print(f"| {LEVEL:.0%} interval; effects of seeds | {' | '.join(SCENARIOS)} |")
    print(f"|:--|{'--:|' * len(SCENARIOS)}")
    errors, by_pair = [], []
    for effects, names in cases:
        found = {
            (scenario, n): simulate(scenario, n, asked.draws, names, effects, asked.random_seed)
            for scenario in SCENARIOS
            for n in SEEDS
        }
        for name in names:
            cells = [[found[scenario, n][name] for n in SEEDS] for scenario in SCENARIOS]
            texts = (" / ".join(f"{100 * c.mean:.1f}" for c in cell) for cell in cells)
            print(f"| {name}; {effects} | {' | '.join(texts)} |", flush=True)
            errors += [c.error for cell in cells for c in cell]
            if (name, effects) == (used, "normal"):
                by_pair = [share for cell in cells for c in cell for share in c.by_pair]
    print(f"\nWith {' / '.join(map(str, SEEDS))} seeds. Standard error of a figure: at most {100 * max(errors):.1f}.")
    print(f"By pair, '{used}' with normal effects: {100 * min(by_pair):.1f} to {100 * max(by_pair):.1f}.")


if __name__ == "__main__":
    main()
