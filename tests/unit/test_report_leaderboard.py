"""The leaderboard of a report: what is best, what it is beside the highest, the front, and the command of each run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from _records import altered, make_record

from fedbench.records.record import Record
from fedbench.records.store import load_all
from fedbench.registry import Registry
from fedbench.report.command import Origins
from fedbench.report.leaderboard import Line, columns_of, front, leaderboard, standing
from fedbench.report.shown import shown_runs
from fedbench.scenario.load import load_scenario
from fedbench.scenario.settings import parse_value
from fedbench.scenario.tables import flatten
from fedbench.tables.compare import compare
from fedbench.tables.ranking import best

COMMITTED = load_all(Path(__file__).parents[2] / "results" / "records")


def answers(share: float, seed: int, rows: int = 400) -> np.ndarray:
    """As many right answers, the first ones, but for one row more or less by seed."""
    return np.arange(rows) < round(share * rows) + seed


def runs(**shares: float) -> list[Record]:
    """Three seeds of each method."""
    return [
        make_record(name.replace("_", "-"), seed, correct=answers(share, seed), proxy=0.5)
        for name, share in shares.items()
        for seed in range(3)
    ]


def lines_of(records: Sequence[Record]) -> dict[str, Line]:
    comparison = compare(records)
    return {line.label: line for line in leaderboard(comparison, shown_runs(records, comparison))}


def test_a_method_is_best_where_every_interval_lies_below_it() -> None:
    records = runs(fedpft=0.9, fedot=0.6, fedavg_lora=0.7)
    found = lines_of(records)
    assert {label for label, line in found.items() if line.best} == {"fedpft"}
    assert found["fedpft"].behind.text == "highest"
    assert found["fedot"].behind.value == pytest.approx(-30.0)
    assert found["fedot"].behind.text.startswith("−30.0 [−3")
    assert found["fedot"].behind.text.endswith("] (3)")
    assert found["fedpft"].group not in ("–", found["fedot"].group)
    assert "fedpft is best" in standing(compare(records).sections[0])


def test_nothing_is_best_where_an_interval_holds_0() -> None:
    records = runs(fedpft=0.9, fedot=0.6)
    # As accurate but for a point, on other rows: over rows at large it might be the other way round.
    near = [
        make_record("fedpft-b", seed, correct=answers(0.89, seed)[::-1].copy(), proxy=0.5) for seed in range(3)
    ]  # fmt: skip
    assert best(compare(records).sections[0]) == "fedpft"
    section = compare(records + near).sections[0]
    assert best(section) is None
    assert standing(section) == "None is marked as best: fedpft is highest, but not clearly above fedpft-b."
    assert not any(line.best for line in lines_of(records + near).values())


def test_one_seed_makes_nothing_best() -> None:
    records = [record for record in runs(fedpft=0.9, fedot=0.3) if record.identity.seed == 0]
    assert best(compare(records).sections[0]) is None
    assert lines_of(records)["fedot"].behind.text == "−60.0 (1 seed, no interval)"


def test_one_method_alone_is_not_best() -> None:
    section = compare(runs(fedpft=0.9)).sections[0]
    assert best(section) is None
    assert standing(section) == "fedpft has no other method to be compared with."


def test_references_and_lines_that_cannot_be_compared_are_never_best() -> None:
    records = runs(head_only=0.99, fedpft=0.9, fedot=0.6)
    records += [
        make_record("fedpft-b", seed, correct=answers(0.95, seed), data_hash="e" * 64, proxy=0.5) for seed in range(3)
    ]
    found = lines_of(records)
    assert found["fedpft"].best
    assert not found["head-only"].best
    assert found["head-only"].behind.text == "–"
    assert found["fedpft-b"].flag
    assert not found["fedpft-b"].best


def test_a_line_has_means_over_its_seeds_and_names_its_records() -> None:
    records = runs(fedpft=0.9)
    line = lines_of(records)["fedpft"]
    # 360, 361 and 362 of 400 rows: a mean of 90.25 and a deviation of 0.25 points.
    assert (line.accuracy.text, line.accuracy.value) == ("90.2 ± 0.2 (3)", pytest.approx(90.25))
    assert line.runs == tuple((record.key[:12], record.identity.seed) for record in records)
    by_title = dict(zip(("proxy", "gap", "personal", "up", "down", "setup"), line.cells, strict=False))
    assert "personal %" not in [column.title for column in columns_of(records)], "nobody has a model of their own"
    assert by_title["proxy"].text == "50.0"
    assert by_title["gap"].value == pytest.approx(40.25)
    assert (by_title["up"].text, by_title["down"].text, by_title["setup"].text) == ("2.00", "2.50", "60.0")


def test_a_method_that_only_failed_has_a_line_and_one_that_never_ran_has_none() -> None:
    records = [*runs(fedpft=0.9), make_record("fedot", status="failed"), make_record("x", scenario="other")]
    comparison = compare(records)
    found = [(line.scenario, line.label) for line in leaderboard(comparison, shown_runs(records, comparison))]
    assert found == [("agnews-noniid", "fedot"), ("agnews-noniid", "fedpft"), ("other", "x")]


def test_costs_stand_beside_accuracy_and_what_is_dominated_is_said() -> None:
    records = runs(fedpft=0.9, fedot=0.6)
    comparison = compare(records)
    lines = leaderboard(comparison, shown_runs(records, comparison))
    found = {lines[row[0]].label: row[1:] for row in front(lines, comparison).rows}
    # Both cost the same: 2 + 62.5 MB, 16.4 million parameters of 4 bytes, 70% of the weights.
    costs = [64.5, 65.6, pytest.approx(70.0)]
    assert found["fedpft"] == [pytest.approx(90.25), pytest.approx(0.25), 3, *costs, "front"]
    assert found["fedot"] == [pytest.approx(60.25), pytest.approx(0.25), 3, *costs, "dominated"]


@pytest.mark.parametrize("record", COMMITTED[::7], ids=lambda r: f"{r.identity.scenario}-{r.key[:6]}")
def test_the_command_of_a_committed_record_asks_for_its_settings(record: Record) -> None:
    origin = Origins().of(record)
    words = shlex.split(origin.command)
    assert words[:2] == ["fedbench", "run"]
    options = list(zip(words[2::2], words[3::2], strict=True))
    given = {name: value for name, value in options if name != "--set"}
    assert (given["--method"], given["--seed"]) == (record.identity.method, str(record.identity.seed))
    settings = dict(value.split("=", 1) for name, value in options if name == "--set")
    mine = {name: value for name, value in settings.items() if name in record.method.settings}
    path, split = Registry().find_scenario(given["--scenario"])
    rest = {name: value for name, value in settings.items() if name not in mine}
    asked = load_scenario(path, split, given.get("--profile"), rest)
    planned = set(record.method.planned or ())
    recorded = flatten({name: value for name, value in record.scenario.to_json().items() if isinstance(value, dict)})
    assert {n: v for n, v in flatten(asked.identity()).items() if n in recorded and n not in planned} == {
        n: v for n, v in recorded.items() if n not in planned
    }
    method = asked.methods.get(record.identity.method, {}) | {n: parse_value(n, v) for n, v in mine.items()}
    assert {name: method[name] for name in record.method.settings} == dict(record.method.settings)


def test_a_run_in_a_profile_is_asked_for_by_its_profile() -> None:
    path, split = Registry().find_scenario("agnews-noniid")
    smoke = load_scenario(path, split, "smoke", {"federation.rounds": "2"})
    tables = {name: value for name, value in smoke.identity().items() if isinstance(value, dict)}
    record = make_record("fedot", federation={"rounds": 2}, settings={"lr": 0.5})
    origin = Origins().of(altered(record, {f"scenario.{name}": value for name, value in tables.items()}))
    assert origin.profile == "smoke"
    assert origin.parts[:3] == ("fedbench run", "--method fedot", "--scenario agnews-noniid")
    assert "--profile smoke" in origin.parts
    assert "--set lr=0.5" in origin.parts


def test_what_is_not_installed_here_is_said_beside_the_command() -> None:
    record = make_record("my method; rm -rf ~", scenario="mine-natural", fm="bert-base")
    origin = Origins().of(record)
    assert "--method 'my method; rm -rf ~'" in origin.parts
    assert "--fm bert-base" in origin.parts
    assert "--plugin FILE" in origin.parts
    assert len(origin.notes) == 2
