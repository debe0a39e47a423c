"""One run: its blocks, and that they agree with each other.

A record says what was run, what came out and what it cost; `records.schema` says what each of its fields holds.
Nothing here imports torch: tables are made from records on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedbench.errors import FedbenchError, one_line
from fedbench.records.schema import (
    Accuracy,
    AggregationError,
    Communication,
    Compute,
    Direction,
    Exposure,
    Failure,
    GradientError,
    Identity,
    Method,
    Partition,
    Privacy,
    Provenance,
    Residual,
    Round,
    Scenario,
    Score,
)
from fedbench.records.text import plain, shown, unpack_correct


class Record(BaseModel):
    """One run. A failed one has the blocks it came to, the others empty.

    Values are made plain and rounded on construction, so a record in memory equals the same record read back. Raises
    ValidationError for a block that is not laid out as its class says, and for one that contradicts another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # `schema` in the file; the attribute has another name because pydantic's own classes have a `schema`.
    schema_version: int = Field(alias="schema")
    status: Literal["complete", "failed"]
    error: Failure | None = None
    identity: Identity
    scenario: Scenario = Scenario()
    method: Method = Method()
    accuracy: Accuracy = Accuracy()
    communication: Communication = Communication()
    gradient_error: GradientError | None = None  # null where clients train the FM itself
    aggregation_error: AggregationError | None = None  # null where no adapters of LoRA are averaged
    privacy: Privacy | None = None  # null where a run gives none
    distillation: list[Residual] = []  # one entry a layer
    exposure: Exposure | None = None
    compute: Compute = Compute()
    rounds: list[Round] = []
    partition: Partition = Partition()
    provenance: Provenance = Provenance()

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    @model_validator(mode="after")
    def _agrees(self) -> Record:
        for complaint in _contradictions(self):
            raise ValueError(complaint)
        return self

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def rounds_without_upload(self) -> int:
        """In how many rounds no upload was taken."""
        return sum(not entry.arrived for entry in self.rounds)

    @property
    def no_upload(self) -> str:
        """Why the scored model of a run with rounds is as it started: no upload until then. Else nothing."""
        selection = self.accuracy.selection
        rounds = self.rounds[: (selection.round if selection else len(self.rounds) - 1) + 1]
        if not rounds or any(entry.arrived for entry in rounds):
            return ""
        if any(entry.arrived for entry in self.rounds):
            what = "no upload had arrived by the round that is scored"
        elif any(entry.refused for entry in self.rounds):
            what = "every upload was refused"
        else:
            what = "no upload ever arrived"
        return f"{what}: the model is as it started"

    def to_json(self) -> dict[str, Any]:
        """The record as it lies in the file: what was left out stays out."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def complaint_of(error: ValidationError) -> str:
    """The first thing that is wrong with a record: dotted field, what was expected, what is there."""
    first = error.errors()[0]
    place = one_line(".".join(map(str, first["loc"])))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # What a record says about its blocks names the field itself.
        return f"{place}: {message}" if place else message
    message = message[0].lower() + message[1:]
    found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
    return f"{place}: {message}{found}"


def _close(a: float, b: float) -> bool:
    """Whether two values are the same but for the rounding of a record."""
    return math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-8)


def _contradictions(record: Record) -> Iterator[str]:
    """What a record says in two places and differently, each as "field: complaint"."""
    who, method, scenario = record.identity, record.method, record.scenario
    for name, said, own in (("method", method.name, who.method), ("scenario", scenario.name, who.scenario)):
        if said and said != own:
            yield f"{name}.name: {shown(said)}, but identity.{name} is {shown(own)}"
    if not method.empty and method.version != who.method_version:
        yield f"method.version: {shown(method.version)}, but identity.method_version is another"
    if record.status == "failed":
        if not record.error:
            yield "error: empty, but status is failed"
        return
    if record.error:
        yield "error: not null, but status is complete"
    for block in ("scenario", "method", "accuracy", "communication", "compute", "partition"):
        if getattr(record, block).empty:
            yield f"{block}: empty, but status is complete"
            return
    for table in ("split", "federation"):
        if getattr(scenario, table) is None:
            yield f"scenario.{table}: missing, but status is complete"
            return
    yield from _scores(record.accuracy)
    yield from _traffic(record.communication)
    yield from _course(record)
    if record.gradient_error is not None:
        yield from _gradients(record.gradient_error)
    if record.aggregation_error is not None:
        yield from _aggregation(record.aggregation_error)
    for i, (size, counts) in enumerate(zip(record.partition.sizes or (), record.partition.label_counts, strict=False)):
        if sum(counts) != size:
            yield f"partition.sizes.{i}: {size}, but its label_counts sum to {sum(counts)}"


def _more_scores(place: str, score: Score | None) -> Iterator[str]:
    """Means of further scores that are not those of their rows."""
    if score is None:
        return
    for said, bits in (("acc_norm", score.correct_norm), ("exact_match", score.exact)):
        value = getattr(score, said)
        if bits is None:
            continue
        try:
            share = float(unpack_correct(bits, score.rows).mean())
        except FedbenchError as error:
            yield f"{place}.{error}"
            continue
        if value is None or not _close(value, share):
            yield f"{place}.{said}: {value}, but its per-row bits say {share:.9g}"
    if (rows := score.rouge_l_rows) is not None:
        if len(rows) != score.rows:
            yield f"{place}.rouge_l_rows: {len(rows)} values of {score.rows} rows"
        elif score.rouge_l is None or not _close(score.rouge_l, float(np.mean(rows))):
            yield f"{place}.rouge_l: {score.rouge_l}, but the mean over its rows is {np.mean(rows):.9g}"


def _scores(accuracy: Accuracy) -> Iterator[str]:
    tests = {"accuracy": (accuracy.plug_in, accuracy.proxy)}
    for name, test in (accuracy.extra_tests or {}).items():
        tests[f"accuracy.extra_tests.{name}"] = test.plug_in, test.proxy
    for place, (plug_in, proxy) in tests.items():
        for name, score in (("plug_in", plug_in), ("proxy", proxy)):
            if score is None or score.correct is None or score.accuracy is None:
                continue
            try:
                share = float(unpack_correct(score.correct, score.rows).mean())
            except FedbenchError as error:
                yield f"{place}.{name}.{error}"
                continue
            if not _close(score.accuracy, share):
                yield f"{place}.{name}.accuracy: {score.accuracy}, but its per-row bits say {share:.9g}"
        for name, score in (("plug_in", plug_in), ("proxy", proxy)):
            yield from _more_scores(f"{place}.{name}", score)
        if plug_in and proxy and plug_in.rows != proxy.rows:
            yield f"{place}.proxy.rows: {proxy.rows}, but plug_in has {plug_in.rows}"
    gap = accuracy.gap
    points = [s.accuracy for s in (accuracy.plug_in, accuracy.proxy) if s is not None and s.accuracy is not None]
    if gap is not None and (len(points) < 2 or not _close(gap, points[0] - points[1])):
        yield f"accuracy.gap: {gap}, but that is not plug_in minus proxy"
    for block, clients in (("per_client", accuracy.per_client), ("personal", accuracy.personal)):
        if clients is None or not clients.values:
            continue
        values = clients.values
        lowest = sorted(values)[: max(1, round(0.1 * len(values)))]
        for name, said, value in (
            ("mean", clients.mean, np.mean(values)),
            ("std", clients.std, np.std(values)),
            ("worst_tenth", clients.worst_tenth, np.mean(lowest)),
        ):
            # The values are rounded to six digits.
            if not math.isclose(said, value, abs_tol=2e-6):
                yield f"accuracy.{block}.{name}: {said}, but its values say {value:.6f}"


def _traffic(traffic: Communication) -> Iterator[str]:
    per_round = traffic.per_round or []
    sides: tuple[tuple[str, Direction | None, int], ...] = (
        ("up", traffic.up, sum(each.up for each in per_round)),
        ("down", traffic.down, sum(each.down for each in per_round)),
    )
    for way, side, over_rounds in sides:
        if side is None:
            continue
        of_kinds = sum(kind.bytes for kind in side.by_kind.values())
        for what, value in ((f"{way}.by_kind", of_kinds), ("per_round", over_rounds)):
            if value != side.bytes:
                yield f"communication.{way}.bytes: {side.bytes}, but {what} sums to {value}"
    if traffic.down and traffic.setup_bytes is not None and traffic.setup_bytes > traffic.down.bytes:
        yield f"communication.setup_bytes: {traffic.setup_bytes}, more than went down"


def _course(record: Record) -> Iterator[str]:
    """Contradictions in the rounds: their number and order, who took part, and their bytes."""
    rounds, per_round = record.rounds, record.communication.per_round or []
    numbers = {
        "rounds": [each.round for each in rounds],
        "communication.per_round": [each.round for each in per_round],
    }
    for place, listed in numbers.items():
        if listed != list(range(len(listed))):
            yield f"{place}: not the rounds 0 to {len(listed) - 1} in order"
    federation, selection = record.scenario.federation, record.accuracy.selection
    if (record.accuracy.plug_in or record.accuracy.personal) is None or federation is None or selection is None:
        return
    for place, listed in numbers.items():
        if len(listed) != federation.rounds:
            yield f"{place}: {len(listed)} of them, but scenario.federation.rounds is {federation.rounds}"
    if selection.round >= len(rounds):
        yield f"accuracy.selection.round: {selection.round}, but there are {len(rounds)} rounds"
    for i, (entry, size) in enumerate(zip(rounds, per_round, strict=False)):
        cohort, arrived, refused = set(entry.cohort), set(entry.arrived), {each.client for each in entry.refused}
        if not arrived | refused <= cohort or arrived & refused:
            yield f"rounds.{i}: arrived and refused are not separate parts of its cohort"
        for way, said, by_client in (
            ("up", size.up, entry.bytes_up_by_client), ("down", size.down, entry.bytes_down_by_client)
        ):  # fmt: skip
            if by_client is not None and sum(by_client) != said:
                yield f"rounds.{i}.bytes_{way}_by_client: sums to {sum(by_client)}, but per_round has {said}"
        for name in ("bytes_up_by_client", "bytes_down_by_client", "flops_by_client"):
            if (values := getattr(entry, name)) is not None and len(values) != len(entry.cohort):
                yield f"rounds.{i}.{name}: {len(values)} of them, but the cohort has {len(entry.cohort)} clients"
        for way, said, measured in (("up", size.up, entry.bytes_up), ("down", size.down, entry.bytes_down)):
            if measured not in (None, said):
                yield f"communication.per_round.{i}.{way}: {said}, but rounds has {measured}"


def _aggregation(aggregation: AggregationError) -> Iterator[str]:
    errors = [point.model for point in aggregation.points if point.model is not None]
    if not errors:
        yield "aggregation_error.points: none of them has a number"
        return
    for name, said, value in (
        ("mean", aggregation.mean, float(np.mean(errors))),
        ("final", aggregation.final, errors[-1]),
    ):
        if not _close(said, value):
            yield f"aggregation_error.{name}: {said}, but its points say {value:.9g}"


def _gradients(gradient: GradientError) -> Iterator[str]:
    errors = [point.zero_filled.error for point in gradient.points if point.zero_filled.error is not None]
    if not errors:
        return
    for name, said, value in (
        ("start", gradient.start, errors[0]),
        ("mean", gradient.mean, float(np.mean(errors))),
        ("final", gradient.final, errors[-1]),
    ):
        if said is not None and not _close(said, value):
            yield f"gradient_error.{name}: {said}, but its points say {value:.9g}"
