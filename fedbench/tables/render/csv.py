"""Comparisons in CSV: plain numbers, nothing that a spreadsheet takes for a formula."""

from __future__ import annotations

from fedbench.errors import one_line
from fedbench.tables.comparison import Comparison

_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet takes a cell that begins so for a formula."""


def csv(comparison: Comparison) -> str:
    def cell(value: object) -> object:
        if not isinstance(value, str):
            return value
        text = one_line(value)
        return f"'{text}" if text.lstrip().startswith(_FORMULA) else text

    frame = comparison.frame()
    texts = frame.select_dtypes(exclude="number").columns
    return frame.assign(**{name: frame[name].map(cell) for name in texts}).rename(columns=cell).to_csv(index=False)
