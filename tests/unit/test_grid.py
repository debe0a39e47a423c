"""Grids: reading, expanding, and running with a runner that only pretends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _records import altered, make_record

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell, Outcome, run_cells
from fedbench.grid.file import Grid, grid_names, load_grid
from fedbench.models.zoo.names import FMS
from fedbench.records.record import Record
from fedbench.records.store import load, load_all, record_key, save
from fedbench.registry import Registry
from fedbench.scenario.load import load_scenario


def write(folder: Path, text: str) -> str:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


SMALL = """
title = "Small"
methods = ["head-only", "fedpft"]
scenarios = ["agnews-iid", "agnews-noniid"]
seeds = 2

[[overrides]]
set = { "federation.rounds" = 3, name = "x", flag = true, layers = [0, 5] }

[[overrides]]
methods = ["fedpft"]
scenarios = ["agnews-noniid"]
set = { "federation.rounds" = 4, lr = 1e-3 }
"""


def test_expansion_order_and_settings(tmp_path: Path) -> None:
    cells = load_grid(write(tmp_path, SMALL)).cells()
    assert [(c.scenario, c.seed, c.method) for c in cells[:5]] == [
        ("agnews-iid", 0, "head-only"),
        ("agnews-iid", 0, "fedpft"),
        ("agnews-iid", 1, "head-only"),
        ("agnews-iid", 1, "fedpft"),
        ("agnews-noniid", 0, "head-only"),
    ]
    assert len(cells) == 8
    general = {"federation.rounds": "3", "name": "x", "flag": "true", "layers": "[0, 5]"}
    assert cells[4].settings == general
    assert cells[5].settings == {**general, "federation.rounds": "4", "lr": "0.001"}


def test_narrowing(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, SMALL))
    part = grid.only(methods=["fedpft"], scenarios=["agnews-noniid"], seeds=3)
    assert [(c.method, c.scenario, c.seed) for c in part.cells()] == [("fedpft", "agnews-noniid", s) for s in range(3)]
    assert part.cells()[0].settings["lr"] == "0.001"
    assert grid.only().cells() == grid.cells()
    with pytest.raises(FedbenchError, match="--methods fedptf: the grid has no such method; did you mean fedpft"):
        grid.only(methods=["fedptf"])


STUDY = """
methods = ["fedot", "fedpft"]
scenarios = ["qnli-iid"]
fms = ["bert-base", "roberta-base"]
seeds = 2

[[overrides]]
methods = ["fedpft"]
set = { t = 3, r = 96 }

[[variants]]
label = "t 5"
set = { t = 5 }

[[variants]]
label = "whole"
set = { }

[reported]
source = "A paper (2024)"
setting = { "federation.rounds" = 100, "methods.fedpft.t" = 10 }

