"""One measure by method, scenario or FM; the best in bold; committed tables that are no longer current."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from _records import altered, make_record
from helpers import Invoke
from test_ranking import BAD, GOOD, SAME, runs
from test_tables import compiled, shown

import fedbench
from fedbench.errors import FedbenchError
from fedbench.grid.file import load_grid
from fedbench.records.store import save
from fedbench.tables.asked import Asked
from fedbench.tables.committed import stale_tables
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.forms import render
from fedbench.tables.render.frames import printed
from fedbench.tables.render.terminal import terminal


def asked(comparison: Comparison, **options: object) -> dict[str, pd.DataFrame]:
    comparison.asked = Asked.of(**options)  # type: ignore[arg-type]
    return {table.title: table.frame.set_index(table.frame.columns[0]) for table in printed(comparison)}


def mixed() -> Comparison:
    first = [make_record("fedpft", 0, 0.8), make_record("fedpft", 1, 0.9), make_record("fedot", 0, 0.5)]
    others = make_record("fedpft", 0, 0.7, scenario="sst2-iid"), make_record("fedot", 0, 0.6, fm="bert-base")
    return compare([*first, *others])


def test_a_measure_by_method_by_scenario_and_by_fm() -> None:
    by_method = asked(mixed(), by="method")
    assert by_method["fedpft: accuracy"].loc["agnews-noniid", "minilm-l6"] == "85.0 ± 7.1 (2)"
    assert by_method["fedot: accuracy"].loc["agnews-noniid"].tolist() == ["60.0 (1)", "50.0 (1)"]
    assert list(by_method["fedot: accuracy"]) == ["bert-base", "minilm-l6"]
    by_scenario = asked(mixed(), by="scenario")
    assert list(by_scenario) == ["agnews-noniid: accuracy", "sst2-iid: accuracy"]
    assert by_scenario["agnews-noniid: accuracy"].loc["fedot", "bert-base"] == "60.0 (1)"
    by_fm = asked(mixed(), by="fm")
    assert by_fm["minilm-l6: accuracy"].loc["fedpft"].tolist() == ["85.0 ± 7.1 (2)", "70.0 (1)"]
    assert by_fm["minilm-l6: accuracy"].loc["fedot"].tolist() == ["50.0 (1)", "missing"]


def test_any_measure_can_be_the_metric_in_its_unit() -> None:
    found = asked(mixed(), metric="mb_up")["minilm-l6: mb up"]
    assert found.loc["fedpft", "agnews-noniid"] == "2.00 ± 0 (2)"
    assert asked(mixed(), metric="client_accuracy_worst_tenth")
    for options, complaint in (
        ({"metric": "mb_upp"}, "--metric mb_upp: no such measure; did you mean mb_up"),
        ({"metric": "simulated_time"}, "--metric simulated_time: it is one for each client profile"),
        ({"by": "seed"}, "--by seed: no such thing; use method, scenario, fm"),
    ):
        with pytest.raises(FedbenchError, match=complaint):
            Asked.of(**options)  # type: ignore[arg-type]


def test_the_best_is_bold_only_where_it_is_better_than_all_others() -> None:
    clear = compare([*runs("fedpft", *GOOD), *runs("fedprox", *BAD), *runs("head-only", *BAD)])
    close = compare([*runs("fedpft", *GOOD), *runs("fedot", *SAME), *runs("fedprox", *BAD)])
    for options in ({"rank": True}, {"by": "scenario"}, {"by": "fm"}):
        for comparison, bold in ((clear, True), (close, False)):
            comparison.asked = Asked.of(**options)  # type: ignore[arg-type]
            assert ("**90.0 ± 0.2 (4)**" in render(comparison, "markdown")) == bold
            assert ("\\textbf{90.0 $\\pm$ 0.2 (4)}" in render(comparison, "latex")) == bold
            assert "90.0 ± 0.2 (4)" in shown(terminal(comparison))
    clear.asked = Asked()
    assert "**" not in render(clear, "markdown"), "only where it is asked for"


def test_the_command_line_has_what_python_has(tmp_path: Path, invoke: Invoke) -> None:
    for record in (*runs("fedpft", *GOOD), *runs("fedprox", *BAD)):
        save(record, tmp_path / "records")

    def table(*options: str) -> str:
        code, out, _ = invoke("table", "--results", tmp_path, "--format", "markdown", *options)
        assert not code
        return out

    assert table() == fedbench.make_table(tmp_path)
    found = fedbench.make_table(tmp_path, rank=True, baseline="fedprox")
    assert table("--rank", "--baseline", "fedprox") == found
    assert table("--by", "method", "--metric", "mb_up") == fedbench.make_table(tmp_path, by="method", metric="mb_up")
    picture = tmp_path / "front.png"
    assert table("--picture", str(picture)) == table("--pareto") == fedbench.make_table(tmp_path, pareto=True)
    assert picture.stat().st_size > 1000


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="takes pdflatex")
def test_every_table_that_can_be_asked_for_compiles(tmp_path: Path) -> None:
    comparison = compare([*runs("fedpft", *GOOD), *runs("fedprox", *BAD), *runs("head-only", *BAD)])
    comparison.asked = Asked.of(["simulated_time"], within=["10MB"], to="80%", rank=True, pareto=True)
    said = compiled(render(comparison, "latex"), tmp_path)
    assert "Overfull" not in said
    comparison.asked = Asked.of(by="scenario")
    compiled(render(comparison, "latex"), tmp_path)


def test_latex_tables_are_whole() -> None:
    comparison = compare([*runs("fedpft", *GOOD), *runs("fedprox", *BAD)])
    comparison.asked = Asked.of(within=["10MB"], to="80%", rank=True, pareto=True)
    text = render(comparison, "latex")
    for word in ("table", "tabular"):
        assert text.count(f"\\begin{{{word}}}") == text.count(f"\\end{{{word}}}") > 0
    for block in text.split("\\begin{tabular}")[1:]:
        spec, body = block.split("\n", 1)
        columns = spec.count("r") + spec.count("l")
        rows = [line for line in body.split("\\end{tabular}")[0].splitlines() if line.rstrip().endswith("\\\\")]
        assert rows
        assert {line.replace("\\&", "").count("&") + 1 for line in rows} == {columns}


def test_a_stale_table_is_named_with_the_command_that_makes_it(tmp_path: Path, invoke: Invoke) -> None:
    record = make_record("fedpft", 0, 0.8, scenario="tweets-noniid")
    save(record, tmp_path / "records")
    grid = load_grid("quickstart")
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "quickstart.md"

    def check() -> tuple[int, str]:
        return invoke("table", "--check", "--results", tmp_path)[:2]

    path.write_text(render(compare([record], grid.cells(), grid.title, grid.reported), "markdown"))
    path.with_suffix(".csv").write_text(fedbench.make_table(tmp_path, grid="quickstart", format="csv"))
    assert check() == (0, "")
    save(altered(record, {"identity.seed": 0, "compute.resident_parameters": 5_000_000}), tmp_path / "records")
    code, out = check()
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()] == [f"{path.with_suffix('.csv')}", f"{path}"]
    again = f"fedbench table --grid quickstart --results {tmp_path} --format markdown > {path}"
    assert out.splitlines()[1] == f"{path}: not what the records say; make it anew: {again}"


def test_a_folder_without_tables_or_with_one_of_no_grid_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match=r"tables: there are no tables; write them there as GRID\.md"):
        list(stale_tables(tmp_path))
    save(make_record(), tmp_path / "records")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "nothing.md").write_text("")
    with pytest.raises(FedbenchError, match="there is no grid 'nothing'"):
        list(stale_tables(tmp_path))
