"""Comparisons in Markdown."""

from __future__ import annotations

import re

from fedbench.errors import one_line
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.frames import LEGEND, printed

_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*|~$"} | {"<": "&lt;"})


def markdown_text(text: str) -> str:
    """`text` as Markdown shows it: no HTML, links, emphasis or cell borders in it."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).translate(_MARKDOWN).replace("](", "]\\(")
    # Within a word an underscore is only that.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def markdown(comparison: Comparison) -> str:
    parts = [f"# {markdown_text(one_line(comparison.title))}"] if comparison.title else []
    for title, frame, notes, bold in printed(comparison):
        frame = frame.map(markdown_text)
        for row, header in bold:
            frame.loc[row, header] = f"**{frame.loc[row, header]!s}**"
        frame = frame.rename(columns=markdown_text)
        align = ["left"] + ["right"] * (len(frame.columns) - 1)
        # Text is printed as it is: tabulate would read "87.30" as a number and print 87.3.
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if len(frame) else None)
        parts += [f"## {markdown_text(title)}", str(table)]
        if notes:
            parts.append("\n".join(f"- {markdown_text(note)}" for note in notes))
    parts.append("\n".join(f"{line}  " for line in LEGEND).rstrip())
    return "\n\n".join(parts) + "\n"
