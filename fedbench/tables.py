"""Tables: what records say, methods beside each other. Pure functions of records, without torch.

Numbers of several seeds are mean ± sample standard deviation with their count n; with one seed there is no
deviation. Seeds are paired: one seed is one partition, one series of cohorts and one initialisation for all methods.
Differences between methods carry a bootstrap interval over shared seeds and the shared test rows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedbench.errors import FedbenchError
from fedbench.records import Record, unpack_correct

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedbench.grid import Cell

REFERENCES = ("zero-shot", "head-only", "centralised-lora")
"""Methods that mark floor and ceiling; tests between pairs of methods leave them out."""

CEILING, FLOOR = "fedavg-lora", "head-only"
"""A scenario can rank methods only where the first clearly beats the second: its headroom."""

SEEDS_FOR_TEST = 6
"""With fewer paired seeds no exact two-sided test can pass 0.05 once Holm has been applied to anything."""

RESAMPLES = 2000
LEVEL = 0.95
MEGA = 1e6
FLAG = "†"


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (null for fewer than two values) and count of a measure over seeds."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary | None:
        """Of the values that exist; None if there are none."""
        found = [float(value) for value in values if value is not None]
        if not found:
            return None
        # Exact arithmetic: equal values have that mean and a deviation of 0, not of 1e-17.
        return cls(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass
class Row:
    """One line of a scenario's table: a method, in one of its settings where there are several.

    `runs` are the complete records by seed; `state` is what to print where no run has an accuracy: "missing",
    "failed" or "not available". `expected` counts the seeds a grid asks for, None where there is no grid.
    """

    method: str
    label: str
    runs: dict[int, Record] = field(default_factory=dict)
    failed: int = 0
    expected: int | None = None
    flag: str = ""

    @property
    def scored(self) -> dict[int, Record]:
        return {seed: run for seed, run in self.runs.items() if run.accuracy.get("plug_in")}

    @property
    def state(self) -> str:
        if self.runs:
            return "not available"
        return "failed" if self.failed else "missing"

    def summary(self, *path: str, scale: float = 1.0) -> Summary | None:
        """Of the value at `path` in each run, times `scale`."""
        values = [_at(run, path) for _, run in sorted(self.runs.items())]
        return Summary.of(None if value is None else value * scale for value in values)


@dataclass(frozen=True)
class Difference:
    """Accuracy of method `a` minus that of `b` in points, over shared seeds and test rows.

    `low` to `high` is the bootstrap interval; `p` is the paired test's, after Holm, where there were seeds enough.
    """

    a: str
    b: str
    mean: float
    low: float
    high: float
    seeds: int
    p: float | None = None

    def __str__(self) -> str:
        test = "" if self.p is None else f", p {_p_value(self.p)}"
        return (
            f"{self.a} minus {self.b}: {signed(self.mean)} points, {LEVEL:.0%} interval {signed(self.low)} to "
            f"{signed(self.high)} ({_seeds(self.seeds)}){test}"
        )


@dataclass
class Section:
    """All rows of one scenario with one FM."""

    scenario: str
    fm: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    headroom: Difference | None = None
    differences: list[Difference] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.scenario}, {self.fm}" if self.fm else self.scenario


@dataclass
class Comparison:
    """Everything the tables show: one section a scenario and FM."""

    sections: list[Section]
    title: str = ""

    def frame(self) -> pd.DataFrame:
        """One line a method and scenario, all measures as plain numbers (shares 0 to 1, megabytes, counts)."""
        lines = []
        for section in self.sections:
            for row in section.rows:
                line: dict[str, Any] = {
                    "scenario": section.scenario,
                    "fm": section.fm,
                    "method": row.method,
                    "variant": row.label.removeprefix(row.method).strip(" []"),
                    "state": "complete" if row.scored else row.state,
                    "seeds": len(row.runs),
                    "seeds_expected": row.expected,
                    "failed": row.failed,
                    "not_comparable": row.flag,
                }
                for name, path, scale in _MEASURES:
                    found = row.summary(*path, scale=scale)
                    line[name] = found.mean if found else None
                    line[f"{name}_std"] = found.std if found else None
                lines.append(line)
        frame = pd.DataFrame(lines)
        for column in ("seeds_expected",):
            if column in frame:
                frame[column] = frame[column].astype("Int64")
        return frame


_MEASURES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("accuracy", ("accuracy", "plug_in", "accuracy"), 1.0),
    ("macro_f1", ("accuracy", "plug_in", "macro_f1"), 1.0),
    ("proxy_accuracy", ("accuracy", "proxy", "accuracy"), 1.0),
    ("gap", ("accuracy", "gap"), 1.0),
    ("untouched_accuracy", ("accuracy", "untouched", "accuracy"), 1.0),
    ("client_accuracy_mean", ("accuracy", "per_client", "mean"), 1.0),
    ("client_accuracy_worst_tenth", ("accuracy", "per_client", "worst_tenth"), 1.0),
    ("mb_up", ("communication", "up", "bytes"), 1 / MEGA),
    ("mb_down", ("communication", "down_after_setup"), 1 / MEGA),
    ("mb_setup", ("communication", "setup_bytes"), 1 / MEGA),
    ("mb_up_per_client_round", ("communication", "up_per_client_round"), 1 / MEGA),
    ("gradient_error_start", ("gradient_error", "start"), 1.0),
    ("gradient_error_mean", ("gradient_error", "mean"), 1.0),
    ("gradient_error_final", ("gradient_error", "final"), 1.0),
    ("exposed_verbatim", ("exposure", "verbatim", "all"), 1.0),
    ("exposed_verbatim_without_embeddings", ("exposure", "verbatim", "without_embeddings"), 1.0),
    ("exposed_within_1_percent", ("exposure", "within_1_percent", "all"), 1.0),
    ("exposed_within_1_percent_without_embeddings", ("exposure", "within_1_percent", "without_embeddings"), 1.0),
    ("trainable_parameters", ("compute", "trainable_parameters"), 1.0),
    ("resident_parameters", ("compute", "resident_parameters"), 1.0),
    ("local_steps", ("compute", "local_steps"), 1.0),
    ("peak_memory_mb", ("compute", "peak_memory_bytes"), 1 / MEGA),
)


def _at(run: Record, path: Sequence[str]) -> float | None:
    """The number at `path` of the record, or None; two measures of communication are derived from others."""
    if path == ("communication", "down_after_setup"):
        down, setup = _at(run, ("communication", "down", "bytes")), _at(run, ("communication", "setup_bytes"))
        return None if down is None or setup is None else down - setup
    if path == ("communication", "up_per_client_round"):
        up = _at(run, ("communication", "up", "bytes"))
        uploads = sum(len(r.get("arrived", ())) + len(r.get("refused", ())) for r in run.rounds)
        return None if up is None or not uploads else up / uploads
    value: Any = getattr(run, path[0])
    for name in path[1:]:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) else None


# Building


def compare(records: Iterable[Record], cells: Sequence[Cell] | None = None, title: str = "") -> Comparison:
    """Sort records into sections and rows.

    With the `cells` of a grid, rows and columns are the grid's and what is not there yet shows as missing; records
    that do not belong to a cell are left out. Without, every record is shown.
    """
    records = list(records)
    if cells is not None:
        records = [record for record in records if any(_belongs(record, cell) for cell in cells)]
    by_section: dict[tuple[str, str], list[Record]] = defaultdict(list)
    scenarios = list(dict.fromkeys(cell.scenario for cell in cells)) if cells is not None else []
    for record in sorted(records, key=lambda r: (r.identity["scenario"], str(r.identity.get("fm")), r.key)):
        by_section[record.identity["scenario"], _fm(record, records)].append(record)
    for scenario in scenarios:
        if not any(name == scenario for name, _ in by_section):
            by_section[scenario, ""] = []
    order = {scenario: index for index, scenario in enumerate(scenarios)}
    sections = []
    for (scenario, fm), found in sorted(by_section.items(), key=lambda item: (order.get(item[0][0], 0), item[0])):
        wanted = None if cells is None else [cell for cell in cells if cell.scenario == scenario]
        sections.append(_section(scenario, fm, found, wanted))
    if cells is None:
        _add_absent(sections)
    return Comparison(sections, title)


def _fm(record: Record, records: Sequence[Record]) -> str:
    """The record's FM. A run that failed before its FM was known goes with the others of its scenario."""
    own = record.identity.get("fm")
    if own:
        return str(own)
    others = [r.identity.get("fm") for r in records if r.identity["scenario"] == record.identity["scenario"]]
    return min((str(fm) for fm in others if fm), default="")


