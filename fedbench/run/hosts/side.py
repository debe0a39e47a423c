"""The two sides of a run, and the host that holds them.

The loop over rounds (`fedbench.run.loop`) talks to both sides through a `Host`, and never touches a server, a client or
a model itself. What passes between the sides are parcels. A host decides where they live: `here`, in this process, or
`apart`, each in a process of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from fedbench.api.context import ClientContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message, State, TensorSpec
from fedbench.api.sides import Client, Method, Server
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError, MessageError
from fedbench.machine.device import Execution
from fedbench.machine.stopwatch import Stopwatch
from fedbench.machine.workers import one_thread
from fedbench.measures.cost import RoundFlops, most_tokens
from fedbench.measures.observer import Observer
from fedbench.measures.personal import accuracy_of
from fedbench.measures.scores import Scores
from fedbench.models.cache import ModuleCache
from fedbench.rng import Streams
from fedbench.run.checkpoint import Held
from fedbench.run.export import Adapter, adapter_of
from fedbench.run.gate import Bounds, let_in, reason
from fedbench.run.payloads import Parcel
from fedbench.run.post import Lent, Post
from fedbench.run.privacy import Private, clipped, noised
from fedbench.run.request import RunRequest
from fedbench.scenario.tables import Federation
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all
from fedbench.training.common import has_dropout

Outbox = Mapping[ClientId, Sequence[Parcel]]


@dataclass(frozen=True)
class Trained:
    """What one client sends back, and what the harness notes of its local training.

    steps, loss: of its training. most: the largest honest value of plain values in its upload, by name. upload: what it
    sends; refused: why that could not even be sent. flops: operations of its training, None where they are not known.
    """

    steps: int
    loss: float
    most: Mapping[str, int]
    upload: Sequence[Parcel]
    refused: str | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Kept:
    """What a server's side needs to go on: its state by name, and notes by observer, which are written once."""

    parts: Mapping[str, State]
    notes: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class ServerEnd(Protocol):
    """What the loop asks of the server's side."""

    def start(self) -> None:
        """Before the first round."""

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Outbox:
        """What each sampled client has to be sent."""

    def receive(self, round: int, client: ClientId, upload: Sequence[Parcel], most: Mapping[str, int]) -> str | None:
        """Take in a client's upload, or refuse the whole of it and say why. `most`: as in `Trained`."""

    def aggregate(self, round: int) -> None:
        """Fold in what was received since the broadcast, and align the proxy where it is time."""

    def ended(self, round: int, due: bool) -> dict[str, Any]:
        """Close the round; what observers have to say in its entry. `due`: it is a round of evaluation."""

    def kept(self) -> Kept:
        """What a run that is resumed needs of this side; notes since this was last asked."""

    def restore(self, kept: Kept) -> None:
        """Become the side that gave this, with all notes there ever were."""

    def finish(self, rounds: int) -> dict[str, Any]:
        """Score the selected round on the test rows; the block of the record."""

    def farewell(self, clients: Sequence[ClientId]) -> Outbox:
        """What these clients need for models of their own after the last round."""

    def report(self, clients: Sequence[ClientId]) -> dict[str, Any]:
        """The observers' other blocks by name, `residuals`, `notes`, and the most that one of `clients` trains."""

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""

    def tuned(self) -> Adapter | None:
        """What was tuned of the FM, as it is now; None where there is no one model for all clients."""


class ClientEnd(Protocol):
    """What the loop asks of the clients' side."""

    def train(
        self, round: int, outbox: Outbox, staying: Sequence[ClientId], report: Callable[[float], None]
    ) -> dict[ClientId, Trained]:
        """Deliver a broadcast, and train the clients that stay. `report` is told the loss of each that is done."""

    def step_flops(self) -> int | None:
        """Floating-point operations of a local step; None before one was made."""

    def personal(self, outbox: Outbox, tests: Mapping[ClientId, Examples], size: int) -> dict[ClientId, float]:
        """The accuracy of each of these clients' own model on its test rows; clients without a model are left out.

        outbox: what the server's `farewell` gave them. size: rows of a batch.
        """

    def known(self) -> list[ClientId]:
        """The clients that were sampled so far."""

    def states(self) -> Mapping[ClientId, Held]:
        """Every client that was sampled so far, with its state on request."""

    def restore(self, states: Mapping[ClientId, State]) -> None:
        """Become the side whose clients gave these states."""

    def report(self) -> dict[str, Any]:
        """Parameters that a client holds at most."""

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""


