"""The face of the package: what `import fedbench` offers, called on small real runs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_overloads

import pandas as pd
import pytest
from _records import make_record
from helpers import save_tiny_bert

import fedbench
from fedbench.api import local, messages, sides
from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import load, save
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest
from fedbench.tables.compare import compare

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ("run_method", "run_grid", "make_table", "read_records")
ASKED: dict[str, Any] = {"scenario": "tweets-noniid", "profile": "smoke", "device": "cpu", "settings": {"rounds": 1}}


class Heard:
    """A progress that keeps the names of the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
        self.phases.append(name)

    def advance(self, n: int = 1, **values: float | str) -> None:
        pass


@dataclass
class Made:
    """A run that was made: its results folder, its record, and the phases it went through."""

    results: Path
    record: Record
    phases: list[str]


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert", layers=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fm: Path) -> Made:
    """One run made by keyword arguments."""
    results, heard = tmp_path_factory.mktemp("made") / "runs", Heard()
    record = fedbench.run_method(method="head-only", fm=fm, results=results, progress=heard, **ASKED)
    return Made(results, record, heard.phases)


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import fedbench; new = set(sys.modules) - before\n"
        "assert fedbench.__all__ and 'fedbench.api.sides' not in new\n"
        "sys.exit(','.join(sorted({'torch', 'pydantic', 'pandas', 'numpy', 'typer', 'rich'} & new)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_asking_for_a_record_or_an_error_loads_no_torch() -> None:
    script = (
        "import sys; import fedbench\n"
        "fedbench.FedbenchError, fedbench.Record, fedbench.RunRequest, fedbench.__version__\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there_and_describes_itself() -> None:
    for name in fedbench.__all__:
        assert name in dir(fedbench)
        found = getattr(fedbench, name)
        if name != "__version__":
            assert inspect.getdoc(found), name
    assert {"Returns", "Raises"} <= set(fedbench.run_method.__doc__.split())  # type: ignore[union-attr]
    assert fedbench.Method is sides.Method and fedbench.Server is sides.Server and fedbench.Client is sides.Client
    assert fedbench.Message is messages.Message
    assert (fedbench.LocalTask, fedbench.LocalResult) == (local.LocalTask, local.LocalResult)
    assert fedbench.AdamW(lr=1e-3).weight_decay == 0.0
    assert issubclass(fedbench.FedbenchError, Exception)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedbench' has no attribute 'run_methods'"):
        fedbench.run_methods  # type: ignore[attr-defined]  # noqa: B018


def test_no_public_name_is_that_of_a_room() -> None:
    """A room that is imported becomes an attribute of the package, and would hide what has its name."""
    folder = Path(fedbench.__file__).parent
    rooms = {path.name.removesuffix(".py") for path in folder.iterdir()}
    assert not rooms & set(fedbench.__all__)
    for name in FUNCTIONS:
        (
            import_module("fedbench.run.run"),
            import_module("fedbench.records.store"),
            import_module("fedbench.grid.cells"),
        )
        assert callable(getattr(fedbench, name))


def test_keyword_arguments_are_the_fields_of_a_request_with_its_defaults() -> None:
    (by_request, by_fields) = map(inspect.signature, get_overloads(fedbench.run_method))
    assert "request" in by_request.parameters
    wanted = {field.name: field.default for field in fields(RunRequest)}
    found = {name: parameter.default for name, parameter in by_fields.parameters.items() if name != "progress"}
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"method", "scenario", "settings"}:
        assert found[name] == (str(wanted[name]) if name == "results" else wanted[name]), name


def test_a_run_by_keyword_arguments_returns_the_record_it_saved(made: Made, fm: Path) -> None:
    results, record = made.results, made.record
    (path,) = results.glob("records/tweets-noniid/head-only/s0-*.json")
    assert load(path) == record
    assert record.status == "complete" and record.scenario.federation.rounds == 1
    assert "set-up" in made.phases


def test_a_request_is_the_run_that_its_fields_are(made: Made, fm: Path, tmp_path: Path) -> None:
    request = RunRequest(
        method="head-only", scenario="tweets-noniid", fm=str(fm), profile="smoke", device="cpu",
        settings={"rounds": "1"}, results=tmp_path,
    )  # fmt: skip
    record = fedbench.run_method(request)
    assert record.key == made.record.key
    with pytest.raises(TypeError, match="a request or its fields, not both; leave out seed"):
        fedbench.run_method(request, seed=1)  # type: ignore[call-overload]


