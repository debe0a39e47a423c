"""A results folder as one HTML file that needs nothing else: numbers, plots and the records behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedbench.errors import one_line
from fedbench.package import own_version
from fedbench.records.record import Record
from fedbench.report.figures import FIGURES, Figures
from fedbench.report.leaderboard import Line, columns_of, front, leaderboard, standing
from fedbench.report.libraries import LICENCES, Libraries, libraries
from fedbench.report.live import Live
from fedbench.report.plots import Plot, plots
from fedbench.report.shown import Shown, excerpt, shown_runs
from fedbench.report.specs import CONFIG
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.render.comments import comments
from fedbench.tables.render.frames import LEGEND
from fedbench.tables.render.ranking import group_notes, improvement_table
from fedbench.tables.roles import place


def page(
    records: Sequence[Record],
    results: Path,
    live: Sequence[Live] = (),
    *,
    links: str = "",
    served: bool = False,
    sources: Libraries | None = None,
) -> str:
    """The report of `records`, which lie in the results folder `results`, and of runs under way.

    links: what a record's file, named from the results folder on, is linked by. served: whether the page asks its
    server for changes. sources: the JavaScript to carry, if not that of the installed packages. Raises FedbenchError
    where these are not installed.
    """
    sources = sources or libraries()
    comparison = compare(records)
    runs = shown_runs(records, comparison)
    columns = columns_of(records)
    lines = leaderboard(comparison, runs, columns)
    labels = sorted({run.label for run in runs} | {run.method for run in live}, key=place)
    drawn = plots(labels)
    content = _content(runs, live, lines, comparison, drawn)
    excerpts = {run.name: excerpt(run.record) for run in runs}
    said = [
        (
            one_line(section.title),
            one_line(standing(section)),
            [one_line(text) for text in (*comments(section), *group_notes(section))],
        )
        for section in comparison.sections
    ]
    return _template().render(
        results=one_line(results.resolve().name),
        version=own_version(),
        served=served,
        lines=lines,
        columns=columns,
        filters=_filters(lines, live),
        said=said,
        often=improvement_table(comparison.sections),
        runs=[_row(run) for run in runs],
        failed=[run for run in runs if run.record.error],
        live=live,
        plots=[plot for plot in drawn if content["figures"][plot.figures]["rows"]],
        absent=[plot.title for plot in drawn if not content["figures"][plot.figures]["rows"]],
        sections=list(dict.fromkeys(entry["section"] for entry in content["runs"])),
        links=quote(links),
        legend=LEGEND,
        licences=LICENCES,
        packages=sources.versions,
        notices=str(_asset("licences.txt")),
        content=embedded(content),
        excerpts=embedded(excerpts),
        style=_asset("report.css"),
        script=_asset("report.js"),
        plots_source=_script(sources.plots),
        tables_source=embedded(sources.tables),
    )


def link_to(results: Path, out: Path) -> str:
    """How the results folder is reached from a file at `out`: relative where both are on one drive."""
    try:
        return os.path.relpath(results.resolve(), out.resolve().parent).replace(os.sep, "/") + "/"
    except ValueError:  # on Windows, another drive
        return results.resolve().as_posix() + "/"


def embedded(content: Any) -> Markup:
    """JSON for a <script> of data: nothing in it ends the element or begins another."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _script(source: str) -> Markup:
    """JavaScript for a <script>: in code that ends the element at a text, the text is written otherwise."""
    return Markup(source.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _content(
    runs: Sequence[Shown], live: Sequence[Live], lines: Sequence[Line], comparison: Comparison, drawn: Sequence[Plot]
) -> dict[str, Any]:
    """What the page's script draws from."""
    figures = {name: read(runs) for name, read in FIGURES.items()}
    for number, run in enumerate(live, start=len(runs)):
        figures["accuracy"].rows.extend([number, *values] for values in run.points)
    figures["front"] = front(lines, comparison)
    return {
        "runs": [_run(run) for run in runs] + [_live(run) for run in live],
        "lines": [
            {
                "section": line.section, "scenario": line.scenario, "fm": line.fm, "method": line.label,
                "kind": line.method, "profiles": line.profiles, "record": line.runs[0][0] if line.runs else "",
            }
            for line in lines
        ],
        "figures": {name: {"columns": each.columns, "rows": _rounded(each)} for name, each in figures.items()},
        "plots": {plot.name: asdict(plot) for plot in drawn},
        "config": CONFIG,
    }  # fmt: skip


def _rounded(figures: Figures) -> list[list[Any]]:
    """Numbers to seven digits, which is finer than anything that is drawn or read."""
    return [[float(f"{x:.7g}") if isinstance(x, float) else x for x in row] for row in figures.rows]


def _run(run: Shown) -> dict[str, Any]:
    who, made = run.record.identity, run.record.provenance
    return {
        "name": run.name, "section": run.section, "scenario": who.scenario, "fm": run.fm, "method": run.label,
        "kind": who.method, "seed": who.seed, "profile": run.origin.profile, "key": who.key, "file": run.file,
        "command": run.origin.parts, "notes": run.origin.notes, "status": run.record.status,
        "finished": made.finished,
    }  # fmt: skip


def _live(run: Live) -> dict[str, Any]:
    section = f"{run.scenario}, {run.fm}" if run.fm else run.scenario
    return {
        "name": "", "section": section, "scenario": run.scenario, "fm": run.fm, "method": run.method,
        "kind": run.method, "seed": run.seed, "profile": "", "key": run.key,
    }  # fmt: skip


def _row(run: Shown) -> Mapping[str, Any]:
    """A line of the table of all runs."""
    score = run.record.accuracy.plug_in
    found = None if score is None or score.diverged or score.accuracy is None else 100 * score.accuracy
    return _run(run) | {"accuracy": found}


def _filters(lines: Sequence[Line], live: Sequence[Live]) -> dict[str, list[str]]:
    """What can be chosen, by what it is a choice of."""
    return {
        "scenario": sorted({line.scenario for line in lines} | {run.scenario for run in live}),
        "method": sorted({line.method for line in lines} | {run.method for run in live}, key=place),
        "fm": sorted({line.fm for line in lines} | {run.fm for run in live}),
        "profile": sorted({profile for line in lines for profile in line.profiles}),
    }


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(str(_asset("page.html")))


@cache
def _asset(name: str) -> Markup:
    return Markup(files("fedbench.report").joinpath("assets", name).read_text(encoding="utf-8"))
