"""The numbers behind each plot: rows of plain values, read from records.

A row begins with the number of its run among those given, or of its line in the leaderboard. Shares are in per cent,
sizes in MB of 10^6 bytes, rounds are counted from 1, and 0 is before the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from fedbench.records.record import Record
from fedbench.records.schema import Direction
from fedbench.report.shown import Shown
from fedbench.tables import measures
from fedbench.tables.formats import MEGA

T = TypeVar("T")
Values = list[Any]

MOST_POINTS = 200
"""Of one curve; a longer one is thinned."""

MOST_CLIENTS, MOST_CLASSES = 120, 10
"""Federations of at most so many clients and classes are shown client by client; in larger ones clients are counted."""

ACCURACY_CLASSES = 50
SHARE_CLASSES = 10


@dataclass(frozen=True)
class Figures:
    """Rows of numbers with the names of their columns. The first is "run", a place among the runs."""

    columns: tuple[str, ...]
    rows: list[Values]


def accuracy_by_round(runs: Sequence[Shown]) -> Figures:
    """Accuracy on the validation rows after each round that was scored, with what had crossed by then, both ways."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        rows += [[place, *values] for values in accuracy_points(run.record)]
    return Figures(("run", "model", "round", "mb", "accuracy"), rows)


def accuracy_points(record: Record) -> list[Values]:
    """model, round, MB that had crossed by its end, accuracy: of each model apart, in the order of rounds."""
    crossed = {
        entry.round: total / MEGA
        for entry, total in zip(
            record.communication.per_round or (),
            accumulate(entry.up + entry.down for entry in record.communication.per_round or ()),
            strict=True,
        )
    }
    rows: list[Values] = []
    readers: tuple[tuple[str, Callable[[Any], float | None]], ...] = (
        ("plug-in", lambda entry: entry.plug_in_validation),
        ("proxy", lambda entry: entry.proxy_validation),
    )
    for model, read in readers:
        scored = [(entry.round, value) for entry in record.rounds if (value := read(entry)) is not None]
        rows += [[model, round + 1, crossed.get(round), 100 * value] for round, value in thinned(scored)]
    return rows


def gradient_by_round(runs: Sequence[Shown]) -> Figures:
    """Zero-filled gradient error at each moment it was measured at."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        block = run.record.gradient_error
        points = [] if block is None else [point for point in block.points if point.zero_filled.error is not None]
        rows += [
            [place, None if point.round is None else point.round + 1, point.phase or "", point.zero_filled.error]
            for point in thinned(points)
        ]
    return Figures(("run", "round", "phase", "error"), rows)


def gradient_by_layer(runs: Sequence[Shown]) -> Figures:
    """Gradient error of each layer, counted from 0, at the first and at the last moment it was measured at."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        block = run.record.gradient_error
        points = [] if block is None else [point for point in block.points if point.layers]
        rows += [
            [place, moment, layer.layer, layer.error]
            for moment, point in zip(("first", "last"), points[:1] + points[1:][-1:], strict=False)
            for layer in point.layers
            if layer.error is not None
        ]
    return Figures(("run", "moment", "layer", "error"), rows)


def gap_by_error(runs: Sequence[Shown]) -> Figures:
    """Plug-in minus proxy in points, and the mean gradient error of the run."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        gap, error = measures.gap(run.record), measures.gradient_error_mean(run.record)
        if gap is not None and error is not None:
            rows.append([place, error, 100 * gap])
    return Figures(("run", "error", "gap"), rows)


def traffic_by_kind(runs: Sequence[Shown]) -> Figures:
    """MB of each kind of message in each direction, over all clients and rounds."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        ways: tuple[tuple[str, Direction | None], ...] = (
            ("up", run.record.communication.up), ("down", run.record.communication.down)
        )  # fmt: skip
        rows += [
            [place, way, kind, entry.bytes / MEGA]
            for way, side in ways
            if side is not None
            for kind, entry in sorted(side.by_kind.items())
        ]
    return Figures(("run", "direction", "kind", "mb"), rows)


