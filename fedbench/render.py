"""Comparisons as text: for a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from fedbench.errors import FedbenchError
from fedbench.formats import MEGA, signed, three_digits
from fedbench.statistics import SEEDS_FOR_TEST, half_width, seeds_needed, variances
from fedbench.tables import CEILING, FLAG, FLOOR, Beside, Comparison, Row, Section, test_path

if TYPE_CHECKING:
    from rich.console import RenderableType


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
            ours.append(accuracy_text(beside.cells[name, scenario], tests))
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
        return comparison.frame().to_csv(index=False)
    if form == "markdown":
        return _markdown(comparison)
    if form == "latex":
        return _latex(comparison)
    raise FedbenchError(f"--format {form}: unknown; use terminal, markdown, latex or csv")


def _tables(comparison: Comparison) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Title, table and comments of each table to print; accuracy over scenarios first, reported figures beside it."""
    out = [(beside.title, beside_frame(beside), beside.notes) for beside in comparison.beside]
    if len(comparison.sections) > 1 and not out:
        out.append(("Accuracy in %, methods by scenarios", overview_frame(comparison), []))
    return out + [(section.title, section_frame(section), comments(section)) for section in comparison.sections]


def _markdown(comparison: Comparison) -> str:
    parts = [f"# {comparison.title}"] if comparison.title else []
    for title, frame, notes in _tables(comparison):
        align = ["left"] + ["right"] * (len(frame.columns) - 1)
        # Text is printed as it is: tabulate would read "87.30" as a number and print 87.3.
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align if len(frame) else None)
        parts += [f"## {title}", str(table)]
        if notes:
            parts.append("\n".join(f"- {note}" for note in notes))
    parts.append("\n".join(f"{line}  " for line in LEGEND).rstrip())
    return "\n\n".join(parts) + "\n"


def _latex(comparison: Comparison) -> str:
    """Tables for booktabs, each with its notes under it; the legend comes once, at the end."""
    from tabulate import tabulate

    parts = []
    for title, frame, notes in _tables(comparison):
        body = tabulate(
            frame.values.tolist(),
            headers=list(frame.columns),
            tablefmt="latex_booktabs",
            disable_numparse=True,
            colalign=["left"] + ["right"] * (len(frame.columns) - 1) if len(frame) else None,
        )
        lines = ["\\begin{table}", "\\centering\\small", f"\\caption{{{_symbols(_escape(title))}}}", _symbols(body)]
        if notes:
            lines.append("\\par\\medskip\\raggedright\\footnotesize")
            lines.append("\\\\\n".join(_symbols(_escape(note)) for note in notes))
        parts.append("\n".join([*lines, "\\end{table}"]))
    parts.append(_symbols(_escape("\n".join(LEGEND))))
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("^", "\\textasciicircum{}")


def _symbols(text: str) -> str:
    for character, command in (("±", "$\\pm$"), (FLAG, "$\\dagger$"), ("−", "$-$"), ("–", "--")):
        text = text.replace(character, command)
    return text


def terminal(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal; fits in 120 columns."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(comparison.title, style="bold")] if comparison.title else []
    if not comparison.sections:
        return Text("no records")
    styles = {"missing": "dim", "failed": "red", "not available": "dim"}
    for title, frame, notes in _tables(comparison):
        table = Table(
            box=None,
            padding=(0, 2, 0, 0),
            pad_edge=False,
            header_style="bold",
        )
        for index, header in enumerate(frame.columns):
            left = index == 0
            table.add_column(Text(header), justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for line in frame.itertuples(index=False):
            table.add_row(*(Text(str(text), style=styles.get(str(text), "")) for text in line))
        # Not as the table's own title, which would wrap at the width of a narrow table.
        parts += [Text(""), Text(title, style="bold"), table]
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in notes]
    parts += [Text(""), *(Text(line, style="dim") for line in LEGEND)]
    return Group(*parts)
