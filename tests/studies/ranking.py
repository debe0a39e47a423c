"""What a table's rankings rest on: how often intervals that are to hold together do, and those of an improvement.

    PYTHONPATH=tests python tests/studies/ranking.py [--draws 1000] [--random-seed 0]

The first part draws as `tests/studies/coverage.py` does, from the committed records, and counts the draws in which
every interval of a table holds its true difference: as they are printed, and with Bonferroni's level, by which rows are
called different. The second draws runs of two methods in scenarios with effects of the seed that both share and effects
of each method's own, and counts how often intervals hold the probability that one beats the other: the interval in use,
on runs of one seed, and the percentile bootstrap of Agarwal et al. (2021), stratified by scenario, on all pairs of
runs.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
from scipy.stats import norm
from studies.coverage import EFFECTS, SCENARIOS, SEEDS, observed

from fedbench.tables.roles import REFERENCES
from fedbench.tables.standing import Improvement
from fedbench.tables.statistics import LEVEL, Difference

GAPS = (0.0, 0.5, 1.5)
"""Mean difference of two methods, in deviations of a seed's own effect on their difference."""


def together(scenario: str, seeds: int, draws: int, random_seed: int = 0) -> tuple[float, float]:
    """Share of draws in which all intervals of the ranked methods hold: of `LEVEL` each, and of Bonferroni's level."""
    rng = np.random.default_rng(random_seed)
    methods, answers = observed(scenario)
    ranked = [i for i, name in enumerate(methods) if name not in REFERENCES]
    pairs = list(itertools.combinations(ranked, 2))
    _, had, rows = answers.shape
    means = answers.mean(axis=2, dtype=np.float64)
    # An effect of each method and seed of its own: a pair's differences then have the variance observed, on average.
    spread = math.sqrt(np.mean([(means[a] - means[b]).var(ddof=1) for a, b in pairs]) / 2)
    level, held = 1 - (1 - LEVEL) / len(pairs), np.zeros((draws, 2))
    for draw in range(draws):
        taken = answers[:, rng.integers(had, size=(seeds, rows)), rng.integers(rows, size=rows)].astype(np.float64)
        taken += spread * EFFECTS["normal"](rng, len(methods) * seeds).reshape(len(methods), seeds, 1)
        all_of, all_adjusted = True, True
        for a, b in pairs:
            found, truth = Difference.of("a", "b", taken[a] - taken[b]), 100 * (means[a] - means[b]).mean()
            for adjusted in (False, True):
                low, high = found.interval_of(level if adjusted else LEVEL) or (0.0, 0.0)
                if not low <= truth <= high:
                    all_of, all_adjusted = (all_of, False) if adjusted else (False, all_adjusted)
        held[draw] = all_of, all_adjusted
    return float(held[:, 0].mean()), float(held[:, 1].mean())


def improvement(seeds: int, scenarios: int, gap: float, draws: int, random_seed: int = 0) -> tuple[float, float]:
    """Share of draws in which the interval in use, and that of the stratified bootstrap, hold their true value.

    In scenario k of m the gap is `gap` * 2 k / (m - 1), so that scenarios differ; a seed's shared effect is as large as
    the methods' own.
    """
    rng = np.random.default_rng(random_seed)
    gaps = np.full(1, gap) if scenarios == 1 else gap * 2 * np.arange(scenarios) / (scenarios - 1)
    paired, free = norm.cdf(gaps).mean(), norm.cdf(gaps / math.sqrt(3)).mean()
    held = np.zeros((draws, 2))
    for draw in range(draws):
        own = rng.standard_normal((2, scenarios, seeds)) / math.sqrt(2)
        shared = rng.standard_normal((scenarios, seeds))
        a, b = own[0] + shared + gaps[:, None], own[1] + shared
        low, high = Improvement("a", "b", int((a > b).sum()), 0, a.size, scenarios).interval
        picks = rng.integers(seeds, size=(2, 500, scenarios, seeds))
        strata = np.arange(scenarios)[None, :, None]
        wins = a[strata, picks[0]][..., :, None] > b[strata, picks[1]][..., None, :]
        ends = np.quantile(wins.mean(axis=(1, 2, 3)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        held[draw] = low <= paired <= high, ends[0] <= free <= ends[1]
    return float(held[:, 0].mean()), float(held[:, 1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--random-seed", type=int, default=0)
    asked = parser.parse_args()
    print(f"All intervals of a table at once, in %, with {' / '.join(map(str, SEEDS))} seeds")
    for scenario in SCENARIOS:
        found = [together(scenario, n, asked.draws, asked.random_seed) for n in SEEDS]
        for name, i in (("each of 95%", 0), ("Bonferroni", 1)):
            print(f"| {scenario} | {name} | {' / '.join(f'{100 * each[i]:.1f}' for each in found)} |", flush=True)
    print("Probability of improvement, in %, of the same seeds")
    for scenarios, gap in itertools.product((1, 4), GAPS):
        found = [improvement(n, scenarios, gap, asked.draws, asked.random_seed) for n in SEEDS]
        for name, i in (("Clopper-Pearson, same seed", 0), ("stratified bootstrap, all pairs", 1)):
            cells = " / ".join(f"{100 * each[i]:.1f}" for each in found)
            print(f"| {scenarios} scenarios, gap {gap} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
