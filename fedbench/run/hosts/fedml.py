"""A federation between real processes, over FedML: a server and silos, each of which holds some of the clients.

The server's process holds the FM and the rows that nobody trains on, and never a client's rows; a silo holds the rows
of its clients, and never the FM. Between them letters of bytes pass over FedML's cross-silo runtime. Here are the
processes; what passes between them is in `hub` and `silo`, FedML itself in `_fedml`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fedbench.api.messages import ClientId
from fedbench.data.clients import ClientRows
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError, printable
from fedbench.machine.workers import cores, end_with
from fedbench.measures.scores import HeldOut
from fedbench.models.zoo.load import load_fm
from fedbench.run.brief import Brief
from fedbench.run.hosts.addresses import Address, loopback, write_addresses
from fedbench.run.hosts.apart import Child, Named, RemoteClients, RemoteServer
from fedbench.run.hosts.hub import Hub
from fedbench.run.hosts.make import make_clients, make_server
from fedbench.run.hosts.side import Host, ServerSide
from fedbench.run.hosts.silo import Memory, Silo, silo_of
from fedbench.run.prepare import Prepared, head_for
from fedbench.run.request import RunRequest

SILOS = 2
"""How many there are unless told, or unless there are fewer clients."""
START_SECONDS = 600.0
"""How long silos may take to come: FedML alone takes some ten seconds to import."""
MISSING = (
    "--host fedml: FedML is not installed here; it needs an environment of its own, which docs/federation.md shows how "
    "to make"
)


def say(what: str) -> None:
    """A line on standard error."""
    print(f"fedbench: {printable(what)}", file=sys.stderr, flush=True)


def check_fedml() -> None:
    """Raises FedbenchError where FedML, or its gRPC, is not installed."""
    if find_spec("fedml") is None or find_spec("grpc") is None:
        raise FedbenchError(MISSING)


def import_fedml() -> Any:
    """The module that talks FedML. Raises FedbenchError where FedML cannot be imported."""
    check_fedml()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Workers are forked from the processes that talk gRPC, and never touch it themselves.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what FedML itself imports
            from fedbench.run.hosts import _fedml
    except Exception as error:  # it imports much, and each of it may fail in its own way
        raise FedbenchError(
            f"--host fedml: FedML cannot be imported: {type(error).__name__}: {error}; docs/federation.md shows an "
            "environment that works"
        ) from error
    return _fedml


class FedML(Host):
    """Server and silos in processes on this machine, over FedML on loopback."""

    name = "fedml"
    one_process = False
    scores_clients = False  # no test rows lie at a silo

    @classmethod
    def ready(cls, request: RunRequest) -> None:
        check_fedml()

    def __init__(self, prepared: Prepared, rows: ClientRows, label_counts: Sequence[Sequence[int]]) -> None:
        p, silos = prepared, prepared.request.silos or min(SILOS, len(rows))
        check_number(silos, len(rows))
        self.keeps = f"--host fedml --silos {silos}"
        self._prepared, self._rows = p, rows
        self.addresses = loopback(silos)
        self._folder = tempfile.TemporaryDirectory(prefix="fedbench-")
        table = Path(self._folder.name) / "addresses.csv"
        write_addresses(table, self.addresses)
        self._method = Named(p.method.name, p.method.model_dump(mode="json"), p.request.plugins)
        names, public = p.loaded.data.class_names, p.loaded.public
        self._line = Line(p.identity, tuple(self.addresses), table, p.request.silo_timeout)
        self._server = Child(
            "server",
            partial(_station, p.brief, self._method, names, public, p.held_out, label_counts, self._line, None),
        )
        self.server = RemoteServer(partial(self._ask, "server"))
        self.clients = RemoteClients(partial(self._ask, "clients"))
        self.silos: dict[int, Any] = {}
        self._complete = False
        try:
            for silo in range(1, silos + 1):
                self.start_silo(silo)
            self._gather()
        except BaseException:
            self.close()
            raise

    def _ask(self, side: str, question: str, *arguments: Any) -> Any:
        return self._server.ask(f"{side}.{question}", *arguments)

    def start_silo(self, silo: int) -> None:
        """Start the process of a silo, for the first time or again."""
        p, silos = self._prepared, len(self.addresses) - 1
        share = max(1, p.execution.workers // silos)
        brief = replace(p.brief, execution=replace(p.execution, workers=share))
        own = self._rows.only([cid for cid in self._rows if silo_of(cid, silos) == silo])
        make = partial(make_silo, silo, p.key, brief, self._method, own, silo_folder(p, silo))
        arguments = (os.getpid(), max(1, cores() // silos), silo, self._line, make)
        # Not a daemon: it has worker processes of its own.
        process = multiprocessing.get_context("spawn").Process(target=_silo, args=arguments)
        process.start()
        self.silos[silo] = process

    def _gather(self) -> None:
        """Wait until all silos have come. Raises FedbenchError where one ends, or takes too long."""
        end = time.monotonic() + START_SECONDS
        while missing := self._ask("clients", "gather", 1.0):
            for silo in missing:
                if self.silos[silo].exitcode is not None:
                    raise FedbenchError(f"silo {silo} ended before the run began; it says above why")
            if time.monotonic() > end:
                raise FedbenchError(f"silo {missing[0]} has not come within {START_SECONDS:g} s")

    def account(self) -> dict[str, Any]:
        self._complete = True
        return dict(self._ask("clients", "account"))

    def close(self) -> None:
        if self._server.process.is_alive():
            with suppress(Exception):  # the process may have ended, and all with it
                self._ask("clients", "close")
        self._server.close()
        for process in self.silos.values():
            process.join(10 if self._complete else 0)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Served(Host):
    """The server's side in this process, silos started by hand elsewhere: `fedbench server`, `fedbench silo`."""

    one_process = False

    def __init__(
        self,
        prepared: Prepared,
        rows: Mapping[ClientId, Examples],
        label_counts: Sequence[Sequence[int]],
        line: Line,
        wait: Callable[[Sequence[int]], None],
    ) -> None:
        """rows: none. wait: is told of the silos that are still to come, whenever their number changes."""
        p, silos = prepared, len(line.addresses) - 1
        check_number(silos, len(label_counts))
        self.keeps = f"fedbench server over {silos} silos"
        self._hub = line.hub()
        self.clients = self._hub
        try:
            self.server = make_server(
                p.brief, p.method, p.loaded.fm, p.loaded.public, p.held_out, label_counts, bytes_only=True
            )
            missing: list[int] = []
            while left := self._hub.gather(1.0):
                if left != missing:
                    wait(left)
                missing = left
        except BaseException:
            self.close()
            raise

    def account(self) -> dict[str, Any]:
        return self._hub.account()

    def close(self) -> None:
        self._hub.close()


