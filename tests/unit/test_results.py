"""The committed tables are what the committed records say, and the README quotes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbench.grid.file import load_grid
from fedbench.records.store import load_all
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.forms import render

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "results" / "tables").glob("*.md"))


def comparison(name: str) -> Comparison:
    grid = load_grid(name)
    return compare(load_all(ROOT / "results" / "records"), grid.cells(), grid.title, grid.reported)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_are_made_from_the_records(path: Path) -> None:
    found = comparison(path.stem)
    for form, suffix in (("markdown", ".md"), ("latex", ".tex"), ("csv", ".csv")):
        assert render(found, form) == path.with_suffix(suffix).read_text(), f"make {path.stem}{suffix} anew"


def test_the_readme_quotes_a_table() -> None:
    about = (ROOT / "README.md").read_text().splitlines()
    quoted = [
        line for line in about if (line.startswith("|") and "±" in line) or (line.startswith("- ") and "points" in line)
    ]
    assert len(quoted) > 10
    lines = {line for path in TABLES for line in path.read_text().splitlines()}
    assert set(quoted) <= lines


def test_every_record_was_made_by_a_clean_commit() -> None:
    for record in load_all(ROOT / "results" / "records"):
        assert record.status == "complete"
        assert record.provenance.git.dirty is False
