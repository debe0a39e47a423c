"""Differences between methods: their intervals by hand, how often these hold the truth, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from _records import altered, make_record
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from studies.coverage import SCENARIOS, SEEDS, simulate

from fedbench.records.record import Record
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Section
from fedbench.tables.render.comments import comments
from fedbench.tables.statistics import Difference, half_width, holm, paired_test, seeds_needed, variances

T2, T1, NORMAL = 4.3026527, 12.7062047, 1.9599640
"""97.5% quantiles of Student's t with 2 and with 1 degrees of freedom, and of the normal distribution."""

OLD, USED = "bootstrap, rows jointly", "the same, at least t over seeds"

variance = st.floats(0, 100)


def answers(*by_seed: Sequence[int]) -> NDArray[np.float64]:
    """Differences of two methods' answers, a list of rows for each seed."""
    return np.array(by_seed, dtype=np.float64)


def right(*where: int, rows: int = 10) -> NDArray[np.bool_]:
    return np.isin(np.arange(rows), where)


def section(**by_method: Sequence[NDArray[np.bool_]]) -> Section:
    """A table of methods by what each answered rightly in seed 0, 1, ..."""
    records = [
        make_record(method.replace("_", "-"), seed, correct=correct)
        for method, runs in by_method.items()
        for seed, correct in enumerate(runs)
    ]
    (found,) = compare(records).sections
    return found


def test_an_interval_over_three_seeds_by_hand() -> None:
    # Each seed differs in a row of its own: 10, 20 and 30 points, and no row differs in two seeds.
    each = np.zeros((3, 10))
    each[0, 0] = each[1, 1:3] = each[2, 3:6] = 1
    found = Difference.of("a", "b", each)
    assert (found.mean, found.seeds) == (pytest.approx(20), 3)
    assert found.seed_variance == pytest.approx(100)  # (10² + 0 + 10²) / 2
    assert found.row_variance == 0  # the covariances are below 0
    assert found.interval == pytest.approx((20 - T2 * 10 / math.sqrt(3), 20 + T2 * 10 / math.sqrt(3)), rel=1e-7)


def test_rows_that_differ_in_every_seed_widen_an_interval_by_hand() -> None:
    # Both seeds differ in the same 60 of 400 rows: the seeds agree, and only the rows are in doubt.
    found = Difference.of("a", "b", answers(*2 * [[1] * 60 + [0] * 340]))
    assert found.mean == pytest.approx(15)
    assert found.seed_variance == 0
    assert found.row_variance == pytest.approx(100**2 * 0.15 * 0.85 / 399)
    half = NORMAL * 100 * math.sqrt(0.15 * 0.85 / 399)
    assert found.interval == pytest.approx((15 - half, 15 + half), rel=1e-7)


def test_what_rows_have_in_common_is_their_covariance_over_seeds() -> None:
    # Seeds 0 and 1 share a row, covariance (.1 - .1 * .2) * 10 / 9; each of the two has none in common with seed 2.
    each = np.zeros((3, 10))
    each[0, 0] = each[1, 0:2] = each[2, 5] = 1
    shared = [(0.1 - 0.02) * 10 / 9, -0.01 * 10 / 9, -0.02 * 10 / 9]
    found = Difference.of("a", "b", each)
    assert found.row_variance == pytest.approx(100**2 * sum(shared) / 3 / 10)


def test_degrees_of_freedom_are_satterthwaites() -> None:
    # Seeds 1, rows 8: (3 - 1) * (9 / 1)² = 162 degrees of freedom, of quantile 1.9747158.
    assert half_width(3, 3.0, 8.0) == pytest.approx(1.9747158 * 3, rel=1e-7)
    # A third of it: 2 * (4 / 3)² = 3.56 would give 2.92 * 2, less than the seeds alone, which are never undercut.
    assert half_width(3, 9.0, 1.0) == pytest.approx(T2 * math.sqrt(3), rel=1e-7)
    assert half_width(3, 9.0, 0.0) == pytest.approx(T2 * math.sqrt(3), rel=1e-7)


@given(n=st.integers(2, 50), seeds=variance, rows=variance, more=st.floats(0, 10))
def test_neither_rows_nor_few_seeds_make_an_interval_narrower(n: int, seeds: float, rows: float, more: float) -> None:
    half, slack = half_width(n, seeds, rows), 1 + 1e-7
    assert half_width(n, seeds, rows + more) * slack >= half
    assert half_width(n, seeds + more, rows) * slack >= half
    assert half_width(n + 1, seeds, rows) <= half * slack
    assert half * slack >= NORMAL * math.sqrt(rows)