def _belongs(record: Record, cell: Cell) -> bool:
    """Whether the record is of this cell, as far as names and the cell's own settings tell."""
    who = record.identity
    if (who["method"], who["scenario"], who["seed"]) != (cell.method, cell.scenario, cell.seed):
        return False
    if cell.fm is not None and who.get("fm") not in (cell.fm, None):
        return False
    if record.status == "failed":
        return True
    have = {**_flat(record.scenario), **_flat(record.method.get("settings", {}))}
    for key, value in cell.settings.items():
        name = key.removeprefix("method.").removeprefix(f"methods.{cell.method}.")
        name = "federation.rounds" if name == "rounds" else name
        found = have.get(name, have.get(name.replace("-", "_")))
        if found is not None and str(found) != value and not _equal_numbers(found, value):
            return False
    return True


def _equal_numbers(found: Any, text: str) -> bool:
    try:
        return math.isclose(float(found), float(text), rel_tol=1e-8)
    except (TypeError, ValueError):
        return str(found).lower() == text.lower()


def _section(scenario: str, fm: str, records: list[Record], cells: Sequence[Cell] | None) -> Section:
    rows: list[Row] = []
    asked: dict[str, int] = defaultdict(int)
    for cell in cells or ():
        asked[cell.method] += 1
    methods = list(asked) if cells is not None else sorted({r.identity["method"] for r in records}, key=_method_order)
    conditions = _conditions(records)
    for method in methods:
        own = [r for r in records if r.identity["method"] == method]
        complete = [r for r in own if r.status == "complete"]
        done = {r.identity["seed"] for r in complete}
        failed = {r.identity["seed"] for r in own if r.status == "failed"} - done
        variants = _variants(complete, conditions)
        for label, runs in variants or [("", [])]:
            row = Row(method, f"{method} [{label}]" if label else method, expected=asked[method] if cells else None)
            row.runs = {r.identity["seed"]: r for r in runs}
            rows.append(row)
        # A failed seed has no settings worth telling apart; it is shown with the method's first row.
        rows[-max(1, len(variants))].failed = len(failed)
    section = Section(scenario, fm, rows)
    _flag(section, conditions)
    _describe(section)
    _differences(section)
    return section


