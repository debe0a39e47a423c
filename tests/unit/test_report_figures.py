"""The numbers behind each plot of a report, from records small enough to check by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from _records import altered, make_record

from fedbench.records.record import Record
from fedbench.report import figures
from fedbench.report.command import Origin
from fedbench.report.figures import FIGURES, Figures, counted, thinned
from fedbench.report.shown import Shown, excerpt


def shown(record: Record, label: str = "") -> Shown:
    who = record.identity
    return Shown(record, label or who.method, str(who.fm), "records/x.json", Origin((), "", ()))


def with_rounds(record: Record, scores: list[dict[str, Any]]) -> Record:
    """The record with these scores on the validation rows, of one round each."""
    rounds = [{"round": i, "cohort": [1], "arrived": [1], "refused": [], **each} for i, each in enumerate(scores)]
    return altered(record, {"rounds": rounds})


def test_accuracy_stands_beside_the_round_and_what_had_crossed_by_then() -> None:
    record = make_record(federation={"rounds": 3}, proxy=0.7)
    per_round = [{"round": 0, "up": 1_000_000, "down": 60_000_000}, {"round": 1, "up": 500_000, "down": 1_500_000},
                 {"round": 2, "up": 500_000, "down": 1_000_000}]  # fmt: skip
    scores = [{"plug_in_validation": 0.5, "proxy_validation": 0.25}, {}, {"plug_in_validation": 0.75}]
    record = with_rounds(altered(record, {"communication.per_round": per_round}), scores)
    assert figures.accuracy_by_round([shown(make_record(federation={"rounds": 0})), shown(record)]) == Figures(
        ("run", "model", "round", "mb", "accuracy"),
        [[1, "plug-in", 1, 61.0, 50.0], [1, "plug-in", 3, 64.5, 75.0], [1, "proxy", 1, 61.0, 25.0]],
    )


def test_gradient_error_begins_at_round_0_and_says_its_phase() -> None:
    points = [
        {"round": -1, "phase": "start", "zero_filled": {"error": 0.5}},
        {"round": 3, "phase": "round", "zero_filled": {"error": None}},
        {"round": 3, "phase": "after_alignment", "zero_filled": {"error": 0.25}},
    ]
    block = {"points": points, "start": 0.5, "mean": 0.375, "final": 0.25}
    record = altered(make_record(proxy=0.7), {"gradient_error": block})
    assert figures.gradient_by_round([shown(record)]).rows == [[0, 0, "start", 0.5], [0, 4, "after_alignment", 0.25]]
    assert figures.gradient_by_round([shown(make_record())]).rows == [], "clients that train the FM itself have none"


def test_layers_are_given_at_the_first_and_the_last_moment() -> None:
    def point(round: int, *errors: float | None) -> dict[str, Any]:
        layers = [{"layer": layer, "error": error} for layer, error in enumerate(errors)]
        return {"round": round, "zero_filled": {"error": 0.5}, "layers": layers}

    block = {"points": [point(-1, 0.1, 0.2), point(2, 9.0, 9.0), point(4, 0.3, None)], "start": 0.5, "mean": 0.5,
             "final": 0.5}  # fmt: skip
    record = altered(make_record(proxy=0.7), {"gradient_error": block})
    expected = [[0, "first", 0, 0.1], [0, "first", 1, 0.2], [0, "last", 0, 0.3]]
    assert figures.gradient_by_layer([shown(record)]).rows == expected
    once = altered(record, {"gradient_error": block | {"points": [point(-1, 0.1)]}})
    assert figures.gradient_by_layer([shown(once)]).rows == [[0, "first", 0, 0.1]]


def test_the_gap_in_points_stands_over_the_mean_gradient_error() -> None:
    found = figures.gap_by_error([shown(make_record(accuracy=0.8, proxy=0.75)), shown(make_record("fedavg-lora"))])
    ((place, error, gap),) = found.rows
    assert (place, error, gap) == (0, 0.75, pytest.approx(5.0))


def test_traffic_is_told_apart_by_direction_and_kind() -> None:
    assert figures.traffic_by_kind([shown(make_record())]).rows == [
        [0, "up", "adapter", 2.0],
        [0, "down", "adapter", 2.5],
        [0, "down", "sub_fm", 60.0],
    ]


def test_clients_are_counted_in_classes_of_two_points() -> None:
    # One client at 0.7, nine at 0.8.
    assert figures.client_accuracy([shown(make_record())]).rows == [[0, 70, 72, 1], [0, 80, 82, 9]]


def test_a_bound_belongs_to_the_class_above_it_and_100_per_cent_to_the_last() -> None:
    assert counted([0.0, 0.1, 0.29, 0.3, 0.7, 1.0], 10) == [1, 1, 1, 1, 0, 0, 0, 1, 0, 1]


def test_labels_are_given_once_for_all_runs_of_a_partition() -> None:
    runs = [shown(make_record(method, seed)) for method in ("fedpft", "fedot") for seed in (1, 0)]
    assert figures.labels_by_client(runs).rows == [[1, 0, 0, 5], [1, 0, 1, 5], [1, 1, 0, 10], [1, 1, 1, 10]]
    assert figures.labels_by_share(runs).rows == [], "two clients are shown one by one"


def test_a_partition_that_the_method_made_itself_is_not_the_scenarios() -> None:
    record = make_record("centralised-lora", planned=["split.kind", "federation.rounds"])
    assert figures.labels_by_client([shown(record)]).rows == []


def test_many_clients_are_counted_by_their_shares_of_each_class() -> None:
    # 100 clients have one row in four of class 0, 50 have nothing but class 1, and one has no rows.
    counts = [[1, 3]] * 100 + [[0, 2]] * 50 + [[0, 0]]
    record = altered(make_record(), {"partition.label_counts": counts, "partition.sizes": [sum(row) for row in counts]})
    assert figures.labels_by_client([shown(record)]).rows == []
    assert figures.labels_by_share([shown(record)]).rows == [
        [0, 0, 0, 10, 50], [0, 0, 20, 30, 100],
        [0, 1, 70, 80, 100], [0, 1, 90, 100, 50],
    ]  # fmt: skip


def test_the_course_of_distillation_is_given_by_layer_where_it_is_recorded() -> None:
    residuals = [{"layer": 2, "hidden": 0.2, "curve": [0.5, 0.25]}, {"layer": 3, "hidden": 0.1}]
    record = altered(make_record(), {"distillation": residuals})
    assert figures.distillation([shown(record)]).rows == [[0, 2, 1, 0.5], [0, 2, 2, 0.25]]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = thinned(range(1001))
    assert len(points) == figures.MOST_POINTS
    assert (points[0], points[-1]) == (0, 1000)
    assert {b - a for a, b in pairwise(points)} == {5, 6}
    assert thinned([3, 4]) == [3, 4]


def test_every_figure_begins_with_the_run_and_takes_a_failed_one() -> None:
    failed = shown(make_record(status="failed"))
    for name, read in FIGURES.items():
        assert read([failed]).columns[0] == "run", name


def test_an_excerpt_has_no_answers_by_row_and_says_what_it_leaves_out() -> None:
    record = altered(make_record(), {"partition.sizes": [10] * 30, "partition.label_counts": []})
    found = excerpt(record)
    assert "correct" not in found["accuracy"]["plug_in"]
    assert found["accuracy"]["plug_in"]["accuracy"] == 0.8
    assert found["partition"]["sizes"] == [10] * 24 + ["… 6 more in the file"]
    failed = make_record(status="failed")
    long = altered(failed, {"error.traceback": "x" * 5000})
    assert excerpt(long)["error"]["traceback"] == "x" * 4000 + "… 1,000 more characters in the file"
