"""The lines under a scenario's table: headroom, differences and what may be made of them."""

from __future__ import annotations

from fedbench.tables.comparison import Section
from fedbench.tables.roles import CEILING, FLOOR
from fedbench.tables.statistics import SEEDS_FOR_TEST, half_width, seeds_needed, variances


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
