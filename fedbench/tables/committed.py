"""Whether tables that lie beside records are what the records say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.tables.folder import compare_folder
from fedbench.tables.render.forms import render

FORMS = {".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""The format of a table by the ending of its file; its name is that of its grid."""


def stale_tables(folder: Path) -> Iterator[str]:
    """A line on each table in `folder`/tables that is not what the grid of its name makes of `folder`/records now.

    Raises FedbenchError where there are no tables, or no grid of a table's name.
    """
    paths = sorted(path for path in (folder / "tables").glob("*.*") if path.suffix in FORMS)
    if not paths:
        place = folder / "tables"
        raise FedbenchError(f"{place}: there are no tables; write them there as GRID.md, GRID.tex or GRID.csv")
    for name, files in groupby(paths, lambda path: path.stem):
        comparison = compare_folder(folder, name)
        for path in files:
            form = FORMS[path.suffix]
            if path.read_text(encoding="utf-8") != render(comparison, form):
                again = f"fedbench table --grid {name} --results {folder} --format {form} > {path}"
                yield f"{path}: not what the records say; make it anew: {again}"
