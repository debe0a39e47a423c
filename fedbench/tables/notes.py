"""What is said under a scenario's table."""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.records.record import Record
from fedbench.tables import measures
from fedbench.tables.comparison import Section
from fedbench.tables.formats import seeds_text
from fedbench.tables.rows import Row
from fedbench.tables.statistics import Summary, binomial_standard_error


def add_notes(section: Section) -> None:
    """Notes on the scenario: test set and its standard error, the FM untouched, reasons, seeds that are not there."""
    scored = [run for row in section.rows for run in row.scored.values()]
    scores = [score for row in section.rows for score in row.scores.values()]
    if scores:
        best = max(score.accuracy for score in scores if score.accuracy is not None)
        rows = scores[0].rows
        if (tokens := scores[0].tokens) is not None:
            section.notes.append(f"test set: {tokens:,} tokens to predict, of {rows:,} rows; accuracy is of tokens")
        else:
            error = binomial_standard_error(best, rows)
            section.notes.append(
                f"test set: {rows:,} rows; binomial standard error {100 * error:.2f} points at {100 * best:.1f}%"
            )
        untouched = [share for run in scored if (share := measures.untouched(run)) is not None]
        text = f"{100 * untouched[0]:.1f}%" if untouched else "not available (no head trained for this task)"
        section.notes.append(f"FM untouched: {text}")
        if any(run.scenario.public and run.scenario.public.in_domain for run in scored):
            section.notes.append("the public corpus is in-domain, which flatters proxies")
        section.notes += _budget(section)
        section.notes.append(f"made with {', '.join(_sources(scored))}")
    for row in section.rows:
        section.notes += _personal(row)
        reasons = sorted({why for run in row.runs.values() if (why := run.accuracy.unavailable)})
        section.notes += [f"{row.label}: not available: {reason}" for reason in reasons]
        without = {
            seed: f"{n} of {len(run.rounds)} (seed {seed})"
            for seed, run in sorted(row.scored.items())
            if (n := run.rounds_without_upload) and not run.no_upload
        }
        if without:
            section.notes.append(f"{row.label}: rounds without any upload: {', '.join(without.values())}")
        if row.failed:
            section.notes.append(f"{row.label}: {seeds_text(row.failed)} failed; the tracebacks are in the records")


def _personal(row: Row) -> list[str]:
    """What clients' own models reach, told apart from the accuracy of one model for all."""
    mean, lowest = (row.summary(read, 100) for read in (measures.personal_mean, measures.personal_worst_tenth))
    if mean is None or lowest is None:
        return []
    return [
        f"{row.label}: personal models, on average over clients {mean}, worst tenth {lowest}, each on test rows of its "
        "client's own: not to be compared with the accuracy of one model on all test rows"
    ]


def _sources(runs: Sequence[Record]) -> list[str]:
    """What the runs were made with: commits, a changed source told from a clean one, or the version; and not fp32."""
    found = set()
    for run in runs:
        git, precision = run.provenance.git, run.identity.precision
        dirty = " with changes" if git and git.dirty else ""
        code = f"commit {git.commit[:7]}{dirty}" if git else f"fedbench {run.provenance.fedbench}"
        found.add(f"{code} in {precision}" if precision != "fp32" else code)
    return sorted(found)


def _budget(section: Section) -> list[str]:
    """What is not equal between the proxy methods: parameters held within 2%, local optimiser steps, distillation."""
    rows = [row for row in section.rows if row.summary(measures.proxy) and not row.flag]
    out = []
    for what, tolerance, measure in (
        ("parameters held at a client", 0.02, measures.held),
        ("local steps", 0.0, measures.local_steps),
        ("public rows distilled on, alignments included", 0.0, _distilled),
    ):
        each = {row.label: Summary.of(measure(run) for run in row.runs.values()) for row in rows}
        found = {label: value.mean for label, value in each.items() if value}
        if len(found) > 1 and max(found.values()) > (1 + tolerance) * min(found.values()):
            told = ", ".join(f"{label} {value:,.0f}" for label, value in found.items())
            out.append(f"budgets of the proxy methods differ: {what}: {told}")
    return out


def _distilled(run: Record) -> float | None:
    """Public rows that a run's distillation steps took, before and during training; None where it does not say.

    Steps are those of the settings. An alignment follows every t-th round but the last.
    """
    settings, federation = run.method.settings, run.scenario.federation
    if not run.distillation or federation is None or not {"distil_steps", "distil_batch"} <= settings.keys():
        return None
    steps, t = settings["distil_steps"], settings.get("t")
    if t:
        steps += (federation.rounds - 1) // t * settings["align_steps"]
    return float(steps * settings["distil_batch"])
