"""Gradient error as a study: how far training on a proxy is from training on the FM, and what explains it.

FedPFT's theorem (Peng et al. 2024, section 3.5) bounds what proxy tuning loses by the error of its gradients, and that
by the residuals of distillation. The study measures every link on one run of a method, against a run of `fedavg-lora`
with the same seed, cohorts, batches and local optimiser, which differs in nothing but that clients hold the FM:

- the error of the gradient on the probe rows, along the method's own path and at the reference's values, which are
  common to all methods that are compared;
- the error of the update: what a client's local training (its epochs, at most `max_steps`) changes from the reference's
  values, on the proxy against on the FM, mean over the round's clients;
- the drift: how far the aggregated values are from the reference's, relative to how far those came from the start;
- the error of aggregation: what averaging the two factors of LoRA loses against averaging their products;
- the residuals of distillation, by layer.

Each is a block as in a record's gradient error: restricted to the proxy's tunables and zero-filled, LoRA and head, and
by layer, with cosines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId
from fedbench.api.sides import Client, Method
from fedbench.errors import FedbenchError
from fedbench.measures.gradient import aggregation_error, gradient_error, gradients
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.models.parts import Parts
from fedbench.models.weights import get_tensors, set_tensors, tunable_names
from fedbench.records import provenance
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared
from fedbench.run.progress import Progress, Silent

Block = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass
class Trace:
    """What the run on the full FM went through, by the FM's names.

    values: of all tunables before each round, and after the last. updates: of each client in each round. gradients: on
    the probe rows at `values`, as far as asked for.
    """

    values: list[dict[str, Tensor]] = field(default_factory=list)
    updates: list[dict[ClientId, dict[str, Tensor]]] = field(default_factory=list)
    gradients: dict[int, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One method's run against the reference.

    points: gradient errors by round and phase (round -1 is the start), each with its block along the method's own path
    and, under "common", at the reference's values. updates, drift: blocks by round, the latter with the error of
    aggregation. residuals: of distillation, by
    layer of the FM.
    """

    about: Mapping[str, Any]
    points: Sequence[Block]
    updates: Sequence[Block]
    drift: Sequence[Block]
    residuals: Sequence[Block]

    def to_json(self) -> dict[str, Any]:
        """Everything, as it goes to a file."""
        return {
            "about": dict(self.about),
            "points": list(self.points),
            "updates": list(self.updates),
            "drift": list(self.drift),
            "residuals": list(self.residuals),
        }

    @property
    def method(self) -> str:
        return str(self.about["method"]["name"])


def matched(method: Method) -> FedAvgLora:
    """`fedavg-lora` with the local optimiser and the adapters of `method`."""
    return FedAvgLora(**{name: getattr(method, name) for name in FedAvgLora.model_fields if hasattr(method, name)})


def study(prepared: Sequence[Prepared], progress: Progress | None = None) -> list[Study]:
    """Study runs of one scenario and seed; methods with the same optimiser and adapters share a reference.

    Raises FedbenchError for a method whose clients train the FM itself.
    """
    traces: dict[str, Trace] = {}
    out = []
    for p in prepared:
        run = _Studied(p, progress or Silent())
        reference = matched(p.method)
        key = reference.model_dump_json()
        if key not in traces:
            first = _Reference(replace(p, method=reference), progress or Silent())
            first.loop(None)
            traces[key] = first.trace
        run.follow(traces[key])
        run.loop(None)
        about = {
            "method": p.identity["method"],
            "scenario": dict(p.identity["scenario"]) | {"name": p.scenario.name},
            "fm": p.loaded.fm.name,
            "seed": p.request.seed,
            "key": p.key,
            "reference": {"name": reference.name, "settings": reference.model_dump(mode="json")},
            "probe_rows": len(run.probe),
            "provenance": provenance.collect(p.execution.device) | {"executor": p.execution.executor},
        }
        out.append(Study(about, run.points, run.updates, run.drift, run.server.residuals()))
    return out


