"""What a large population may not cost: every cause of work in proportion to it, at a scale where it can be counted."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_tiny_bert, smoke_request, train_rows

from fedbench.api.messages import ClientId
from fedbench.data.clients import ClientRows
from fedbench.data.examples import Examples
from fedbench.data.partition import Partition
from fedbench.methods.fedavg_lora import AdapterServer
from fedbench.records.text import dumps, parse, plain
from fedbench.run.ledger import Ledger
from fedbench.run.payloads import Parcel
from fedbench.run.prepare import prepare
from fedbench.run.run import run


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were copied out of others, selection by selection."""
    counts: list[int] = []
    honest = Examples.select

    def select(self: Examples, rows: Any) -> Examples:
        counts.append(len(rows))
        return honest(self, rows)

    monkeypatch.setattr(Examples, "select", select)
    return counts


def test_rows_of_a_client_are_taken_when_they_are_asked_for(selected: list[int]) -> None:
    rows = train_rows(60)
    clients = [np.arange(client, 60, 20) for client in range(20)]
    mine = ClientRows.of(rows, clients)
    assert (len(mine), list(mine), selected) == (20, list(range(20)), [])
    assert mine[7].content_hash() == rows.select(clients[7]).content_hash()
    assert selected == [3, 3]


def test_some_clients_rows_come_without_those_of_others() -> None:
    rows = train_rows(60)
    clients = [np.arange(client, 60, 20)[: client % 4] for client in range(20)]
    every = ClientRows.of(rows, clients)
    some = every.only([3, 8, 11, 0])
    assert sorted(some) == [0, 3, 8, 11]
    assert all(some[cid].content_hash() == every[cid].content_hash() for cid in some)
    assert len(some._rows) == 3 + 0 + 3 + 0
    assert len(every.only([])) == 0


def test_rows_are_sent_to_another_process_as_one_piece() -> None:
    rows = train_rows(400)
    few, many = (
        len(pickle.dumps(ClientRows.of(rows, np.array_split(np.arange(400), clients)))) for clients in (4, 400)
    )
    assert many - few < 400 * 150, "a client's numbers and no tensor of its own"


def test_labels_are_counted_for_all_clients_at_once() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 90)
    clients = (np.arange(0, 40), np.array([], dtype=np.int64), np.arange(40, 90))
    counts = Partition(clients, 1).label_counts(labels, 6)
    assert counts == [np.bincount(labels[rows], minlength=6).tolist() for rows in clients]
    assert all(type(count) is int for row in counts for count in row)


def test_a_round_s_bytes_are_summed_over_that_round_alone() -> None:
    ledger = Ledger()
    for round in range(3):
        for client in range(2):
            ledger.charge(round, "up", client, [Parcel("adapter", 10 + round, 1, b"")])
    assert [len(ledger.rounds[round]) for round in range(3)] == [2, 2, 2]
    assert [ledger.total("up", round=round) for round in range(3)] == [20, 22, 24]
    assert ledger.total("up") == 66
    assert [entry.round for entry in ledger.entries] == [0, 0, 1, 1, 2, 2]


def test_only_clients_who_took_part_are_looked_at_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selected: list[int]
) -> None:
    asked: list[ClientId] = []
    honest = AdapterServer.trainable

    def trainable(self: AdapterServer, client: ClientId) -> int:
        asked.append(client)
        return honest(self, client)

    monkeypatch.setattr(AdapterServer, "trainable", trainable)
    settings = {"split.clients": "300", "split.min_size": "1", "federation.fraction": "0.01", "federation.rounds": "2"}
    request = smoke_request(tmp_path, "fedavg-lora", "tweets-iid", save_tiny_bert(tmp_path / "bert"))
    prepared = prepare(replace(request, settings=settings))
    selected.clear()
    record = run(prepared)
    assert record.scenario.split and record.scenario.split.clients == 300
    cohorts = [entry.cohort for entry in record.rounds]
    assert [len(cohort) for cohort in cohorts] == [3, 3]
    assert asked == sorted({client for cohort in cohorts for client in cohort})
    assert len(selected) < 20, "of six sampled clients, of the probe, and of small steps that are counted"


@pytest.mark.parametrize(
    "content",
    [
        {"a": [1, 2, 3] * 60, "b": [[0, 10**400 % 7], []], "c": [1, 2.5, None] * 40},
        {"a": [True, 1] * 60, "b": [-3] * 200, "c": ["x", 1] * 50},
    ],
)
def test_long_lists_of_numbers_are_written_and_read_as_short_ones_are(content: dict[str, Any]) -> None:
    assert plain(content) == content
    text = dumps(plain(content))
    assert parse(text) == content
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_number_that_no_float_holds_is_refused_in_a_long_list_too() -> None:
    with pytest.raises(ValueError, match="is not a finite number"):
        parse("[" + "1, " * 100 + "1" + "0" * 400 + "]")