def _add_absent(sections: list[Section]) -> None:
    """Without a grid: show a method that ran in one scenario as missing in the others."""
    methods = {row.method for section in sections for row in section.rows}
    for section in sections:
        section.rows += [Row(m, m) for m in methods - {row.method for row in section.rows}]
        section.rows.sort(key=lambda row: _method_order(row.method))


def _method_order(name: str) -> tuple[int, str]:
    """Floor first, ceilings last, the methods under test by name between them."""
    ends = {"zero-shot": 0, "head-only": 1, CEILING: 3, "centralised-lora": 4}
    return ends.get(name, 2), name


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _conditions(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By record key: all that has to agree between two rows for their numbers to be comparable.

    That is the scenario without the methods' own settings, data, FM and precision. What a reference changes by its
    nature (`method.planned`: a partition of one client, no rounds) does not make it another scenario.
    """
    out = {}
    for record in records:
        if record.status != "complete":
            continue
        found = {
            path: value
            for path, value in _flat(record.scenario).items()
            if path not in ("title", "name") and not path.startswith("methods.") and path != "methods"
        }
        for name in ("data_hash", "fm_hash", "precision"):
            found[name] = record.identity.get(name)
        for path in record.method.get("planned") or ():
            found.pop(path, None)
        out[record.key] = found
    return out


def _variants(records: Sequence[Record], conditions: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Record]]]:
    """Records of one method, grouped by everything but the seed; each group with what tells it from the others."""
    groups: dict[str, list[Record]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    for record in records:
        about = {
            **conditions[record.key],
            **_flat(record.method.get("settings", {})),
            "version": record.identity.get("method_version"),
        }
        name = repr(sorted((path, repr(value)) for path, value in about.items()))
        groups[name].append(record)
        settings[name] = about
    paths = sorted({path for about in settings.values() for path in about})
    telling = [p for p in paths if len({repr(about.get(p)) for about in settings.values()}) > 1]
    labelled = [(", ".join(_setting(p, settings[name].get(p)) for p in telling), groups[name]) for name in groups]
    # The group with most seeds first: where results were collected over time that is the one they are about.
    return sorted(labelled, key=lambda item: (-len(item[1]), item[0]))


def _setting(path: str, value: Any) -> str:
    return f"{path.rpartition('.')[2]} {_value(path, value)}"


def _value(path: str, value: Any) -> str:
    return str(value)[:8] if path.endswith("_hash") else str(value).lower()


def _flag(section: Section, conditions: Mapping[str, Mapping[str, Any]]) -> None:
    """Mark the rows whose conditions are not those of most runs in the section, and say what differs."""
    own = [(row, conditions[next(iter(row.runs.values())).key]) for row in section.rows if row.runs]
    if not own:
        return

    def agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        return all(repr(a[path]) == repr(b[path]) for path in a.keys() & b.keys())

    def support(candidate: Mapping[str, Any]) -> tuple[int, int]:
        """Runs under these conditions, and how many of the conditions are stated."""
        return sum(len(row.runs) for row, other in own if agree(candidate, other)), len(candidate)

    usual = max((about for _, about in own), key=support)
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, about in own:
        different = sorted(p for p in about.keys() & usual.keys() if repr(about[p]) != repr(usual[p]))
        if different:
            row.flag = ", ".join(
                f"{p} {_value(p, about[p])} instead of {_value(p, usual[p])}" for p in different[:3]
            ) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            reasons[row.flag].append(row.label)
    for reason, labels in reasons.items():
        section.notes.append(f"{FLAG} not comparable with the rest: {', '.join(labels)}: {reason}")


def _describe(section: Section) -> None:
    """Notes on the scenario: test set and its standard error, the FM untouched, reasons, seeds that are not there."""
    scored = [run for row in section.rows for run in row.scored.values()]
    if scored:
        best = max(run.accuracy["plug_in"]["accuracy"] for run in scored)
        rows = scored[0].accuracy["plug_in"]["rows"]
        error = binomial_standard_error(best, rows)
        section.notes.append(
            f"test set: {rows:,} rows; binomial standard error {100 * error:.2f} points at {100 * best:.1f}%"
        )
        untouched = [run.accuracy["untouched"]["accuracy"] for run in scored if run.accuracy.get("untouched")]
        text = f"{100 * untouched[0]:.1f}%" if untouched else "not available (no head trained for this task)"
        section.notes.append(f"FM untouched: {text}")
        if any((run.scenario.get("public") or {}).get("in_domain") for run in scored):
            section.notes.append("the public corpus is in-domain, which flatters proxies")
        section.notes += _budget(section)
    for row in section.rows:
        reasons = sorted({str(run.accuracy["unavailable"]) for run in row.runs.values() if not _plug_in(run)})
        section.notes += [f"{row.label}: not available: {reason}" for reason in reasons]
        if row.failed:
            section.notes.append(f"{row.label}: {_seeds(row.failed)} failed; the tracebacks are in the records")


def _budget(section: Section) -> list[str]:
    """What is not equal between the proxy methods: parameters held within 2%, and local optimiser steps."""
    rows = [row for row in section.rows if row.summary("accuracy", "proxy", "accuracy") and not row.flag]
    out = []
    for name, what, tolerance in (
        ("resident_parameters", "parameters held at a client", 0.02),
        ("local_steps", "local steps", 0.0),
    ):
        found = {row.label: value.mean for row in rows if (value := row.summary("compute", name))}
        if len(found) > 1 and max(found.values()) > (1 + tolerance) * min(found.values()):
            each = ", ".join(f"{label} {value:,.0f}" for label, value in found.items())
            out.append(f"budgets of the proxy methods differ: {what}: {each}")
    return out


def _plug_in(run: Record) -> Any:
    return run.accuracy.get("plug_in")


# Statistics


def binomial_standard_error(accuracy: float, rows: int) -> float:
    """Standard deviation of the accuracy on `rows` independent test rows: sqrt(a (1 - a) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / rows)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): family-wise error, valid under any dependence."""
    m = len(p_values)
    adjusted = [0.0] * m
    highest = 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation (sign-flip) test on the mean difference; exact up to 16 pairs."""
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=np.float64)
    if not values.any():
        return 1.0
    result = permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=2**16,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def bootstrap(
    correct: Mapping[str, Mapping[int, NDArray[np.bool_]]], pairs: Sequence[tuple[str, str]], resamples: int = RESAMPLES
) -> list[Difference]:
    """Difference in accuracy of each pair, with a percentile interval over shared seeds and shared test rows.

    `correct[method][seed]` says for each test row [n] whether it was answered rightly. In every resample the rows are
    drawn once for all runs, because all runs face the same rows, and then the seeds that both of a pair have; with a
    single seed only the rows vary. Resamples come from a fixed stream: the same records give the same interval.
    """
    runs = [(method, seed) for method, seeds in correct.items() for seed in sorted(seeds)]
    if not runs:
        return []
    answers = np.stack([correct[method][seed] for method, seed in runs], axis=1).astype(np.float32)  # [n, runs]
    rows = len(answers)
    rng = np.random.default_rng(0)
    scores = np.empty((resamples, len(runs)))
    chunk = max(1, 4_000_000 // rows)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        weights = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float32)
        scores[start : start + size] = weights @ answers / rows
    place = {run: index for index, run in enumerate(runs)}
    out = []
    for a, b in pairs:
        shared = sorted(correct[a].keys() & correct[b].keys())
        mine, theirs = [place[a, s] for s in shared], [place[b, s] for s in shared]
        each = scores[:, mine] - scores[:, theirs]  # [resamples, seeds]
        seeds = rng.integers(len(shared), size=each.shape)
        means = np.take_along_axis(each, seeds, axis=1).mean(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        observed = float((answers[:, mine].mean(axis=0) - answers[:, theirs].mean(axis=0)).mean())
        out.append(Difference(a, b, 100 * observed, 100 * float(low), 100 * float(high), len(shared)))
    return out


def _differences(section: Section) -> None:
    """Headroom and the differences between methods, among comparable rows with per-row correctness."""
    rows = {row.label: row for row in section.rows if row.scored and not row.flag}
    correct: dict[str, dict[int, NDArray[np.bool_]]] = {}
    sizes: dict[int, int] = defaultdict(int)
    for row in rows.values():
        for run in row.scored.values():
            sizes[run.accuracy["plug_in"]["rows"]] += 1
    usual = max(sizes, key=lambda size: sizes[size]) if sizes else 0
    for label, row in rows.items():
        blocks = {seed: run.accuracy["plug_in"] for seed, run in row.scored.items()}
        correct[label] = {
            seed: unpack_correct(block["correct"], block["rows"])
            for seed, block in blocks.items()
            if block.get("correct") and block["rows"] == usual
        }

    def paired(a: str, b: str) -> bool:
        return bool(correct[a].keys() & correct[b].keys())

    first = {row.method: label for label, row in reversed(rows.items())}
    pairs = []
    if CEILING in first and FLOOR in first and paired(first[CEILING], first[FLOOR]):
        pairs.append((first[CEILING], first[FLOOR]))
    ranked = [label for label, row in rows.items() if row.method not in REFERENCES]
    pairs += [(a, b) for a, b in itertools.combinations(ranked, 2) if paired(a, b)]
    found = bootstrap(correct, pairs)
    if pairs and pairs[0][1] == first.get(FLOOR):
        section.headroom = found.pop(0)
    tested = [i for i, difference in enumerate(found) if difference.seeds >= SEEDS_FOR_TEST]
    raw = []
    for i in tested:
        a, b = correct[found[i].a], correct[found[i].b]
        raw.append(paired_test([float(a[s].mean() - b[s].mean()) for s in sorted(a.keys() & b.keys())]))
    for i, p in zip(tested, holm(raw), strict=True):
        d = found[i]
        found[i] = Difference(d.a, d.b, d.mean, d.low, d.high, d.seeds, p)
    section.differences = found


# Rendering

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


def accuracy_text(row: Row) -> str:
    """87.3 ± 0.4 (3), in per cent; (2/3) where a grid expects more; or why there is none."""
    found = row.summary("accuracy", "plug_in", "accuracy", scale=100)
    if found is None:
        return row.state
    deviation = "" if found.std is None else f" ± {found.std:.1f}"
    of = f"/{row.expected}" if row.expected and row.expected != found.n else ""
    return f"{found.mean:.1f}{deviation} ({found.n}{of})"


def comments(section: Section) -> list[str]:
    """The lines under a scenario's table: headroom, differences, notes."""
    out = []
    if section.headroom:
        verdict = "" if section.headroom.low > 0 else "; the interval holds 0: this scenario cannot rank methods"
        out.append(f"headroom, {section.headroom}{verdict}")
    elif any(row.scored for row in section.rows):
        out.append(f"headroom: unknown; it takes complete runs of {CEILING} and {FLOOR} with a shared seed")
    out += map(str, section.differences)
    if section.differences and all(d.p is None for d in section.differences):
        out.append(f"no test of these differences: it takes {SEEDS_FOR_TEST} shared seeds")
    elif section.differences:
        out.append("p: paired permutation test over shared seeds, with Holm's correction")
    return out + section.notes


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
    """Title, table and comments of each table to print; accuracy over scenarios first where there are several."""
    out: list[tuple[str, pd.DataFrame, list[str]]] = []
    if len(comparison.sections) > 1:
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
            title=Text(title),
            title_justify="left",
            title_style="bold",
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
        parts += [Text(""), table]
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in notes]
    parts += [Text(""), *(Text(line, style="dim") for line in LEGEND)]
    return Group(*parts)


def signed(value: float) -> str:
    """One decimal with its sign, as differences in points are written."""
    text = f"{value:+.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def three_digits(value: float) -> str:
    """About three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    return three_digits(size / MEGA)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds(n: int) -> str:
    return f"{n} seed" + ("" if n == 1 else "s")