[reported.figures.bert-base]
"fedpft [t 5]" = { qnli-iid = 87 }
"fedot [whole]" = { qnli-iid = { matched = 80.5, mismatched = 81 } }
"""


def test_fms_are_an_axis_and_variants_are_rows(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, STUDY))
    cells = grid.cells()
    assert [(c.fm, c.seed, c.row) for c in cells[:5]] == [
        ("bert-base", 0, "fedot [t 5]"),
        ("bert-base", 0, "fedot [whole]"),
        ("bert-base", 0, "fedpft [t 5]"),
        ("bert-base", 0, "fedpft [whole]"),
        ("bert-base", 1, "fedot [t 5]"),
    ]
    assert len(cells) == 2 * 2 * 4
    assert {c.fm for c in cells[8:]} == {"roberta-base"}
    # A variant's settings come after the overrides.
    assert [dict(c.settings) for c in cells[:4]] == [{"t": "5"}, {}, {"t": "5", "r": "96"}, {"t": "3", "r": "96"}]
    assert str(cells[2]) == "fedpft [t 5] on qnli-iid, bert-base, seed 0"
    assert grid.rows() == ["fedot [t 5]", "fedot [whole]", "fedpft [t 5]", "fedpft [whole]"]
    assert len({c.key for c in cells}) == len(cells)


def test_another_fm_takes_the_place_of_all_of_them(tmp_path: Path) -> None:
    part = load_grid(write(tmp_path, STUDY)).only(fm="minilm-l6")
    assert len(part.cells()) == 2 * 4
    assert {cell.fm for cell in part.cells()} == {"minilm-l6"}
    assert part.reported is not None
    assert [*part.reported.figures] == ["bert-base"]
    assert {cell.fm for cell in load_grid("quickstart").only(fm="minilm-l6").cells()} == {"minilm-l6"}


def test_reported_figures_are_numbers_by_test_set(tmp_path: Path) -> None:
    reported = load_grid(write(tmp_path, STUDY)).reported
    assert reported is not None
    assert reported.figures["bert-base"] == {
        "fedpft [t 5]": {"qnli-iid": {"": 87.0}},
        "fedot [whole]": {"qnli-iid": {"matched": 80.5, "mismatched": 81.0}},
    }


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (
            ("figures.bert-base", "figures.bert-bse"),
            r"reported\.figures: 'bert-bse' is not in the grid; did you mean bert",
        ),
        (
            ('"fedpft [t 5]" =', '"fedpft [t 6]" ='),
            r"figures\.bert-base: 'fedpft \[t 6\]' is not in .*did you mean fedpft \[",
        ),
        (('"fedpft [t 5]" =', "fedptf ="), r"reported\.figures\.bert-base: 'fedptf' is not in the grid"),
        (
            ("{ qnli-iid = 87 }", "{ qnli-idd = 87 }"),
            r"bert-base\.fedpft \[t 5\]: 'qnli-idd' is not .*did you mean qnli-iid",
        ),
        (("= 87 }", "= 870 }"), r"reported\.figures\.bert-base\.fedpft \[t 5\]\.qnli-iid: .*less than or equal to 100"),
        (("= 87 }", "= '87' }"), r"qnli-iid: input should be a valid dictionary"),
        (("= 87 }", "= {} }"), r"qnli-iid: dictionary should have at least 1 item"),
        (("source", "sorce"), r"reported\.so?u?rce: "),
        (("setting =", "settings ="), r"reported\.settings: .*did you mean setting\?"),
        (('label = "whole"', 'label = "t 5"'), r"variants: 't 5' is there twice"),
        (('label = "whole"', 'labl = "whole"'), r"variants\.1\.labl: unknown field; did you mean label\?"),
        (('"bert-base", "roberta-base"', '"bert-base", "bert-base"'), r"fms: 'bert-base' is there twice"),
        (("fms = [", "fm = ["), r"fm: unknown field; did you mean fms\?"),
    ],
)
def test_a_mistake_in_fms_variants_or_figures_is_named(tmp_path: Path, edit: tuple[str, str], complaint: str) -> None:
    assert edit[0] in STUDY
    name = write(tmp_path, STUDY.replace(*edit))
    with pytest.raises(FedbenchError, match=complaint) as caught:
        load_grid(name)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("methods = [", "not TOML"),
        ("methods = ['a']\nseeds = 1", "scenarios: field required"),
        ("methods = ['a', 'a']\nscenarios = ['s']\nseeds = 1", "methods: 'a' is there twice"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = 0", "seeds: list should have at least 1 item"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = [-1]", "seeds are 0 or larger"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = 1000000000", "more than 10000; list those to run"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = [10000000000000000000]", "seeds are 0 or larger, up to"),
        ("methods = ['../../a']\nscenarios = ['s']\nseeds = 1", "methods: '../../a' is no name"),
        ("methods = ['a']\nscenarios = ['/s']\nseeds = 1", "scenarios: '/s' is no name"),
        ("methods = ['a']\nscenarios = ['s.toml']\nseeds = 1", "scenarios: 's.toml' is a file: bring it with --plugin"),
        ("title = 2024-05-01", "title: 2024-05-01 is a date"),
        (
            "methods = ['a']\nscenarios = ['s']\nseeds = 1\n[[overrides]]\nset = { lr = 2024-05-01 }",
            "overrides.0.set.lr: 2024-05-01 is a date",
        ),
        ('methods = ["\\u001b[2J"]', "methods.0: text may not hold control characters"),
        ("method = ['a']\nmethods = ['a']\nscenarios = ['s']\nseeds = 1", "did you mean methods"),
        (
            "methods = ['a']\nscenarios = ['s']\nseeds = 1\n[[overrides]]\nmethods = ['b']\nset = {}",
            "'b' is not in the grid",
        ),
    ],
)
def test_bad_grid_files_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    name = write(tmp_path, text)
    with pytest.raises(FedbenchError, match=complaint) as caught:
        load_grid(name)
    assert str(caught.value).startswith(name)


def test_a_grid_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(STUDY, encoding="utf-8-sig")
    assert load_grid(str(path)) == load_grid(write(tmp_path, STUDY))


def test_a_setting_that_is_no_number_is_named_by_its_cell(tmp_path: Path) -> None:
    from fedbench.methods.fedavg_lora import FedAvgLora
    from fedbench.run.prepare import make_method, parse_values
    from fedbench.run.request import RunRequest

    text = "methods = ['fedavg-lora']\nscenarios = ['s']\nseeds = 1\n[[overrides]]\nset = { lr = inf }"
    (cell,) = load_grid(write(tmp_path, text)).cells()
    with pytest.raises(FedbenchError, match="s: hyper-parameter 'lr' of fedavg-lora: .*finite number, not inf"):
        make_method(FedAvgLora, parse_values(cell.settings), RunRequest("fedavg-lora", "s"))


def test_unknown_grid_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="there is no grid 'agnew'; did you mean agnews"):
        load_grid("agnew")
    with pytest.raises(FedbenchError, match="cannot be read"):
        load_grid(str(tmp_path / "none.toml"))


def test_built_in_grids() -> None:
    assert {"agnews", "quickstart"} <= set(grid_names())
    agnews = load_grid("agnews")
    assert set(agnews.methods) == {"head-only", "fedot", "fedpft", "fedavg-lora", "centralised-lora", "zero-shot"}
    assert (agnews.scenarios, agnews.seeds) == (["agnews-noniid"], [0, 1, 2])
    assert len(load_grid("quickstart").cells()) == 3


PAPER = ("paper-iid", "paper-dirichlet", "paper-ablation", "paper-parameters", "paper-vision")


def test_the_papers_grids_and_one_figure_of_each_table() -> None:
    assert set(PAPER) <= set(grid_names())
    figures = {}
    for name in PAPER:
        grid = load_grid(name)
        assert grid.reported is not None
        assert "2404.11536" in grid.reported.source
        assert "the paper reports no deviation" in grid.reported.notes
        assert [*grid.reported.figures] == grid.fms
        figures[name] = grid.reported.figures
    iid, skew = figures["paper-iid"], figures["paper-dirichlet"]
    assert iid["bert-base"]["fedpft"]["mnli-iid"] == {"matched": 78.6, "mismatched": 79.0}
    assert iid["roberta-base"]["fedavg-lora"]["qqp-iid"] == {"": 88.3}
    assert skew["bert-base"]["fedot"]["sst2-dir5"] == {"": 89.9}
    assert skew["roberta-base"]["fedpft"]["qnli-dir10"] == {"": 88.1}
    assert figures["paper-ablation"]["roberta-base"]["fedpft-n"]["qnli-iid"] == {"": 78.9}
    assert figures["paper-parameters"]["bert-base"]["fedpft [t 20]"]["qnli-iid"] == {"": 87.1}
    assert figures["paper-parameters"]["roberta-base"]["fedpft [p 0.3]"]["qnli-iid"] == {"": 87.8}
    assert figures["paper-vision"] == {"vit-base": {}}
    # Every cell of the text tables has a figure.
    for name in PAPER[:-1]:
        grid = load_grid(name)
        for rows in figures[name].values():
            assert {row: list(scenarios) for row, scenarios in rows.items()} == dict.fromkeys(
                grid.rows(), grid.scenarios
            )


@pytest.mark.parametrize("name", grid_names())
def test_every_cell_of_a_built_in_grid_resolves(name: str) -> None:
    from fedbench.run.prepare import make_method, parse_values, scenario_settings, split_settings
    from fedbench.run.request import RunRequest

    registry, grid = Registry(), load_grid(name)
    # At another seed only the seed is another.
    for cell in grid.only(seeds=1).cells():
        kind = registry.load_method(cell.method)
        path, split = registry.find_scenario(cell.scenario)
        mine, rest = split_settings(cell.settings, list(kind.model_fields), cell.method)
        for profile in (None, "small") if name in PAPER else (None,):
            scenario = load_scenario(path, split, profile, rest)
            given = {key: value for key, (value, _) in scenario_settings(kind, scenario).items()}
            method = make_method(kind, given | parse_values(mine), RunRequest(cell.method, cell.scenario))
            assert (scenario.name, method.name) == (cell.scenario, cell.method)
            if cell.fm:
                assert cell.fm in FMS
            if name in PAPER:
                # In full the paper's federation, and in small not.
                assert grid.reported is not None
                resolved = {
                    "split": scenario.split.model_dump(), "federation": scenario.federation.model_dump(),
                    "dataset": scenario.dataset.model_dump(),
                }  # fmt: skip
                stated = {k: v for k, v in grid.reported.setting.items() if k.split(".")[0] in resolved}
                assert len(stated) >= 6
                differ = [
                    key
                    for key, value in stated.items()
                    if resolved[key.split(".")[0]][key.split(".")[1]] != (None if value == "none" else value)
                ]
                assert ("federation.rounds" in differ) == (profile == "small")
                assert profile == "small" or differ == []


@dataclass(frozen=True)
class FakePrepared:
    cell: Cell
    key: str
    identity: Mapping[str, Any]
    fm_name: str = "minilm-l6"


@dataclass
class FakeRunner:
    """Makes records without training; `trouble` maps (method, seed) to what to raise, and where."""

    root: Path
    trouble: dict[tuple[str, int], tuple[str, BaseException]] = field(default_factory=dict)
    ran: list[tuple[str, int]] = field(default_factory=list)

    def prepare(self, cell: Cell) -> FakePrepared:
        self._maybe(cell, "prepare")
        identity = {
            "scenario": {}, "data_hash": "d", "fm_hash": "f", "precision": "fp32",
            "method": {"name": cell.method, "version": 2, "settings": {}},
        }  # fmt: skip
        return FakePrepared(cell, record_key(["run", cell.method, cell.scenario, cell.seed]), identity)

    def run(self, prepared: FakePrepared) -> Record:
        cell = prepared.cell
        self._maybe(cell, "run")
        made = make_record(cell.method, cell.seed, scenario=cell.scenario)
        record = altered(made, {"identity.key": prepared.key})
        save(record, self.root)
        self.ran.append((cell.method, cell.seed))
        return record

    def _maybe(self, cell: Cell, where: str) -> None:
        place, error = self.trouble.get((cell.method, cell.seed), ("", None))
        if place == where and error is not None:
            raise error


@pytest.fixture
def cells() -> list[Cell]:
    content = {"methods": ["head-only", "fedpft"], "scenarios": ["agnews-noniid"], "seeds": 2}
    return Grid.model_validate(content).cells()


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_finished_cells_are_skipped(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path)
    seen: list[str] = []
    first = run_cells(cells, runner, tmp_path, lambda i, c: seen.append(str(c)), lambda i, o: seen.append(o.status))
    assert statuses(first) == ["complete"] * 4
    assert seen[:2] == ["head-only on agnews-noniid, seed 0", "complete"]
    again = run_cells(cells, runner, tmp_path)
    assert statuses(again) == ["skipped"] * 4
    assert len(runner.ran) == 4
    assert [outcome.record for outcome in again] == [outcome.record for outcome in first]


def test_a_failure_is_recorded_with_its_traceback_and_the_rest_goes_on(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path, {("fedpft", 0): ("run", ValueError("loss is not finite"))})
    outcomes = run_cells(cells, runner, tmp_path)
    assert statuses(outcomes) == ["complete", "failed", "complete", "complete"]
    record = outcomes[1].record
    assert load(tmp_path / "agnews-noniid" / "fedpft" / f"s0-{record.key[:12]}.json") == record
    assert record.error is not None
    assert (record.error.type, record.error.message) == ("ValueError", "loss is not finite")
    assert "in _maybe" in record.error.traceback
    assert 'File "fedbench/grid/cells.py"' in record.error.traceback  # from the import folder on, not from the root
    assert record.identity.fm == "minilm-l6"
    assert record.identity.method_version == 2
    # Tried again, made good, and the failure is gone.
    runner.trouble.clear()
    assert statuses(run_cells(cells, runner, tmp_path)) == ["skipped", "complete", "skipped", "skipped"]
    assert {r.status for r in load_all(tmp_path)} == {"complete"}


def test_a_failure_before_the_key_is_known(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path, {("fedpft", 1): ("prepare", FedbenchError("agnews: no data"))})
    assert statuses(run_cells(cells, runner, tmp_path)) == ["complete", "complete", "complete", "failed"]
    (failed,) = [r for r in load_all(tmp_path) if r.status == "failed"]
    assert failed.identity.key == cells[3].key
    assert failed.identity.data_hash is None
    runner.trouble.clear()
    run_cells(cells, runner, tmp_path)
    assert len(load_all(tmp_path)) == 4
    assert {r.status for r in load_all(tmp_path)} == {"complete"}


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_goes_on_after_ctrl_c(tmp_path: Path, cells: list[Cell], where: str) -> None:
    runner = FakeRunner(tmp_path, {("head-only", 1): (where, KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, runner, tmp_path)
    assert [r.status for r in load_all(tmp_path)] == ["complete"] * 2
    runner.trouble.clear()
    assert statuses(run_cells(cells, runner, tmp_path)) == ["skipped", "skipped", "complete", "complete"]
    assert runner.ran == [("head-only", 0), ("fedpft", 0), ("head-only", 1), ("fedpft", 1)]


def test_a_damaged_record_is_made_anew(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path)
    record = run_cells(cells[:1], runner, tmp_path)[0].record
    path = tmp_path / "agnews-noniid" / "head-only" / f"s0-{record.key[:12]}.json"
    path.write_text("{")
    assert statuses(run_cells(cells[:1], runner, tmp_path)) == ["complete"]
    assert load(path) == record