def test_settings_may_be_numbers_and_mean_what_their_texts_mean(fm: Path, tmp_path: Path) -> None:
    given = {"lr": 2e-3, "federation.max_steps": None, "federation.rounds": 0, "federation.fraction": 1}
    numbers = fedbench.run_method(method="head-only", fm=fm, results=str(tmp_path / "a"), **ASKED | {"settings": given})
    texts = {"lr": "0.002", "federation.max_steps": "none", "federation.rounds": "0", "federation.fraction": "1"}
    again = fedbench.run_method(method="head-only", fm=str(fm), results=tmp_path / "b", **ASKED | {"settings": texts})
    assert numbers.method.settings["lr"] == 2e-3 and numbers.scenario.federation.max_steps is None
    assert numbers.key == again.key


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "fedptf"}, "no method 'fedptf'; did you mean fedp"),
        ({"scenario": "tweets-nonid"}, "did you mean tweets-noniid"),
        ({"seed": -1}, "--seed -1: below zero"),
        ({"seed": 2**63}, "too large; use at most 9223372036854775807"),
        ({"settings": {"learning_rate": 1}}, "did you mean lr?"),
        ({"plugins": "no/such.py"}, "--plugin no/such.py: no such"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_bad_input_is_a_fedbench_error(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match=message):
        fedbench.run_method(**{"method": "head-only", "results": tmp_path, **ASKED, **asked})


def test_a_field_that_no_request_has_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="round"):
        fedbench.run_method(method="head-only", scenario="tweets-iid", round=1)  # type: ignore[call-overload]


