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
from fedbench.api.sides import Client, Method, Server, tuned_fm
from fedbench.errors import FedbenchError
from fedbench.measures.gradient import GradientErrors, aggregation_error, gradient_error, gradients
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.models.parts import Parts
from fedbench.models.weights import get_tensors, set_tensors, tunable_names
from fedbench.records import provenance
from fedbench.run.hosts.here import Here
from fedbench.run.hosts.side import ClientSide
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
        studied = _Studied(p, progress or Silent())
        reference = matched(p.method)
        key = reference.model_dump_json()
        if key not in traces:
            traces[key] = _reference(replace(p, method=reference), progress or Silent())
        studied.follow(traces[key])
        about = {
            "method": p.identity["method"],
            "scenario": dict(p.identity["scenario"]) | {"name": p.scenario.name},
            "fm": p.loaded.fm.name,
            "seed": p.request.seed,
            "key": p.key,
            "reference": {"name": reference.name, "settings": reference.model_dump(mode="json")},
            "probe_rows": len(p.held_out.probe),
            "provenance": provenance.collect(p.execution.device) | {"executor": p.execution.executor},
        }
        updates = studied.errors.compared.updates
        out.append(Study(about, studied.errors.points, updates, studied.drift, studied.server.residuals()))
    return out


class _NotingClients(ClientSide):
    """Clients whose updates are written down, round by round."""

    updates: list[dict[ClientId, dict[str, Tensor]]]

    def results(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> Iterator[tuple[ClientId, LocalResult]]:
        updates: dict[ClientId, dict[str, Tensor]] = {}
        for cid, result in super().results(round, tasks):
            updates[cid] = _update(tasks[cid], result)
            yield cid, result
        self.updates.append(updates)


class _NotingHost(Here):
    client_side = _NotingClients
    clients: _NotingClients


def _reference(prepared: Prepared, progress: Progress) -> Trace:
    """What a run on the full FM goes through."""
    run = Run(prepared, progress, _NotingHost)
    assert isinstance(run.host, _NotingHost)
    trace, server = Trace(), run.host.server.server
    run.host.clients.updates = trace.updates
    names = tunable_names(tuned_fm(server))
    trace.values.append(get_tensors(tuned_fm(server), names))
    for round in range(run.federation.rounds):
        run.loop(None, until=round + 1)
        trace.values.append(get_tensors(tuned_fm(server), names))
    return trace


class _Comparing:
    """What is compared with the reference along a run: the studied server, and the reference's trace."""

    def __init__(self, server: Server, trace: Trace) -> None:
        self.server, self.trace = server, trace
        self.updates: list[Block] = []
        self.aggregation: float | None = None

    def in_fm(self, tensors: Tensors) -> dict[str, Tensor]:
        """The same by the FM's names."""
        names = self.server.fm_names()
        return {names[name]: tensor for name, tensor in tensors.items()}

    def block(self, mine: Tensors, reference: Tensors) -> dict[str, Any]:
        """How far tensors by the FM's names are from the reference's."""
        parts = Parts(tuned_fm(self.server))
        own, theirs = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (mine, reference))
        return gradient_error(own, theirs, parts.layer_of, parts.is_head)


class _StudiedClients(ClientSide):
    """Clients who also train from the reference's values, to compare one round's updates."""

    compared: _Comparing

    def results(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> Iterator[tuple[ClientId, LocalResult]]:
        compared = self.compared
        values, names = compared.trace.values[round], compared.server.fm_names()
        common = {
            cid: replace(task, tunables={name: values[names[name]] for name in task.tunables}, observers={})
            for cid, task in tasks.items()
            # A client with a `fit` of its own does not train by gradients alone.
            if type(self.client(cid)).fit is Client.fit
        }
        from_common = dict(super().results(round, common))
        blocks = [
            compared.block(compared.in_fm(_update(task, from_common[cid])), compared.trace.updates[round][cid])
            for cid, task in common.items()
        ]
        if blocks:
            compared.updates.append({"round": round, "clients": len(blocks), **mean_block(blocks)})
        found = {}
        for cid, result in super().results(round, tasks):
            found[cid] = result
            yield cid, result
        weights = [len(self.rows[cid]) for cid in tasks]
        tuned = [found[cid].tunables for cid in tasks]
        compared.aggregation = aggregation_error(tuned, weights) if tuned else None


class _StudiedHost(Here):
    client_side = _StudiedClients
    clients: _StudiedClients


class _CommonErrors(GradientErrors):
    """Gradient errors along the method's own path and, under "common", at the values that the reference then has."""

    compared: _Comparing

    def measure(
        self, server: Server, round: int, phase: str, reference: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor] | None:
        own = super().measure(server, round, phase, reference)
        if own is not None:
            self.points[-1]["common"] = self._common(server, round)
        return own

    def _common(self, server: Server, round: int) -> dict[str, Any]:
        compared, trace, names = self.compared, self.compared.trace, server.fm_names()
        values = trace.values[round + 1]
        if round not in trace.gradients:
            fm = tuned_fm(server)
            with _holding(fm, values):
                trace.gradients[round] = gradients(fm, tunable_names(fm), self.probe, self.execution)
        proxy = server.put_in_proxy()
        assert proxy is not None
        with _holding(proxy, {name: values[names[name]] for name in names}):
            mine = gradients(proxy, list(names), self.probe, self.execution)
        return compared.block(compared.in_fm(mine), trace.gradients[round])


class _Studied:
    """A run of a method that is compared with the reference on its way."""

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        self.run = Run(prepared, progress, _StudiedHost)
        assert isinstance(self.run.host, _StudiedHost)
        self.host = self.run.host
        self.server = self.host.server.server
        if self.server.put_in_proxy() is None:
            raise FedbenchError(
                f"{prepared.method.name}: its clients train the FM itself, so its gradients have no error; "
                "name a method with a proxy, such as fedpft"
            )
        self.errors = _CommonErrors(prepared.held_out.probe, prepared.execution, self.run.time)
        self.host.server.observers = tuple(
            self.errors if isinstance(o, GradientErrors) else o for o in self.host.server.observers
        )
        self.drift: list[Block] = []

    def follow(self, trace: Trace) -> None:
        """Run all rounds, comparing with this run of the reference."""
        compared = self.errors.compared = self.host.clients.compared = _Comparing(self.server, trace)
        start = trace.values[0]
        for round in range(self.run.federation.rounds):
            self.run.loop(None, until=round + 1)
            now = get_tensors(tuned_fm(self.server), list(self.server.fm_names().values()))
            moved, expected = ({n: v - start[n] for n, v in x.items()} for x in (now, trace.values[round + 1]))
            block = compared.block(moved, expected)
            self.drift.append({"round": round, "aggregation": compared.aggregation, **block})


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
