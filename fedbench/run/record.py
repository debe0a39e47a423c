"""A record made of a run: what was asked, what came out, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedbench.api.messages import SETUP_KINDS, ClientId
from fedbench.data.rows import RawData
from fedbench.errors import FedbenchError
from fedbench.machine.memory import peak_memory
from fedbench.measures.accuracy import over_clients
from fedbench.records import provenance
from fedbench.records.record import Record, complaint_of
from fedbench.records.schema import SCHEMA
from fedbench.run.loop import Run
from fedbench.run.privacy import spent


def finish(run: Run) -> Record:
    """Score the selected round on the test rows and write everything down."""
    run.progress.phase("test", detail=f"{len(run.p.loaded.test)} rows")
    # Clients' own models are those after the last round, whatever round the server goes back to.
    personal = {"personal": personal_of(run)} if run.p.method.personal else {}
    return record_of(run, run.host.server.finish(run.federation.rounds) | personal)


def personal_of(run: Run) -> dict[str, Any]:
    """The block of clients' own models: the accuracy of each on test rows of its own.

    Raises FedbenchError where no client has a model, or none of those a test row.
    """
    tests = run.p.own_tests(run.host.clients.known())
    outbox = run.host.server.farewell(list(tests))
    found = run.host.clients.personal(outbox, tests, run.evaluation.batch_size)
    if not found:
        raise FedbenchError(f"{run.p.method.name}: no client that trained has a test row, so no model can be scored")
    return {
        **over_clients(np.array([found[cid] for cid in sorted(found)])),
        "rows": [len(tests[cid]) for cid in sorted(found)],
        "drawn": run.p.held_out.of_clients is None,
        "without": len(run.partition.clients) - len(found),
    }


def without_scores(run: Run, why: str) -> Record:
    """The record of a method that is not available here, and why."""
    return record_of(run, {"plug_in": None, "proxy": None, "unavailable": why})


def privacy_of(run: Run) -> dict[str, Any]:
    """The block of a run under differential privacy."""
    settings = run.p.scenario.privacy
    if settings is None:
        return {}
    clients = len(run.partition.clients)
    return {"privacy": spent(settings, clients, run.federation.cohort_size(clients), run.federation.rounds)}


def whose(data: RawData) -> dict[str, str]:
    """Which column says whose rows are, and its hash, of a natural split."""
    return {} if data.clients is None else {"by": data.clients.by, "clients_hash": data.clients.column_hash}


def took_part(run: Run) -> list[ClientId]:
    """The clients that were sampled in some round."""
    return sorted({client for entry in run.rounds for client in entry["cohort"]})


def record_of(run: Run, accuracy: Mapping[str, Any]) -> Record:
    """The record of a run with these scores. Raises FedbenchError where what a method says of itself fits none."""
    p, ledger, device = run.p, run.ledger, run.p.execution.device
    server, clients = run.host.server.report(took_part(run)), run.host.clients.report()
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
            "refused": [list(r) for r in run.refused],
            "per_round": [{"round": r["round"], "up": r["bytes_up"], "down": r["bytes_down"]} for r in run.rounds],
        },
        **server["blocks"],
        "distillation": server["residuals"],
        **privacy_of(run),
        "compute": {
            "trainable_parameters": server["trainable_parameters"],
            "resident_parameters": clients["resident_parameters"],
            "local_steps": run.steps,
            "step_flops": run.step_flops,
            "peak_memory_bytes": peak_memory(device) if run.host.one_process else None,
            "seconds": {name: round(s, 3) for name, s in sorted(run.seconds().items())},
        },
        "rounds": run.rounds,
        "partition": {
            "hash": run.partition.hash(),
            "sizes": run.partition.sizes(),
            "label_counts": run.label_counts,
            "skew": dict(p.division.skew),
            "attempts": run.partition.attempts,
            **whose(p.loaded.data),
        },
        "provenance": {
            **provenance.collect(device),
            "notes": [*p.notes, *server["notes"]],
            "fm": dict(p.loaded.fm.provenance),
            "executor": p.execution.executor,
            "host": p.request.host,
            "workers": p.execution.workers,
            **({"runtime": account} if (account := run.host.account()) else {}),
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
