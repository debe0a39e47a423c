"""Measures that a table has only where it is asked for them: aggregation error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _records import make_record
from pydantic import ValidationError

from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.tables.asked import Asked
from fedbench.tables.folder import compare_folder
from fedbench.tables.frame import frame_of
from fedbench.tables.render.forms import render

POINTS = [
    {"round": 0, "factors": 0.5, "model": 0.1},
    {"round": 1, "factors": None, "model": None},
    {"round": 2, "factors": 0.3, "model": 0.3},
]


def measured(method: str = "fedex-lora", **changes: Any) -> Record:
    block = {"points": POINTS, "mean": 0.2, "final": 0.3} | changes
    return Record.model_validate({**make_record(method).to_json(), "aggregation_error": block})


def test_a_record_keeps_it_and_holds_it_to_its_points() -> None:
    assert Record.model_validate(measured().to_json()) == measured()
    for wrong, complaint in (({"mean": 0.25}, "mean: 0.25, but its points say 0.2"), ({"final": 0.1}, "final")):
        with pytest.raises(ValidationError, match=rf"aggregation_error\.{complaint}"):
            measured(**wrong)
    with pytest.raises(ValidationError, match="none of them has a number"):
        measured(points=POINTS[1:2])


def test_a_table_has_a_column_for_a_measure_that_is_asked_for(tmp_path: Path) -> None:
    for record in (measured(), make_record("head-only")):
        save(record, tmp_path / "records")
    asked = compare_folder(tmp_path, asked=Asked.of(measures=["aggregation_error", "factor_averaging_error"]))
    plain = compare_folder(tmp_path)
    for form in ("markdown", "latex", "csv"):
        assert "aggregation" not in render(plain, form)
    lines = render(asked, "markdown").splitlines()
    header = next(line for line in lines if line.startswith("| method"))
    assert [cell.strip() for cell in header.split("|")][-3:-1] == ["aggregation error", "factor averaging error"]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")][-3:-1] for line in lines if "|" in line}
    assert cells["fedex-lora"] == ["0.200", "0.400"]
    assert cells["head-only"] == ["–", "–"]
    frame = asked.frame().set_index("method")
    assert frame.loc["fedex-lora", "aggregation_error"] == pytest.approx(0.2)


def test_the_data_frame_always_has_it() -> None:
    frame = frame_of([measured(), make_record("head-only")])
    assert frame["aggregation_error"].tolist()[0] == pytest.approx(0.2)
    assert frame["aggregation_error"].isna().tolist() == [False, True]


def test_a_measure_that_there_is_none_of_is_refused_with_the_nearest(tmp_path: Path) -> None:
    save(measured(), tmp_path / "records")
    with pytest.raises(FedbenchError, match="--measure agregation_error: no such measure; did you mean aggregation_er"):
        compare_folder(tmp_path, asked=Asked.of(measures=["agregation_error"]))
