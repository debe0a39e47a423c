"""Grids: reading, expanding, and running with a runner that only pretends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _records import make_record

from fedbench.errors import FedbenchError
from fedbench.grid import Cell, Grid, Outcome, grid_names, load_grid, run_grid
from fedbench.records import Record, load, load_all, record_key, save


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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("methods = [", "not TOML"),
        ("methods = ['a']\nseeds = 1", "scenarios: field required"),
        ("methods = ['a', 'a']\nscenarios = ['s']\nseeds = 1", "methods: 'a' is there twice"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = 0", "seeds: list should have at least 1 item"),
        ("methods = ['a']\nscenarios = ['s']\nseeds = [-1]", "seeds are 0 or larger"),
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


@dataclass(frozen=True)
class FakePrepared:
    cell: Cell
    key: str
    identity: Mapping[str, Any]


@dataclass
class FakeRunner:
    """Makes records without training; `trouble` maps (method, seed) to what to raise, and where."""

    root: Path
    trouble: dict[tuple[str, int], tuple[str, BaseException]] = field(default_factory=dict)
    ran: list[tuple[str, int]] = field(default_factory=list)

    def prepare(self, cell: Cell) -> FakePrepared:
        self._maybe(cell, "prepare")
        identity = {
            "scenario": {"fm": "minilm-l6"}, "data_hash": "d", "fm_hash": "f", "precision": "fp32",
            "method": {"name": cell.method, "version": 2, "settings": {}},
        }  # fmt: skip
        return FakePrepared(cell, record_key(["run", cell.method, cell.scenario, cell.seed]), identity)

    def run(self, prepared: FakePrepared) -> Record:
        cell = prepared.cell
        self._maybe(cell, "run")
        made = make_record(cell.method, cell.seed, scenario=cell.scenario)
        record = made.model_copy(update={"identity": {**made.identity, "key": prepared.key}})
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
    first = run_grid(cells, runner, tmp_path, lambda i, c: seen.append(str(c)), lambda i, o: seen.append(o.status))
    assert statuses(first) == ["complete"] * 4
    assert seen[:2] == ["head-only on agnews-noniid, seed 0", "complete"]
    again = run_grid(cells, runner, tmp_path)
    assert statuses(again) == ["skipped"] * 4
    assert len(runner.ran) == 4
    assert [outcome.record for outcome in again] == [outcome.record for outcome in first]


def test_a_failure_is_recorded_with_its_traceback_and_the_rest_goes_on(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path, {("fedpft", 0): ("run", ValueError("loss is not finite"))})
    outcomes = run_grid(cells, runner, tmp_path)
    assert statuses(outcomes) == ["complete", "failed", "complete", "complete"]
    record = outcomes[1].record
    assert load(tmp_path / "agnews-noniid" / "fedpft" / f"s0-{record.key[:12]}.json") == record
    assert record.error is not None
    assert (record.error["type"], record.error["message"]) == ("ValueError", "loss is not finite")
    assert "in _maybe" in record.error["traceback"]
    assert 'File "fedbench/grid.py"' in record.error["traceback"]  # from the import folder on, not from the root
    assert record.identity["fm"] == "minilm-l6"
    assert record.identity["method_version"] == 2
    # Tried again, made good, and the failure is gone.
    runner.trouble.clear()
    assert statuses(run_grid(cells, runner, tmp_path)) == ["skipped", "complete", "skipped", "skipped"]
    assert {r.status for r in load_all(tmp_path)} == {"complete"}


def test_a_failure_before_the_key_is_known(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path, {("fedpft", 1): ("prepare", FedbenchError("agnews: no data"))})
    assert statuses(run_grid(cells, runner, tmp_path)) == ["complete", "complete", "complete", "failed"]
    (failed,) = [r for r in load_all(tmp_path) if r.status == "failed"]
    assert failed.identity["key"] == cells[3].key
    assert failed.identity["data_hash"] is None
    runner.trouble.clear()
    run_grid(cells, runner, tmp_path)
    assert len(load_all(tmp_path)) == 4
    assert {r.status for r in load_all(tmp_path)} == {"complete"}


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_goes_on_after_ctrl_c(tmp_path: Path, cells: list[Cell], where: str) -> None:
    runner = FakeRunner(tmp_path, {("head-only", 1): (where, KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        run_grid(cells, runner, tmp_path)
    assert [r.status for r in load_all(tmp_path)] == ["complete"] * 2
    runner.trouble.clear()
    assert statuses(run_grid(cells, runner, tmp_path)) == ["skipped", "skipped", "complete", "complete"]
    assert runner.ran == [("head-only", 0), ("fedpft", 0), ("head-only", 1), ("fedpft", 1)]


def test_a_damaged_record_is_made_anew(tmp_path: Path, cells: list[Cell]) -> None:
    runner = FakeRunner(tmp_path)
    record = run_grid(cells[:1], runner, tmp_path)[0].record
    path = tmp_path / "agnews-noniid" / "head-only" / f"s0-{record.key[:12]}.json"
    path.write_text("{")
    assert statuses(run_grid(cells[:1], runner, tmp_path)) == ["complete"]
    assert load(path) == record
