"""What tables measure of a run: numbers of its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedbench.records.store import Record, diverged
from fedbench.tables.formats import MEGA

if TYPE_CHECKING:
    pass


MEASURES: tuple[tuple[str, tuple[str, ...], float], ...] = (
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
    ("gflop_per_step", ("compute", "step_flops"), 1e-9),
    ("peak_memory_mb", ("compute", "peak_memory_bytes"), 1 / MEGA),
)


def at(run: Record, path: Sequence[str]) -> float | None:
    """The number at `path` of the record, or None; two measures of communication are derived from others.

    A model that diverged has no measure of accuracy.
    """
    if path == ("communication", "down_after_setup"):
        down, setup = at(run, ("communication", "down", "bytes")), at(run, ("communication", "setup_bytes"))
        return None if down is None or setup is None else down - setup
    if path == ("communication", "up_per_client_round"):
        up = at(run, ("communication", "up", "bytes"))
        uploads = sum(len(r.get("arrived", ())) + len(r.get("refused", ())) for r in run.rounds)
        return None if up is None or not uploads else up / uploads
    if path[0] == "accuracy":
        scores = run.accuracy.get("plug_in"), run.accuracy.get("proxy")
        if (path[1] == "gap" and any(map(diverged, scores))) or (path[1] == "per_client" and diverged(scores[0])):
            return None
    value: Any = getattr(run, path[0])
    for name in path[1:]:
        value = value.get(name) if isinstance(value, Mapping) and not diverged(value) else None
    return value if isinstance(value, (int, float)) else None


def train_rows(run: Record) -> int:
    return sum(run.partition.get("sizes") or ())
