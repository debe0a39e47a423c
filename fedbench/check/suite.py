"""The contract suite: what every method has to satisfy, built in or not. `fedbench check METHOD` runs it.

The heart of it runs the server and the clients in processes of their own, with nothing but payload bytes between
them, the server process without any client's rows and the client process without the FM. Neither can load the other's:
the functions that could raise there.
"""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message
from fedbench.api.sides import Client, Method, Server
from fedbench.data.examples import Examples
from fedbench.machine.device import Execution
from fedbench.machine.paths import cache_folder
from fedbench.machine.workers import can_fork
from fedbench.measures.accuracy import evaluate
from fedbench.models.cache import ModuleCache
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.records.differences import comparable, differences
from fedbench.records.record import Record
from fedbench.registry import Registry
from fedbench.rng import Streams
from fedbench.run.loop import Run, run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.request import RunRequest
from fedbench.run.transport import Transport, deserialise, serialise
from fedbench.scenario.tables import Federation
from fedbench.training.alone import execute


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
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the contract suite on the method called `name`; one result a clause, in a fixed order.

    A clause that raises has failed; the others still run. `report` is told each result as soon as it is there. Raises
    FedbenchError if the method cannot be loaded.
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
            result = CheckResult("available", True, f"not available here: {prepared.unavailable}")
            report(result)
            return [result]
        subject = Subject(prepared)
        clauses: list[tuple[str, Callable[[Subject], str | None]]] = [
            ("settings survive JSON", settings_survive_json),
            ("same seed, same record", same_seed_same_record),
            ("stopped and resumed, same record", resumed_same_record),
            ("proxy and FM agree on names", names_bind),
        ]
        if prepared.scenario.federation.rounds:
            clauses += [
                ("every tunable is trained", tunables_are_trained),
                ("the method learns", learns),
                ("what clients send is what the server expects", uploads_are_expected),
                ("server and clients in separate processes", separate_processes),
            ]
        results = []
        for label, clause in clauses:
            results.append(_result(label, clause, subject))
            report(results[-1])
        return results


def _with_workers(prepared: Prepared, workers: int) -> Prepared:
    return replace(prepared, execution=replace(prepared.execution, workers=workers))


class Subject:
    """The run under test, and what several clauses need of it: made once, as runs are what a check takes."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    @cached_property
    def whole(self) -> Run:
        """All its rounds, in one process."""
        this = Run(_with_workers(self.prepared, 1), Silent())
        this.loop(None)
        return this

    @cached_property
    def tuned(self) -> dict[str, Tensor]:
        """The tuned FM's tunables after the last round."""
        model = self.whole.server.plug_in()
        return get_tensors(model, tunable_names(model))


def _result(label: str, clause: Callable[[Subject], str | None], subject: Subject) -> CheckResult:
    try:
        return CheckResult(label, True, clause(subject) or "")
    except Violation as error:
        return CheckResult(label, False, str(error))
    except Exception as error:  # a plugin may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        return CheckResult(
            label, False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        )


def settings_survive_json(subject: Subject) -> None:
    """Hyper-parameters can be written to a record and read back."""
    method = subject.prepared.method
    again = type(method).model_validate(json.loads(json.dumps(method.model_dump(mode="json"))))
    require(again == method, "model_dump and model_validate do not give the same settings back")


def _compare(a: Record, b: Record) -> None:
    if comparable(a) != comparable(b):
        raise Violation(f"the records differ at {', '.join(differences(a, b)[:3])}")


def same_seed_same_record(subject: Subject) -> None:
    """Two runs of one seed, another seed between them, give the same record apart from times and provenance.

    The second spreads its clients over worker processes, where those can be had: a client that learns something in
    the functions its task declares, behind the harness's back, would lose it there.
    """
    prepared = subject.prepared
    first = run(_with_workers(prepared, 1))
    other = prepare(replace(prepared.request, seed=prepared.request.seed + 1))
    require(other.key != prepared.key, "two seeds have one key")
    torch.rand(3)  # whatever else reads the global generator must not matter
    again = prepare(prepared.request)
    _compare(first, run(_with_workers(again, 2) if can_fork() else again))


