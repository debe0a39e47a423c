"""The round loop: one run of one method on one scenario with one seed, from data to record."""

from __future__ import annotations

import gc
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message, State
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.data.partition import Partition, partition
from fedbench.errors import DamagedFileError, DivergedError, FedbenchError
from fedbench.files import state_digest
from fedbench.machine.memory import peak_memory, reset_peak
from fedbench.machine.paths import cache_folder
from fedbench.machine.workers import one_thread
from fedbench.measures.accuracy import Evaluation, evaluate, per_client
from fedbench.measures.cost import most_tokens, step_flops
from fedbench.measures.exposure import Exposure
from fedbench.measures.gradient import gradient_error, gradients
from fedbench.models.cache import ModuleCache
from fedbench.models.parts import Parts
from fedbench.models.weights import frozen_state, tunable_names
from fedbench.records import provenance
from fedbench.records.record import Record, complaint_of
from fedbench.records.schema import SCHEMA
from fedbench.records.store import save
from fedbench.rng import Streams
from fedbench.run.checkpoint import Checkpoint, read_checkpoint
from fedbench.run.claims import claim
from fedbench.run.export import adapter_path, keep_adapter
from fedbench.run.prepare import Prepared
from fedbench.run.progress import Progress, Silent
from fedbench.run.transport import SETUP_KINDS, Bounds, Ledger, Transport
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all
from fedbench.training.common import has_dropout