@given(seeds=variance, rows=st.floats(0, 0.25))
def test_the_fewest_seeds_for_a_point_are_enough_and_one_less_is_not(seeds: float, rows: float) -> None:
    assume(rows * NORMAL**2 < 0.98)
    enough = seeds_needed(1.0, seeds, rows)
    assert enough is not None
    assert half_width(enough, seeds, rows) <= 1.0
    assert enough == 2 or half_width(enough - 1, seeds, rows) > 1.0


def test_seeds_for_a_point_by_hand() -> None:
    # 1 point over seeds: t / sqrt(n) is 1.05 for 6 seeds (t 2.571) and 0.92 for 7 (t 2.447).
    assert seeds_needed(1.0, 1.0, 0.0) == 7
    assert seeds_needed(1.0, 0.0, 0.0) == 2
    # The rows alone leave 1.96 * 0.6 points.
    assert seeds_needed(1.0, 0.0, 0.36) is None
    assert seeds_needed(2.0, 0.0, 1.5) is None, "1.96 * 1.22 points"
    assert seeds_needed(1.0, 0.0, 0.258) == 2, "1.96 * 0.508 points"


def test_answers_in_half_the_width_give_the_same_numbers() -> None:
    each = np.random.default_rng(0).integers(-1, 2, size=(3, 1001))
    wide, narrow = (Difference.of("a", "b", each.astype(dtype)) for dtype in (np.float64, np.float32))
    assert narrow == wide, "an average in single precision is off in the seventh digit"


def test_an_adjusted_p_is_at_most_1() -> None:
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_a_difference_in_words() -> None:
    tested = Difference("fedpft", "fedot", 1.5, 6, 0.0, 0.25, p=0.03)
    assert str(tested) == "fedpft minus fedot: +1.5 points, 95% interval +0.5 to +2.5 (6 seeds), p 0.030"
    assert str(replace(tested, p=None)) == "fedpft minus fedot: +1.5 points, 95% interval +0.5 to +2.5 (6 seeds)"
    alone = replace(tested, seeds=1, seed_variance=None, row_variance=None, p=None)
    assert str(alone) == "fedpft minus fedot: +1.5 points (1 seed, no interval)"


def test_a_sampled_test_is_the_same_each_time() -> None:
    # With 17 pairs there are too many signs to try each: 65,536 of them are drawn.
    values = [0.1 * i - 0.4 for i in range(17)]
    assert paired_test(values) == paired_test(values)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_difference_has_no_order_and_no_direction(seeds: int, rows: int, random: int) -> None:
    rng = np.random.default_rng(random)
    each = rng.integers(-1, 2, size=(seeds, rows)).astype(np.float64)
    found, turned = Difference.of("a", "b", each), Difference.of("b", "a", -each)
    mixed = Difference.of("a", "b", each[rng.permutation(seeds)][:, rng.permutation(rows)])
    assert (found.interval is None) == (seeds == 1 or rows == 1)
    if found.interval is not None and turned.interval is not None and mixed.interval is not None:
        assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))
        assert mixed.interval == pytest.approx(found.interval)


def test_one_seed_gives_no_interval_and_that_is_said() -> None:
    lines = comments(section(fedpft=[right(0, 1)], fedot=[right(0)], fedavg_lora=[right(1)], head_only=[right(2)]))
    assert lines[0] == (
        "headroom, fedavg-lora minus head-only: 0.0 points (1 seed, no interval); "
        "with one seed it is open whether this scenario can rank methods"
    )
    assert "fedot minus fedpft: −10.0 points (1 seed, no interval)" in lines
    assert "no interval: it takes two shared seeds to see how far seeds differ" in lines
    assert not any("95%" in line or "±1 point" in line for line in lines)


def test_an_interval_over_two_seeds_by_hand() -> None:
    lines = comments(section(fedpft=[right(0, 1, 2), right(3, 4, 5, 6)], fedot=[right(), right()]))
    # 30 and 40 points: deviation 7.07, so 35 ± 12.7 * 5.
    assert f"fedot minus fedpft: −35.0 points, 95% interval −{35 + T1 * 5:.1f} to +{T1 * 5 - 35:.1f} (2 seeds)" in lines