def test_a_plugin_given_as_one_path_is_found(tmp_path: Path, fm: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("from fedbench.methods.head_only import HeadOnly\n\n\nclass Mine(HeadOnly):\n    name = 'mine'\n")
    asked = ASKED | {"settings": {"rounds": 0}}
    record = fedbench.run_method(method="mine", fm=fm, plugins=plugin, results=tmp_path, **asked)
    assert record.identity.method == "mine"


def test_a_grid_returns_what_became_of_every_cell_and_skips_what_is_finished(tmp_path: Path, fm: Path) -> None:
    grid = tmp_path / "two.toml"
    grid.write_text(
        'methods = ["head-only", "zero-shot"]\nscenarios = ["tweets-iid"]\nseeds = 1\n'
        "[[overrides]]\nset = { rounds = 1 }\n"
    )
    asked: dict[str, Any] = {"fm": fm, "profile": "smoke", "device": "cpu", "results": tmp_path / "runs"}
    outcomes = fedbench.run_grid(grid, **asked)
    assert [(str(each.cell.method), each.status) for each in outcomes] == [
        ("head-only", "complete"), ("zero-shot", "complete"),
    ]  # fmt: skip
    again = fedbench.run_grid(grid, methods="head-only", **asked)
    assert [each.status for each in again] == ["skipped"]
    assert again[0].record == outcomes[0].record
    table = fedbench.make_table(tmp_path / "runs", grid=grid, fm=fm)
    assert "head-only" in table and "tweets-iid" in table


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"methods": "fedptf"}, "--methods fedptf: the grid has no such method"),
        ({"seeds": 0}, "--seeds 0: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "--seeds .1, 1.: 1 is there twice"),
        ({"seeds": [-1]}, "seeds are 0 or larger"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_it_runs(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match=message):
        fedbench.run_grid("agnews", results=tmp_path / "runs", **asked)
    assert not (tmp_path / "runs").exists()


def test_a_grid_of_methods_that_nothing_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('methods = ["nothing-such"]\nscenarios = ["tweets-iid"]\nseeds = 1\n')
    with pytest.raises(FedbenchError, match="no method 'nothing-such'"):
        fedbench.run_grid(tmp_path / "g.toml", results=tmp_path / "runs")


@pytest.mark.parametrize(
    ("format", "mark"), [("markdown", "| method"), ("latex", r"\begin{tabular}"), ("csv", "scenario,fm")]
)
def test_a_table_comes_in_each_format(made: Made, format: Any, mark: str) -> None:
    text = fedbench.make_table(made.results, format=format)
    assert mark in text and "head-only" in text


def test_a_table_of_what_is_not_there_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="there are no records of agnews-iid"):
        fedbench.make_table(made.results, scenarios="agnews-iid")
    with pytest.raises(FedbenchError, match="there are no records; make some"):
        fedbench.make_table(tmp_path)
    with pytest.raises(FedbenchError, match="format 'html': no such format; use markdown, latex or csv"):
        fedbench.make_table(made.results, format="html")  # type: ignore[arg-type]


def test_a_frame_has_one_row_a_record_with_what_the_record_says(made: Made) -> None:
    frame, record = fedbench.read_records(made.results), made.record
    assert isinstance(frame, pd.DataFrame) and len(frame) == 1
    row = frame.iloc[0]
    assert (row["method"], row["scenario"], row["seed"]) == ("head-only", "tweets-noniid", 0)
    assert (row["key"], row["status"], row["fault"]) == (record.key, "complete", "")
    assert row["accuracy"] == record.accuracy.plug_in.accuracy
    assert row["rounds"] == 1 and row["clients"] == record.scenario.split.clients
    assert json.loads(row["settings"]) == record.method.settings
    up, down = record.communication.up.bytes, record.communication.down.bytes
    assert row["mb_up"] * 1e6 == pytest.approx(up)
    assert (row["mb_down"] + row["mb_setup"]) * 1e6 == pytest.approx(down)
    assert row["seconds"] == pytest.approx(sum(record.compute.seconds.values()))
    assert row["seconds_local"] == record.compute.seconds["local"]


def test_measures_of_a_frame_are_those_of_the_table(tmp_path: Path) -> None:
    records = [make_record(method, 3, proxy=proxy) for method, proxy in (("fedot", 0.7), ("fedpft", 0.6))]
    for record in records:
        save(record, tmp_path / "records")
    frame, table = fedbench.read_records(tmp_path).set_index("method"), compare(records).frame().set_index("method")
    measures = [name for name in table.columns if f"{name}_std" in table.columns]
    assert {"accuracy", "gap", "mb_down", "gradient_error_mean", "trainable_parameters"} <= set(measures)
    for method in ("fedot", "fedpft"):
        ours, theirs = frame.loc[method, measures].astype(float), table.loc[method, measures].astype(float)
        pd.testing.assert_series_equal(ours, theirs)


def test_only_runs_that_differ_in_their_seed_alone_share_a_configuration(tmp_path: Path) -> None:
    others = (
        make_record("fedpft", 0, settings={"lr": 0.1}),
        make_record("fedpft", 0, federation={"rounds": 15, "batch_size": 4}),
        make_record("fedpft", 0, data_hash="e" * 64),
        make_record("fedpft", 0, scenario="agnews-iid"),
        make_record("fedot", 0),
    )
    for record in (make_record("fedpft", 0), make_record("fedpft", 1), *others):
        save(record, tmp_path / "records")
    frame = fedbench.read_records(tmp_path)
    sizes = frame.groupby("configuration")["seed"].agg(["count", "nunique"])
    assert sorted(sizes["count"]) == [1] * len(others) + [2]
    assert (sizes["count"] == sizes["nunique"]).all()
    assert frame["configuration"].str.len().eq(12).all()


def test_a_frame_says_why_a_row_has_no_accuracy_or_one_that_is_not_to_be_ranked(tmp_path: Path) -> None:
    for record in (
        make_record("fedpft", 0, status="failed"),
        make_record("fedpft", 1, loss=None),
        make_record("fedpft", 2, arrived=[[]] * 15),
        make_record("fedpft", 3),
        make_record("zero-shot", 0, None, unavailable="no head for this task"),
    ):
        save(record, tmp_path / "records")
    frame = fedbench.read_records(tmp_path).set_index(["method", "seed"]).sort_index()
    assert frame["accuracy"].notna().tolist() == [False, False, True, True, False]
    faults = frame["fault"].tolist()
    assert faults[0] and faults[1].startswith("diverged")
    assert faults[2] == "no upload ever arrived: the model is as it started"
    assert faults[3:] == ["", "no head for this task"]
    assert frame.loc[("fedpft", 0), "status"] == "failed"
    assert str(frame["rounds"].dtype) == "Int64" and str(frame["accuracy"].dtype) == "float64"


def test_the_page_about_python_runs_as_it_stands(
    fm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny FM, in a folder of its own."""
    page = (ROOT / "docs/python.md").read_text("utf-8")
    monkeypatch.setattr("fedbench.run.prepare.prepare", lambda request: prepare(replace(request, fm=str(fm))))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec("\n".join(blocks), {"__name__": "page"})
    out = capsys.readouterr().out
    assert "complete" in out and "did you mean fedpft?" in out
    assert {path.parent.name for path in tmp_path.glob("runs/records/*/*/*.json")} == {"fedpft", "head-only", "fedot"}
    assert set(FUNCTIONS) <= set(re.findall(r"fedbench\.(\w+)\(", page))


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="there is no folder `records` in it"):
        fedbench.read_records(tmp_path)
    (tmp_path / "records").mkdir()
    with pytest.raises(FedbenchError, match="there are no records; make some"):
        fedbench.read_records(tmp_path)


def test_the_committed_records_make_a_frame() -> None:
    results = ROOT / "results"
    frame = fedbench.read_records(results)
    assert len(frame) == len(list((results / "records").rglob("*.json")))
    assert frame["key"].is_unique
    averaged = frame.groupby("configuration")["seed"]
    assert (averaged.count() == averaged.nunique()).all() and averaged.count().max() == 3