class _Reference(Run):
    """A run on the full FM that writes down where it came by."""

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        super().__init__(prepared, progress)
        self.trace = Trace()
        self._note()

    def _note(self) -> None:
        fm = self.server.plug_in()
        self.trace.values.append(get_tensors(fm, tunable_names(fm)))

    def round(self, round: int) -> None:
        super().round(round)
        self._note()

    def _train(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> dict[ClientId, LocalResult]:
        results = super()._train(round, tasks)
        self.trace.updates.append({cid: _update(tasks[cid], result) for cid, result in results.items()})
        return results


class _Studied(Run):
    """A run of a method that is compared with the reference on its way."""

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        super().__init__(prepared, progress)
        if self.server.proxy() is None:
            raise FedbenchError(
                f"{prepared.method.name}: its clients train the FM itself, so its gradients have no error; "
                "name a method with a proxy, such as fedpft"
            )
        self.trace = Trace()
        self.updates: list[Block] = []
        self.drift: list[Block] = []
        self.aggregation: float | None = None

    def follow(self, trace: Trace) -> None:
        """Compare with this run from now on."""
        self.trace = trace

    def _in_fm(self, tensors: Tensors) -> dict[str, Tensor]:
        names = self.server.fm_names()
        return {names[name]: tensor for name, tensor in tensors.items()}

    def _block(self, mine: Tensors, reference: Tensors) -> dict[str, Any]:
        parts = Parts(self.server.plug_in())
        own, theirs = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (mine, reference))
        return gradient_error(own, theirs, parts.layer_of, parts.is_head)

    def round(self, round: int) -> None:
        super().round(round)
        start, theirs = self.trace.values[0], self.trace.values[round + 1]
        now = get_tensors(self.server.plug_in(), list(self.server.fm_names().values()))
        moved, expected = ({n: v - start[n] for n, v in values.items()} for values in (now, theirs))
        self.drift.append({"round": round, "aggregation": self.aggregation, **self._block(moved, expected)})

    def _train(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> dict[ClientId, LocalResult]:
        values, names = self.trace.values[round], self.server.fm_names()
        common = {
            cid: replace(task, tunables={name: values[names[name]] for name in task.tunables}, observers={})
            for cid, task in tasks.items()
            # A client with a `fit` of its own does not train by gradients alone.
            if type(self.client(cid)).fit is Client.fit
        }
        shown, self.progress = self.progress, Silent()
        from_common = super()._train(round, common)
        self.progress = shown
        blocks = [
            self._block(self._in_fm(_update(common[cid], result)), self.trace.updates[round][cid])
            for cid, result in from_common.items()
        ]
        if blocks:
            self.updates.append({"round": round, "clients": len(blocks), **mean_block(blocks)})
        results = super()._train(round, tasks)
        weights = [len(self.rows[cid]) for cid in results]
        self.aggregation = aggregation_error([r.tunables for r in results.values()], weights) if results else None
        return results

    def _gradient_error(self, round: int, phase: str, reference: Tensors | None = None) -> Tensors | None:
        own = super()._gradient_error(round, phase, reference)
        if own is not None:
            self.points[-1]["common"] = self._common(round)
        return own

    def _common(self, round: int) -> dict[str, Any]:
        """The gradient's error at the values the reference has after `round`."""
        values, names = self.trace.values[round + 1], self.server.fm_names()
        if round not in self.trace.gradients:
            fm = self.server.plug_in()
            with _holding(fm, values):
                found = gradients(fm, tunable_names(fm), self.probe, self.p.execution)
            self.trace.gradients[round] = found
        proxy = self.server.proxy()
        assert proxy is not None
        with _holding(proxy, {name: values[names[name]] for name in names}):
            mine = gradients(proxy, list(names), self.probe, self.p.execution)
        return self._block(self._in_fm(mine), self.trace.gradients[round])


@contextmanager
def _holding(model: nn.Module, values: Tensors) -> Iterator[None]:
    """Put values into parameters of the model for the time of the block."""
    before = get_tensors(model, list(values))
    set_tensors(model, values)
    try:
        yield
    finally:
        set_tensors(model, before)


def _update(task: LocalTask, result: LocalResult) -> dict[str, Tensor]:
    return {name: value - task.tunables[name].cpu() for name, value in result.tunables.items()}


def mean_block(blocks: Sequence[Any]) -> Any:
    """The mean of blocks of one shape, number by number; of those that exist, null where none does."""
    first = blocks[0]
    if isinstance(first, Mapping):
        return {n: value if n == "layer" else mean_block([b[n] for b in blocks]) for n, value in first.items()}
    if isinstance(first, Sequence):
        return [mean_block(parts) for parts in zip(*blocks, strict=True)]
    found = [value for value in blocks if value is not None]
    return float(np.mean(found)) if found else None
