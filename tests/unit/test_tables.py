"""Tables: hand-computed statistics, what is missing or not comparable, and the four renderings."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _records import altered, make_record
from rich.console import Console, RenderableType

from fedbench.cli import app as cli
from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell
from fedbench.grid.file import Grid, load_grid
from fedbench.records.record import Record
from fedbench.records.schema import Residual
from fedbench.records.store import save
from fedbench.tables import report
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.matching import of_fm
from fedbench.tables.render import latex, markdown
from fedbench.tables.render.comments import comments
from fedbench.tables.render.forms import render
from fedbench.tables.render.frames import accuracy_text, beside_frame, overview_frame
from fedbench.tables.render.terminal import terminal
from fedbench.tables.statistics import Summary, binomial_standard_error, holm, paired_test


def shown(renderable: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def accuracies(method: str, values: Sequence[float], rows: int = 100) -> list[Record]:
    return [make_record(method, seed, value, rows=rows) for seed, value in enumerate(values)]


def test_mean_and_sample_deviation_by_hand() -> None:
    found = Summary.of([0.80, 0.84, None, 0.88])
    assert found is not None
    assert found.mean == pytest.approx(0.84)
    assert found.n == 3
    assert found.std == pytest.approx(0.04)  # sqrt((0.04² + 0 + 0.04²) / 2)
    assert Summary.of([0.7]) == Summary(0.7, None, 1)
    assert Summary.of([0.8, 0.8, 0.8]) == Summary(0.8, 0.0, 3)
    assert Summary.of([None]) is None


def test_accuracy_with_deviation_only_from_two_seeds() -> None:
    (section,) = compare([*accuracies("fedpft", [0.80, 0.84, 0.88]), *accuracies("fedot", [0.75])]).sections
    assert {row.label: accuracy_text(row) for row in section.rows} == {
        "fedpft": "84.0 ± 4.0 (3)",
        "fedot": "75.0 (1)",
    }


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_paired_test_is_exact() -> None:
    # All six differences are positive: of the 64 signings two are as extreme.
    assert paired_test([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(2 / 64)
    # 1, 1, -1: means at least as large as 1/3 in 4 of 8 signings, so two-sided 8 / 8.
    assert paired_test([1.0, 1.0, -1.0]) == pytest.approx(1.0)
    assert paired_test([0.0, 0.0]) == 1.0


def test_binomial_standard_error() -> None:
    assert binomial_standard_error(0.9, 900) == pytest.approx(0.01)  # sqrt(0.09 / 900)


def test_headroom_uses_shared_seeds_only() -> None:
    records = [*accuracies("fedavg-lora", [0.90, 0.92, 0.10]), *accuracies("head-only", [0.80, 0.80])]
    (section,) = compare(records).sections
    assert section.headroom is not None
    assert section.headroom.mean == pytest.approx(11.0)
    assert section.headroom.seeds == 2
    line = comments(section)[0]
    # 10 and 12 points: deviation 1.41 over two seeds, 12.7 * 1.
    assert line.startswith("headroom, fedavg-lora minus head-only: +11.0 points, 95% interval −1.7 to +23.7 (2 seeds)")
    assert "the interval holds 0: this scenario cannot rank methods" in line


def test_headroom_that_holds_zero_says_so_and_missing_headroom_is_said() -> None:
    (section,) = compare([*accuracies("fedavg-lora", [0.8] * 2), *accuracies("head-only", [0.8] * 2)]).sections
    assert "cannot rank methods" in comments(section)[0]
    (section,) = compare(accuracies("fedpft", [0.8])).sections
    assert "headroom: unknown" in comments(section)[0]


def test_tests_only_from_six_seeds_with_holm() -> None:
    five = [0.80, 0.81, 0.82, 0.83, 0.84]
    better = [value + 0.05 for value in five]
    (section,) = compare([*accuracies("fedpft", better), *accuracies("fedot", five)]).sections
    assert [d.p for d in section.differences] == [None]
    assert any("it takes 6 shared seeds" in line for line in comments(section))
    records = [
        *accuracies("fedpft", [*better, 0.90]),
        *accuracies("fedot", [*five, 0.85]),
        *accuracies("fedavg-lora", [*better, 0.90]),
        *accuracies("head-only", [*five, 0.85]),  # a reference: no pair of its own
    ]
    (section,) = compare(records).sections
    by_pair = {(d.a, d.b): d.p for d in section.differences}
    assert by_pair == {
        ("fedot", "fedpft"): pytest.approx(3 * 2 / 64),
        ("fedot", "fedavg-lora"): pytest.approx(3 * 2 / 64),
        ("fedpft", "fedavg-lora"): 1.0,
    }


def test_missing_failed_and_unavailable_are_visible() -> None:
    records = [
        make_record("fedpft", 0, 0.8),
        make_record("fedpft", 1, None, status="failed"),
        make_record("fedot", 0, None, status="failed"),
        make_record("zero-shot", 0, None, unavailable="minilm-l6 has no head trained for this task"),
    ]
    grid = Grid(methods=["zero-shot", "fedot", "fedpft", "head-only"], scenarios=["agnews-noniid", "sst2-iid"], seeds=3)
    comparison = compare(records, grid.cells(), "A grid")
    first, second = comparison.sections
    texts = {row.label: accuracy_text(row) for row in first.rows}
    assert texts == {"zero-shot": "not available", "fedot": "failed", "fedpft": "80.0 (1/3)", "head-only": "missing"}
    assert list(texts) == grid.methods
    assert {accuracy_text(row) for row in second.rows} == {"missing"}
    notes = "\n".join(comments(first))
    assert "zero-shot: not available: minilm-l6 has no head trained for this task" in notes
    assert "fedpft: 1 seed failed" in notes
    text = shown(terminal(comparison))
    for word in ("A grid", "missing", "failed", "not available", "80.0 (1/3)"):
        assert word in text
    assert list(comparison.frame()["state"])[:4] == ["not available", "failed", "complete", "missing"]


def test_without_a_grid_a_method_absent_from_a_scenario_is_missing() -> None:
    comparison = compare([make_record("fedpft"), make_record("fedot"), make_record("fedot", scenario="sst2-iid")])
    overview = overview_frame(comparison).set_index("method")
    assert overview.loc["fedpft"].tolist() == ["80.0 (1)", "missing"]


def test_a_failure_that_was_made_good_does_not_show() -> None:
    failed = make_record("fedpft", 0, None, status="failed")
    (section,) = compare([failed, make_record("fedpft", 0, 0.8, settings={"lr": 0.002})]).sections
    assert [(accuracy_text(row), row.failed) for row in section.rows] == [("80.0 (1)", 0)]


def test_variants_of_a_method_are_rows_of_their_own() -> None:
    records = [
        make_record("fedpft", 0, 0.8, settings={"lr": 0.001, "r": 384}),
        make_record("fedpft", 1, 0.9, settings={"lr": 0.001, "r": 384}),
        make_record("fedpft", 0, 0.5, settings={"lr": 0.001, "r": 96}),
    ]
    (section,) = compare(records).sections
    assert [(row.label, accuracy_text(row), row.flag) for row in section.rows] == [
        ("fedpft [r 384]", "85.0 ± 7.1 (2)", ""),
        ("fedpft [r 96]", "50.0 (1)", ""),
    ]


def test_rows_that_are_not_comparable_are_flagged_and_left_out_of_differences() -> None:
    records = [
        *accuracies("fedpft", [0.8, 0.8]),
        *accuracies("fedavg-lora", [0.9, 0.9]),
        make_record("fedot", 0, 0.7, federation={"rounds": 30}, data_hash="e" * 64),
    ]
    (section,) = compare(records).sections
    flags = {row.label: row.flag for row in section.rows}
    assert flags == {
        "fedpft": "",
        "fedavg-lora": "",
        "fedot": "data_hash eeeeeeee instead of dddddddd, federation.rounds 30 instead of 15",
    }
    assert [(d.a, d.b) for d in section.differences] == [("fedpft", "fedavg-lora")]
    for text in (shown(terminal(compare(records))), render(compare(records), "markdown")):
        assert "fedot †" in text
        assert "not comparable" in text
    assert compare(records).frame().set_index("method").loc["fedot", "not_comparable"] == flags["fedot"]


def test_what_a_reference_changes_by_its_nature_is_not_flagged() -> None:
    records = [
        *accuracies("fedpft", [0.8, 0.8]),
        make_record("centralised-lora", 0, 0.9, federation={"rounds": 1}, planned=["federation.rounds"]),
    ]
    (section,) = compare(records).sections
    assert [row.flag for row in section.rows] == ["", ""]


def test_two_foundation_models_do_not_share_a_table() -> None:
    comparison = compare([make_record("fedpft"), make_record("fedpft", fm="bert-base")])
    assert [section.title for section in comparison.sections] == [
        "agnews-noniid, bert-base",
        "agnews-noniid, minilm-l6",
    ]


def test_a_grid_takes_only_the_records_of_its_cells() -> None:
    records = [make_record("fedpft", 0, 0.8), make_record("fedpft", 0, 0.7, settings={"lr": 0.01})]
    content = {
        "methods": ["fedpft"], "scenarios": ["agnews-noniid"], "seeds": 1, "overrides": [{"set": {"lr": 0.01}}]
    }  # fmt: skip
    (section,) = compare(records, Grid.model_validate(content).cells()).sections
    assert [accuracy_text(row) for row in section.rows] == ["70.0 (1)"]


SHORT = {"fraction": 0.1, "rounds": 15, "local_epochs": 1, "max_steps": 10}
FULL = {**SHORT, "rounds": 100, "max_steps": None}


def with_mismatched(record: Record, accuracy: float) -> Record:
    extra = {"mismatched": {"plug_in": {"accuracy": accuracy, "rows": 10}, "proxy": None}}
    return altered(record, {"accuracy.test_name": "matched", "accuracy.extra_tests": extra})


def beside_the_paper(fm: str | None = None) -> Comparison:
    """paper-iid with records of BERT in full and of MiniLM in small, and most cells missing."""
    bert = {"lr": 8e-4, "t": 10, "p": 0.5}
    records = [
        *(make_record("fedpft", s, 0.8 + s / 10, scenario="qnli-iid", fm="bert-base", federation=FULL, settings=bert)
          for s in range(3)),
        with_mismatched(make_record("fedpft", 0, 0.7, scenario="mnli-iid", fm="bert-base", settings=bert), 0.6),
        make_record("fedot", 0, None, status="failed", scenario="qqp-iid", fm="bert-base", settings={"lr": 1}),
        make_record("fedpft", 0, 0.6, scenario="qnli-iid", federation=SHORT, settings={"lr": 6e-3, "t": 5, "p": 0.5}),
        make_record("fedavg-lora", 1, 0.5, scenario="qnli-iid", federation=SHORT, settings={"lr": 6e-3}),
        make_record("fedavg-lora", 0, None, scenario="sst2-paper-iid", unavailable="no reason"),
    ]  # fmt: skip
    grid = load_grid("paper-iid").only(fm=fm)
    return compare(records, grid.cells(), grid.title, grid.reported)


def test_reported_figures_stand_under_ours_of_the_same_fm() -> None:
    comparison = beside_the_paper()
    bert, roberta = comparison.beside
    assert [bert.title, roberta.title] == [
        "Accuracy in %: ours with bert-base, reported with bert-base",
        "Accuracy in %: ours with roberta-base, reported with roberta-base",
    ]
    assert beside_frame(bert).to_numpy().tolist() == [
        ["fedavg-lora", "missing", "missing", "missing", "missing", "–"],
        ["  reported", "91.6", "88.4", "80.7 / 81.6", "87.8", "81M"],
        ["fedot", "missing", "missing", "missing", "failed", "–"],
        ["  reported", "90.4", "83.9", "74.9 / 74.9", "81.6", "47M"],
        ["fedpft", "missing", "90.0 ± 10.0 (3)", "70.0 / 60.0 (1/3)", "missing", "16.4M"],
        ["  reported", "91.6", "87.5", "78.6 / 79.0", "86.3", "47M"],
    ]
    assert beside_frame(bert).columns[-1] == "parameters"
    assert any("those of the transformer layers, in units of 2^20" in note for note in bert.notes)
    assert "ours: no results with roberta-base yet" in roberta.notes
    # The tables of each scenario stay, one for each FM; records of an FM outside the grid have no place in it.
    assert [section.title for section in comparison.sections] == [
        f"{scenario}, {fm}"
        for fm in ("bert-base", "roberta-base")
        for scenario in ("sst2-paper-iid", "qnli-iid", "mnli-iid", "qqp-iid")
    ]


def test_scale_and_what_is_not_as_reported_are_said() -> None:
    notes = beside_the_paper().beside[0].notes
    assert notes[1:3] == ["the paper reports no deviation", "mnli-iid: test sets matched / mismatched"]
    assert "ours: bert-base, 50 clients, 10% of them a round, 100 rounds, 1 local epoch on qnli-iid" in notes
    assert "ours: seeds 0, 1, 2; training rows: qnli-iid 30, mnli-iid 30" in notes
    assert "not as reported: split.clients 50 instead of 100" in notes
    assert "not as reported on mnli-iid: federation.rounds 15 instead of 100" in notes
    assert not any("lr" in note for note in notes[3:])
    small = beside_the_paper("minilm-l6").beside
    assert [table.title for table in small] == [
        "Accuracy in %: ours with minilm-l6, reported with bert-base",
        "Accuracy in %: ours with minilm-l6, reported with roberta-base",
    ]
    assert beside_frame(small[0])["qnli-iid"].tolist() == [
        "50.0 (1/3)",
        "88.4",
        "missing",
        "83.9",
        "60.0 (1/3)",
        "87.5",
    ]
    assert beside_frame(small[0])["sst2-paper-iid"].tolist()[:2] == ["not available", "91.6"]
    assert beside_frame(small[1])["qnli-iid"].tolist()[1::2] == ["90.8", "85.3", "88.7"]
    assert (
        "ours: minilm-l6, 50 clients, 10% of them a round, 15 rounds, 1 local epoch of at most 10 steps"
        in small[0].notes
    )
    assert small[0].notes[-2:] == [
        "not as reported: FM minilm-l6 instead of bert-base; split.clients 50 instead of 100; "
        "federation.rounds 15 instead of 100; federation.max_steps 10 instead of none; lr 0.006 instead of 0.0008",
        "not as reported in fedpft: t 5 instead of 10",
    ]
    # One of the paper's FMs stands beside its own figures only.
    assert [table.reported_fm for table in beside_the_paper("roberta-base").beside] == ["roberta-base"]


@pytest.mark.parametrize("fm", [None, "minilm-l6"])
def test_reported_figures_in_every_format(fm: str | None) -> None:
    comparison = beside_the_paper(fm)
    name = fm or "bert-base"
    title = f"ours with {name}, reported with bert-base"
    text = shown(terminal(comparison))
    assert max(map(len, text.splitlines())) <= 120
    for rendered in (text, render(comparison, "markdown"), render(comparison, "latex")):
        assert title in rendered
        for words in ("missing", "78.6 / 79.0", "training rows", "the paper reports no deviation", "not as reported"):
            assert words in rendered
    latex = render(comparison, "latex")
    assert latex.count("\\begin{table}") == len(comparison.beside) + len(comparison.sections)
    assert not set("±†−–…") & set(latex)
    frame = pd.read_csv(io.StringIO(render(comparison, "csv")))
    line = frame[(frame.scenario == "qnli-iid") & (frame.fm == name) & (frame.method == "fedpft")].iloc[0]
    assert line["reported_bert-base"] == 0.875
    assert (line["clients"], line["rounds"], line["train_rows"]) == (50, 15 if fm else 100, 30)
    assert ("lr 0.006 instead of 0.0008" in line["not_as_reported"]) == (fm is not None)
    line = frame[(frame.scenario == "mnli-iid") & (frame.fm == name) & (frame.method == "fedpft")].iloc[0]
    assert (line["reported_bert-base_matched"], line["reported_bert-base_mismatched"]) == (0.786, 0.79)
    if fm:
        assert line["state"] == "missing"
        assert line["reported_roberta-base_mismatched"] == 0.832
    else:
        assert (line["accuracy"], line["accuracy_mismatched"]) == (0.7, 0.6)
        assert np.isnan(line["reported_roberta-base_matched"])


def test_figures_that_are_not_at_hand_are_not_available() -> None:
    grid = load_grid("paper-vision")
    (beside,) = compare([], grid.cells(), grid.title, grid.reported).beside
    assert set(beside_frame(beside).iloc[1::2, 1:].to_numpy().ravel()) == {"not available"}
    assert set(beside_frame(beside).iloc[::2, 1:].to_numpy().ravel()) == {"missing"}
    assert "the paper's figures for vision are not at hand" in beside.notes


def test_variants_of_a_grid_are_rows_with_their_own_records() -> None:
    settings = [{"t": t, "p": p} for t, p in ((5, 0.5), (10, 0.5), (10, 0.8), (7, 0.5))]
    records = [
        make_record("fedpft", 0, 0.1 * i, scenario="qnli-iid", fm="bert-base", settings=s)
        for i, s in enumerate(settings, 1)
    ]
    failed = make_record(
        "fedpft", 1, None, status="failed", scenario="qnli-iid", fm="bert-base", settings={"t": "20", "p": "0.5"}
    )
    grid = load_grid("paper-parameters")
    comparison = compare([*records, failed], grid.cells(), "", grid.reported)
    assert {row.label: accuracy_text(row) for row in comparison.sections[0].rows} == {
        "fedpft [t 5]": "10.0 (1/3)",
        "fedpft [t 10, p 0.5]": "20.0 (1/3)",
        "fedpft [t 20]": "failed",
        "fedpft [p 0.3]": "missing",
        "fedpft [p 0.8]": "30.0 (1/3)",
    }
    assert beside_frame(comparison.beside[0])["qnli-iid"].tolist()[:4] == ["10.0 (1/3)", "87.3", "20.0 (1/3)", "87.5"]


def test_of_several_settings_the_nearest_to_the_reported_one_is_shown() -> None:
    settings = {"lr": 8e-4, "t": 10, "p": 0.5}
    records = [
        make_record("fedpft", 0, 0.9, scenario="qnli-iid", fm="bert-base", federation=FULL, settings=settings),
        *(make_record("fedpft", s, 0.5, scenario="qnli-iid", fm="bert-base", federation=SHORT, settings=settings)
          for s in range(3)),
    ]  # fmt: skip
    grid = load_grid("paper-iid")
    comparison = compare(records, grid.cells(), "", grid.reported)
    assert beside_frame(comparison.beside[0])["qnli-iid"].tolist()[4] == "90.0 (1/3)"
    assert any("nearest to the reported one" in note for note in comparison.beside[0].notes)
    assert len(comparison.sections[1].rows) == 4


def test_a_reported_test_set_that_the_records_do_not_have_is_an_error() -> None:
    record = with_mismatched(make_record("fedpft", 0, 0.7, scenario="mnli-iid", fm="bert-base"), 0.6)
    record = altered(record, {"accuracy.test_name": "other"})
    grid = load_grid("paper-iid")
    with pytest.raises(FedbenchError, match="mnli-iid has no test set 'matched'; its records have other, mismatched"):
        compare([record], grid.cells(), "", grid.reported)


def test_measures_by_hand() -> None:
    frame = compare([make_record("fedpft", 0, 0.8, proxy=0.75), make_record("fedpft", 1, 0.9, proxy=0.75)]).frame()
    (line,) = frame.to_dict("records")
    assert line["accuracy"] == pytest.approx(0.85)
    assert line["gap"] == pytest.approx(0.10)
    assert line["mb_up"] == 2.0
    assert line["mb_setup"] == 60.0
    assert line["mb_down"] == 2.5  # 62.5 less the set-up
    assert line["mb_up_per_client_round"] == pytest.approx(2 / 60)  # 2 MB over 3 arrived and 1 refused in 15 rounds
    assert line["gradient_error_start"] == 0.5
    assert line["exposed_verbatim"] == 0.7
    assert line["resident_parameters"] == 16_400_000


def test_unequal_budgets_and_an_in_domain_corpus_are_said() -> None:
    a, b = make_record("fedpft", proxy=0.7), make_record("fedot", proxy=0.7)
    assert not [note for note in compare([a, b]).sections[0].notes if "differ" in note or "in-domain" in note]
    b = altered(b, {"compute.resident_parameters": 16_800_000, "compute.local_steps": 800})
    public = {"name": "tweets", "in_domain": True}
    a, b = (altered(r, {"scenario.public": public}) for r in (a, b))
    notes = compare([a, b]).sections[0].notes
    assert "the public corpus is in-domain, which flatters proxies" in notes
    assert "budgets of the proxy methods differ: local steps: fedot 800, fedpft 750" in notes
    assert any("parameters held at a client: fedot 16,800,000, fedpft 16,400,000" in note for note in notes)


def test_the_code_that_made_the_runs_is_named() -> None:
    def made_by(seed: int, git: dict[str, object] | None) -> Record:
        record = make_record("fedot", seed, 0.8)
        return altered(record, {"provenance.git": git})

    clean, dirty = ({"commit": c * 40, "dirty": c == "b"} for c in "ab")
    notes = compare([made_by(0, clean), made_by(1, dirty), made_by(2, clean)]).sections[0].notes
    assert "made with commit aaaaaaa, commit bbbbbbb with changes" in notes
    assert "made with fedbench 0.1.0" in compare([made_by(0, None)]).sections[0].notes


def many_records() -> list[Record]:
    return [
        *(make_record("fedpft", s, 0.80 + s / 50, proxy=0.79, rows=100) for s in range(3)),
        *(make_record("fedot", s, 0.78 + s / 50, proxy=0.85, rows=100) for s in range(3)),
        *accuracies("fedavg-lora", [0.88, 0.89, 0.90]),
        *accuracies("head-only", [0.70, 0.71, 0.72]),
        make_record("fedpft", 0, 0.8, scenario="sst2-iid"),
    ]


NONE: list[list[int]] = [[]] * 15


def test_a_run_without_any_upload_is_marked_and_not_ranked() -> None:
    records = [
        *accuracies("fedavg-lora", [0.9, 0.9]),
        *accuracies("fedot", [0.8, 0.8]),
        make_record("head-only", 0, 0.3, rows=100, arrived=NONE, proxy=0.3),
        make_record("fedpft", 0, 0.7, rows=100, proxy=0.7),
        make_record("fedpft", 1, 0.2, rows=100, proxy=0.2, arrived=NONE),
    ]
    records[-1] = altered(records[-1], {"compute.local_steps": 1})  # would be said among the budgets
    comparison = compare(records)
    (section,) = comparison.sections
    why = "no upload ever arrived: the model is as it started"
    assert {row.label: row.flag for row in section.rows} == {
        "head-only": why, "fedot": "", "fedpft": f"{why} (seed 1)", "fedavg-lora": ""
    }  # fmt: skip
    assert [(d.a, d.b) for d in section.differences] == [("fedot", "fedavg-lora")]
    assert section.headroom is None
    notes = comments(section)
    assert f"† head-only: {why}" in notes
    assert f"† fedpft: {why} (seed 1)" in notes
    assert not any("budgets" in note for note in notes)
    for text in (shown(terminal(comparison)), render(comparison, "markdown")):
        assert "head-only †" in text
        assert why in text
    frame = comparison.frame().set_index("method")
    assert frame.loc["head-only", "not_comparable"] == why
    assert frame.loc["head-only", "accuracy"] == pytest.approx(0.3)


def test_rounds_without_an_upload_are_said() -> None:
    some = [[1]] * 12 + [[]] * 3
    records = [make_record("fedpft", 0, 0.8, arrived=some), make_record("fedpft", 1, 0.8), make_record("fedot", 0, 0.8)]
    (section,) = compare(records).sections
    assert [row.flag for row in section.rows] == ["", ""]
    assert [note for note in section.notes if "upload" in note] == [
        "fedpft: rounds without any upload: 3 of 15 (seed 0)"
    ]


def test_a_method_without_rounds_needs_no_upload() -> None:
    zero = make_record("zero-shot", 0, 0.5, federation={"rounds": 0}, planned=["federation.rounds"])
    (section,) = compare([zero, make_record("fedpft", 0, 0.8)]).sections
    assert [row.flag for row in section.rows] == ["", ""]
    assert "upload" not in "".join(section.notes)


def test_runs_without_uploads_do_not_decide_what_is_usual() -> None:
    dropout = {"rounds": 15, "dropout": 0.99}
    lost = [make_record("fedot", seed, 0.2, federation=dropout, arrived=NONE) for seed in range(3)]
    (section,) = compare([*lost, make_record("fedpft", 0, 0.8, federation={"rounds": 15, "dropout": 0.0})]).sections
    assert [row.flag for row in section.rows] == [
        "no upload ever arrived: the model is as it started; federation.dropout 0.99 instead of 0.0", ""
    ]  # fmt: skip


def test_a_diverged_model_has_no_score() -> None:
    records = [
        *accuracies("fedpft", [0.8, 0.9]),
        make_record("fedpft", 2, 0.48, rows=100, loss=None),
        make_record("fedot", 0, 0.48, rows=100, loss=None, proxy=0.5),
        *accuracies("fedavg-lora", [0.9]),
    ]
    comparison = compare(records)
    (section,) = comparison.sections
    why = "diverged: the loss on the test set is not a finite number, so there is no score"
    assert {row.label: (accuracy_text(row), row.flag) for row in section.rows} == {
        "fedot": ("diverged", why),
        "fedpft": ("85.0 ± 7.1 (2)", f"{why} (seed 2)"),
        "fedavg-lora": ("90.0 (1)", ""),
    }
    assert section.differences == []
    line = comparison.frame().set_index("method").loc["fedot"]
    assert line["state"] == "diverged"
    assert line[["accuracy", "macro_f1", "gap", "client_accuracy_mean"]].isna().all()
    assert line["proxy_accuracy"] == 0.5
    for form in ("markdown", "latex", "csv"):
        text = render(comparison, form)
        assert "diverged" in text
        assert "48.0" not in text


def test_a_fault_is_marked_beside_reported_figures() -> None:
    grid = load_grid("paper-iid")
    federation = {**FULL, "rounds": 2}
    lost = make_record("fedpft", 0, 0.5, scenario="qnli-iid", fm="bert-base", federation=federation, arrived=[[], []])
    (bert, _) = compare([lost], grid.cells(), grid.title, grid.reported).beside
    assert beside_frame(bert)["qnli-iid"].tolist()[4] == "50.0 (1/3) †"
    assert "† fedpft on qnli-iid: no upload ever arrived: the model is as it started" in bert.notes


def test_several_records_of_one_seed_and_settings_are_said() -> None:
    again = altered(make_record("fedpft", 0, 0.9), {"identity.key": "0" * 64})
    (section,) = compare([make_record("fedpft", 0, 0.8), again]).sections
    assert "fedpft: several records of seed 0 with the same settings; one of each is shown" in section.notes


def test_other_inputs_are_another_condition() -> None:
    records = [make_record(method, 0, 0.8) for method in ("fedot", "fedpft", "head-only")]
    records[:2] = [altered(r, {"identity.inputs_hash": x * 64}) for r, x in zip(records[:2], "ab", strict=True)]
    (section,) = compare(records).sections
    # What an older record does not say is not held against it.
    assert sorted(row.flag for row in section.rows) == ["", "", "inputs_hash bbbbbbbb instead of aaaaaaaa"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 119, 200])
def test_a_terminal_of_any_width_shows_every_cell_whole(width: int) -> None:
    comparison = compare(many_records())
    text = shown(terminal(comparison), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    section = text.split("agnews-noniid, minilm-l6\n")[-1].split("headroom")[0]
    words = " ".join(section.split())
    for header in ("accuracy %", "proxy %", "MB set-up", "grad. error", "exposed %", "trained M", "held M"):
        assert words.count(header) == 1
    # Every part of the table names its rows.
    parts = [line for line in section.splitlines() if line.startswith("method")]
    for method in ("head-only", "fedot", "fedpft", "fedavg-lora"):
        lines = [line for line in section.splitlines() if line.split()[:1] == [method]]
        assert len(lines) == len(parts)
    cells = " ".join(" ".join(line.split()[1:]) for line in section.splitlines() if line.startswith("fedpft "))
    assert cells == "82.0 ± 2.0 (3) 79.0 +3.0 2.00 2.50 60.0 0.50 / 0.75 70.0 / 72.0 0.150 16.4"


def test_a_long_name_is_folded_and_leaves_room_for_numbers() -> None:
    settings = [{"lr": lr, "schedule": "a-rather-long-name-of-a-schedule"} for lr in (0.001, 0.002)]
    settings[1]["schedule"] = "another"
    text = shown(terminal(compare([make_record("fedpft", 0, 0.8, settings=s) for s in settings])), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "80.0 (1)" in text
    assert "a-rather-long-name-of-a-schedule" in "".join(line[:26].strip() for line in text.splitlines())


def test_terminal_fits_in_120_columns_with_every_cell_whole() -> None:
    text = shown(terminal(compare(many_records())))
    assert max(map(len, text.splitlines())) <= 120
    line = next(line for line in text.splitlines() if line.startswith("fedpft") and "60.0" in line)
    assert " ".join(line.split()) == (
        "fedpft 82.0 ± 2.0 (3) 79.0 +3.0 2.00 2.50 60.0 0.50 / 0.75 70.0 / 72.0 0.150 16.4"
    )
    assert "…" not in text


def test_markdown() -> None:
    text = render(compare(many_records(), title="All"), "markdown")
    assert text.startswith("# All\n\n## Accuracy in %, methods by scenarios\n\n| method")
    assert "| 82.0 ± 2.0 (3) |      79.0 |" in text
    assert "- headroom, fedavg-lora minus head-only: +18.0 points" in text
    widths = {len(line) for line in text.split("## ")[2].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_latex() -> None:
    text = render(compare(many_records()), "latex")
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 3
    assert "82.0 $\\pm$ 2.0 (3)" in text
    assert "accuracy \\%" in text
    body = text.replace("\\%", "").replace("\\_", "").replace("\\&", "")
    assert "%" not in body
    assert not set("±†−–…") & set(text)
    labels = re.findall(r"\\label\{(.*)\}", text)
    assert labels == ["tab:accuracy-in-methods-by-scenarios", "tab:agnews-noniid-minilm-l6", "tab:sst2-iid-minilm-l6"]
    for table in text.split("\\end{tabular}")[:-1]:
        rows = table.split("\\toprule")[1].strip().splitlines()
        assert rows[0].startswith("method")
        assert len({row.count(" & ") for row in rows if row.endswith("\\\\")}) == 1
    section = text.split("\\label{tab:agnews")[1].split("\\end{table}")[0]
    for header in ("accuracy \\%", "proxy \\%", "MB set-up", "grad. error", "exposed \\%", "trained M", "held M"):
        assert section.count(header) == 1


def test_latex_labels_are_unique() -> None:
    records = [make_record(fm=fm) for fm in ("a/b", "a-b")]
    labels = re.findall(r"\\label\{(.*)\}", render(compare(records), "latex"))
    assert len(set(labels)) == 3


def test_points_are_those_of_computer_modern_or_more() -> None:
    # Widths in cmr8.tfm, in points: of "0" 4.25, "a" 4.25, "m" 7.08, "W" 8.73, "i" 2.36, a blank 2.83.
    for text, width in (("0000000000", 42.5), ("mmmm", 28.3), ("WWWW", 34.9), ("aaaa", 17.0), ("iiii", 9.4)):
        assert width * 0.98 <= latex.points(text) <= 1.45 * width


def compiled(text: str, folder: Path) -> str:
    """What LaTeX says about a document with these tables."""
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{text}\\end{{document}}\n"
    (folder / "t.tex").write_text(document)
    command = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="takes pdflatex")
def test_latex_compiles_and_is_no_wider_than_the_text(tmp_path: Path) -> None:
    paths = ["/home/somebody/models/a_long_folder/with_more/and_more/of_it", "C:\\models\\bert~1"]
    records = [*many_records(), *(make_record(fm=fm) for fm in [*paths, *HOSTILE])]
    records += [make_record("fedpft", 9, 0.8, settings={"lr": 0.001, "a_very_long_setting": "x" * 20})]
    for comparison in (compare(records), beside_the_paper()):
        said = compiled(render(comparison, "latex"), tmp_path)
        assert "Overfull" not in said


HOSTILE = [
    "\\input{/etc/passwd}",
    "[x]{\\csname end\\endcsname}",
    "$x$ & y % z # {",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>|cell|",
    "[click](javascript:alert(1)) `code` *bold* &lt;b&gt;",
    "=HYPERLINK(1)",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\x1b]0;pwned\x07\x1b[2Jx",
    "a\r\n=1+1\n| b |\x9b31m",
    "abc\u202ecba\u2028",
]


def hostile_records() -> list[Record]:
    """Records whose free texts all carry something that a terminal or a program would act on."""
    out = []
    for i, text in enumerate(HOSTILE):
        settings = {"lr": 0.001, "note": text}
        out.append(make_record("fedpft", i, 0.8, fm="same", settings=settings))
        out.append(make_record("fedot", i, None, fm=text, unavailable=text))
        other = make_record("fedavg-lora", i, 0.8, fm="same")
        git = {"commit": text, "dirty": True}
        out.append(altered(other, {"provenance.git": git, "scenario": {**other.scenario.to_json(), text: text}}))
    return out


def test_the_command_ends_with_one_line_where_a_record_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make_record("fedot"), tmp_path / "records")
    path = save(make_record(), tmp_path / "records")
    path.write_text(path.read_text().replace('"accuracy": 0.8,', '"accuracy": 0.999,'))
    monkeypatch.setattr(sys, "argv", ["fedbench", "table", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"fedbench: {path}: not a record: accuracy.plug_in.accuracy: 0.999, but its per-row bits say 0.8; "
        "delete the file and run again\n"
    )


def test_nothing_in_a_record_acts_on_what_shows_it() -> None:
    comparison = compare(hostile_records(), title="\x1b[2J<b>=1")
    terminal_text, markdown, latex = (
        shown(terminal(comparison)),
        render(comparison, "markdown"),
        render(comparison, "latex"),
    )
    for text in (terminal_text, markdown, latex, render(comparison, "csv")):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "\\x1b" in text or "\\textbackslash{}x1b" in text
    assert "<" not in markdown
    assert "](" not in markdown
    rows = [re.sub(r"\\.", "", line) for line in markdown.splitlines() if line.startswith("|")]
    assert all("`" not in row and "*" not in row for row in rows)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({re.sub(r"\\.", "", line).count("|") for line in table.splitlines()}) == 1
    assert set(re.findall(r"\\([A-Za-z]+)", latex)) <= {
        "begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "label", "toprule", "midrule",
        "bottomrule", "medskip", "par", "raggedright", "raggedleft", "parbox", "strut", "pm", "dagger", "allowbreak",
        "textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar", "textasciigrave",
    }  # fmt: skip
    for line in csv.reader(io.StringIO(render(comparison, "csv"))):
        for cell in line:
            assert not cell.startswith(("=", "@", "+")) and (not cell.startswith("-") or float(cell) <= 0)


def test_markdown_shows_a_text_as_it_is() -> None:
    shows = markdown.markdown_text
    assert shows("fedpft [t 5], p < 0.001, max_steps 10") == "fedpft [t 5], p &lt; 0.001, max_steps 10"
    assert shows("_a_ a_b |x| &amp; Q&A") == "\\_a\\_ a_b \\|x\\| &amp;amp; Q&A"


def test_the_panel_of_a_run_shows_control_characters_as_text() -> None:
    failed = altered(make_record(accuracy=None, status="failed"), {"error.message": "a\x1b[2J\nb"})
    assert "a\\x1b[2J b" in shown(report.summary(failed))
    record = make_record("zero-shot", accuracy=None, unavailable="\x1b]0;x\x07", fm="\x9b31m")
    text = shown(report.summary(record))
    assert "\\x1b]0;x\\x07" in text
    assert "\\x9b31m" in text


def test_csv_can_be_read_back() -> None:
    frame = pd.read_csv(io.StringIO(render(compare(many_records()), "csv")))
    line = frame[(frame.method == "fedavg-lora") & (frame.scenario == "agnews-noniid")].iloc[0]
    assert line.accuracy == pytest.approx(0.89)
    assert line.accuracy_std == pytest.approx(0.01)
    assert line.seeds == 3


def test_unknown_format_and_no_records() -> None:
    with pytest.raises(FedbenchError, match="markdown, latex or csv"):
        render(compare([]), "html")
    assert shown(terminal(compare([]))).strip() == "no records"
    assert render(compare([]), "markdown")


def test_tables_are_a_pure_function_of_records() -> None:
    records = many_records()
    once = render(compare(records), "markdown")
    assert once == render(compare(list(reversed(records))), "markdown")


def test_rendering_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    tested = [*accuracies("fedpft", [0.7] * 6), *accuracies("fedot", [0.8] * 6)]
    for record in [*many_records(), *tested]:
        save(record, tmp_path)
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from fedbench.tables import report; from fedbench.tables import compare as tables\n"
        "from fedbench.tables.render.forms import render; from fedbench.tables.render.terminal import terminal\n"
        "from fedbench.grid import file as grid; from fedbench.records import store as records\n"
        "found = records.load_all(Path(sys.argv[1]))\n"
        "chosen = grid.load_grid('paper-iid')\n"
        "comparison = tables.compare(found, chosen.cells(), '', chosen.reported)\n"
        "[render(comparison, form) for form in ('markdown', 'latex', 'csv')]\n"
        "comparison = tables.compare(found, grid.load_grid('agnews').cells())\n"
        "[render(comparison, form) for form in ('markdown', 'latex', 'csv')]\n"
        "Console().print(terminal(comparison), report.summary(found[0]))\n"
        "sys.exit(','.join(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_summary_tells_the_course_of_a_distillation() -> None:
    layers = [{"hidden": 0.1, "hidden_before": 0.5, "curve": [0.4, 0.2]}, {"hidden": 0.3, "hidden_before": 0.7}]
    record = make_record()

    def told(*residuals: dict[str, object]) -> str:
        found = [Residual(layer=i, **residual) for i, residual in enumerate(residuals)]
        return shown(report.summary(record.model_copy(update={"distillation": found})), 160)

    assert "residual 0.200 before" not in told()
    assert "residual 0.600 before, 0.200 after" in told(*layers)
    assert "after; " not in told(*layers), "a course of one layer is none of the mean"
    assert "residual 0.600 before, 0.200 after; 0.400 0.250" in told(layers[0], layers[1] | {"curve": [0.4, 0.3]})
    assert "residual 0.100" in told({"hidden": 0.1})


def test_summary_of_a_run() -> None:
    text = shown(report.summary(make_record(accuracy=0.8, proxy=0.75)), 160)
    for words in (
        "fedpft on agnews-noniid, minilm-l6, seed 0",
        "80.0% plug-in",
        "75.0% proxy; plug-in minus proxy +5.0 points",
        "up 2.00 MB; down 62.5 MB (adapter 2.50 MB, sub_fm 60.0 MB)",
        "set-up 60.0 MB, once for each of 4 clients",
        "0.50 at the start, 0.75 on average, 0.90 at the end",
        "16.40 M parameters, 0.150 M trained; 750 steps",
    ):
        assert words in text


def test_the_panel_says_that_no_upload_arrived() -> None:
    why = "no upload ever arrived: the model is as it started"
    assert why in shown(report.summary(make_record(arrived=NONE)))
    assert "none in 3 of 15 rounds" in shown(report.summary(make_record(arrived=[[1]] * 12 + [[]] * 3)))
    for record in (make_record(), make_record("zero-shot", federation={"rounds": 0})):
        assert "uploads  " not in shown(report.summary(record)).replace("refused", "")


def test_the_panel_of_a_diverged_run_has_no_score() -> None:
    record = make_record(proxy=0.7, accuracy=0.48, rows=100, loss=None)
    record = altered(record, {"gradient_error": {"points": [], "start": 0.5, "mean": None, "final": None}})
    text = shown(report.summary(record))
    assert "none: the model diverged" in text
    assert "48.0%" not in text
    assert "0.50 at the start, – on average, – at the end" in text


def test_summary_of_a_failed_and_of_an_unavailable_run() -> None:
    assert "failed: ValueError: no" in shown(report.summary(make_record(accuracy=None, status="failed")))
    record = make_record("zero-shot", accuracy=None, unavailable="no head [of its own]")
    assert "not available: no head [of its own]" in shown(report.summary(record))


# ---------------------------------------------------------------- foundation models by name and by hash


def of(record: Record, fm: str, digest: str = "h") -> Record:
    """The record as one of an FM called `fm` whose hash is `digest`."""
    return altered(record, {"identity.fm": fm, "identity.fm_hash": digest, "scenario.fm": fm})


def test_records_of_one_hash_share_a_section_whatever_the_folder_was_called() -> None:
    runs = [of(make_record(seed=seed), fm) for seed, fm in enumerate(("tiny", "renamed", "/home/somebody/tiny/"))]
    [section] = compare(runs).sections
    assert section.fm == "renamed", "the first of its names"
    [row] = section.rows
    assert sorted(row.runs) == [0, 1, 2]
    assert row.label == "fedpft"
    assert "somebody" not in render(compare(runs[2:]), "markdown"), "of a path the last part is told"


def test_another_fm_of_the_same_name_is_told_apart() -> None:
    runs = [of(make_record(seed=seed), "tiny", digest) for seed, digest in enumerate(("aaaaaaaa1", "bbbbbbbb2"))]
    [section] = compare(runs).sections
    assert {row.label for row in section.rows} == {"fedpft [fm_hash aaaaaaaa]", "fedpft [fm_hash bbbbbbbb]"}


def test_runs_that_read_other_inputs_are_told_apart() -> None:
    a, b = make_record(seed=0), make_record(seed=1)
    runs = [altered(a, {"identity.inputs_hash": "1"}), altered(b, {"identity.inputs_hash": "2"})]
    [section] = compare(runs).sections
    assert {row.label for row in section.rows} == {"fedpft [inputs_hash 1]", "fedpft [inputs_hash 2]"}


def test_a_cell_takes_records_by_the_folders_own_name_and_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = [of(make_record(seed=0), "tiny"), of(make_record(seed=1), "renamed"), of(make_record(seed=2), "other", "o")]
    for given in ("tiny", "tiny/", "./tiny", str(tmp_path / "tiny"), "/somewhere/else/tiny"):
        cells = [Cell("fedpft", "agnews-noniid", seed, given) for seed in range(3)]
        [section] = compare(runs, cells).sections
        assert section.fm == "tiny"
        [row] = section.rows
        assert (sorted(row.runs), row.expected) == ([0, 1], 3)
    assert [r.identity.seed for r in of_fm(runs, "tiny/")] == [0, 1]
    assert [r.identity.seed for r in of_fm(runs, "renamed")] == [0, 1]
    assert of_fm(runs, "absent") == []


def test_an_older_record_that_holds_a_path_is_of_its_cell() -> None:
    runs = [of(make_record(), "models/tiny")]
    [section] = compare(runs, [Cell("fedpft", "agnews-noniid", 0, "models/tiny")]).sections
    assert list(section.rows[0].runs) == [0]
