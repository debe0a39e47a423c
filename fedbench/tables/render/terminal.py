"""Comparisons for a terminal of any width."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import pandas as pd

from fedbench.errors import one_line
from fedbench.tables.comparison import Comparison

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

from fedbench.tables.render.frames import LEGEND, pieces_of, printed


class _Fitted:
    """A table that is whole in a terminal of any width: split where it is wider, with the first column in each part."""

    def __init__(self, frame: pd.DataFrame, bold: Set[tuple[int, str]]) -> None:
        self.frame, self.bold = frame, bold

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        styles = {"missing": "dim", "failed": "red", "diverged": "red", "not available": "dim"}
        pieces, names = pieces_of(self.frame, options.max_width, 2, cell_len)
        for i, piece in enumerate(pieces):
            if i:
                yield Text("")
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
            for j, header in enumerate(piece.columns):
                first = j == 0
                table.add_column(
                    Text(header),
                    justify="left" if first else "right",
                    overflow="fold",
                    max_width=max(1, int(names)) if first else None,
                )
            for row, line in enumerate(piece.itertuples(index=False)):
                strong = ["bold" if (row, header) in self.bold else "" for header in piece.columns]
                texts = zip(line, strong, strict=True)
                table.add_row(*(Text(text, style=styles.get(text, style)) for text, style in texts))
            yield table


def terminal(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal; a table that is wider is split."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text(one_line(comparison.title), style="bold")] if comparison.title else []
    if not comparison.sections:
        return Text("no records")
    for title, frame, notes, bold in printed(comparison):
        # Not as the table's own title, which would wrap at the width of a narrow table.
        parts += [Text(""), Text(title, style="bold"), _Fitted(frame, bold)]
        parts += [Padding(Text(note), (0, 0, 0, 2), expand=False) for note in notes]
    parts += [Text(""), *(Text(line, style="dim") for line in LEGEND)]
    return Group(*parts)
