"""Makes the two sides of a run, wherever they are to live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedbench.api.context import ServerContext
from fedbench.api.messages import ClientId
from fedbench.api.sides import Method
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.machine.stopwatch import Stopwatch
from fedbench.measures.aggregation import AggregationErrors
from fedbench.measures.exposure import Exposures
from fedbench.measures.gradient import GradientErrors
from fedbench.measures.scores import HeldOut, Scores
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import why_it_cannot_write
from fedbench.run.brief import Brief
from fedbench.run.hosts.side import ClientSide, ServerSide
from fedbench.run.privacy import Private


def make_server(
    brief: Brief,
    method: Method,
    fm: FoundationModel,
    public: Examples | None,
    rows: HeldOut,
    label_counts: Sequence[Sequence[int]],
    bytes_only: bool = False,
) -> ServerSide:
    """The server's side of `method`, with the measures of every record. label_counts: of each client, by class."""
    time = Stopwatch()
    federation, evaluation, execution = brief.scenario.federation, brief.scenario.evaluation, brief.execution
    context = ServerContext(brief.streams, federation, execution, brief.cache, evaluation.every, len(label_counts))
    who = f"{method.name} on {brief.scenario.name}, seed {brief.seed}"
    with time("setup"):
        server = method.server(fm, public, context)
    if brief.scenario.objective is not None and brief.scenario.objective.scores:
        for model in (server.put_in_fm(), server.put_in_proxy()):
            if model is not None and (why := why_it_cannot_write(model)):
                raise FedbenchError(f"{method.name}: its model writes no answers, as {why}; leave objective.scores out")
    observers = [Exposures(fm), GradientErrors(rows.probe, execution, time), AggregationErrors(time)]
    scores = Scores(rows, evaluation, execution, who, fm, label_counts, time)
    return ServerSide(server, observers, scores, federation, time, bytes_only, private_of(brief))


def make_clients(
    brief: Brief,
    method: Method,
    rows: Mapping[ClientId, Examples],
    kind: type[ClientSide] = ClientSide,
) -> ClientSide:
    """The clients' side of `method`; `rows` of each client that is there.

    kind: what to make, for studies that look closer.
    """
    return kind(method, brief.streams, brief.scenario.federation, rows, brief.execution, private_of(brief))


def private_of(brief: Brief) -> Private | None:
    """What both sides need to know of a run's privacy."""
    settings = brief.scenario.privacy
    return None if settings is None else Private(settings, brief.streams)
