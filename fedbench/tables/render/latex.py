"""Comparisons in LaTeX, for booktabs, no wider than the text."""

from __future__ import annotations

import re
from collections.abc import Set

import pandas as pd

from fedbench.tables.comparison import Comparison
from fedbench.tables.render.frames import LEGEND, pieces_of, printed
from fedbench.tables.rows import FLAG

_TEXT_WIDTH = 345.0
"""Of LaTeX's article at 10pt, in points."""

_GAP = 8.0
"""Between the columns of a LaTeX table, in points."""

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}",
        ">": "\\textgreater{}", "|": "\\textbar{}", "`": "\\textasciigrave{}", "±": "$\\pm$", FLAG: "$\\dagger$",
        "−": "$-$", "–": "--",
    }
)  # fmt: skip


def latex_text(text: str) -> str:
    """`text` as LaTeX prints it: no command in it, and long words may be broken after their punctuation."""
    words = (re.sub(r"([/_.,-])(?=.)", "\\1\0", word) if len(word) > 30 else word for word in text.split(" "))
    out = " ".join(words).translate(_LATEX).replace("\0", "\\allowbreak{}")
    # After the end of a line these two would be read as its argument.
    return "{}" + out if out.startswith(("[", "*")) else out


_CHARACTERS = {"fijlrtI.,:;'!|()[]/- ": 0.42, "mwGQOCDHNKXU%&±+−": 0.9, "MW@": 1.1}
"""Widths of characters in Computer Modern at 8pt, in units of 8pt, a little more than in cmr8.tfm; others have 0.58."""


def points(text: str) -> float:
    """About how wide `text` is at 8pt, in points, and hardly ever less."""
    return 8 * sum(next((width for those, width in _CHARACTERS.items() if c in those), 0.58) for c in text)


def latex(comparison: Comparison) -> str:
    """Tables for booktabs no wider than the text, each with its notes under it; the legend comes once, at the end."""
    parts = []
    labels: list[str] = []
    for title, frame, notes, bold in printed(comparison):
        label = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        labels.append(label)
        again = f"-{labels.count(label)}" if labels.count(label) > 1 else ""
        pieces, names = pieces_of(frame, _TEXT_WIDTH, _GAP, points)
        lines = ["\\begin{table}", "\\centering\\footnotesize", f"\\setlength{{\\tabcolsep}}{{{_GAP / 2:g}pt}}"]
        lines += [f"\\caption{{{latex_text(title)}}}", f"\\label{{tab:{label}{again}}}"]
        lines.append("\n\n\\medskip\n".join(_tabular(piece, names, bold) for piece in pieces))
        if notes:
            lines.append("\\par\\medskip\\raggedright\\footnotesize")
            lines.append("\\\\\n".join(latex_text(note) for note in notes))
        parts.append("\n".join([*lines, "\\end{table}"]))
    parts.append(latex_text("\n".join(LEGEND)))
    return "\n\n".join(parts) + "\n"


def _tabular(frame: pd.DataFrame, names: float, bold: Set[tuple[int, str]]) -> str:
    """One piece of a table, of which the first column is `names` points wide, and these cells (row, header) bold."""

    def cell(text: str, column: int) -> str:
        room = names if column == 0 else _TEXT_WIDTH - names - _GAP
        if points(text) <= room:
            return latex_text(text)
        side = "right" if column == 0 else "left"
        return f"\\parbox[t]{{{room:.0f}pt}}{{\\ragged{side} {latex_text(text)}\\strut}}"

    lines = [[cell(str(text), i) for i, text in enumerate(line)] for line in [frame.columns, *frame.to_numpy()]]
    for row, header in bold:
        if header in frame.columns:
            column = list(frame.columns).index(header)
            lines[1 + row][column] = f"\\textbf{{{lines[1 + row][column]}}}"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = (
        " & ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " \\\\" for line in lines
    )
    spec = f"@{{}}l{'r' * (len(widths) - 1)}@{{}}"
    return "\n".join(
        [f"\\begin{{tabular}}{{{spec}}}", "\\toprule", head, "\\midrule", *rows, "\\bottomrule", "\\end{tabular}"]
    )
