"""Comparisons as text: for a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from fedbench.errors import FedbenchError, one_line
from fedbench.tables.compare import CEILING, FLAG, FLOOR, Beside, Comparison, Row, Section, test_path
from fedbench.tables.formats import MEGA, signed, three_digits
from fedbench.tables.statistics import SEEDS_FOR_TEST, half_width, seeds_needed, variances

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


_HEADERS = (
    "method", "accuracy %", "proxy %", "gap", "MB up", "MB down", "MB set-up", "grad. error", "exposed %",
    "trained M", "held M",
)  # fmt: skip

LEGEND = (
    "accuracy: FM with the tuned parameters plugged in, on the test set, mean ± standard deviation (n seeds)",
    "proxy, gap: the model clients train, and plug-in minus proxy, in points; – where clients train the FM itself",
    "MB: 10^6 bytes of payload, a run's total over all clients; down is without set-up (first download of a model)",
    "grad. error: proxy against FM, relative norm, at the start / mean of the run; exposed: share of the FM's weights",
    "a client ends up with, verbatim / within 1%; trained, held: 10^6 parameters at a client",
)


def _columns() -> list[tuple[str, Callable[[Row], str]]]:
    """Headers with how each is written, after the method and its accuracy."""

    def value(*path: str, scale: float = 1.0, form: Callable[[float], str]) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            found = row.summary(*path, scale=scale)
            return form(found.mean) if found else "–"

        return text

    def both(a: Callable[[Row], str], b: Callable[[Row], str]) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            return "–" if (x := a(row)) == (y := b(row)) == "–" else f"{x} / {y}"

        return text

    one, two = "{:.1f}".format, "{:.2f}".format
    writers = (
        value("accuracy", "proxy", "accuracy", scale=100, form=one),
        value("accuracy", "gap", scale=100, form=signed),
        value("communication", "up", "bytes", scale=1 / MEGA, form=three_digits),
        value("communication", "down_after_setup", scale=1 / MEGA, form=three_digits),
        value("communication", "setup_bytes", scale=1 / MEGA, form=three_digits),
        both(value("gradient_error", "start", form=two), value("gradient_error", "mean", form=two)),
        both(
            value("exposure", "verbatim", "all", scale=100, form=one),
            value("exposure", "within_1_percent", "all", scale=100, form=one),
        ),
        value("compute", "trainable_parameters", scale=1 / MEGA, form=three_digits),
        value("compute", "resident_parameters", scale=1 / MEGA, form=three_digits),
    )
    return list(zip(_HEADERS[2:], writers, strict=True))


def section_frame(section: Section) -> pd.DataFrame:
    """A scenario's table as text: one line a method."""
    lines = []
    for row in section.rows:
        line = {"method": row.label + (f" {FLAG}" if row.flag else ""), "accuracy %": accuracy_text(row)}
        line |= {header: write(row) if row.scored else "–" for header, write in _columns()}
        lines.append(line)
    return pd.DataFrame(lines, columns=list(_HEADERS))


def overview_frame(comparison: Comparison) -> pd.DataFrame:
    """Accuracy as text, methods x scenarios."""
    columns: dict[str, dict[str, str]] = {}
    rows = [row for section in comparison.sections for row in section.rows]
    order = list(dict.fromkeys(row.method for row in rows))
    labels = dict.fromkeys(row.label for row in sorted(rows, key=lambda row: order.index(row.method)))
    for section in comparison.sections:
        texts = {row.label: accuracy_text(row) + (f" {FLAG}" if row.flag else "") for row in section.rows}
        columns[section.title] = {label: texts.get(label, "–") for label in labels}
    frame = pd.DataFrame(columns, index=list(labels))
    return frame.rename_axis("method").reset_index()


def accuracy_text(row: Row, tests: Sequence[str] = ("",)) -> str:
    """87.3 ± 0.4 (3), in per cent; (2/3) where a grid expects more; or why there is none. Several test sets: a / b."""
    found = [summary for test in tests if (summary := row.summary(*test_path(row, test), scale=100))]
    if not found:
        return row.state
    scores = (f"{each.mean:.1f}" + ("" if each.std is None else f" ± {each.std:.1f}") for each in found)
    of = f"/{row.expected}" if row.expected and row.expected != found[0].n else ""
    return f"{' / '.join(scores)} ({found[0].n}{of})"


def beside_frame(beside: Beside) -> pd.DataFrame:
    """Our accuracy as text over the reported one, rows x scenarios."""
    lines = []
    for name in dict.fromkeys(name for name, _ in beside.cells):
        ours, theirs = [name], ["  reported"]
        for scenario, tests in beside.tests.items():
            row = beside.cells[name, scenario]
            ours.append(accuracy_text(row, tests) + (f" {FLAG}" if row.faults else ""))
            theirs.append(_figure_text(beside.figures.get((name, scenario), {}), tests))
        lines += [ours, theirs]
    return pd.DataFrame(lines, columns=["method", *beside.tests])


