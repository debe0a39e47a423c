"""What tables measure of a run: each a number that is read from its record, or None where there is none.

A model that diverged has no measure of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedbench.records.record import Record
from fedbench.records.schema import Direction, Score
from fedbench.tables.formats import MEGA

Reader = Callable[[Record], float | None]


def score_of(score: Score | None) -> float | None:
    """The accuracy of a model that was scored and did not diverge."""
    return None if score is None or score.diverged else score.accuracy


def macro_f1(run: Record) -> float | None:
    score = run.accuracy.plug_in
    return None if score is None or score.diverged else score.macro_f1


def perplexity(run: Record) -> float | None:
    """Of a language objective: e to the mean loss of a token of the test rows."""
    score = run.accuracy.plug_in
    return None if score is None or score.diverged else score.perplexity


def _beside(name: str) -> Reader:
    """A further score of the FM plugged in, on the test rows."""

    def read(run: Record) -> float | None:
        score = run.accuracy.plug_in
        return None if score is None or score.diverged else getattr(score, name)

    return read


def plug_in(run: Record) -> float | None:
    return score_of(run.accuracy.plug_in)


def proxy(run: Record) -> float | None:
    return score_of(run.accuracy.proxy)


def untouched(run: Record) -> float | None:
    return score_of(run.accuracy.untouched)


def gap(run: Record) -> float | None:
    scores = run.accuracy.plug_in, run.accuracy.proxy
    return None if any(score is not None and score.diverged for score in scores) else run.accuracy.gap


def client_mean(run: Record) -> float | None:
    clients = run.accuracy.per_client
    return None if clients is None or run.accuracy.diverged else clients.mean


def worst_tenth(run: Record) -> float | None:
    clients = run.accuracy.per_client
    return None if clients is None or run.accuracy.diverged else clients.worst_tenth


def personal_mean(run: Record) -> float | None:
    """Of clients' own models, each on test rows of its own."""
    return None if run.accuracy.personal is None else run.accuracy.personal.mean


def personal_worst_tenth(run: Record) -> float | None:
    return None if run.accuracy.personal is None else run.accuracy.personal.worst_tenth


def accuracy_on(test: str) -> Reader:
    """The accuracy of the FM plugged in on one of the further test sets."""

    def read(run: Record) -> float | None:
        scores = (run.accuracy.extra_tests or {}).get(test)
        return None if scores is None else score_of(scores.plug_in)

    return read


def _bytes(side: Direction | None) -> int | None:
    return None if side is None else side.bytes


def up(run: Record) -> float | None:
    return _bytes(run.communication.up)


def down_after_setup(run: Record) -> float | None:
    down, first = _bytes(run.communication.down), run.communication.setup_bytes
    return None if down is None or first is None else down - first


def setup(run: Record) -> float | None:
    return run.communication.setup_bytes


def traffic(run: Record) -> float | None:
    """Bytes in both directions, set-up included."""
    sent, received = _bytes(run.communication.up), _bytes(run.communication.down)
    return None if sent is None or received is None else sent + received


def up_per_client_round(run: Record) -> float | None:
    """Bytes of one upload, taken or refused, on average."""
    total = _bytes(run.communication.up)
    uploads = sum(len(entry.arrived) + len(entry.refused) for entry in run.rounds)
    return None if total is None or not uploads else total / uploads


def gradient_error_start(run: Record) -> float | None:
    return None if run.gradient_error is None else run.gradient_error.start


def gradient_error_mean(run: Record) -> float | None:
    return None if run.gradient_error is None else run.gradient_error.mean


def gradient_error_final(run: Record) -> float | None:
    return None if run.gradient_error is None else run.gradient_error.final


def aggregation_error(run: Record) -> float | None:
    return None if run.aggregation_error is None else run.aggregation_error.mean


def factor_averaging_error(run: Record) -> float | None:
    """What plain averaging of LoRA's factors would have lost of the same uploads, on average over rounds."""
    points = [] if run.aggregation_error is None else run.aggregation_error.points
    found = [point.factors for point in points if point.factors is not None]
    return sum(found) / len(found) if found else None


def verbatim(run: Record) -> float | None:
    return None if run.exposure is None else run.exposure.verbatim.all


def verbatim_without_embeddings(run: Record) -> float | None:
    return None if run.exposure is None else run.exposure.verbatim.without_embeddings


def near(run: Record) -> float | None:
    return None if run.exposure is None else run.exposure.within_1_percent.all


def near_without_embeddings(run: Record) -> float | None:
    return None if run.exposure is None else run.exposure.within_1_percent.without_embeddings


def trained(run: Record) -> float | None:
    return run.compute.trainable_parameters


def held(run: Record) -> float | None:
    return run.compute.resident_parameters


def client_memory(run: Record) -> float | None:
    """Bytes of the parameters that a client holds, 4 each; activations and an optimiser's state are not counted."""
    held = run.compute.resident_parameters
    return None if held is None else 4 * held


def local_steps(run: Record) -> float | None:
    return run.compute.local_steps


def step_flops(run: Record) -> float | None:
    return run.compute.step_flops


def peak_memory(run: Record) -> float | None:
    return run.compute.peak_memory_bytes


def train_rows(run: Record) -> int:
    """Training rows over all clients."""
    return sum(run.partition.sizes or ())


@dataclass(frozen=True)
class Measure:
    """A column of the table of plain numbers: its name, how it is read, and what it is multiplied by.

    about: a line on it under tables that were asked for it. unknown: why a run has no number, nothing where it has one.
    """

    name: str
    read: Reader
    scale: float = 1.0
    about: str = ""
    unknown: Callable[[Record], str] | None = None


MEASURES = (
    Measure("accuracy", plug_in),
    Measure("macro_f1", macro_f1),
    Measure("proxy_accuracy", proxy),
    Measure("gap", gap),
    Measure("untouched_accuracy", untouched),
    Measure("client_accuracy_mean", client_mean),
    Measure("client_accuracy_worst_tenth", worst_tenth),
    Measure("mb_up", up, 1 / MEGA),
    Measure("mb_down", down_after_setup, 1 / MEGA),
    Measure("mb_setup", setup, 1 / MEGA),
    Measure("mb_up_per_client_round", up_per_client_round, 1 / MEGA),
    Measure("gradient_error_start", gradient_error_start),
    Measure("gradient_error_mean", gradient_error_mean),
    Measure("gradient_error_final", gradient_error_final),
    Measure("exposed_verbatim", verbatim),
    Measure("exposed_verbatim_without_embeddings", verbatim_without_embeddings),
    Measure("exposed_within_1_percent", near),
    Measure("exposed_within_1_percent_without_embeddings", near_without_embeddings),
    Measure("trainable_parameters", trained),
    Measure("resident_parameters", held),
    Measure("local_steps", local_steps),
    Measure("gflop_per_step", step_flops, 1e-9),
    Measure("peak_memory_mb", peak_memory, 1 / MEGA),
)
"""In the order of the columns."""

ASKED = (
    Measure("personal_accuracy_mean", personal_mean),
    Measure("personal_accuracy_worst_tenth", personal_worst_tenth),
    Measure("perplexity", perplexity),
    Measure("acc_norm", _beside("acc_norm")),
    Measure("exact_match", _beside("exact_match")),
    Measure("rouge_l", _beside("rouge_l")),
    Measure("aggregation_error", aggregation_error),
    Measure("factor_averaging_error", factor_averaging_error),
    Measure("client_memory_mb", client_memory, 1 / MEGA),
    Measure("mb_traffic", traffic, 1 / MEGA),
)
"""Those that a table has only where it is asked for them."""