class Host(ABC):
    """Where the sides of a run live; use as a context manager.

    A subclass has a `name`, which `--host` takes.
    """

    name: ClassVar[str]
    scores_clients: ClassVar[bool] = True
    """Whether clients' own models are scored here, where a method makes some."""
    one_process: ClassVar[bool] = True
    """Whether both sides live in this process, whose peak memory is then the run's."""
    keeps: str = ""
    """Options that a run has to be resumed with where its clients' states lie outside of its checkpoint."""
    server: ServerEnd
    clients: ClientEnd

    @classmethod
    def ready(cls, request: RunRequest) -> None:
        """Raise FedbenchError where a run like this cannot be made here; asked before anything is loaded."""
        if request.silos is not None:
            raise FedbenchError(f"--silos {request.silos}: the host {request.host!r} has no silos; use --host fedml")

    def account(self) -> dict[str, Any]:
        """What the host itself has to say in the record's provenance; empty for nothing."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """End what was started for the run."""

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ServerSide:
    """The method's server, the gate before it, and the measures that watch it."""

    def __init__(
        self,
        server: Server,
        observers: Sequence[Observer],
        scores: Scores,
        federation: Federation,
        time: Stopwatch,
        bytes_only: bool = False,
        private: Private | None = None,
    ) -> None:
        """bytes_only: what is sent leaves this process. time: shared with the observers.

        private: settings and streams of differential privacy, None for none.
        """
        self.private = private
        self.server, self.observers, self.scores, self.federation = server, (*observers, scores), scores, federation
        self.time = time
        self._post, self._lent = Post(bytes_only), Lent()
        self._sent: Mapping[ClientId, Sequence[Message]] = {}
        self._expected: dict[ClientId, Mapping[str, Mapping[str, TensorSpec]]] = {}
        self._uploads: dict[ClientId, list[Message]] = {}

    def start(self) -> None:
        for observer in self.observers:
            observer.started(self.server)

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Outbox:
        with self.time("broadcast"):
            outbox = self.server.broadcast(round, cohort)
            parcels = self._post.pack(outbox)
            # What is shared in this process is the one message that all recipients see.
            sent = {c: [p.message or m for p, m in zip(parcels[c], outbox[c], strict=True)] for c in outbox}
        self._sent, self._uploads = sent, {}
        every = {id(m): m for messages in sent.values() for m in messages}
        for observer in self.observers:
            observer.sent(round, self.server, list(every.values()))
        self._expected = {client: self.server.expected(round, client) for client in outbox}
        return parcels

    def receive(self, round: int, client: ClientId, upload: Sequence[Parcel], most: Mapping[str, int]) -> str | None:
        adapters = [m for m in self._sent.get(client, ()) if m.kind == "adapter"]
        sent = {name: tensor for message in adapters for name, tensor in message.tensors.items()}
        bounds = Bounds(most, sent, self.federation.max_update_norm)
        try:
            messages = let_in(
                upload, self._expected.get(client, {}), bounds, lambda arrived: self.server.accept(round, arrived)
            )
        except MessageError as error:
            return reason(error)
        self._uploads[client] = [self._lent.lend(message) for message in messages]
        return None

    def aggregate(self, round: int) -> None:
        if self._uploads:
            for observer in self.observers:
                observer.aggregating(round, self.server, self._uploads)
            with self.time("aggregate"):
                uploads: Mapping[ClientId, Sequence[Message]] = self._uploads
                if self.private is not None:
                    uploads = noised(uploads, self.private.streams, round, self.private.settings)
                self.server.aggregate(round, uploads)
            for observer in self.observers:
                observer.aggregated(round, self.server)
            if self.server.aligns(round):
                for observer in self.observers:
                    observer.aligning(round, self.server)
                with self.time("align"):
                    self.server.align(round)
                for observer in self.observers:
                    observer.aligned(round, self.server)
        self._lent.close()

    def ended(self, round: int, due: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        for observer in self.observers:
            entry |= observer.ended(round, self.server, due)
        return entry

    def kept(self) -> Kept:
        states = {observer.name: observer.state() for observer in self.observers}
        parts = {"server": self.server.state()} | {name: state for name, state in states.items() if state is not None}
        return Kept(parts, {observer.name: observer.notes() for observer in self.observers})

    def restore(self, kept: Kept) -> None:
        self.server.restore(kept.parts["server"])
        for observer in self.observers:
            observer.restore(kept.parts.get(observer.name), kept.notes.get(observer.name, ()))

    def finish(self, rounds: int) -> dict[str, Any]:
        return self.scores.finish(self.server, rounds)

    def farewell(self, clients: Sequence[ClientId]) -> Outbox:
        return self._post.pack(self.server.farewell(clients))

    def report(self, clients: Sequence[ClientId]) -> dict[str, Any]:
        blocks = {o.name: o.block(self.server) for o in self.observers if o is not self.scores}
        trainable = max((self.server.trainable(client) for client in clients), default=0)
        return {
            "blocks": blocks,
            "residuals": [dict(r) for r in self.server.residuals()],
            "notes": list(self.server.notes()),
            "trainable_parameters": trainable or None,
        }

    def seconds(self) -> dict[str, float]:
        return dict(self.time.seconds)

    def tuned(self) -> Adapter | None:
        model = self.server.put_in_fm()
        return None if model is None else adapter_of(model, self.scores.fm.state)


class ClientSide:
    """The clients, each with its own rows, and the models they share."""

    def __init__(
        self,
        method: Method,
        streams: Streams,
        federation: Federation,
        rows: Mapping[ClientId, Examples],
        execution: Execution,
        private: Private | None = None,
    ) -> None:
        """rows: of the clients that are here."""
        self.private = private
        self.method, self.streams, self.federation, self.rows = method, streams, federation, rows
        self.execution, self.time = execution, Stopwatch()
        self.modules = ModuleCache(execution.device)
        self.clients: dict[ClientId, Client] = {}
        self._flops = RoundFlops(execution.device)
        self._spent: dict[ClientId, int | None] = {}  # operations of this round's trainings

    def client(self, cid: ClientId) -> Client:
        """The client of this number, made when it is first asked for."""
        if cid not in self.clients:
            self.clients[cid] = self.method.client(ClientContext(cid, self.streams, self.federation, self.modules))
        return self.clients[cid]

    def train(
        self, round: int, outbox: Outbox, staying: Sequence[ClientId], report: Callable[[float], None]
    ) -> dict[ClientId, Trained]:
        lent = Lent()
        with self.time("local"):
            # A client that drops out has still received what it was sent.
            tasks, rows = {}, {cid: self.rows[cid] for cid in outbox}
            for cid, parcels in outbox.items():
                inbox = [lent.lend(parcel.open()) for parcel in parcels]
                tasks[cid] = self.client(cid).task(round, inbox, rows[cid])
            chosen = {cid: tasks[cid] for cid in staying}
            results, self._spent = {}, {}
            for cid, result in self.results(round, chosen):
                results[cid] = result
                report(result.loss)
        with self.time("flops"):
            flops = {cid: self._spent[cid] if cid in self._spent else self._flops.of(chosen[cid]) for cid in chosen}
        trained = {}
        with self.time("upload"):
            for cid in chosen:  # in this order, whoever was done first
                result, parcels, why = results[cid], [], None
                try:
                    messages = self.client(cid).upload(round, result)
                    if self.private is not None:
                        start = chosen[cid].tunables
                        messages = clipped(self.method.name, messages, start, self.private.settings)
                    parcels += [Parcel.of(message) for message in messages]
                except MessageError as error:
                    why = reason(error)
                most = {"num_examples": len(rows[cid]), "tokens": most_tokens(chosen[cid])}
                trained[cid] = Trained(result.steps, result.loss, most, parcels, why, flops[cid])
        lent.close()
        return trained

    def results(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> Iterator[tuple[ClientId, LocalResult]]:
        """Train clients, over worker processes or together; each result as it is there."""
        # A client with a `fit` of its own may keep what it learns there, so it has to run in this process.
        own = [cid for cid in tasks if type(self.client(cid)).fit is not Client.fit]
        modules = {id(task.frozen.module): task.frozen.module for task in tasks.values()}
        if self.method.dropout == 0 and any(map(has_dropout, modules.values())):
            raise FedbenchError(
                f"{self.method.name}: its clients train with dropout, but its property `dropout` is 0; let it give the "
                "probability, since executors draw dropout in different orders"
            )
        declared = [cid for cid in tasks if cid not in own]
        for i, result in execute_all([tasks[cid] for cid in declared], self.execution):
            yield declared[i], result
        for cid in own:
            trained: list[LocalTask] = []  # a `fit` may train any number of tasks, or in ways of its own

            def train(task: LocalTask, trained: list[LocalTask] = trained) -> LocalResult:
                trained.append(task)
                return execute(task, self.execution)

            with one_thread():
                result = self.client(cid).fit(tasks[cid], train)
            counts = [self._flops.of(task) for task in trained]
            self._spent[cid] = sum(c or 0 for c in counts) if counts and None not in counts else None
            yield cid, result

    def train_all(self, round: int, outbox: Outbox, staying: Sequence[ClientId]) -> dict[ClientId, Trained]:
        """`train` for whoever cannot be told of each client as it is done."""
        return self.train(round, outbox, staying, lambda loss: None)

    def personal(self, outbox: Outbox, tests: Mapping[ClientId, Examples], size: int) -> dict[ClientId, float]:
        lent, found = Lent(), {}
        with self.time("test"):
            for cid, rows in tests.items():
                inbox = [lent.lend(parcel.open()) for parcel in outbox.get(cid, ())]
                if (model := self.client(cid).personal(inbox)) is not None:
                    found[cid] = accuracy_of(model, cid, rows, size, self.execution)
        lent.close()
        return found

    def known(self) -> list[ClientId]:
        """The clients that were sampled so far."""
        return sorted(self.clients)

    def state_of(self, cid: ClientId) -> State:
        """The state of one of them."""
        return self.client(cid).state()

    def step_flops(self) -> int | None:
        return self._flops.first

    def states(self) -> Mapping[ClientId, Held]:
        return self.clients

    def restore(self, states: Mapping[ClientId, State]) -> None:
        for cid, state in states.items():
            self.client(cid).restore(state)

    def report(self) -> dict[str, Any]:
        return {"resident_parameters": self.modules.resident or None}

    def seconds(self) -> dict[str, float]:
        return dict(self.time.seconds)