def _figure_text(figure: Mapping[str, float], tests: Sequence[str]) -> str:
    """Reported accuracies by test set: a / b."""
    if not figure:
        return "not available"
    return " / ".join(f"{figure[test]:.1f}" if test in figure else "–" for test in tests)


def comments(section: Section) -> list[str]:
    """The lines under a scenario's table: headroom, differences with what may be made of them, notes."""
    out = []
    if section.headroom:
        out.append(f"headroom, {section.headroom}{_verdict(section.headroom.interval)}")
    elif any(row.scored for row in section.rows):
        out.append(f"headroom: unknown; it takes complete runs of {CEILING} and {FLOOR} with a shared seed")
    out += map(str, section.differences)
    shown = [*section.differences, *filter(None, [section.headroom])]
    if any(d.interval for d in shown):
        out.append("intervals: for seeds and test rows at large; t over shared seeds, widened by the test rows' part")
    elif shown:
        out.append("no interval: it takes two shared seeds to see how far seeds differ")
    if found := variances(section.differences or shown):
        out.append(_seeds_for_a_point(*found))
    if section.differences and all(d.p is None for d in section.differences):
        out.append(f"no test of these differences: it takes {SEEDS_FOR_TEST} shared seeds")
    elif section.differences:
        out.append("p: paired permutation test over shared seeds, for these test rows, with Holm's correction")
    return out + section.notes


def _verdict(headroom: tuple[float, float] | None) -> str:
    """What a headroom's interval says against a scenario; nothing where it lies above 0."""
    if headroom is None:
        return "; with one seed it is open whether this scenario can rank methods"
    low, high = headroom
    if low > 0:
        return ""
    holds = "holds 0" if high >= 0 else "lies below 0"
    return f"; the interval {holds}: this scenario cannot rank methods"


def _seeds_for_a_point(seed_variance: float, row_variance: float) -> str:
    """How many seeds bring the intervals of a table to ±1 point; variances in squared points."""
    enough = seeds_needed(1.0, seed_variance, row_variance)
    if enough is None:
        rows = half_width(2, 0.0, row_variance)
        return (
            f"no number of seeds brings each interval to ±1 point: the test rows alone leave up to ±{rows:.1f} points"
        )
    return f"bringing each interval to ±1 point takes about {enough:,} seeds, by their mean variance over seeds"


def render(comparison: Comparison, form: str) -> str:
    """The comparison as "markdown", "latex" or "csv"."""
    if form == "csv":
        return _csv(comparison)
    if form == "markdown":
        return _markdown(comparison)
    if form == "latex":
        return _latex(comparison)
    raise FedbenchError(f"--format {form}: unknown; use terminal, markdown, latex or csv")


def _tables(comparison: Comparison) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Title, table and comments of each table to print; accuracy over scenarios first, reported figures beside it.

    Names and notes come from records and may hold anything, so all texts are made lines of printable characters.
    """
    out = [(beside.title, beside_frame(beside), beside.notes) for beside in comparison.beside]
    if len(comparison.sections) > 1 and not out:
        out.append(("Accuracy in %, methods by scenarios", overview_frame(comparison), []))
    out += [(section.title, section_frame(section), comments(section)) for section in comparison.sections]
    return [
        (one_line(title), frame.map(one_line).rename(columns=one_line), [one_line(note) for note in notes])
        for title, frame, notes in out
    ]


def _pieces(
    frame: pd.DataFrame, room: float, gap: float, measure: Callable[[str], float]
) -> tuple[list[pd.DataFrame], float]:
    """The table in as few pieces as fit into `room`, each with the first column, which names the rows; and its width.

    Names keep their width where the whole table fits with it, else they get a third of the room.
    """
    widths = [max(map(measure, [str(name), *frame.iloc[:, i]])) for i, name in enumerate(frame.columns)]
    first = min(widths[0], max(room - sum(gap + width for width in widths[1:]), room / 3))
    pieces: list[list[int]] = []
    used = math.inf
    for i, width in enumerate(widths[1:], start=1):
        if used + gap + width > room:
            pieces.append([0])
            used = first
        pieces[-1].append(i)
        used += gap + width
    return [frame.iloc[:, columns] for columns in pieces or [[0]]], first


_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet takes a cell that begins so for a formula."""


def _csv(comparison: Comparison) -> str:
    def cell(value: object) -> object:
        if not isinstance(value, str):
            return value
        text = one_line(value)
        return f"'{text}" if text.lstrip().startswith(_FORMULA) else text

    frame = comparison.frame()
    texts = frame.select_dtypes(exclude="number").columns
    return frame.assign(**{name: frame[name].map(cell) for name in texts}).rename(columns=cell).to_csv(index=False)


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*|~$"} | {"<": "&lt;"})