def resumed_same_record(subject: Subject) -> None:
    """A run stopped after its first round and resumed by a new object gives the record of one never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        stopped = Run(subject.prepared, Silent())
        if stopped.federation.rounds > 1:
            stopped.loop(Path(folder), until=1)
            stopped = Run(subject.prepared, Silent())
            require(stopped.resume(Path(folder)), "the checkpoint was not taken")
        stopped.loop(None)
        assert subject.tuned  # before the selected round takes the place of the last
        _compare(subject.whole.finish(), stopped.finish())


def names_bind(subject: Subject) -> None:
    """Every tunable of the proxy has a place of the same shape in the FM; every frozen tensor's source exists."""
    server = Run(subject.prepared, Silent()).server
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
        require(source.name in subject.prepared.loaded.fm.state, f"fm_sources(): the FM has no tensor {source.name!r}")


def tunables_are_trained(subject: Subject) -> str | None:
    """Every tunable has a gradient in some step, moves, and is another in the tuned FM once it was sent.

    Looked at over two rounds or more: LoRA's A has no gradient before its B has left 0.
    """
    p = subject.prepared
    watch = _Watch()
    server, clients = _sides(p, p.scenario.federation, subject.whole.rows, watch)
    before = _parameters(server.server.plug_in())
    sent: set[str] = set()
    for round in range(max(2, p.scenario.federation.rounds)):
        cohort, _ = subject.whole.cohort(round)
        uploads = clients.train(round, server.broadcast(round, cohort), cohort)
        server.aggregate(round, uploads)
        sent |= {n for payloads in uploads.values() for payload in payloads for n in deserialise(payload).tensors}
    if watch.steps:
        without = sorted(watch.declared - watch.gradient)
        require(
            not without,
            f"the gradient of {_few(without)} is 0 in every step: what it is multiplied by stays 0 (the client's model "
            "has 0 wherever nothing was sent), or it is no part of the loss",
        )
    still = sorted(watch.declared - watch.moved)
    require(not still, f"{_few(still)} ends every client's training as it began")
    after, names = _parameters(server.server.plug_in()), server.server.fm_names()
    moved = {n for n, tensor in after.items() if n not in before or not torch.equal(tensor, before[n])}
    require(bool(moved), "the tuned FM is after all rounds what it was before the first")
    kept = sorted({names.get(n, n) for n in sent} & set(after) - moved)
    require(not kept, f"{_few(kept)} is trained and sent, but is in the tuned FM as it was before the first round")
    return None if watch.steps else "gradients were not looked at: clients train in a way of their own"


def learns(subject: Subject) -> str | None:
    """Clients who all hold the same few rows, one of each class, learn them: the loss there falls.

    It is the loss of what clients train, a proxy where there is one: how much of that arrives in the FM is a result.
    """
    p = subject.prepared
    _, first = np.unique(p.loaded.train.labels.numpy(), return_index=True)
    rows = p.loaded.train.select(np.sort(first)[:8])
    cohort = list(range(min(2, p.scenario.split.clients)))
    everything = {"rounds": 3, "local_epochs": 4, "batch_size": len(rows), "max_steps": None, "dropout": 0.0}
    federation = p.scenario.federation.model_copy(update={**everything, "fraction": 1.0})
    watch = _Watch()
    server, clients = _sides(p, federation, [rows] * len(cohort), watch)

    def loss() -> float:
        proxy = server.server.proxy()
        return evaluate(server.server.plug_in() if proxy is None else proxy, rows, len(rows), Execution()).loss

    before = loss()
    for round in range(federation.rounds):
        server.aggregate(round, clients.train(round, server.broadcast(round, cohort), cohort))
    after = loss()
    if not watch.steps:  # without gradients a few steps need not go down
        return "not looked at: clients train in a way of their own"
    require(
        after < before,
        f"on {len(rows)} rows that every client trains on in {federation.rounds} rounds, the loss goes from "
        f"{before:.4g} to {after:.4g}: it has to fall",
    )
    return None


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _few(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" and of {len(names) - 1} more tunables" if len(names) > 1 else "") if names else ""


class _Watch:
    """Trains like the reference executor, and notes which tunables have a gradient and which move."""

    def __init__(self) -> None:
        self.declared: set[str] = set()
        self.gradient: set[str] = set()
        self.moved: set[str] = set()
        self.steps = 0

    def __call__(self, task: LocalTask) -> LocalResult:
        def look(name: str, parameter: Tensor) -> None:
            if parameter.grad is not None and bool(parameter.grad.count_nonzero()):
                self.gradient.add(name)

        self.declared |= set(task.tunables)
        with ExitStack() as hooks:
            for name, parameter in task.frozen.module.named_parameters():
                if name in task.tunables:
                    frozen = not parameter.requires_grad
                    parameter.requires_grad_(True)  # a hook can be hung on nothing else
                    hooks.callback(parameter.register_post_accumulate_grad_hook(partial(look, name)).remove)
                    parameter.requires_grad_(not frozen)
            result = execute(task, Execution(executor="reference"))
        self.moved |= {n for n, t in result.tunables.items() if not torch.equal(t, task.tunables[n])}
        self.steps += result.steps
        return result