def check_number(silos: int, clients: int) -> None:
    """Raises FedbenchError for more silos than clients."""
    if silos > clients:
        raise FedbenchError(f"{silos} silos for {clients} clients; use at most as many silos as clients")


def silo_folder(prepared: Prepared, silo: int) -> Path:
    """Where a silo keeps what its clients hold; on the server's machine that is beside the checkpoint of the run."""
    return prepared.request.results / "checkpoints" / prepared.key[:12] / f"silo-{silo}"


@dataclass(frozen=True)
class Line:
    """How the processes of one run talk: its identity, their addresses, the file of them, and seconds for an answer."""

    identity: Mapping[str, Any]
    addresses: tuple[Address, ...]
    table: Path
    patience: float

    def hub(self) -> Hub:
        """The hub of the silos, listening; in the server's process."""
        fedml, addresses = import_fedml(), list(self.addresses)
        return Hub(
            len(addresses) - 1,
            self.identity,
            self.patience,
            lambda hub: fedml.ServerCarrier(hub, addresses, self.table),
            say,
        )

    def answer(self, silo: int, make: Callable[[str], Silo], say: Callable[[str], None]) -> None:
        """Answer letters as a silo, in its process, until the run is complete. Raises FedbenchError where it cannot."""
        import_fedml().SiloManager(silo, list(self.addresses), self.table, self.identity, make, say).run()


@dataclass(frozen=True)
class _Station:
    """What lives in the server's process: the server's side, and the hub of the silos."""

    server: ServerSide
    clients: Hub


def _station(
    brief: Brief,
    method: Named,
    class_names: tuple[str, ...],
    public: Examples | None,
    rows: HeldOut,
    label_counts: Sequence[Sequence[int]],
    line: Line,
    _watch: None,
) -> _Station:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent answers it
    hub = line.hub()
    fm = load_fm(brief.scenario.fm, len(class_names), brief.cache, class_names, head_for(brief.scenario.objective))
    return _Station(make_server(brief, method.load(), fm, public, rows, label_counts, bytes_only=True), hub)


def _silo(parent: int, threads: int, silo: int, line: Line, make: Callable[[str], Silo]) -> None:
    """The process of a silo."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        line.answer(silo, make, lambda what: None)
    except FedbenchError as error:
        say(str(error))
        sys.exit(2)


def make_silo(
    silo: int, key: str, brief: Brief, method: Named, rows: Mapping[ClientId, Examples], memory: Path, session: str
) -> Silo:
    """A silo of these clients, by their rows. key: of the run, as the silo knows it. memory: a folder of its own."""
    return Silo(silo, make_clients(brief, method.load(), rows), Memory(memory, key), session)
