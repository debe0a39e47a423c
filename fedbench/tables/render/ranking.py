"""What may be ranked, as frames of text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fedbench.errors import FedbenchError
from fedbench.tables.comparison import Section
from fedbench.tables.formats import seeds_text, three_digits
from fedbench.tables.ranking import (
    PARETO,
    Standing,
    adjusted_level,
    groups,
    improvements,
    ranked_rows,
    standing_against,
    standings,
)
from fedbench.tables.rows import Row
from fedbench.tables.statistics import LEVEL, POWER, seeds_to_detect, variances

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Printed = tuple[str, pd.DataFrame, list[str]]


def group_column(section: Section) -> tuple[str, dict[str, str]]:
    """Header and cells by label: letters of those that cannot be told apart, or how each stands to the baseline."""
    if section.baseline:
        return f"against {section.baseline}", standing_against(section)
    return "group", groups(section)


def group_notes(section: Section) -> list[str]:
    """What the letters mean, and how many seeds a difference of a point takes."""
    level = adjusted_level(section)
    if level is None:
        return ["no groups: it takes two shared seeds to see how far seeds differ"] if ranked_rows(section) else []
    n = sum(difference.interval is not None for difference in section.differences)
    held = f"{LEVEL:.0%} intervals that hold all {n} differences at once (Bonferroni, each of {level:.2%})"
    seeds = sorted({difference.seeds for difference in section.differences if difference.interval})
    over = seeds_text(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    what = (
        f"against {section.baseline}: above or below it"
        if section.baseline
        else "group: rows that share a letter cannot be told apart"
    )
    notes = [f"{what} by {held}, over {over}"]
    if found := variances(section.differences):
        enough = seeds_to_detect(1.0, *found)
        size = f"a difference of 1 point is seen with probability {POWER:g}"
        notes.append(
            f"{size} with about {enough:,} seeds, by one such interval of {LEVEL:.0%}"
            if enough
            else f"with no number of seeds {size}: the test rows alone leave too much"
        )
    return notes


def improvement_table(sections: Sequence[Section], baseline: str = "") -> list[Printed]:
    """How often one row beats another over all sections; nothing where no two share a seed."""
    found = improvements(sections, baseline)
    lines = []
    for each in found:
        low, high = (100 * end for end in each.interval)
        share = f"{100 * each.probability:.0f}% ({low:.0f} to {high:.0f})"
        counts = f"{each.wins:,} of {each.pairs:,}" + (f", {each.ties:,} tied" if each.ties else "")
        lines.append([f"{each.a} over {each.b}", share, counts, f"{each.scenarios}"])
    if not lines:
        return []
    columns = ["first over second", f"% ({LEVEL:.0%} interval)", "runs", "scenarios"]
    notes = [
        "how often the first beats the second in a run of the same scenario and seed, by however little (after Agarwal "
        "et al. 2021, who compare all seeds with all); ties are half",
        f"interval: Clopper-Pearson over those pairs of runs, each of {LEVEL:.0%}; above 50% the first is better more "
        "often than not",
    ]
    return [("Probability of improvement", pd.DataFrame(lines, columns=columns), notes)]


def pareto_table(section: Section) -> list[Printed]:
    """How rows stand on the front of accuracy against traffic, client memory and exposure."""
    found, unknown = standings(section)
    if not found and not unknown:
        return []
    lines = [
        [each.row.label, f"{100 * each.accuracy:.1f}", *map(three_digits, each.costs), standing_text(each)]
        for each in found
    ]
    columns = ["method", "accuracy %", *(measure.name for measure in PARETO), "standing"]
    notes = [
        "MB both ways: a run's traffic, set-up included; client MB: the parameters a client holds, 4 bytes each; "
        "exposed: share of the FM's weights at a client verbatim",
        "dominated: another costs no more in all three in every shared seed, and is better by an interval that holds "
        "with all others at once; open: another costs less and cannot be told apart, so the row may be dominated",
        *(f"{label}: left out, since one of its costs is not known" for label in unknown),
    ]
    if adjusted_level(section) is None:
        notes.append("no intervals, so no row is shown to be dominated: it takes two shared seeds")
    return [(f"{section.title}: Pareto front", pd.DataFrame(lines, columns=columns), notes)]


def standing_text(standing: Standing) -> str:
    if standing.below:
        return f"dominated by {', '.join(standing.below)}"
    return f"open: {', '.join(standing.beside)}" if standing.beside else "front"


def pareto_picture(sections: Sequence[Section], path: Path) -> None:
    """Accuracy over each cost, a row of panels for each section; the format, SVG or PNG, follows from the name.

    Filled: on the front; half: open; hollow: dominated. Bars: the deviation over seeds. Raises FedbenchError for
    another format, and where no section has a row to show.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise FedbenchError(f"--picture {path}: name a file that ends in .svg or .png")
    shown = [(section, standings(section)[0]) for section in sections]
    shown = [(section, found) for section, found in shown if found]
    if not shown:
        raise FedbenchError(f"--picture {path}: no scenario has rows that could be compared")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4 * len(PARETO), 3.4 * len(shown) + 0.6)
    with matplotlib.rc_context({"svg.hashsalt": "fedbench"}):  # the same file each time
        figure, panels = pyplot.subplots(len(shown), len(PARETO), figsize=size, squeeze=False, layout="constrained")
        labels = list(dict.fromkeys(each.row.label for _, found in shown for each in found))
        for (section, found), axes in zip(shown, panels, strict=True):
            for i, panel in enumerate(axes):
                _draw(panel, found, i, labels)
            axes[0].set(title=section.title, ylabel="accuracy, %")
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize="small")
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        pyplot.close(figure)


def _draw(panel: Axes, found: Sequence[Standing], cost: int, labels: Sequence[str]) -> None:
    for each in found:
        fill = "none" if each.below else "left" if each.beside else "full"
        panel.errorbar(
            each.costs[cost], 100 * each.accuracy, yerr=_deviation(each.row), fmt="o", capsize=2, fillstyle=fill,
            markerfacecoloralt="white", color=f"C{labels.index(each.row.label) % 10}", label=each.row.label,
        )  # fmt: skip
    panel.set(xlabel=PARETO[cost].name)
    panel.grid(alpha=0.3)


def _deviation(row: Row) -> float | None:
    from fedbench.tables.measures import plug_in

    found = row.summary(plug_in, 100)
    return found.std if found else None