def uploads_are_expected(subject: Subject) -> None:
    """No upload of a well-behaved client is refused, and something is sent in both directions."""
    transport = subject.whole.transport
    require(not transport.refused, f"an upload was refused: {transport.refused[:1]}")
    require(transport.ledger.total("up") > 0, "clients send nothing")
    require(transport.ledger.total("down") > 0, "the server sends nothing")


def separate_processes(subject: Subject) -> None:
    """Server and clients in processes of their own end with the tunables of a run in one process, bit for bit."""
    p, together, expected = subject.prepared, subject.whole, subject.tuned
    settings = p.method.model_dump(mode="json")
    both = (p.request, settings, p.scenario.federation)
    fm, evaluation = p.scenario.fm, p.scenario.evaluation
    server_side = _Host(_server_process, *both, evaluation.every, fm, p.loaded.data.class_names, p.loaded.public)
    client_side = _Host(_client_process, *both, together.rows)
    with server_side as server, client_side as clients:
        for round in range(p.scenario.federation.rounds):
            cohort, staying = together.cohort(round)
            downloads = server.ask("broadcast", round, cohort)
            uploads = clients.ask("train", round, downloads, staying)
            server.ask("aggregate", round, uploads)
        apart = deserialise(server.ask("plug_in")).tensors
    require(set(apart) == set(expected), "the tuned FM has other tunables when the sides are apart")
    for name, tensor in expected.items():
        require(torch.equal(tensor, apart[name]), f"{name!r} differs when server and clients are in separate processes")


class ServerSide:
    """A server that takes and gives payloads."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> dict[ClientId, list[bytes]]:
        return {c: [serialise(m) for m in messages] for c, messages in self.server.broadcast(round, cohort).items()}

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[bytes]]) -> None:
        accepted: dict[ClientId, Sequence[Message]] = {}
        transport, expected = Transport(), self.server.expected(round)
        for client, payloads in uploads.items():
            received = [deserialise(payload) for payload in payloads]
            messages = transport.upload(round, client, received, expected, self.server.accept)
            if messages is not None:
                accepted[client] = messages
        if not accepted:
            return
        self.server.aggregate(round, accepted)
        if self.server.aligns(round):
            self.server.plug_in()
            self.server.align(round)

    def plug_in(self) -> bytes:
        model = self.server.plug_in()
        return serialise(Message("adapter", get_tensors(model, tunable_names(model))))


class ClientSide:
    """The clients, each with its rows, that take and give payloads; `execute` trains them."""

    def __init__(
        self,
        method: Method,
        streams: Streams,
        federation: Federation,
        rows: Sequence[Examples],
        execute: Callable[[LocalTask], LocalResult],
    ) -> None:
        self.method, self.rows, self.execute = method, rows, execute
        self.context = partial(ClientContext, streams=streams, federation=federation)
        self.modules = ModuleCache(torch.device("cpu"))
        self.clients: dict[ClientId, Client] = {}

    def train(
        self, round: int, downloads: Mapping[ClientId, Sequence[bytes]], staying: Sequence[ClientId]
    ) -> dict[ClientId, list[bytes]]:
        uploads = {}
        for cid, payloads in downloads.items():
            if cid not in self.clients:
                self.clients[cid] = self.method.client(self.context(cid, modules=self.modules))
            client = self.clients[cid]
            task = client.task(round, [deserialise(payload) for payload in payloads], self.rows[cid])
            if cid in staying:
                uploads[cid] = [serialise(m) for m in client.upload(round, client.fit(task, self.execute))]
        return uploads


def _sides(
    p: Prepared, federation: Federation, rows: Sequence[Examples], execute: Callable[[LocalTask], LocalResult]
) -> tuple[ServerSide, ClientSide]:
    """Both sides of a run in this process."""
    streams, cache = Streams(p.request.seed, p.scenario.name), cache_folder(p.request.cache)
    context = ServerContext(streams, federation, Execution(), cache, p.scenario.evaluation.every)
    server = ServerSide(p.method.server(p.loaded.fm, p.loaded.public, context))
    return server, ClientSide(p.method, streams, federation, rows, execute)


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


def _answer(connection: Connection, make: Callable[[], Any]) -> None:
    """Answer questions by the methods of what `make` makes, or why there is no answer: a forbidden call above all."""
    host: Any = None
    while True:
        try:
            action, *arguments = connection.recv()
        except EOFError:
            return
        try:
            host = host or make()
            answer = (True, getattr(host, action)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc(limit=-3))
        connection.send((False, _forbidden_calls[0]) if _forbidden_calls else answer)


def _load_method(request: RunRequest, settings: Mapping[str, Any]) -> Method:
    """The method, loaded anew in a child process: a plug-in's classes cannot be sent there."""
    return Registry(request.plugins).load_method(request.method).model_validate(dict(settings))