def _markdown_text(text: str) -> str:
    """`text` as Markdown shows it: no HTML, links, emphasis or cell borders in it."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).translate(_MARKDOWN).replace("](", "]\\(")
    # Within a word an underscore is only that.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _markdown(comparison: Comparison) -> str:
    parts = [f"# {_markdown_text(one_line(comparison.title))}"] if comparison.title else []
    for title, frame, notes in _tables(comparison):
        frame = frame.map(_markdown_text).rename(columns=_markdown_text)
        align = ["left"] + ["right"] * (len(frame.columns) - 1)
        # Text is printed as it is: tabulate would read "87.30" as a number and print 87.3.
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if len(frame) else None)
        parts += [f"## {_markdown_text(title)}", str(table)]
        if notes:
            parts.append("\n".join(f"- {_markdown_text(note)}" for note in notes))
    parts.append("\n".join(f"{line}  " for line in LEGEND).rstrip())
    return "\n\n".join(parts) + "\n"


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


def _latex_text(text: str) -> str:
    """`text` as LaTeX prints it: no command in it, and long words may be broken after their punctuation."""
    words = (re.sub(r"([/_.,-])(?=.)", "\\1\0", word) if len(word) > 30 else word for word in text.split(" "))
    out = " ".join(words).translate(_LATEX).replace("\0", "\\allowbreak{}")
    # After the end of a line these two would be read as its argument.
    return "{}" + out if out.startswith(("[", "*")) else out


_CHARACTERS = {"fijlrtI.,:;'!|()[]/- ": 0.42, "mwGQOCDHNKXU%&±+−": 0.9, "MW@": 1.1}
"""Widths of characters in Computer Modern at 8pt, in units of 8pt, a little more than in cmr8.tfm; others have 0.58."""


def _points(text: str) -> float:
    """About how wide `text` is at 8pt, in points, and hardly ever less."""
    return 8 * sum(next((width for those, width in _CHARACTERS.items() if c in those), 0.58) for c in text)


def _latex(comparison: Comparison) -> str:
    """Tables for booktabs no wider than the text, each with its notes under it; the legend comes once, at the end."""
    parts = []
    labels: list[str] = []
    for title, frame, notes in _tables(comparison):
        label = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        labels.append(label)
        again = f"-{labels.count(label)}" if labels.count(label) > 1 else ""
        pieces, names = _pieces(frame, _TEXT_WIDTH, _GAP, _points)
        lines = ["\\begin{table}", "\\centering\\footnotesize", f"\\setlength{{\\tabcolsep}}{{{_GAP / 2:g}pt}}"]
        lines += [f"\\caption{{{_latex_text(title)}}}", f"\\label{{tab:{label}{again}}}"]
        lines.append("\n\n\\medskip\n".join(_tabular(piece, names) for piece in pieces))
        if notes:
            lines.append("\\par\\medskip\\raggedright\\footnotesize")
            lines.append("\\\\\n".join(_latex_text(note) for note in notes))
        parts.append("\n".join([*lines, "\\end{table}"]))
    parts.append(_latex_text("\n".join(LEGEND)))
    return "\n\n".join(parts) + "\n"


def _tabular(frame: pd.DataFrame, names: float) -> str:
    """One piece of a table, of which the first column is `names` points wide."""

    def cell(text: str, column: int) -> str:
        room = names if column == 0 else _TEXT_WIDTH - names - _GAP
        if _points(text) <= room:
            return _latex_text(text)
        side = "right" if column == 0 else "left"
        return f"\\parbox[t]{{{room:.0f}pt}}{{\\ragged{side} {_latex_text(text)}\\strut}}"

    lines = [[cell(str(text), i) for i, text in enumerate(line)] for line in [frame.columns, *frame.to_numpy()]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = (
        " & ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " \\\\" for line in lines
    )
    spec = f"@{{}}l{'r' * (len(widths) - 1)}@{{}}"
    return "\n".join(
        [f"\\begin{{tabular}}{{{spec}}}", "\\toprule", head, "\\midrule", *rows, "\\bottomrule", "\\end{tabular}"]
    )


class _Fitted:
    """A table that is whole in a terminal of any width: split where it is wider, with the first column in each part."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        styles = {"missing": "dim", "failed": "red", "diverged": "red", "not available": "dim"}
        pieces, names = _pieces(self.frame, options.max_width, 2, cell_len)
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
            for line in piece.itertuples(index=False):
                table.add_row(*(Text(text, style=styles.get(text, "")) for text in line))
            yield table


def terminal(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal; a table that is wider is split."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text(one_line(comparison.title), style="bold")] if comparison.title else []
    if not comparison.sections:
        return Text("no records")
    for title, frame, notes in _tables(comparison):
        # Not as the table's own title, which would wrap at the width of a narrow table.
        parts += [Text(""), Text(title, style="bold"), _Fitted(frame)]
        parts += [Padding(Text(note), (0, 0, 0, 2), expand=False) for note in notes]
    parts += [Text(""), *(Text(line, style="dim") for line in LEGEND)]
    return Group(*parts)
