"""Comparisons as text, by the name of the format."""

from __future__ import annotations

from fedbench.errors import FedbenchError
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.csv import csv
from fedbench.tables.render.latex import latex
from fedbench.tables.render.markdown import markdown

FORMS = {"markdown": markdown, "latex": latex, "csv": csv}


def render(comparison: Comparison, form: str) -> str:
    """The comparison as "markdown", "latex" or "csv". Raises FedbenchError for another format."""
    if form not in FORMS:
        raise FedbenchError(f"--format {form}: unknown; use terminal, markdown, latex or csv")
    return FORMS[form](comparison)