def client_accuracy(runs: Sequence[Shown]) -> Figures:
    """How many clients have an accuracy from `low` to below `high`, in per cent; the last class holds 100 as well.

    Where a method makes clients models of their own, it is the accuracy of these.
    """
    rows: list[Values] = []
    for place, run in enumerate(runs):
        block = run.record.accuracy.personal or run.record.accuracy.per_client
        if block is None or run.record.accuracy.diverged:
            continue
        step = 100 // ACCURACY_CLASSES
        rows += [
            [place, step * number, step * (number + 1), count]
            for number, count in enumerate(counted(block.values, ACCURACY_CLASSES))
            if count
        ]
    return Figures(("run", "low", "high", "clients"), rows)


def labels_by_client(runs: Sequence[Shown]) -> Figures:
    """Rows of each class at each client, of federations that are not too large for it.

    One partition serves many runs: it is given once in a section, with the first of them.
    """
    rows: list[Values] = []
    for place, run in _partitions(runs):
        counts = run.record.partition.label_counts
        if not _large(counts):
            rows += [[place, client, label, n] for client, row in enumerate(counts) for label, n in enumerate(row)]
    return Figures(("run", "client", "class", "rows"), rows)


def labels_by_share(runs: Sequence[Shown]) -> Figures:
    """How many clients have from `low` to below `high` per cent of their rows in a class, of larger federations.

    Clients without rows are left out; the last of the ten classes of shares holds 100 per cent as well.
    """
    rows: list[Values] = []
    for place, run in _partitions(runs):
        if not _large(run.record.partition.label_counts):
            continue
        counts = [row for row in run.record.partition.label_counts if sum(row)]
        step = 100 // SHARE_CLASSES
        for label in range(len(counts[0]) if counts else 0):
            shares = [row[label] / sum(row) for row in counts]
            rows += [
                [place, label, step * number, step * (number + 1), count]
                for number, count in enumerate(counted(shares, SHARE_CLASSES))
                if count
            ]
    return Figures(("run", "class", "low", "high", "clients"), rows)


def distillation(runs: Sequence[Shown]) -> Figures:
    """The hidden residual of each layer over the distillation, in up to ten stretches, where it was recorded."""
    rows: list[Values] = []
    for place, run in enumerate(runs):
        for number, residual in enumerate(run.record.distillation):
            layer = number if residual.layer is None else residual.layer
            rows += [[place, layer, stretch, value] for stretch, value in enumerate(residual.curve, start=1)]
    return Figures(("run", "layer", "stretch", "residual"), rows)


FIGURES: dict[str, Callable[[Sequence[Shown]], Figures]] = {
    "accuracy": accuracy_by_round,
    "gradient": gradient_by_round,
    "layers": gradient_by_layer,
    "gap": gap_by_error,
    "traffic": traffic_by_kind,
    "clients": client_accuracy,
    "labels": labels_by_client,
    "shares": labels_by_share,
    "distillation": distillation,
}
"""By name; two plots may share them."""


def counted(shares: Iterable[float], classes: int) -> list[int]:
    """How many of `shares`, 0 to 1, lie in each of so many classes of equal width, lower bounds included."""
    bounds = [number / classes for number in range(1, classes)]
    out = [0] * classes
    for share in shares:
        out[bisect_right(bounds, share + 1e-9)] += 1  # a recorded 0.7 is 0.7, whatever its last bit
    return out


def thinned(points: Sequence[T]) -> list[T]:
    """At most `MOST_POINTS` of them, evenly spaced, first and last included."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _large(label_counts: Sequence[Sequence[int]]) -> bool:
    return len(label_counts) > MOST_CLIENTS or len(label_counts[0]) > MOST_CLASSES


def _partitions(runs: Sequence[Shown]) -> list[tuple[int, Shown]]:
    """The first run of each partition of each section, by place, with its seeds in order."""
    found: dict[tuple[str, str], tuple[int, Shown]] = {}
    for place, run in sorted(enumerate(runs), key=lambda item: item[1].record.identity.seed):
        # What a method makes of the split by its nature, one client say, is not the scenario's.
        planned = any(name.startswith("split.") for name in run.record.method.planned or ())
        if run.record.partition.label_counts and not planned:
            found.setdefault((run.section, run.record.partition.hash or run.record.key), (place, run))
    return list(found.values())
