"""The committed tables are what the committed records say, and the README quotes them."""

from __future__ import annotations

from pathlib import Path

from fedbench.records.store import load_all
from fedbench.tables.committed import stale_tables

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "results" / "tables").glob("*.md"))


def test_tables_are_made_from_the_records() -> None:
    assert len(TABLES) == 2
    assert list(stale_tables(ROOT / "results")) == []


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
