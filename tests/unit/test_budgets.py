"""Quality under a budget, and what a target costs: by hand, with runs that do not get there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _records import altered, make_record
from helpers import Invoke
from test_simulated import TWO, measured, profile

import fedbench
from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.tables.asked import Asked
from fedbench.tables.budgets import accuracy_within, cost_to, parse_budget, parse_target, scored_rounds, time_cost
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.frames import printed


def scored(*accuracies: float | None, seed: int = 0, method: str = "fedpft", **changes: Any) -> Record:
    """A run of these scores by round, each of whose rounds costs 1 MB up and 3 MB down."""
    n = len(accuracies)
    record = make_record(method, seed, federation={"rounds": n})
    wanted: dict[str, Any] = {
        "communication.per_round": [{"round": r, "up": 10**6, "down": 3 * 10**6} for r in range(n)],
        "communication.setup_bytes": 0,
    }
    for way, total in (("up", n * 10**6), ("down", 3 * n * 10**6)):
        wanted[f"communication.{way}"] = {"bytes": total, "by_kind": {"adapter": {"bytes": total}}}
    wanted |= {f"rounds.{r}.plug_in_validation": a for r, a in enumerate(accuracies) if a is not None}
    return altered(record, wanted | changes)


def tables(records: list[Record], **asked: Any) -> dict[str, tuple[pd.DataFrame, list[str]]]:
    comparison: Comparison = compare(records)
    comparison.asked = Asked.of(**asked)
    return {each.title: (each.frame.set_index("method"), each.notes) for each in printed(comparison)}


def test_what_is_spent_is_the_sum_of_the_rounds_so_far() -> None:
    run = scored(0.5, None, 0.7, 0.6)
    assert scored_rounds(run) == {0: 0.5, 2: 0.7, 3: 0.6}
    # 4 MB a round: after 12 MB three rounds are over, after 11.9 MB two, of which the first was scored.
    for budget, accuracy in (("12MB", 0.7), ("11.9MB", 0.5), ("16MB", 0.6), ("1GB", 0.6), ("3.9MB", None)):
        assert accuracy_within(run, [parse_budget(budget)]) == accuracy
    assert accuracy_within(run, [parse_budget("up=3MB")]) == 0.7
    assert accuracy_within(run, [parse_budget("1GB"), parse_budget("up=1000kB")]) == 0.5


def test_a_client_that_holds_more_than_its_memory_reaches_nothing() -> None:
    run = scored(0.5, 0.6)  # 16.4 M parameters of 4 bytes
    assert accuracy_within(run, [parse_budget("memory=65.6MB")]) == 0.6
    assert accuracy_within(run, [parse_budget("memory=65.5MB")]) is None


def test_simulated_time_is_a_budget_and_a_cost() -> None:
    run = altered(measured(*TWO), {"rounds.0.plug_in_validation": 0.6, "rounds.1.plug_in_validation": 0.8})  # 4 s, 3 s
    for budget, accuracy in (("7s", 0.8), ("time=6.9s", 0.6), ("0.1min", 0.6), ("3s", None)):
        assert accuracy_within(run, [parse_budget(budget, [profile()])]) == accuracy
    assert cost_to(run, 0.8, time_cost(profile())) == pytest.approx(7)
    old = scored(0.5, 0.6)
    assert str(accuracy_within(old, [parse_budget("1h", [profile()])])) == "nan", "not known"
    assert accuracy_within(old, [parse_budget("1MB"), parse_budget("1h", [profile()])]) is None, "out of traffic anyway"


def test_a_mean_is_of_all_runs_or_of_none() -> None:
    records = [scored(0.5, 0.8, seed=0), scored(0.9, 0.7, seed=1)]
    records += [scored(0.4, None, seed=0, method="fedot"), scored(0.9, 0.9, seed=1, method="fedot")]
    records += [make_record("zero-shot", 0, None, unavailable="no head", federation={"rounds": 2})]
    found = tables(records, to="80%")
    frame, notes = found["agnews-noniid, minilm-l6: cost to 80% on validation rows"]
    assert frame.loc["fedpft"].tolist() == ["1.5 ± 0.7 (2)", "6.00 ± 2.83 (2)", "1.50 ± 0.707 (2)"]
    assert frame.loc["fedot"].tolist() == ["not reached (1 of 2)"] * 3
    assert frame.loc["zero-shot"].tolist() == ["not available", "–", "–"]
    assert not any(note.startswith("scored in different rounds") for note in notes)
    assert any("no simulated time: fedot, fedpft: the record does not say" in note for note in notes)
    frame, notes = tables(records, within=["4MB"])[
        "agnews-noniid, minilm-l6: within 4MB of traffic (both directions, set-up included, all clients)"
    ]
    assert frame.loc["fedpft"].tolist() == ["70.0 ± 28.3 (2)", "1.0 ± 0.0 (2)"]


def test_who_is_scored_in_other_rounds_is_named() -> None:
    records = [scored(0.5, 0.6, 0.7), scored(None, None, 0.8, method="fedot")]
    ((_, notes),) = [found for title, found in tables(records, to=0.6).items() if "cost to" in title]
    assert any(note.endswith("gets there later: fedot in 1 rounds, fedpft in 3 rounds") for note in notes)


def test_plain_numbers_have_a_mean_of_all_runs_alone() -> None:
    comparison = compare([scored(0.5, 0.8), scored(0.5, 0.6, seed=1), scored(0.9, 0.9, method="fedot")])
    comparison.asked = Asked.of(within=["8MB"], to="0.8", profile=["phone"])
    frame = comparison.frame().set_index("method")
    assert frame["target_reached"].tolist() == [1, 1]
    assert frame["rounds_to_target"].isna().tolist() == [False, True]
    assert frame.loc["fedot", "mb_to_target"] == pytest.approx(4)
    assert frame.loc["fedpft", "accuracy_within"] == pytest.approx(0.7)
    assert "s_phone_to_target" in frame
    comparison.asked = Asked()
    assert not [name for name in comparison.frame() if "target" in name or "within_r" in name]


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ("10", "write a number and a unit, as 10MB"),
        ("10 parsecs", "write a number and a unit"),
        ("trafic=10MB", "no such budget; did you mean traffic"),
        ("up=2h", "up is given in bytes"),
        ("time=2MB", "time is given in seconds, min or h"),
        ("2h", "give --profile phone"),
        ("0MB", "a budget is above 0"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_to_write(budget: str, complaint: str) -> None:
    profiles = [profile()] if budget.startswith("time") else []
    with pytest.raises(FedbenchError, match=f"--within {budget}: .*{complaint}"):
        parse_budget(budget, profiles)


def test_a_target_is_a_share_or_per_cent() -> None:
    assert [parse_target(text) for text in ("0.8", "80%", " 1 ")] == [0.8, 0.8, 1.0]
    for text in ("80", "0", "-1", "nan", "high", "101%"):
        with pytest.raises(FedbenchError, match=r"--to .*: write a share or per cent"):
            parse_target(text)


def test_the_command_line_and_python_have_both(tmp_path: Path, invoke: Invoke) -> None:
    save(scored(0.5, 0.8), tmp_path / "records")
    _, out, _ = invoke("table", "--results", tmp_path, "--within", "4MB", "--to", "0.8", "--format", "markdown")
    assert "50.0 (1)" in out and "2.0 (1)" in out
    assert out == fedbench.make_table(tmp_path, within="4MB", to=0.8)
