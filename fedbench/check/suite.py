"""The contract suite: what every method has to satisfy, built in or not. `fedbench check METHOD` runs it.

The heart of it runs the server and the clients in processes of their own, with nothing but payload bytes between
them, the server process without any client's rows and the client process without the FM. Neither can load the other's:
the functions that could raise there.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message
from fedbench.api.sides import Server, tuned_fm
from fedbench.api.sums import summed
from fedbench.check.guards import CLIENTS_DATA, THE_FM, Guard, Violation
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.machine.workers import can_fork
from fedbench.measures.accuracy import evaluate
from fedbench.records.differences import comparable, differences
from fedbench.records.record import Record
from fedbench.run.hosts.apart import Apart
from fedbench.run.hosts.here import Here
from fedbench.run.hosts.side import ClientSide, Trained
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.tables import Federation
from fedbench.training.alone import execute


@dataclass(frozen=True)
class CheckResult:
    """One clause of the contract: whether it holds and, if not, why."""

    name: str
    ok: bool
    detail: str = ""


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
    whole: bool = True,
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the contract suite on the method called `name`; one result a clause, in a fixed order.

    A clause that raises has failed; the others still run. `report` is told each result as soon as it is there. whole:
    look at records and at separate processes too, which take longer than all else. Raises FedbenchError if the method
    cannot be loaded.
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
        if not whole:
            clauses = clauses[-1:]
        if prepared.scenario.federation.rounds:
            clauses += [("every tunable is trained", tunables_are_trained), ("the method learns", learns)]
        if whole and prepared.scenario.federation.rounds:
            clauses += [
                ("what clients send is what the server expects", uploads_are_expected),
                ("the server needs what it says", needs_what_it_says),
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
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    @cached_property
    def whole(self) -> Run:
        """All its rounds, in one process."""
        this = Run(_with_workers(self.prepared, 1), Silent())
        assert isinstance(this.host, Here)
        self.before = _made(this.host.server.server)
        this.loop(None)
        self.after = _made(this.host.server.server)
        return this

    @cached_property
    def tuned(self) -> dict[str, Tensor]:
        """The tuned FM's tunables after the last round; none where there is no one model for all clients."""
        tuned = self.whole.host.server.tuned()
        return {} if tuned is None else dict(tuned.tensors)

    @cached_property
    def record(self) -> Record:
        """The run's record."""
        _ = self.tuned  # before the selected round takes the place of the last
        return finish(self.whole)


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
    prepared, first = subject.prepared, subject.record
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
        _compare(subject.record, finish(stopped))


def names_bind(subject: Subject) -> None:
    """Every tunable of the proxy has a place of the same shape in the FM; every frozen tensor's source exists."""
    server = Here(subject.prepared, subject.whole.rows, subject.whole.label_counts).server.server
    proxy = server.put_in_proxy()
    if proxy is None:
        return
    inside, outside = dict(proxy.named_parameters()), dict(tuned_fm(server).named_parameters())
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
    longer = p.scenario.federation.model_copy(update={"rounds": max(2, p.scenario.federation.rounds), "dropout": 0.0})
    watch = _Watch()
    run, server = _watched(p, longer, watch, subject.whole.rows)
    before = _made(server)
    run.loop(None)
    if watch.steps:
        without = sorted(watch.declared - watch.gradient)
        require(
            not without,
            f"the gradient of {_few(without)} is 0 in every step: what it is multiplied by stays 0 (the client's model "
            "has 0 wherever nothing was sent), or it is no part of the loss",
        )
    still = sorted(watch.declared - watch.moved)
    require(not still, f"{_few(still)} ends every client's training as it began")
    after, names = _made(server), server.fm_names()
    moved = {n for n, tensor in after.items() if n not in before or not torch.equal(tensor, before[n])}
    # A product of LoRA may end in the frozen weight it is added to, with the adapter as it was.
    moved |= {n for n in after if f"{n.partition('.lora_')[0]}.base_layer.weight" in moved}
    require(bool(moved), "the tuned FM is after all rounds what it was before the first")
    kept = sorted({names.get(n, n) for n in watch.sent} & set(after) - moved)
    require(not kept, f"{_few(kept)} is trained and sent, but is in the tuned FM as it was before the first round")
    return None if watch.steps else "gradients were not looked at: clients train without"


def learns(subject: Subject) -> str | None:
    """Clients who all hold the same few rows, one of each class, learn them: the loss there falls.

    It is the loss of what clients train, a proxy where there is one: how much of that arrives in the FM is a result.
    Where there is no one model for all clients, it is that of their training in the first round and in the last.
    """
    p = subject.prepared
    _, first = np.unique(p.loaded.data.train.labels, return_index=True)
    rows = p.loaded.train.select(np.sort(first)[:8])
    everything = {"rounds": 3, "local_epochs": 4, "batch_size": len(rows), "max_steps": None, "dropout": 0.0}
    federation = p.scenario.federation.model_copy(update={**everything, "fraction": 1.0})
    watch = _Watch()
    run, server = _watched(p, federation, watch, dict.fromkeys(subject.whole.rows, rows), few=True)

    def loss() -> float:
        proxy = server.put_in_proxy()
        return evaluate(tuned_fm(server) if proxy is None else proxy, rows, len(rows), Execution()).loss

    if server.put_in_fm() is None:
        run.loop(None)
        before, after = (run.rounds[i]["loss"] for i in (0, -1))
    else:
        before = loss()
        run.loop(None)
        after = loss()
    if not watch.steps:  # without gradients a few steps need not go down
        return "not looked at: clients train in a way of their own"
    require(
        after < before,
        f"on {len(rows)} rows that every client trains on in {federation.rounds} rounds, the loss goes from "
        f"{before:.4g} to {after:.4g}: it has to fall",
    )
    return None


