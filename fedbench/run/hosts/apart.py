"""The two sides of a run in processes of their own, with nothing but bytes between them.

The server's process loads the FM itself and is given the rows that nobody trains on; it never has a client's rows. The
clients' process is given their rows, and never the FM. This process holds the loop, and carries payloads.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from operator import attrgetter
from typing import Any, Protocol

import torch

from fedbench.api.messages import ClientId, State
from fedbench.api.sides import Method
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.measures.scores import HeldOut
from fedbench.models.zoo.load import load_fm
from fedbench.registry import Registry
from fedbench.run.brief import Brief
from fedbench.run.checkpoint import Held
from fedbench.run.export import Adapter
from fedbench.run.hosts.make import make_clients, make_server
from fedbench.run.hosts.side import ClientSide, Host, Kept, Outbox, ServerSide, Trained
from fedbench.run.payloads import Parcel
from fedbench.run.prepare import Prepared, head_for


class Watch(Protocol):
    """Looks over what a side does in its process; has to survive pickling."""

    def begin(self) -> None:
        """In the side's process, before the method is made there."""

    def complaint(self) -> str | None:
        """Why what was done so far is against the rules; None where it is not."""


@dataclass(frozen=True)
class Named:
    """A method by name, with its settings: a plug-in's classes cannot be sent to another process."""

    name: str
    settings: Mapping[str, Any]
    plugins: tuple[str, ...]

    def load(self) -> Method:
        """The method, loaded anew; the families of its plug-ins become known to this process."""
        registry = Registry(self.plugins)
        registry.add_families()
        return registry.load_method(self.name).model_validate(dict(self.settings))


class Apart(Host):
    """Server and clients in a process each. `server_watch`, `client_watch`: look over what they do there."""

    name = "apart"
    one_process = False

    def __init__(
        self,
        prepared: Prepared,
        rows: Mapping[ClientId, Examples],
        label_counts: Sequence[Sequence[int]],
        server_watch: Watch | None = None,
        client_watch: Watch | None = None,
    ) -> None:
        p = prepared
        method = Named(p.method.name, p.method.model_dump(mode="json"), p.request.plugins)
        names, public = p.loaded.data.class_names, p.loaded.public
        self._server = Child(
            "server", partial(_server, p.brief, method, names, public, p.held_out, label_counts, server_watch)
        )
        self._clients = Child("clients", partial(_clients, p.brief, method, rows, client_watch))
        self.server, self.clients = RemoteServer(self._server.ask), RemoteClients(self._clients.ask)

    def close(self) -> None:
        self._server.close()
        self._clients.close()


def _server(
    brief: Brief,
    method: Named,
    class_names: tuple[str, ...],
    public: Examples | None,
    rows: HeldOut,
    label_counts: Sequence[Sequence[int]],
    watch: Watch | None,
) -> ServerSide:
    loaded = method.load()
    fm = load_fm(brief.scenario.fm, len(class_names), brief.cache, class_names, head_for(brief.scenario.objective))
    if watch is not None:
        watch.begin()
    return make_server(brief, loaded, fm, public, rows, label_counts, bytes_only=True)


def _clients(brief: Brief, method: Named, rows: Mapping[ClientId, Examples], watch: Watch | None) -> ClientSide:
    if watch is not None:
        watch.begin()
    return make_clients(brief, method.load(), rows)