class Stopwatch:
    """Seconds by phase."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float, seconds or {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


@dataclass(frozen=True)
class Best:
    """The round with the best score on the validation rows so far, and the server as it was after it."""

    score: float
    round: int
    state: State


class Run:
    """The state of one run between rounds, and the loop over them."""

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        p = self.p = prepared
        self.progress = progress
        self.streams = Streams(p.request.seed, p.scenario.name)
        self.federation, self.evaluation = p.scenario.federation, p.scenario.evaluation
        self.time = Stopwatch()
        self.partition: Partition = partition(
            p.loaded.train.labels.numpy(), p.scenario.split, self.streams.numpy("partition")
        )
        self.rows = [p.loaded.train.select(rows) for rows in self.partition.clients]
        self.modules = ModuleCache(p.execution.device)
        self.transport = Transport()
        self.clients: dict[ClientId, Client] = {}
        self.rounds: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self.saved: Checkpoint | None = None
        self.changed: set[ClientId] = set()  # clients who have taken part since the last checkpoint
        self.steps = 0
        self.step_flops: int | None = None
        self.example: LocalTask | None = None  # of the round before, for counting its operations
        self.best: Best | None = None
        progress.phase("set-up", detail=f"{p.method.name}: building the server's side")
        context = ServerContext(
            self.streams, self.federation, p.execution, cache_folder(p.request.cache), self.evaluation.every
        )
        with self.time("setup"):
            self.server: Server = p.method.server(p.loaded.fm, p.loaded.public, context)
        self.exposure = Exposure(p.loaded.fm.state, p.loaded.fm.family.embeddings)
        self.observed: Message | None = None
        self.observed_alignments: set[str] = set()
        # The probe is drawn from the validation rows by a stream of its own: the same for every method.
        size = min(self.evaluation.probe_size, len(p.loaded.validation))
        self.probe = p.loaded.validation.select(
            self.streams.numpy("probe").permutation(len(p.loaded.validation))[:size]
        )

    def client(self, cid: ClientId) -> Client:
        if cid not in self.clients:
            self.clients[cid] = self.p.method.client(ClientContext(cid, self.streams, self.federation, self.modules))
        return self.clients[cid]

    def cohort(self, round: int) -> tuple[list[ClientId], list[ClientId]]:
        """Clients sampled for `round`, in order, and those of them that stay until the upload."""
        n = len(self.partition.clients)
        sampled = self.streams.numpy("cohort", round).choice(n, self.federation.cohort_size(n), replace=False)
        cohort = sorted(int(c) for c in sampled)
        stays = self.streams.numpy("client-dropout", round).random(len(cohort)) >= self.federation.dropout
        return cohort, [c for c, stay in zip(cohort, stays, strict=True) if stay]

    def round(self, round: int) -> None:
        """One federated round: broadcast, local training, upload, aggregation, alignment, measures."""
        server = self.server
        cohort, staying = self.cohort(round)
        refused_before = len(self.transport.refused)
        uploads = {}
        with self.time("broadcast"):
            outbox = server.broadcast(round, cohort)
            delivered = list(self.transport.download(round, outbox))
        inboxes = dict(delivered)
        self.changed |= {cid for cid, _ in delivered}
        self._observe(delivered)
        expected = server.expected(round)
        with self.time("local"):
            # A client that drops out has still received, and is charged for, what it was sent.
            tasks = {cid: self.client(cid).task(round, inbox, self.rows[cid]) for cid, inbox in delivered}
            results = self._train(round, {cid: tasks[cid] for cid in staying})
        self.example = next((tasks[cid] for cid in staying if tasks[cid].batches), None)
        self.steps += sum(r.steps for r in results.values())
        with self.time("upload"):
            for cid, result in results.items():
                messages = self.client(cid).upload(round, result)
                bounds = self._bounds(cid, tasks[cid], inboxes[cid])
                accepted = self.transport.upload(round, cid, messages, expected, server.accept, bounds)
                if accepted is not None:
                    uploads[cid] = accepted
        self.progress.advance(len(cohort) - len(results))
        aligned = False
        if uploads:
            with self.time("aggregate"):
                server.aggregate(round, uploads)
            if aligned := server.aligns(round):
                reference = self._gradient_error(round, "before_alignment")
                with self.time("align"):
                    server.align(round)
                self._gradient_error(round, "after_alignment", reference)
        self.transport.close_round()
        entry: dict[str, Any] = {
            "round": round,
            "cohort": cohort,
            "arrived": sorted(uploads),
            "refused": [{"client": c, "reason": why} for _, c, why in self.transport.refused[refused_before:]],
            "loss": float(np.mean([r.loss for r in results.values()])) if results else None,
            "bytes_up": self.transport.ledger.total("up", round=round),
            "bytes_down": self.transport.ledger.total("down", round=round),
        }
        due = (round + 1) % self.evaluation.every == 0 or round + 1 == self.federation.rounds
        if due and not aligned:
            self._gradient_error(round, "round")
        if due or self.evaluation.selection == "best":
            entry |= self._validate(round, due)
        self.rounds.append(entry)

    def _bounds(self, cid: ClientId, task: LocalTask, inbox: Sequence[Message]) -> Bounds:
        """What an upload of this client is held to, whatever the method's server checks."""
        sent = {name: t for message in inbox if message.kind == "adapter" for name, t in message.tensors.items()}
        most = {"num_examples": len(self.rows[cid]), "tokens": most_tokens(task)}
        return Bounds(most, sent, self.federation.max_update_norm)

    def _train(self, round: int, tasks: Mapping[ClientId, LocalTask]) -> dict[ClientId, LocalResult]:
        """Local training of the clients that stay, over worker processes; results in the order of `tasks`."""
        p = self.p
        done: dict[ClientId, LocalResult] = {}

        def keep(cid: ClientId, result: LocalResult) -> None:
            done[cid] = result
            self.progress.advance(1, round=round + 1, loss=result.loss)

        # A client with a `fit` of its own may keep what it learns there, so it has to run in this process.
        own = [cid for cid in tasks if type(self.client(cid)).fit is not Client.fit]
        modules = {id(task.frozen.module): task.frozen.module for task in tasks.values()}
        if p.method.dropout == 0 and any(map(has_dropout, modules.values())):
            raise FedbenchError(
                f"{p.method.name}: its clients train with dropout, but its property `dropout` is 0; let it give the "
                "probability, since executors draw dropout in different orders"
            )
        declared = [cid for cid in tasks if cid not in own]
        chosen = [tasks[cid] for cid in declared]
        for i, result in execute_all(chosen, p.execution):
            keep(declared[i], result)
        for cid in own:
            with one_thread():
                keep(cid, self.client(cid).fit(tasks[cid], lambda task: execute(task, p.execution)))
        return {cid: done[cid] for cid in tasks}

    def _evaluate(self, model: torch.nn.Module, data: Examples, round: int) -> Evaluation:
        """Score a model as it is after `round`. Raises DivergedError, naming that, where its answers are not finite."""
        p = self.p
        try:
            return evaluate(model, data, self.evaluation.batch_size, p.execution)
        except DivergedError as error:
            raise DivergedError(
                f"{p.method.name} on {p.scenario.name}, seed {p.request.seed}, has diverged: {error} after round "
                f"{round + 1}; lower lr"
            ) from None

    def _validate(self, round: int, due: bool) -> dict[str, Any]:
        """Scores on the validation rows: of the proxy, which is what a deployment could see and select on.

        due: whether the plug-in is scored too, in rounds of evaluation. Where there is no proxy it always is.
        """
        rows = self.p.loaded.validation
        found: dict[str, Any] = {}
        with self.time("evaluate"):
            proxy = self.server.proxy()
            if due or proxy is None:
                found["plug_in_validation"] = self._evaluate(self.server.plug_in(), rows, round).accuracy
            found["proxy_validation"] = None if proxy is None else self._evaluate(proxy, rows, round).accuracy
        seen = found["plug_in_validation"] if proxy is None else found["proxy_validation"]
        if self.evaluation.selection == "best" and (self.best is None or seen > self.best.score):
            state = self.server.state()
            tensors = {n: t.detach().cpu().clone() for n, t in state.tensors.items()}
            self.best = Best(seen, round, State(tensors, deepcopy(dict(state.values))))
        self.progress.advance(0, accuracy=found.get("plug_in_validation", seen))
        return found

    def _observe(self, delivered: Sequence[tuple[ClientId, Sequence[Message]]]) -> None:
        """Count what a broadcast exposes of the FM: each set-up message, and the proxy as an alignment left it."""
        messages = {id(m): m for _, inbox in delivered for m in inbox}.values()
        for message in messages:
            # The transport delivers a large message that has not changed as the same object, round after round.
            if message.kind in SETUP_KINDS and message is not self.observed:
                self.exposure.observe(message.tensors, self.server.fm_sources())
                self.observed = message
        # Comparing a proxy with the FM takes some percent of a round, and the same alignment is sent for many rounds.
        alignments = {state_digest(m.tensors) for m in messages if m.kind == "alignment"}
        if not alignments <= self.observed_alignments and (proxy := self.server.proxy()) is not None:
            self.exposure.observe(frozen_state(proxy), self.server.fm_sources())
            self.observed_alignments |= alignments

    def _gradient_error(
        self, round: int, phase: str, reference: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor] | None:
        """Append one point of gradient error along the method's own trajectory; nothing where there is no proxy.

        Returns the FM's gradient, which is the `reference` of another point at the same tunable values.
        """
        proxy = self.server.proxy()
        if proxy is None or len(self.probe) == 0:
            return None
        with self.time("gradient"):
            fm, names = self.server.plug_in(), self.server.fm_names()
            if reference is None:
                reference = gradients(fm, tunable_names(fm), self.probe, self.p.execution)
            mine = gradients(proxy, list(names), self.probe, self.p.execution)
            parts = Parts(fm)
            block = gradient_error({names[n]: g for n, g in mine.items()}, reference, parts.layer_of, parts.is_head)
        self.points.append({"round": round, "phase": phase, **block})
        return reference

    def loop(self, checkpoints: Path | None, until: int | None = None) -> None:
        """All rounds that are left, or those up to `until`, with a checkpoint after each but the last of all."""
        start = len(self.rounds)
        if start == 0 and self.federation.rounds:
            self._gradient_error(-1, "start")
        size = self.federation.cohort_size(len(self.partition.clients))
        self.progress.phase(
            "federated rounds", total=(self.federation.rounds - start) * size, detail=self.p.method.name
        )
        # Looking through what is there by now for garbage takes 0.3 s each time, and workers copy what they look at.
        gc.freeze()
        try:
            for round in range(start, self.federation.rounds if until is None else until):
                self.round(round)
                if self.step_flops is None and self.example is not None:
                    with self.time("flops"):
                        self.step_flops = step_flops(self.example, self.p.execution.device)
                if checkpoints is not None and round + 1 < self.federation.rounds:
                    with self.time("checkpoint"):
                        self.checkpoint(checkpoints)
        finally:
            gc.unfreeze()

    def checkpoint(self, folder: Path) -> None:
        """Write everything needed to go on after this round; at any moment `folder` holds one whole checkpoint."""
        if self.saved is None or self.saved.folder != folder:
            self.saved = Checkpoint(folder, self.p.key)
        parts = {"server": self.server.state(), "exposure": State(self.exposure.state())}
        if self.best is not None:
            parts["best"] = self.best.state
        values = {
            "best": None if self.best is None else [self.best.score, self.best.round],
            "steps": self.steps,
            "step_flops": self.step_flops,
            "seconds": dict(self.time.seconds),
        }
        self.saved.write(parts, self.clients, self.changed, self._history, values)
        self.changed = set()

    def _history(self, start: int) -> list[dict[str, Any]]:
        """What each round from `start` on has added to what this run knows; the first also has what came before it."""
        after = start if start else -1
        points: dict[int, list[Any]] = defaultdict(list)
        for point in self.points:
            if point["round"] >= after:
                points[max(0, point["round"])].append(point)
        crossed: dict[int, list[Any]] = defaultdict(list)
        for entry in self.transport.ledger.entries:
            if entry.round >= start:
                crossed[entry.round].append(entry.to_json())
        refused: dict[int, list[Any]] = defaultdict(list)
        for round, client, why in self.transport.refused:
            if round >= start:
                refused[round].append([round, client, why])
        return [
            {"round": entry, "points": points[r], "ledger": crossed[r], "refused": refused[r]}
            for r, entry in enumerate(self.rounds[start:], start=start)
        ]

    def resume(self, folder: Path) -> bool:
        """Become the run that wrote the checkpoint in `folder`; False where there is none for this key.

        Raises DamagedFileError for one that cannot be trusted or does not fit this code; this run may have taken up a
        part of it by then, and is of no further use.
        """
        saved = read_checkpoint(folder, self.p.key)
        if saved is None:
            return False
        try:
            self.server.restore(saved.parts["server"])
            self.exposure.restore(dict(saved.parts["exposure"].tensors))
            for cid, state in saved.clients.items():
                self.client(cid).restore(state)
            if saved.values["best"]:
                score, round = saved.values["best"]
                self.best = Best(score, round, saved.parts["best"])
            self.rounds = [entry["round"] for entry in saved.history]
            self.points = [point for entry in saved.history for point in entry["points"]]
            self.transport.ledger = Ledger.from_json([row for entry in saved.history for row in entry["ledger"]])
            self.transport.refused = [(r, c, why) for entry in saved.history for r, c, why in entry["refused"]]
            self.steps, self.step_flops = saved.values["steps"], saved.values["step_flops"]
            self.time = Stopwatch(saved.values["seconds"])
        except Exception as error:  # a method may raise anything over a state that another version of it wrote
            raise DamagedFileError(
                f"{folder}: its checkpoint does not fit this run: {type(error).__name__}: {error}; delete the folder"
            ) from None
        return True

    def finish(self) -> Record:
        """Score the selected round on the test set and write everything down."""
        p, server = self.p, self.server
        labels, classes = p.loaded.train.labels.numpy(), len(p.loaded.data.class_names)
        self.progress.phase("test", detail=f"{len(p.loaded.test)} rows")
        selected = self.federation.rounds - 1
        if self.best is not None:
            selected = self.best.round
            server.restore(self.best.state)
        with self.time("test"):
            plug_in = self._evaluate(server.plug_in(), p.loaded.test, selected)
            proxy_model = server.proxy()
            proxy = None if proxy_model is None else self._evaluate(proxy_model, p.loaded.test, selected)
            untouched = None
            if p.loaded.fm.trained_head:
                model = p.loaded.fm.build(None, p.execution.device)
                model.load_state_dict(p.loaded.fm.trained_head, strict=False)
                untouched = self._evaluate(model, p.loaded.test, selected)
            models = {"plug_in": server.plug_in(), "proxy": proxy_model}
            extra = {
                test: {
                    name: None if model is None else self._evaluate(model, rows, selected).block(rows=True)
                    for name, model in models.items()
                }
                for test, rows in p.loaded.extra_tests.items()
            }
        counts = self.partition.label_counts(labels, classes)
        final = dict(next((r for r in self.rounds if r["round"] == selected), {}))
        if final and "plug_in_validation" not in final:
            with self.time("evaluate"):
                rows = p.loaded.validation
                final["plug_in_validation"] = self._evaluate(server.plug_in(), rows, selected).accuracy
        accuracy: dict[str, Any] = {
            "selection": {"rule": self.evaluation.selection, "round": selected},
            "plug_in": plug_in.block(rows=True),
            "proxy": proxy.block(rows=True) if proxy else None,
            "untouched": untouched.block() if untouched else None,
            "gap": plug_in.accuracy - proxy.accuracy if proxy else None,
            "validation": {"plug_in": final.get("plug_in_validation"), "proxy": final.get("proxy_validation")},
            "per_client": per_client(plug_in, counts),
            "unavailable": None,
        }
        if extra:
            accuracy |= {"test_name": p.loaded.data.test_name, "extra_tests": extra}
        return self.record(accuracy)

    def record(self, accuracy: Mapping[str, Any]) -> Record:
        """The record of this run, with the scores given."""
        p = self.p
        ledger = self.transport.ledger
        # The headline is over all of the FM's tunables: the one set that is the same for every method.
        errors = [e for point in self.points if (e := point["zero_filled"]["error"]) is not None]
        adapter = self.server.expected(0).get("adapter", {}) if self.federation.rounds else {}
        trainable = sum(int(np.prod(spec.shape)) for spec in adapter.values()) or None
        labels, classes = p.loaded.train.labels.numpy(), len(p.loaded.data.class_names)
        content = {
            "schema": SCHEMA,
            "status": "complete",
            "error": None,
            "identity": {
                "key": p.key,
                "method": p.method.name,
                "method_version": p.method.version,
                "scenario": p.scenario.name,
                "seed": p.request.seed,
                "fm": p.loaded.fm.name,
                "data_hash": p.loaded.data.content_hash,
                "fm_hash": p.loaded.fm.content_hash,
                "inputs_hash": p.loaded.inputs_hash,
                "precision": p.execution.precision,
            },
            "scenario": dict(p.identity["scenario"]) | {"title": p.scenario.title, "fm": p.loaded.fm.name},
            "method": dict(p.identity["method"]) | {"planned": list(p.planned)},
            "accuracy": dict(accuracy),
            "communication": {
                **{way: {"bytes": ledger.total(way), "by_kind": ledger.by_kind(way)} for way in ("up", "down")},
                "setup_bytes": ledger.total("down", SETUP_KINDS),
                "refused": [list(r) for r in self.transport.refused],
                "per_round": [{"round": r["round"], "up": r["bytes_up"], "down": r["bytes_down"]} for r in self.rounds],
            },
            "gradient_error": {
                "points": self.points,
                "start": errors[0],
                "mean": float(np.mean(errors)),
                "final": errors[-1],
            }
            if errors
            else None,
            "distillation": [dict(r) for r in self.server.residuals()],
            "exposure": self.exposure.block(),
            "compute": {
                "trainable_parameters": trainable,
                "resident_parameters": self.modules.resident or None,
                "local_steps": self.steps,
                "step_flops": self.step_flops,
                "peak_memory_bytes": peak_memory(p.execution.device),
                "seconds": {name: round(s, 3) for name, s in sorted(self.time.seconds.items())},
            },
            "rounds": self.rounds,
            "partition": {
                "hash": self.partition.hash(),
                "sizes": self.partition.sizes(),
                "label_counts": self.partition.label_counts(labels, classes),
                "skew": self.partition.skew(labels, classes),
                "attempts": self.partition.attempts,
            },
            "provenance": {
                **provenance.collect(p.execution.device),
                "notes": [*p.notes, *self.server.notes()],
                "fm": dict(p.loaded.fm.provenance),
                "executor": p.execution.executor,
                "workers": p.execution.workers,
            },
        }
        try:
            return Record.model_validate(content)
        except ValidationError as error:
            # Nothing a user did: what a plugin's method says of itself, or a fault of fedbench's.
            raise FedbenchError(
                f"{p.method.name} on {p.scenario.name}: what came out is no record: {complaint_of(error)}; "
                "the fault is in the method, or in fedbench"
            ) from error


