"""What a table ranks: letters, the Pareto front, probability of improvement, a baseline, and seeds for a difference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from _records import altered, make_record
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from studies.ranking import improvement, together

import fedbench
from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.tables.asked import Asked
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Section
from fedbench.tables.folder import compare_folder
from fedbench.tables.ranking import (
    adjusted_level,
    best,
    groups,
    improvements,
    ordered_pairs,
    standing_against,
    standings,
)
from fedbench.tables.render.forms import render
from fedbench.tables.render.ranking import group_notes, pareto_picture
from fedbench.tables.standing import Improvement, letters
from fedbench.tables.statistics import seeds_to_detect

ROWS = 400


def runs(method: str, *shares: float, **record: str) -> list[Record]:
    """A run a seed, each right on rows of its own choice, so that no row is right in all seeds."""
    rng = np.random.default_rng([*method.encode()])
    correct = [rng.permutation(ROWS) < round(share * ROWS) for share in shares]
    return [make_record(method, seed, correct=each, **record) for seed, each in enumerate(correct)]  # type: ignore[arg-type]


def section(*records: Sequence[Record], baseline: str = "") -> Section:
    (found,) = compare([run for each in records for run in each], baseline=baseline).sections
    return found


GOOD, SAME, BAD = (0.90, 0.902, 0.898, 0.90), (0.89, 0.905, 0.895, 0.90), (0.30, 0.302, 0.298, 0.30)


def test_letters_are_shared_by_those_that_cannot_be_told_apart() -> None:
    # Of a, b, c only a and c differ: b is in both groups.
    assert letters("abc", [("a", "c")]) == {"a": "a", "b": "ab", "c": "b"}
    assert letters("abc", []) == {"a": "a", "b": "a", "c": "a"}
    assert letters("abc", itertools.combinations("abc", 2)) == {"a": "a", "b": "b", "c": "c"}
    assert letters([], []) == {}
    # The example of two chains: 1 differs from 3 and 4, 2 from 4.
    assert letters("1234", [("1", "3"), ("1", "4"), ("4", "2")]) == {"1": "a", "2": "ab", "3": "bc", "4": "c"}


@given(n=st.integers(1, 7), chosen=st.data())
def test_two_names_share_a_letter_exactly_where_they_are_not_apart(n: int, chosen: st.DataObject) -> None:
    names = [f"m{i}" for i in range(n)]
    pairs = list(itertools.combinations(names, 2))
    apart = chosen.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    found = letters(names, [pair[::-1] for pair in apart])
    for a, b in pairs:
        assert bool({*found[a]} & {*found[b]}) == ((a, b) not in apart)
    assert all(found.values())


def test_rows_are_told_apart_by_intervals_that_hold_together() -> None:
    found = section(runs("fedpft", *GOOD), runs("fedot", *SAME), runs("fedprox", *BAD), runs("head-only", *BAD))
    assert adjusted_level(found) == pytest.approx(1 - 0.05 / 3)
    assert set(ordered_pairs(found)) == {("fedpft", "fedprox"), ("fedot", "fedprox")}
    assert groups(found) == {"fedpft": "a", "fedot": "a", "fedprox": "b"}, "head-only is a reference"
    assert best(found) is None
    alone = section(runs("fedpft", *GOOD), runs("fedprox", *BAD))
    assert best(alone) == "fedpft"


def test_a_difference_that_only_its_own_interval_supports_is_no_difference_among_many() -> None:
    found = section(*(runs(name, *GOOD) for name in ("fedot", "fedadam", "fedavgm", "fedyogi")), runs("fedpft", *GOOD))
    difference = found.differences[0]
    own, adjusted = difference.interval, difference.interval_of(adjusted_level(found) or 0)
    assert own is not None and adjusted is not None
    assert adjusted[0] < own[0] and own[1] < adjusted[1]
    assert adjusted[0] + adjusted[1] == pytest.approx(own[0] + own[1])


def test_one_seed_has_no_groups_and_that_is_said() -> None:
    found = section(runs("fedpft", 0.9), runs("fedot", 0.1))
    assert (groups(found), best(found), ordered_pairs(found)) == ({}, None, [])
    assert group_notes(found) == ["no groups: it takes two shared seeds to see how far seeds differ"]


def test_a_baseline_takes_the_place_of_all_pairs() -> None:
    records = runs("fedpft", *GOOD), runs("fedot", *SAME), runs("fedprox", *BAD), runs("head-only", *BAD)
    found = section(*records, baseline="fedot")
    assert [(d.a, d.b) for d in found.differences] == [("fedpft", "fedot"), ("fedprox", "fedot")]
    assert standing_against(found) == {"fedpft": "open", "fedprox": "below"}
    assert (groups(found), adjusted_level(found)) == ({}, pytest.approx(1 - 0.05 / 2))
    floor = section(*records, runs("fedavg-lora", *GOOD), baseline="head-only")
    assert [d.b for d in floor.differences] == ["head-only"] * 4
    assert floor.headroom is not None and floor.headroom.a == "fedavg-lora"
    with pytest.raises(FedbenchError, match="--baseline fedpt: no such method in these records; did you mean fedpft"):
        section(*records, baseline="fedpt")


def test_six_seeds_are_tested_against_a_baseline_with_fewer_corrections() -> None:
    six = [0.5 + i / 100 for i in range(6)]
    shifts = {"fedot": 0, "fedpft": 0.1, "fedprox": 0.2}
    records = [runs(name, *(share + shift for share in six)) for name, shift in shifts.items()]
    assert [d.p for d in section(*records).differences] == [pytest.approx(3 * 2 / 64)] * 3
    assert [d.p for d in section(*records, baseline="fedot").differences] == [pytest.approx(2 * 2 / 64)] * 2


def test_a_probability_of_improvement_by_hand() -> None:
    found = Improvement("a", "b", wins=3, ties=0, pairs=3, scenarios=1)
    assert found.probability == 1
    assert found.interval == (pytest.approx(0.025 ** (1 / 3)), 1.0)  # three of three are won in p³ = 2.5% of cases
    tied = Improvement("a", "b", wins=2, ties=1, pairs=4, scenarios=1)
    assert tied.probability == pytest.approx(2.5 / 4)
    low, high = stats.binomtest(2, 4).proportion_ci().low, stats.binomtest(3, 4).proportion_ci().high
    assert tied.interval == (pytest.approx(low), pytest.approx(high)), "the tie counts for neither"
    assert Improvement("a", "b", 0, 0, 2, 1).interval == (0.0, pytest.approx(1 - 0.025**0.5))


def test_runs_are_compared_within_scenario_and_seed() -> None:
    one = [make_record("fedpft", s, a) for s, a in enumerate((0.8, 0.6, 0.5))]
    one += [make_record("fedot", s, a) for s, a in enumerate((0.7, 0.6))]
    two = [make_record(m, 0, a, scenario="sst2-iid") for m, a in (("fedpft", 0.1), ("fedot", 0.2), ("fedprox", 0.1))]
    found = {(each.a, each.b): each for each in improvements(compare([*one, *two]).sections)}
    assert found["fedot", "fedpft"] == Improvement("fedot", "fedpft", wins=1, ties=1, pairs=3, scenarios=2)
    assert found["fedot", "fedprox"].pairs == 1
    sections = compare([*one, *two], baseline="fedot").sections
    assert {(each.a, each.b) for each in improvements(sections, "fedot")} == {("fedpft", "fedot"), ("fedprox", "fedot")}


def exact_power(n: int, sd: float) -> float:
    """Of the paired t test at 5% for a difference of 1."""
    shift, bound = math.sqrt(n) / sd, stats.t.ppf(0.975, n - 1)
    return float(stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift))


@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0, 4.0])
def test_seeds_for_a_difference_are_those_of_the_exact_power_but_for_one(sd: float) -> None:
    found = seeds_to_detect(1.0, sd**2, 0.0)
    assert found is not None
    exact = next(n for n in range(2, 1000) if exact_power(n, sd) >= 0.8)
    assert abs(found - exact) <= 1
    assert exact_power(found + 1, sd) >= 0.8


def test_test_rows_bound_what_seeds_can_do() -> None:
    quantiles = 1.959964 + 0.841621
    assert seeds_to_detect(1.0, 1.0, (1.001 / quantiles) ** 2) is None
    assert seeds_to_detect(1.0, 0.0, (0.999 / quantiles) ** 2) == 2
    assert (seeds_to_detect(1.0, 1.0, 0.05) or 0) > (seeds_to_detect(1.0, 1.0, 0.0) or 0)


def costs(records: Sequence[Record], up: int, held: int, exposed: float | None) -> list[Record]:
    shares = {"all": exposed, "without_embeddings": exposed}
    changes: dict[str, object] = {
        "communication.up": {"bytes": up, "by_kind": {"adapter": {"bytes": up}}},
        "compute.resident_parameters": held,
        "exposure": None if exposed is None else {"verbatim": shares, "within_1_percent": shares},
    }
    out = []
    for record in records:
        per_round: list[Mapping[str, int]] = record.to_json()["communication"]["per_round"]
        first = [{**e, "up": up if e["round"] == 0 else 0} for e in per_round]
        out.append(altered(record, changes | {"communication.per_round": first}))
    return out


def test_a_row_is_dominated_only_where_the_difference_is_supported() -> None:
    found, unknown = standings(
        section(
            costs(runs("fedpft", *GOOD), 1_000_000, 10_000_000, 0.5),
            costs(runs("fedprox", *BAD), 1_000_000, 10_000_000, 0.5),  # costs the same, and is worse
            costs(runs("fedot", *SAME), 2_000_000, 10_000_000, 0.5),  # costs more, and may be as good
            costs(runs("fedadam", *BAD), 1_000, 10_000_000, 0.5),  # is worse, and sends least
            costs(runs("flora", *GOOD), 1_000, 1_000, None),
        )
    )
    assert {each.row.label: (each.below, each.beside) for each in found} == {
        "fedpft": ((), ()),
        "fedprox": (("fedpft",), ("fedadam",)),
        "fedot": ((), ("fedpft",)),
        "fedadam": ((), ()),
    }
    assert unknown == ["flora"]


def test_the_front_is_printed_and_drawn(tmp_path: Path) -> None:
    for record in (*costs(runs("fedpft", *GOOD), 10**6, 10**7, 0.5), *costs(runs("fedprox", *BAD), 10**6, 10**7, 0.5)):
        save(record, tmp_path / "records")
    comparison = compare_folder(tmp_path, asked=Asked.of(pareto=True))
    text = render(comparison, "markdown")
    assert "dominated by fedpft" in text
    assert "| fedpft   |         90.0 |           63.5 |        40.0 |        50.0 |               front |" in text
    assert text == fedbench.make_table(tmp_path, pareto=True)
    for name in ("front.svg", "front.png"):
        pareto_picture(comparison.sections, tmp_path / name)
    drawn = (tmp_path / "front.svg").read_text()
    assert drawn.count('id="line2d_') > 6
    pareto_picture(comparison.sections, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn, "the same file each time"
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FedbenchError, match=r"--picture .*front\.pdf: name a file that ends in \.svg or \.png"):
        pareto_picture(comparison.sections, tmp_path / "front.pdf")
    with pytest.raises(FedbenchError, match="no scenario has rows"):
        pareto_picture([], tmp_path / "front.svg")
    with pytest.raises(FedbenchError, match="leave out --baseline"):
        compare_folder(tmp_path, asked=Asked.of(pareto=True), baseline="fedpft")


def test_ranks_are_shown_where_they_are_asked_for(tmp_path: Path) -> None:
    for record in (*runs("fedpft", *GOOD), *runs("fedot", *SAME), *runs("fedprox", *BAD)):
        save(record, tmp_path / "records")
    text = fedbench.make_table(tmp_path, rank=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [line[:3] for line in lines if line[0] in ("method", "fedpft", "fedprox")] == [
        ["method", "accuracy %", "group"], ["fedpft", "90.0 ± 0.2 (4)", "a"], ["fedprox", "30.0 ± 0.2 (4)", "b"]
    ]  # fmt: skip
    assert ["fedpft over fedprox", "100% (40 to 100)", "4 of 4", "1"] in lines
    assert "group: rows that share a letter cannot be told apart by 95% intervals that hold all 3 differences" in text
    assert "a difference of 1 point is seen with probability 0.8 with about" in text
    against = fedbench.make_table(tmp_path, rank=True, baseline="fedot")
    assert "against fedot" in against and "below" in against and "fedpft over fedprox" not in against
    assert "group" not in fedbench.make_table(tmp_path) and "over fedprox" not in fedbench.make_table(tmp_path)


def test_intervals_that_are_to_hold_together_do_and_those_of_an_improvement_cover() -> None:
    each, adjusted = together("sst2-iid", 6, 60)
    assert adjusted >= 0.88 > each
    mine, theirs = improvement(3, 1, 1.5, 300)
    assert mine >= 0.95 > 0.9 > theirs