def _made(server: Server) -> dict[str, Tensor]:
    """The tuned FM's parameters or, where there is no one model for all clients, the server's state."""
    model = server.put_in_fm()
    found = server.state().tensors.items() if model is None else model.named_parameters()
    return {name: tensor.detach().clone() for name, tensor in found}


def _few(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" and of {len(names) - 1} more tunables" if len(names) > 1 else "") if names else ""


class _Watch:
    """Trains like the reference executor, and notes which tunables have a gradient and which move."""

    def __init__(self) -> None:
        self.declared: set[str] = set()
        self.gradient: set[str] = set()
        self.moved: set[str] = set()
        self.sent: set[str] = set()
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
        # Estimated from losses, gradients are noise: no loss has to fall by them, and no tunable to be without.
        self.steps += result.steps if task.zeroth_order is None else 0
        return result


def _watched(
    p: Prepared, federation: Federation, watch: _Watch, rows: Mapping[ClientId, Examples], few: bool = False
) -> tuple[Run, Server]:
    """A run whose clients hold these rows and train under a watch, and its server; `few`: two clients take part."""

    class Clients(ClientSide):
        def results(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> Iterator[tuple[ClientId, LocalResult]]:
            for cid, task in tasks.items():
                yield cid, self.client(cid).fit(task, watch)

        def train(self, *args: Any) -> dict[ClientId, Trained]:
            trained = super().train(*args)
            parcels = [parcel for each in trained.values() for parcel in each.upload]
            watch.sent |= {name for parcel in parcels for name in parcel.open().tensors}
            return trained

    class Watched(Here):
        client_side = Clients

        def __init__(
            self, prepared: Prepared, _: Mapping[ClientId, Examples], label_counts: Sequence[Sequence[int]]
        ) -> None:
            super().__init__(prepared, rows, label_counts)

    class Tried(Run):
        def cohort(self, round: int) -> tuple[list[ClientId], list[ClientId]]:
            first = list(range(min(2, len(rows))))
            return (first, first) if few else super().cohort(round)

    # What it scores does not matter here.
    evaluation = p.scenario.evaluation.model_copy(update={"selection": "last", "probe_size": 0})
    scenario = p.scenario.model_copy(update={"federation": federation, "evaluation": evaluation})
    loaded = replace(p.loaded, validation=p.loaded.validation.select(np.arange(min(8, len(p.loaded.validation)))))
    run = Tried(replace(p, scenario=scenario, loaded=loaded), Silent(), Watched)
    assert isinstance(run.host, Watched)
    return run, run.host.server.server


def uploads_are_expected(subject: Subject) -> None:
    """No upload of a well-behaved client is refused, and something is sent in both directions."""
    run = subject.whole
    require(not run.refused, f"an upload was refused: {run.refused[:1]}")
    require(run.ledger.total("up") > 0, "clients send nothing")
    require(run.ledger.total("down") > 0, "the server sends nothing")


def needs_what_it_says(subject: Subject) -> str | None:
    """A server that says it needs the sum of a round's uploads comes to the same model with that alone.

    So it may run behind secure aggregation, which leaves it no more (`fedbench.api.sums`).
    """
    method = subject.prepared.method
    require(method.needs in ("sum", "each"), f"needs is {method.needs!r}; say 'sum' or 'each'")
    if method.needs == "each":
        return "each client's upload"
    run = Run(_with_workers(subject.prepared, 1), Silent())
    assert isinstance(run.host, Here)
    server = run.host.server.server
    with_each = server.aggregate

    def with_the_sum(round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        with_each(round, {min(uploads): summed(list(uploads.values()))})

    server.aggregate = with_the_sum  # type: ignore[method-assign]
    run.loop(None)
    assert subject.whole
    after = _made(server)
    expected, found = ({n: t - subject.before[n] for n, t in each.items()} for each in (subject.after, after))
    require(
        tensors_close(expected, found, 1e-3),
        "needs is 'sum', but from the sum of each round's uploads the server makes another model than from the uploads "
        "themselves; say needs = 'each', or aggregate by sums",
    )
    return "their sum"


def separate_processes(subject: Subject) -> None:
    """Server and clients in processes of their own give the record and the tunables of a run in one process."""
    p, expected, name = subject.prepared, subject.tuned, subject.prepared.method.name
    host = partial(
        Apart,
        server_watch=Guard(CLIENTS_DATA, f"the server of {name} tried to load the clients' data"),
        client_watch=Guard(THE_FM, f"a client of {name} tried to load the FM"),
    )
    try:
        run = Run(_with_workers(p, 1), Silent(), host)
        with run.host:
            run.loop(None)
            tuned = run.host.server.tuned()
            apart = {} if tuned is None else tuned.tensors
            record = finish(run)
    except (FedbenchError, RuntimeError) as error:
        raise Violation(str(error)) from None
    require(set(apart) == set(expected), "the tuned FM has other tunables when the sides are apart")
    for name, tensor in expected.items():
        require(torch.equal(tensor, apart[name]), f"{name!r} differs when server and clients are in separate processes")
    _compare(subject.record, record)


def tensors_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: float) -> bool:
    """Whether two updates agree: L2 distance over all tensors at most `relative` times the norm of `a`."""
    if set(a) != set(b):
        return False
    distance = np.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))
    norm = np.sqrt(sum(float(a[n].double().square().sum()) for n in a))
    return bool(distance <= relative * norm)
