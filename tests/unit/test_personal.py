"""Clients with models of their own: FedSA-LoRA, and how such models are scored and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _records import make_record
from helpers import context, save_tiny_bert, smoke_request, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.local import LocalResult
from fedbench.api.messages import Message
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.measures.personal import ROWS, accuracy_of, drawn_rows
from fedbench.methods.fedsa_lora import FedSALora
from fedbench.models.cache import ModuleCache
from fedbench.models.weights import set_tensors
from fedbench.records.record import Record
from fedbench.rng import Streams
from fedbench.run.export import export_adapter
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.run import run
from fedbench.tables.asked import asked_measures
from fedbench.tables.compare import compare
from fedbench.tables.report import summary

CPU = torch.device("cpu")


def sides(tmp_path: Path, method: FedSALora, clients: int = 2) -> tuple[Any, list[Any]]:
    ctx, modules = context(tmp_path), ModuleCache(CPU)
    made = [method.client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in range(clients)]
    return method.server(tiny_fm(), None, ctx), made


def prepared(tmp_path: Path, **settings: str) -> Prepared:
    fm = save_tiny_bert(tmp_path / "bert")
    return prepare(smoke_request(tmp_path, "fedsa-lora", "tweets-noniid", fm, **settings))


def trained_by(client: Any, server: Any, round: int, add: float) -> list[Message]:
    """The upload of a client whose training added a number to all that it tunes."""
    task = client.task(round, server.broadcast(round, [client.ctx.client])[client.ctx.client], train_rows(4))
    return list(client.upload(round, LocalResult({n: v + add for n, v in task.tunables.items()}, 1, 0.0)))


def test_a_is_averaged_and_b_and_head_stay_with_each_client(tmp_path: Path) -> None:
    server, (one, two) = sides(tmp_path, FedSALora(lora_r=4))
    start = dict(server.initial)
    uploads = {0: trained_by(one, server, 0, 1.0), 1: trained_by(two, server, 0, 3.0)}
    assert all(".lora_A." in n for m in uploads[0] for n in m.tensors)
    uploads[1] = [replace(m, meta={"num_examples": 12}) for m in uploads[1]]
    server.aggregate(0, uploads)
    assert all(torch.allclose(v, start[n] + (4 * 1.0 + 12 * 3.0) / 16) for n, v in server.values.items())
    task = one.task(1, server.broadcast(1, [0])[0], train_rows(4))
    for name, value in task.tunables.items():
        assert torch.allclose(value, start[name] + (2.5 if ".lora_A." in name else 1.0)), name
    assert not task.fixed


def test_a_round_moves_a_alone_and_the_rest_crosses_once_with_the_model(tmp_path: Path) -> None:
    server, (client, _) = sides(tmp_path, FedSALora(lora_r=4))
    first, second = server.broadcast(0, [0])[0], server.broadcast(1, [0])[0]
    assert [m.kind for m in first] == ["fm", "adapter"]
    assert {n for m in second for n in m.tensors} == {n for n in server.initial if ".lora_A." in n}
    assert set(server.expected(0, 0)["adapter"]) == {n for n in server.initial if ".lora_A." in n}
    assert server.trainable(0) == sum(v.numel() for v in server.initial.values())
    assert set(client.task(0, first, train_rows(4)).tunables) == set(server.initial)


def test_the_head_may_be_shared_too(tmp_path: Path) -> None:
    server, (client, _) = sides(tmp_path, FedSALora(lora_r=4, share_head=True))
    [message] = trained_by(client, server, 0, 1.0)
    assert {n for n in message.tensors if "lora" not in n} == {"classifier.weight", "classifier.bias"}
    assert all(".lora_B." in n for n in client.memory["own"])


def test_a_clients_model_is_the_last_common_a_with_its_own_b_and_head(tmp_path: Path) -> None:
    server, (client, absent) = sides(tmp_path, FedSALora(lora_r=4))
    server.aggregate(0, {0: trained_by(client, server, 0, 0.5)})
    server.values = {n: v + 1.0 for n, v in server.values.items()}
    outbox = server.farewell([0, 1])
    assert absent.personal(outbox[1]) is None
    model = client.personal(outbox[0])
    whole = tiny_fm().tuned(server.spec, CPU)
    set_tensors(whole, {n: v + (1.5 if ".lora_A." in n else 0.5) for n, v in server.initial.items()})
    rows = train_rows(40)
    expected = evaluate(whole, rows, 8, Execution()).accuracy
    assert accuracy_of(model, 0, rows, 8, Execution()) == expected
    again = sides(tmp_path, FedSALora(lora_r=4))[1][0]
    again.restore(client.state())
    assert accuracy_of(again.personal(outbox[0]), 0, rows, 8, Execution()) == expected
    assert server.put_in_fm() is None


def test_test_rows_are_drawn_in_a_clients_label_shares() -> None:
    classes = np.repeat([0, 1, 2], [300, 150, 10])
    rows = drawn_rows(classes, [3, 1, 0], np.random.default_rng(0))
    assert np.bincount(classes[rows]).tolist() == [150, 50]
    assert len(np.unique(rows)) == len(rows) == ROWS
    thirds = drawn_rows(classes, [1, 1, 1], np.random.default_rng(0))
    assert np.bincount(classes[thirds]).tolist() == [67, 67, 10], "as many of a class as there are"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    folder = tmp_path_factory.mktemp("run")
    return run(prepared(folder)), folder


def test_a_record_has_the_personal_models_and_no_accuracy_of_one_model(ran: tuple[Record, Path]) -> None:
    record, folder = ran
    personal = record.accuracy.personal
    assert personal is not None and record.accuracy.plug_in is None and record.accuracy.per_client is None
    assert record.accuracy.selection is not None and record.accuracy.selection.rule == "last"
    known = {c for r in record.rounds for c in r.arrived}
    assert len(personal.values) == len(personal.rows or ()) == len(known)
    assert personal.drawn and personal.without == len(record.partition.sizes or ()) - len(known)
    assert personal.mean == pytest.approx(np.mean(personal.values), abs=1e-6)
    assert Record.model_validate(record.to_json()) == record
    with pytest.raises(FedbenchError, match="fedsa-lora makes a model for each client, and none for all"):
        export_adapter(next((folder / "runs" / "records").rglob("*.json")), folder / "out", folder / "cache")


def test_clients_of_the_data_are_scored_on_their_own_test_rows(tmp_path: Path) -> None:
    this = Run(prepared(tmp_path), Silent())
    this.loop(None)
    p = this.p
    whose = np.full(len(p.loaded.test), -1)
    whose[:6] = [0, 0, 1, 1, 1, 2]
    tests = {cid: np.flatnonzero(whose == cid) for cid in this.host.clients.known()}
    p.__dict__["held_out"] = replace(p.held_out, test_clients=whose)
    assert {cid: len(rows) for cid, rows in p.own_tests(list(tests)).items()} == {
        cid: len(rows) for cid, rows in tests.items() if len(rows)
    }
    record = finish(this)
    assert record.accuracy.personal is not None and not record.accuracy.personal.drawn


def test_a_personal_score_is_told_apart_wherever_it_is_shown(ran: tuple[Record, Path]) -> None:
    from rich.console import Console

    record, _ = ran
    screen = Console(record=True, width=200)
    screen.print(summary(record))
    shown = screen.export_text()
    assert "none of one model for all" in shown and "test rows drawn in its label shares" in shown
    comparison = compare([record])
    [row] = comparison.sections[0].rows
    assert (row.state, row.scored) == ("personal models", {})
    assert any("not to be compared with the accuracy of one model" in note for note in comparison.sections[0].notes)
    assert comparison.frame()["accuracy"].isna().all()
    [measure] = asked_measures(["personal_accuracy_mean"], ())
    assert measure.read(record) == record.accuracy.personal.mean  # type: ignore[union-attr]


def test_a_personal_block_that_contradicts_its_values_is_refused() -> None:
    content = make_record().to_json()
    block = {
        "mean": 0.5,
        "std": 0.5,
        "worst_tenth": 0.0,
        "values": [0.0, 1.0],
        "rows": [3, 4],
        "drawn": True,
        "without": 1,
    }
    content["accuracy"]["personal"] = block
    Record.model_validate(content)
    content["accuracy"]["personal"] = {**block, "mean": 0.6}
    with pytest.raises(ValueError, match="accuracy.personal.mean: 0.6, but its values say 0.5"):
        Record.model_validate(content)


def test_a_host_that_scores_no_clients_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbench.run.hosts.here.Here.scores_clients", False)
    with pytest.raises(FedbenchError, match="--host here: does not score clients' own models, which fedsa-lora makes"):
        prepared(tmp_path)