class Child:
    """A process that answers questions over a pipe; an error there is raised here."""

    def __init__(self, role: str, make: partial[Any]) -> None:
        self.role = role
        context = _processes()
        self.connection, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads(), make)
        # Not a daemon: it has worker processes of its own.
        self.process = context.Process(target=_answer, args=arguments)
        self.process.start()
        theirs.close()

    def ask(self, question: str, *arguments: Any) -> Any:
        """What the method of that name, which may be dotted, answers there.

        Raises what it raised there, and FedbenchError where the process has ended.
        """
        try:
            self.connection.send_bytes(pickle.dumps((question, arguments), protocol=5))
            ok, answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise FedbenchError(f"the process of the {self.role} ended at {question!r}") from None
        if not ok:
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _processes() -> SpawnContext | ForkServerContext:
    """What sides' processes come from: on Linux, copies of one that has imported what they need and done nothing else.

    Most of the time of a short run would be imports.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "peft", "transformers.models.auto.modeling_auto"])
    return context


def _answer(connection: Connection, threads: int, make: partial[Any]) -> None:
    """Answer questions by the methods of what `make` makes, until nobody is left to ask; its last argument is a watch,
    or None."""
    torch.set_num_threads(threads)
    watch: Watch | None = make.args[-1]
    side: Any = None
    while True:
        try:
            question, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            side = side or make()
            answer = (True, attrgetter(question)(side)(*arguments))
        except FedbenchError as error:
            answer = (False, error)
        except Exception as error:  # a method may raise anything
            where = traceback.format_exc(limit=-3)
            answer = (False, RuntimeError(f"{type(error).__name__}: {error}\n{where}"))
        if watch is not None and (complaint := watch.complaint()):
            answer = (False, FedbenchError(complaint))
        connection.send_bytes(pickle.dumps(answer, protocol=5))


class RemoteServer:
    """The server's side, in another process."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        """ask: asks that process a question by the name of a side's method."""
        self._ask = ask

    def start(self) -> None:
        self._ask("start")

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Outbox:
        found: Outbox = self._ask("broadcast", round, cohort)
        return found

    def receive(self, round: int, client: ClientId, upload: Sequence[Parcel], most: Mapping[str, int]) -> str | None:
        why: str | None = self._ask("receive", round, client, upload, most)
        return why

    def aggregate(self, round: int) -> None:
        self._ask("aggregate", round)

    def ended(self, round: int, due: bool) -> dict[str, Any]:
        return dict(self._ask("ended", round, due))

    def kept(self) -> Kept:
        kept: Kept = self._ask("kept")
        return kept

    def restore(self, kept: Kept) -> None:
        self._ask("restore", kept)

    def finish(self, rounds: int) -> dict[str, Any]:
        return dict(self._ask("finish", rounds))

    def report(self, clients: Sequence[ClientId]) -> dict[str, Any]:
        return dict(self._ask("report", clients))

    def seconds(self) -> dict[str, float]:
        return dict(self._ask("seconds"))

    def farewell(self, clients: Sequence[ClientId]) -> Outbox:
        found: Outbox = self._ask("farewell", clients)
        return found

    def tuned(self) -> Adapter | None:
        adapter: Adapter | None = self._ask("tuned")
        return adapter


class RemoteClients:
    """The clients' side, in another process."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        """ask: as of `RemoteServer`."""
        self._ask = ask

    def train(
        self, round: int, outbox: Outbox, staying: Sequence[ClientId], report: Callable[[float], None]
    ) -> dict[ClientId, Trained]:
        trained: dict[ClientId, Trained] = self._ask("train_all", round, outbox, staying)
        for each in trained.values():
            report(each.loss)
        return trained

    def step_flops(self) -> int | None:
        flops: int | None = self._ask("step_flops")
        return flops

    def personal(self, outbox: Outbox, tests: Mapping[ClientId, Examples], size: int) -> dict[ClientId, float]:
        return dict(self._ask("personal", outbox, tests, size))

    def known(self) -> list[ClientId]:
        return list(self._ask("known"))

    def states(self) -> Mapping[ClientId, Held]:
        return _RemoteStates(self._ask)

    def restore(self, states: Mapping[ClientId, State]) -> None:
        self._ask("restore", states)

    def report(self) -> dict[str, Any]:
        return dict(self._ask("report"))

    def seconds(self) -> dict[str, float]:
        return dict(self._ask("seconds"))


@dataclass(frozen=True)
class _RemoteState:
    ask: Callable[..., Any]
    client: ClientId

    def state(self) -> State:
        state: State = self.ask("state_of", self.client)
        return state


class _RemoteStates(Mapping[ClientId, Held]):
    """The states of clients in another process, fetched one by one."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask, self._known = ask, frozenset(ask("known"))

    def __getitem__(self, client: ClientId) -> _RemoteState:
        if client not in self._known:
            raise KeyError(client)
        return _RemoteState(self._ask, client)

    def __iter__(self) -> Iterator[ClientId]:
        return iter(sorted(self._known))

    def __len__(self) -> int:
        return len(self._known)