@pytest.mark.parametrize("seeds", [1, 2, 3, 6])
def test_an_interval_depends_on_its_own_pair_alone(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    names = ("fedot", "fedpft", "fedpft_b")
    runs = {name: [rng.random(50) < rng.uniform(0.5, 0.9) for _ in range(seeds)] for name in names}
    among = section(**runs).differences
    (alone,) = section(fedot=runs["fedot"], fedpft=runs["fedpft"]).differences
    (found,) = [d for d in among if (d.a, d.b) == ("fedot", "fedpft")]
    assert len(among) == 3
    assert (found.mean, found.interval, found.seeds) == (alone.mean, alone.interval, alone.seeds)


def test_seeds_that_only_one_of_a_pair_has_do_not_count() -> None:
    (found,) = section(fedpft=[right(0), right(1), right()], fedot=[right(), right()]).differences
    assert (found.mean, found.seeds, found.seed_variance) == (-10.0, 2, 0.0)


@pytest.mark.parametrize(
    ("ceiling", "verdict"),
    [
        ([right(*range(9)), right(*range(9))], ""),
        ([right(0), right(0, 1, 2)], "; the interval holds 0: this scenario cannot rank methods"),
        ([right(), right()], "; the interval lies below 0: this scenario cannot rank methods"),
    ],
)
def test_what_a_headroom_allows_is_said(ceiling: list[NDArray[np.bool_]], verdict: str) -> None:
    floor = [right(0, 1, 2), right(0, 1, 2)]
    rows = 50
    runs = [[np.resize(run, rows * 10) for run in each] for each in (ceiling, floor)]
    line = comments(section(fedavg_lora=runs[0], head_only=runs[1]))[0]
    assert line.startswith("headroom, fedavg-lora minus head-only: ")
    assert line.endswith(f"(2 seeds){verdict}")


def test_how_many_seeds_a_point_needs_is_said() -> None:
    rng = np.random.default_rng(0)
    # Seeds are 0, 1 and 2 points apart in rows of their own: variance 1, and no part of the rows; 7 seeds as by hand.
    none = np.zeros(1000, dtype=bool)
    own = [right(*range(100 * s, 100 * s + 10 * s), rows=1000) for s in range(3)]
    assert variances(section(fedpft=own, fedot=[none] * 3).differences) == pytest.approx((1.0, 0.0))
    lines = comments(section(fedpft=own, fedot=[none] * 3))
    assert "bringing each interval to ±1 point takes about 7 seeds, by their mean variance over seeds" in lines
    # The same 100 random rows of 400 in both seeds: 1.96 * 100 * sqrt(.25 * .75 / 399) points from the rows alone.
    same = right(*rng.permutation(400)[:100].tolist(), rows=400)
    lines = comments(section(fedpft=[same] * 2, fedot=[np.zeros(400, dtype=bool)] * 2))
    assert "no number of seeds brings each interval to ±1 point: the test rows alone leave up to ±4.2 points" in lines
    assert "intervals: for seeds and test rows at large; t over shared seeds, widened by the test rows' part" in lines


def test_the_mean_variance_is_weighted_and_the_rows_part_is_the_largest() -> None:
    one, two = Difference("a", "b", 0.0, 2, 4.0, 0.5), Difference("a", "c", 0.0, 4, 8.0, 0.1)
    assert variances([one, two, Difference("b", "c", 1.0, 1, None, None)]) == (7.0, 0.5)  # (1 * 4 + 3 * 8) / 4
    for over_seeds, rows in ((None, None), (1.0, None), (None, 1.0)):
        assert variances([Difference("b", "c", 1.0, 1, over_seeds, rows)]) is None


def proxy(method: str, rounds: int = 12, residuals: bool = True, **settings: int) -> Record:
    record = make_record(method, proxy=0.7, settings=dict(settings), federation={"rounds": rounds})
    return altered(record, {"distillation": [{"layer": 1}] if residuals else []})


def test_unequal_distillation_is_said() -> None:
    before = {"distil_steps": 100, "distil_batch": 32}
    aligned = proxy("fedpft", **before, t=4, align_steps=20)
    (found,) = compare([proxy("fedot", **before), aligned]).sections
    # Aligned after rounds 4 and 8; after the last one, round 12, nobody trains any more.
    assert (
        "budgets of the proxy methods differ: public rows distilled on, alignments included: fedot 3,200, fedpft 4,480"
        in found.notes
    )
    never = proxy("fedpft", **before, t=0, align_steps=20)
    late = proxy("fedpft", **before, t=12, align_steps=20)
    silent = proxy("fedpft", **before, t=4, align_steps=20, residuals=False)
    for other in (never, late, silent, proxy("fedpft", lr=1)):
        (found,) = compare([proxy("fedot", **before), other]).sections
        assert not [note for note in found.notes if "distilled" in note]


def test_the_interval_in_use_holds_the_truth_as_often_as_it_says_and_the_old_bootstrap_does_not() -> None:
    found = simulate("agnews-noniid", 3, 150, [OLD, USED])
    assert found[OLD].mean < 0.82
    assert 0.93 <= found[USED].mean <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_coverage_is_in_its_band(scenario: str, seeds: int) -> None:
    for effects in ("normal", "heavy-tailed"):
        found = simulate(scenario, seeds, 500, [USED], effects)[USED]
        assert 0.93 <= found.mean <= 0.97, effects
        assert min(found.by_pair) >= 0.90, effects
