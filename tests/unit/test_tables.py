"""Tables: hand-computed statistics, what is missing or not comparable, and the four renderings."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _records import make_record
from rich.console import Console, RenderableType

from fedbench import report, tables
from fedbench.errors import FedbenchError
from fedbench.grid import Cell, Grid, load_grid
from fedbench.records import Record, save
from fedbench.render import accuracy_text, beside_frame, comments, overview_frame, render, terminal
from fedbench.statistics import Summary, binomial_standard_error, bootstrap, holm, paired_test
from fedbench.tables import compare, of_fm


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


def test_bootstrap_over_seeds_by_hand() -> None:
    # Seed 0 differs in every row, seed 1 in none: resampled seeds give 0, 50 or 100 with odds 1 : 2 : 1.
    right, wrong = np.ones(20, dtype=bool), np.zeros(20, dtype=bool)
    (found,) = bootstrap({"a": {0: right, 1: right}, "b": {0: wrong, 1: right}}, [("a", "b")])
    assert (found.mean, found.low, found.high, found.seeds) == (50.0, 0.0, 100.0, 2)


def test_bootstrap_over_rows_matches_the_normal_interval() -> None:
    # One seed; a is right in 60 of 400 rows where b is wrong: mean 0.15, standard error sqrt(.15 * .85 / 400) = .01785.
    a = np.ones(400, dtype=bool)
    b = np.arange(400) >= 60
    (found,) = bootstrap({"a": {3: a}, "b": {3: b}}, [("a", "b")])
    assert found.mean == pytest.approx(15.0)
    assert found.low == pytest.approx(15 - 1.96 * 1.785, abs=0.4)
    assert found.high == pytest.approx(15 + 1.96 * 1.785, abs=0.4)
    # The rows are shared: equal answers leave no uncertainty about their difference.
    (same,) = bootstrap({"a": {3: b}, "b": {3: b}}, [("a", "b")])
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seeds", [1, 2, 3, 6])
def test_an_interval_depends_on_its_own_pair_alone(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    runs = {name: {s: rng.random(50) < rng.uniform(0.5, 0.9) for s in range(seeds)} for name in "abcd"}
    (alone,) = bootstrap({name: runs[name] for name in "cd"}, [("c", "d")])
    *others, among = bootstrap(runs, [("a", "b"), ("d", "c"), ("c", "d")])
    assert among == alone
    assert (others[1].low, others[1].high) == (pytest.approx(-alone.high), pytest.approx(-alone.low))


def test_bootstrap_takes_the_draws_of_few_seeds_equally_often() -> None:
    # Rows do not vary here. Of 27 draws of three seeds one has seed 0 alone, which is more than a fortieth.
    right, wrong = np.ones(20, dtype=bool), np.zeros(20, dtype=bool)
    runs = {"a": {0: right, 1: wrong, 2: wrong}, "b": dict.fromkeys(range(3), wrong)}
    (found,) = bootstrap(runs, [("a", "b")])
    assert (found.low, found.high) == (0.0, 100.0)
    (same,) = bootstrap(runs, [("a", "b")], resamples=2011)
    assert (same.low, same.high) == (0.0, 100.0)


def test_headroom_uses_shared_seeds_only() -> None:
    records = [*accuracies("fedavg-lora", [0.90, 0.92, 0.10]), *accuracies("head-only", [0.80, 0.80])]
    (section,) = compare(records).sections
    assert section.headroom is not None
    assert section.headroom.mean == pytest.approx(11.0)
    assert section.headroom.seeds == 2
    line = comments(section)[0]
    assert line.startswith("headroom, fedavg-lora minus head-only: +11.0 points, 95% interval +")
    assert "cannot rank" not in line


def test_headroom_that_holds_zero_says_so_and_missing_headroom_is_said() -> None:
    (section,) = compare([*accuracies("fedavg-lora", [0.8]), *accuracies("head-only", [0.8])]).sections
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
    scores = {**record.accuracy, "test_name": "matched", "extra_tests": extra}
    return record.model_copy(update={"accuracy": scores})


def beside_the_paper(fm: str | None = None) -> tables.Comparison:
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
        ["fedavg-lora", "missing", "missing", "missing", "missing"],
        ["  reported", "91.6", "88.4", "80.7 / 81.6", "87.8"],
        ["fedot", "missing", "missing", "missing", "failed"],
        ["  reported", "90.4", "83.9", "74.9 / 74.9", "81.6"],
        ["fedpft", "missing", "90.0 ± 10.0 (3)", "70.0 / 60.0 (1/3)", "missing"],
        ["  reported", "91.6", "87.5", "78.6 / 79.0", "86.3"],
    ]
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
    record.accuracy["test_name"] = "other"
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
    assert line["mb_up_per_client_round"] == pytest.approx(0.5)  # 2 MB over 3 arrived and 1 refused
    assert line["gradient_error_start"] == 0.5
    assert line["exposed_verbatim"] == 0.7
    assert line["resident_parameters"] == 16_400_000


def test_unequal_budgets_and_an_in_domain_corpus_are_said() -> None:
    a, b = make_record("fedpft", proxy=0.7), make_record("fedot", proxy=0.7)
    assert not [note for note in compare([a, b]).sections[0].notes if "differ" in note or "in-domain" in note]
    b = b.model_copy(update={"compute": {**b.compute, "resident_parameters": 16_800_000, "local_steps": 800}})
    public = {"name": "tweets", "in_domain": True}
    a, b = (r.model_copy(update={"scenario": {**r.scenario, "public": public}}) for r in (a, b))
    notes = compare([a, b]).sections[0].notes
    assert "the public corpus is in-domain, which flatters proxies" in notes
    assert "budgets of the proxy methods differ: local steps: fedot 800, fedpft 750" in notes
    assert any("parameters held at a client: fedot 16,800,000, fedpft 16,400,000" in note for note in notes)


def test_the_code_that_made_the_runs_is_named() -> None:
    def made_by(seed: int, git: dict[str, object] | None) -> Record:
        record = make_record("fedot", seed, 0.8)
        return record.model_copy(update={"provenance": {**record.provenance, "git": git}})

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
        "from fedbench import grid, records, render, report, tables\n"
        "found = records.load_all(Path(sys.argv[1]))\n"
        "chosen = grid.load_grid('paper-iid')\n"
        "comparison = tables.compare(found, chosen.cells(), '', chosen.reported)\n"
        "[render.render(comparison, form) for form in ('markdown', 'latex', 'csv')]\n"
        "comparison = tables.compare(found, grid.load_grid('agnews').cells())\n"
        "[render.render(comparison, form) for form in ('markdown', 'latex', 'csv')]\n"
        "Console().print(render.terminal(comparison), report.summary(found[0]))\n"
        "sys.exit(','.join(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


def test_summary_of_a_failed_and_of_an_unavailable_run() -> None:
    assert "failed: ValueError: no" in shown(report.summary(make_record(accuracy=None, status="failed")))
    record = make_record("zero-shot", accuracy=None, unavailable="no head [of its own]")
    assert "not available: no head [of its own]" in shown(report.summary(record))


# ---------------------------------------------------------------- foundation models by name and by hash


def of(record: Record, fm: str, digest: str = "h") -> Record:
    """The record as one of an FM called `fm` whose hash is `digest`."""
    identity = {**record.identity, "fm": fm, "fm_hash": digest}
    return record.model_copy(update={"identity": identity, "scenario": {**record.scenario, "fm": fm}})


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
    runs = [
        r.model_copy(update={"identity": {**r.identity, "inputs_hash": digest}}) for r, digest in ((a, "1"), (b, "2"))
    ]
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
    assert [r.identity["seed"] for r in of_fm(runs, "tiny/")] == [0, 1]
    assert [r.identity["seed"] for r in of_fm(runs, "renamed")] == [0, 1]
    assert of_fm(runs, "absent") == []


def test_an_older_record_that_holds_a_path_is_of_its_cell() -> None:
    runs = [of(make_record(), "models/tiny")]
    [section] = compare(runs, [Cell("fedpft", "agnews-noniid", 0, "models/tiny")]).sections
    assert list(section.rows[0].runs) == [0]