CLIENTS_DATA = (
    "fedbench.data.load:load_data",
    "fedbench.run.prepare:_load",
    "fedbench.run.prepare:prepare",
    "fedbench.data.sets.text:load_text_set",
    "fedbench.data.sets.text:read_text_file",
    "fedbench.data.sets.images:load_image_set",
    "fedbench.data.sets.embedded:EMBEDDED",
    "fedbench.data.sources:read_parquet",
)
"""What could load the clients' rows."""

THE_FM = (
    "fedbench.models.zoo.load:load_fm",
    "fedbench.models.checkpoint:_checkpoint",
    "fedbench.models.zoo.load:minilm_folder",
    "fedbench.models.zoo.vit_digits:vit_digits",
    "fedbench.run.prepare:_load",
    "fedbench.run.prepare:prepare",
    "fedbench.files:load_tensors",
    "transformers:PreTrainedModel.from_pretrained",
    "safetensors.torch:load_file",
    "safetensors:safe_open",
)
"""What could load the foundation model."""

_forbidden_calls: list[str] = []
"""Why calls in this process were forbidden; kept, as a method might catch what they raise."""


def _refuse(*_: Any, _why: str = "", **__: Any) -> Any:
    from fedbench.check.suite import Violation, _forbidden_calls  # this code runs in the place of another module's

    _forbidden_calls.append(_why)
    raise Violation(_why)


def forbid(doors: Sequence[str], why: str) -> None:
    """Let each of `doors`, "module:name", raise Violation(why) in this process, for whoever holds it already too.

    A name may stand for a function, a mapping of functions, or a class or method of another library. Raises LookupError
    for one that does not exist: a guard of nothing guards nothing.
    """
    for door in doors:
        module, _, path = door.partition(":")
        found: Any = importlib.import_module(module)
        owner, name = found, path
        for name in path.split("."):
            if not hasattr(found, name):
                raise LookupError(f"the contract forbids {door}, which does not exist")
            owner, found = found, getattr(found, name)
        for function in found.values() if isinstance(found, Mapping) else [found]:
            plain = inspect.unwrap(function)
            if inspect.isfunction(plain) and not plain.__closure__:
                # Its code rather than its name: other modules have imported the function, and tables hold it.
                plain.__code__, plain.__defaults__, plain.__kwdefaults__ = _refuse.__code__, None, {"_why": why}
            else:
                setattr(owner, name, partial(_refuse, _why=why))


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

    def make() -> ServerSide:
        cache = cache_folder(request.cache)
        fm = load_fm(fm_name, len(class_names), cache, class_names)
        forbid(CLIENTS_DATA, f"the server of {request.method} tried to load the clients' data")
        method = _load_method(request, settings)
        streams = Streams(request.seed, request.scenario)
        context = ServerContext(streams, federation, Execution(), cache, evaluate_every)
        return ServerSide(method.server(fm, public, context))

    _answer(connection, make)


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

    def make() -> ClientSide:
        forbid(THE_FM, f"a client of {request.method} tried to load the FM")
        method, streams = _load_method(request, settings), Streams(request.seed, request.scenario)
        return ClientSide(method, streams, federation, rows, lambda task: execute(task, Execution()))

    _answer(connection, make)


def tensors_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: float) -> bool:
    """Whether two updates agree: L2 distance over all tensors at most `relative` times the norm of `a`."""
    if set(a) != set(b):
        return False
    distance = np.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))
    norm = np.sqrt(sum(float(a[n].double().square().sum()) for n in a))
    return bool(distance <= relative * norm)
