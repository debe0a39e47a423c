"""Comparisons as text, by the name of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedbench.errors import FedbenchError
from fedbench.tables.comparison import Comparison

if TYPE_CHECKING:
    pass

from fedbench.tables.render.csv import csv
from fedbench.tables.render.latex import latex
from fedbench.tables.render.markdown import markdown


def render(comparison: Comparison, form: str) -> str:
    """The comparison as "markdown", "latex" or "csv"."""
    if form == "csv":
        return csv(comparison)
    if form == "markdown":
        return markdown(comparison)
    if form == "latex":
        return latex(comparison)
    raise FedbenchError(f"--format {form}: unknown; use terminal, markdown, latex or csv")
