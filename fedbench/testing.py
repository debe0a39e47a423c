"""The contract suite: what every method has to satisfy, built in or not. `fedbench check METHOD` runs it.

The heart of it runs the server and the clients in processes of their own, with nothing but payload bytes between
them, the server process without any client's rows and the client process without the FM.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbench.api import ClientId, Message, Method
from fedbench.context import ClientContext, ServerContext
from fedbench.data import Examples
from fedbench.engine import Prepared, Run, RunRequest, Silent, cache_folder, prepare, run
from fedbench.foundation import load_fm
from fedbench.models import ModuleCache, get_tensors, tunable_names
from fedbench.records import Record, comparable, differences
from fedbench.registry import Registry
from fedbench.rng import Streams
from fedbench.scenario import Federation
from fedbench.training import execute
from fedbench.transport import Transport, deserialise, serialise
from fedbench.workers import can_fork


@dataclass(frozen=True)
class CheckResult:
    """One clause of the contract: whether it holds and, if not, why."""

    name: str
    ok: bool
    detail: str = ""


class Violation(AssertionError):
    """A clause of the contract does not hold."""


def require(condition: bool, why: str) -> None:
    if not condition:
        raise Violation(why)


def check_method(
    name: str,
    plugins: Sequence[str] = (),
    scenario: str = "tweets-noniid",
    fm: str | None = None,
    profile: str | None = "smoke",
    settings: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
) -> list[CheckResult]:
    """Run the contract suite on the method called `name`; one result a clause, in a fixed order.

    A clause that raises has failed; the others still run. Raises FedbenchError if the method cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = RunRequest(
            method=name,
            scenario=scenario,
            fm=fm,
            profile=profile,
            settings=settings or {},
            device="cpu",
            data_dir=data_dir,
            results=Path(folder),
            plugins=tuple(plugins),
        )
        prepared = prepare(request)
        if prepared.unavailable:
            return [CheckResult("available", True, f"not available here: {prepared.unavailable}")]
        clauses: list[tuple[str, Callable[[Prepared], None]]] = [
            ("settings survive JSON", settings_survive_json),
            ("same seed, same record", same_seed_same_record),
            ("stopped and resumed, same record", resumed_same_record),
            ("proxy and FM agree on names", names_bind),
        ]
        if prepared.scenario.federation.rounds:
            clauses += [
                ("what clients send is what the server expects", uploads_are_expected),
                ("server and clients in separate processes", separate_processes),
            ]
        return [_result(label, clause, prepared) for label, clause in clauses]


def _result(label: str, clause: Callable[[Prepared], None], prepared: Prepared) -> CheckResult:
    try:
        clause(prepared)
    except Violation as error:
        return CheckResult(label, False, str(error))
    except Exception as error:  # a plugin may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        return CheckResult(
            label, False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        )
    return CheckResult(label, True)


def settings_survive_json(prepared: Prepared) -> None:
    """Hyper-parameters can be written to a record and read back."""
    method = prepared.method
    again = type(method).model_validate(json.loads(json.dumps(method.model_dump(mode="json"))))
    require(again == method, "model_dump and model_validate do not give the same settings back")


def _compare(a: Record, b: Record) -> None:
    if comparable(a) != comparable(b):
        raise Violation(f"the records differ at {', '.join(differences(a, b)[:3])}")


def same_seed_same_record(prepared: Prepared) -> None:
    """Two runs of one seed, another seed between them, give the same record apart from times and provenance.

    The second spreads its clients over worker processes, where those can be had: a client that learns something in
    the functions its task declares, behind the harness's back, would lose it there.
    """
    first = run(replace(prepared, workers=1))
    other = prepare(replace(prepared.request, seed=prepared.request.seed + 1))
    require(other.key != prepared.key, "two seeds have one key")
    torch.rand(3)  # whatever else reads the global generator must not matter
    again = prepare(prepared.request)
    _compare(first, run(replace(again, workers=2) if can_fork() else again))


def resumed_same_record(prepared: Prepared) -> None:
    """A run stopped after its first round and resumed by a new object gives the record of one never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(prepared, Silent())
        whole.loop(None)
        stopped = Run(prepared, Silent())
        if stopped.federation.rounds > 1:
            stopped.loop(Path(folder), until=1)
            stopped = Run(prepared, Silent())
            require(stopped.resume(Path(folder)), "the checkpoint was not taken")
        stopped.loop(None)
        _compare(whole.finish(), stopped.finish())


def names_bind(prepared: Prepared) -> None:
    """Every tunable of the proxy has a place of the same shape in the FM; every frozen tensor's source exists."""
    server = Run(prepared, Silent()).server
    proxy = server.proxy()
    if proxy is None:
        return
    inside, outside = dict(proxy.named_parameters()), dict(server.plug_in().named_parameters())
    names = server.fm_names()
    require(bool(names), "a server with a proxy has to say where its tunables belong: fm_names() is empty")
    require(len(set(names.values())) == len(names), "fm_names() maps two tunables to one place")
    for mine, theirs in names.items():
        require(mine in inside, f"fm_names(): the proxy has no parameter {mine!r}")
        require(theirs in outside, f"fm_names(): the FM has no parameter {theirs!r}")
        require(inside[mine].shape == outside[theirs].shape, f"fm_names(): {mine!r} and {theirs!r} differ in shape")
    for source in server.fm_sources().values():
        require(source.name in prepared.loaded.fm.state, f"fm_sources(): the FM has no tensor {source.name!r}")


def uploads_are_expected(prepared: Prepared) -> None:
    """No upload of a well-behaved client is refused, and something is sent in both directions."""
    this = Run(prepared, Silent())
    this.loop(None)
    require(not this.transport.refused, f"an upload was refused: {this.transport.refused[:1]}")
    require(this.transport.ledger.total("up") > 0, "clients send nothing")
    require(this.transport.ledger.total("down") > 0, "the server sends nothing")


