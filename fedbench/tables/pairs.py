"""Headroom and differences between methods, from what each answered rightly."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedbench.records.text import unpack_correct
from fedbench.tables.comparison import Section
from fedbench.tables.roles import CEILING, FLOOR, REFERENCES
from fedbench.tables.statistics import SEEDS_FOR_TEST, Difference, holm, paired_test


def add_differences(section: Section, baseline: str = "") -> None:
    """Headroom and the differences between methods, among comparable rows with per-row correctness.

    With a `baseline`, a method or the label of a row, the differences are those of each other row from it.
    """
    rows = {row.label: row for row in section.rows if row.scored and not row.flag}
    correct: dict[str, dict[int, NDArray[np.bool_]]] = {}
    sizes: dict[int, int] = defaultdict(int)
    for row in rows.values():
        for score in row.scores.values():
            sizes[score.rows] += 1
    usual = max(sizes, key=lambda size: sizes[size]) if sizes else 0
    for label, row in rows.items():
        correct[label] = {
            seed: unpack_correct(score.correct, score.rows)
            for seed, score in row.scores.items()
            if score.correct and score.rows == usual
        }

    def paired(a: str, b: str) -> bool:
        return bool(correct[a].keys() & correct[b].keys())

    first = {row.method: label for label, row in reversed(rows.items())}
    pairs = []
    if CEILING in first and FLOOR in first and paired(first[CEILING], first[FLOOR]):
        pairs.append((first[CEILING], first[FLOOR]))
    against = next((label for label, row in rows.items() if baseline in (label, row.name, row.method)), "")
    ranked = [label for label, row in rows.items() if row.method not in REFERENCES]
    if baseline:
        section.baseline = against
        wanted = [(label, against) for label in ranked if against and label != against]
    else:
        wanted = list(itertools.combinations(ranked, 2))
    pairs += [(a, b) for a, b in wanted if paired(a, b)]
    found = [_difference(a, b, correct[a], correct[b]) for a, b in pairs]
    if pairs and pairs[0] == (first.get(CEILING), first.get(FLOOR)):
        section.headroom = found.pop(0)
    tested = [i for i, difference in enumerate(found) if difference.seeds >= SEEDS_FOR_TEST]
    raw = []
    for i in tested:
        a, b = correct[found[i].a], correct[found[i].b]
        raw.append(paired_test([float(a[s].mean() - b[s].mean()) for s in sorted(a.keys() & b.keys())]))
    for i, p in zip(tested, holm(raw), strict=True):
        found[i] = replace(found[i], p=p)
    section.differences = found


def _difference(
    a: str, b: str, mine: Mapping[int, NDArray[np.bool_]], theirs: Mapping[int, NDArray[np.bool_]]
) -> Difference:
    """Of two methods by what each answered rightly in a seed [rows]: of this pair and its shared seeds alone."""
    shared = sorted(mine.keys() & theirs.keys())
    return Difference.of(a, b, np.stack([mine[s].astype(np.float64) - theirs[s] for s in shared]))