def checkpoint_folder(prepared: Prepared) -> Path:
    """Where a run keeps its checkpoint: under the results folder, by key."""
    return prepared.request.results / "checkpoints" / prepared.key[:12]


def run(prepared: Prepared, progress: Progress | None = None) -> Record:
    """Run from the start or from a checkpoint to a saved record; the checkpoint is removed at the end.

    Raises ClaimedError where another process is making the same run into the same folder.
    """
    with claim(prepared.request.results, prepared.key):
        return _run(prepared, progress or Silent())


def _run(prepared: Prepared, progress: Progress) -> Record:
    reset_peak(prepared.execution.device)
    this, folder = Run(prepared, progress), checkpoint_folder(prepared)
    if prepared.unavailable:
        nothing = {"plug_in": None, "proxy": None, "unavailable": prepared.unavailable}
        record = this.record(nothing)
    else:
        try:
            if this.resume(folder):
                progress.phase("resume", detail=f"after round {len(this.rounds)}")
        except DamagedFileError as error:
            progress.phase("starting anew", detail=f"the checkpoint is damaged: {error}")
            shutil.rmtree(folder, ignore_errors=True)
            this = Run(prepared, progress)
        this.loop(folder)
        record = this.finish()
        keep_adapter(this.server.plug_in(), adapter_path(prepared.request.results, prepared.key), prepared.key)
    save(record, prepared.request.results / "records")
    shutil.rmtree(folder, ignore_errors=True)
    return record