def separate_processes(prepared: Prepared) -> None:
    """Server and clients in processes of their own end with the tunables of a run in one process, bit for bit."""
    together = Run(prepared, Silent())
    together.loop(None)
    model = together.server.plug_in()
    expected = get_tensors(model, tunable_names(model))
    p, settings = prepared, prepared.method.model_dump(mode="json")
    both = (p.request, settings, p.scenario.federation)
    fm, evaluation = p.scenario.fm, p.scenario.evaluation
    server_side = _Host(_server_process, *both, evaluation.every, fm, p.loaded.data.class_names, p.loaded.public)
    client_side = _Host(_client_process, *both, together.rows)
    with server_side as server, client_side as clients:
        for round in range(prepared.scenario.federation.rounds):
            cohort, staying = together.cohort(round)
            downloads = server.ask("broadcast", round, cohort)
            uploads = clients.ask("train", round, downloads, staying)
            if uploads:
                server.ask("aggregate", round, uploads)
        apart = deserialise(server.ask("plug_in")).tensors
    require(set(apart) == set(expected), "the tuned FM has other tunables when the sides are apart")
    for name, tensor in expected.items():
        require(torch.equal(tensor, apart[name]), f"{name!r} differs when server and clients are in separate processes")


class _Host:
    """A child process that answers questions over a pipe; an error there is raised here."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self.process = context.Process(target=target, args=(theirs, threads, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *question: Any) -> Any:
        self.connection.send(question)
        try:
            ok, answer = self.connection.recv()
        except EOFError:
            raise Violation(f"the {self.process.name} process ended at {question[0]!r}") from None
        if not ok:
            raise Violation(answer)
        return answer

    def __enter__(self) -> _Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _answer(connection: Connection, actions: Mapping[str, Callable[..., Any]]) -> None:
    while True:
        try:
            action, *arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, actions[action](*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc(limit=-3)))


def _load_method(request: RunRequest, settings: Mapping[str, Any]) -> Method:
    """The method, loaded anew in a child process: a plug-in's classes cannot be sent there."""
    return Registry(request.plugins).load_method(request.method).model_validate(dict(settings))


def _forbid(module: Any, function: str, why: str) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise Violation(why)

    setattr(module, function, forbidden)


def _server_process(
    connection: Connection,
    threads: int,
    request: RunRequest,
    settings: Mapping[str, Any],
    federation: Federation,
    evaluate_every: int,
    fm_name: str,
    class_names: tuple[str, ...],
    public: Examples | None,
) -> None:
    """The server's side: FM and public rows; loading labelled data here is an error."""
    torch.set_num_threads(threads)
    from fedbench import data

    _forbid(data, "load_data", "the server tried to load the clients' data")
    method = _load_method(request, settings)
    fm = load_fm(fm_name, len(class_names), cache_folder(request.cache), class_names)
    streams = Streams(request.seed, request.scenario)
    context = ServerContext(streams, federation, torch.device("cpu"), cache_folder(request.cache), evaluate_every)
    server = method.server(fm, public, context)

    def broadcast(round: int, cohort: list[ClientId]) -> dict[ClientId, list[bytes]]:
        return {c: [serialise(m) for m in messages] for c, messages in server.broadcast(round, cohort).items()}

    def aggregate(round: int, uploads: Mapping[ClientId, list[bytes]]) -> None:
        accepted: dict[ClientId, Sequence[Message]] = {}
        transport, expected = Transport(), server.expected(round)
        for client, payloads in uploads.items():
            messages = transport.upload(round, client, [deserialise(p) for p in payloads], expected, server.accept)
            if messages is not None:
                accepted[client] = messages
        server.aggregate(round, accepted)
        if server.aligns(round):
            server.plug_in()
            server.align(round)

    def plug_in() -> bytes:
        model = server.plug_in()
        return serialise(Message("adapter", get_tensors(model, tunable_names(model))))

    _answer(connection, {"broadcast": broadcast, "aggregate": aggregate, "plug_in": plug_in})


def _client_process(
    connection: Connection,
    threads: int,
    request: RunRequest,
    settings: Mapping[str, Any],
    federation: Federation,
    rows: list[Examples],
) -> None:
    """The clients' side: their own rows and the method's settings; loading an FM here is an error."""
    torch.set_num_threads(threads)
    from fedbench import foundation

    _forbid(foundation, "load_fm", "a client tried to load the FM")
    method = _load_method(request, settings)
    streams = Streams(request.seed, request.scenario)
    cache = ModuleCache(torch.device("cpu"))
    clients: dict[ClientId, Any] = {}

    def train(round: int, downloads: Mapping[ClientId, list[bytes]], staying: list[ClientId]) -> Any:
        uploads = {}
        for cid, payloads in downloads.items():
            if cid not in clients:
                clients[cid] = method.client(ClientContext(cid, streams, federation, cache))
            task = clients[cid].task(round, [deserialise(p) for p in payloads], rows[cid])
            if cid in staying:
                result = clients[cid].fit(task, lambda t: execute(t, torch.device("cpu")))
                uploads[cid] = [serialise(m) for m in clients[cid].upload(round, result)]
        return uploads

    _answer(connection, {"train": train})


def tensors_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: float) -> bool:
    """Whether two updates agree: L2 distance over all tensors at most `relative` times the norm of `a`."""
    if set(a) != set(b):
        return False
    distance = np.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))
    norm = np.sqrt(sum(float(a[n].double().square().sum()) for n in a))
    return bool(distance <= relative * norm)
