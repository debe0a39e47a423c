"""DeComFL: scalars on the wire, and the same tunables at both sides however many rounds were missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context, save_tiny_bert, smoke_request, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.directions import direction
from fedbench.api.messages import Message
from fedbench.machine.device import Execution
from fedbench.methods.decomfl import DeComFL
from fedbench.models.cache import ModuleCache
from fedbench.rng import Streams
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.training.alone import execute

METHOD = DeComFL(lora_r=2, perturbations=2, steps=2, lr=0.5, lr_decay="linear")


def sides(tmp_path: Path, clients: int = 1) -> tuple[Any, list[Any]]:
    ctx, modules = context(tmp_path), ModuleCache(torch.device("cpu"))
    made = [METHOD.client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in range(clients)]
    return METHOD.server(tiny_fm(), None, ctx), made


def upload(rows: int, *slopes: list[float]) -> list[Message]:
    return [Message("adapter", {"slopes": torch.tensor(slopes)}, {"num_examples": rows})]


def test_the_server_steps_by_the_mean_slopes_along_the_rounds_directions(tmp_path: Path) -> None:
    server, _ = sides(tmp_path)
    server.aggregate(1, {0: upload(1, [1.0, 0.0], [0.0, 4.0]), 1: upload(3, [5.0, 0.0], [0.0, 0.0])})
    first, shapes = server.seed(1), {n: t.shape for n, t in server.initial.items()}
    a, b = direction(shapes, first), direction(shapes, first + 3)
    lr = 0.5 * 3 / 4  # of the second of four rounds
    for name, value in server.initial.items():
        expected = value - lr * (4.0 * a[name] + 1.0 * b[name]) / 2
        assert torch.allclose(server.values[name], expected, atol=1e-6)


def test_a_clients_own_steps_are_what_the_server_would_make_of_its_slopes(tmp_path: Path) -> None:
    server, (client,) = sides(tmp_path)
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(12))
    result = execute(task, Execution())
    [message] = client.upload(0, result)
    assert {n: (tuple(t.shape), t.dtype) for n, t in message.tensors.items()} == {
        n: (s.shape, s.dtype) for n, s in server.expected(0, 0)["adapter"].items()
    }
    server.aggregate(0, {0: [message]})
    assert all(torch.allclose(t, server.values[n], atol=1e-5) for n, t in result.tunables.items())


def test_whoever_missed_rounds_makes_up_for_them_to_the_bit(tmp_path: Path) -> None:
    server, (early, late, newcomer) = sides(tmp_path, 3)
    outbox = server.broadcast(0, [0, 1])
    early.task(0, outbox[0], train_rows(8))
    late.task(0, outbox[1], train_rows(8))
    for round in range(3):
        server.aggregate(round, {0: upload(1, [1.0 + round, 2.0], [0.5, -1.0])})
        inbox = server.broadcast(round + 1, [0])[0]
        assert [m.kind for m in inbox] == ["alignment", "adapter"]
        early.task(round + 1, inbox, train_rows(8))
    outbox = server.broadcast(3, [1, 2])
    assert outbox[1][0].tensors["slopes"].shape == (3, 2, 2)
    assert [m.kind for m in outbox[2]] == ["fm", "alignment", "adapter"]
    late.task(3, outbox[1], train_rows(8))
    task = newcomer.task(3, outbox[2], train_rows(8))
    for client in (early, late, newcomer):
        assert all(torch.equal(t, server.values[n]) for n, t in client.fixed.items())
    assert len(task.batches) == 2
    again, (client_again, *_) = sides(tmp_path, 3)
    again.restore(server.state())
    client_again.restore(newcomer.state())
    assert all(torch.equal(t, client_again.fixed[n]) for n, t in again.values.items())
    assert torch.equal(again.update_since(1).tensors["slopes"], server.update_since(1).tensors["slopes"])


@pytest.mark.parametrize("executor", ["reference", "packed", "fused"])
def test_a_round_takes_some_hundred_bytes_whatever_the_model(executor: str, tmp_path: Path) -> None:
    fm = save_tiny_bert(tmp_path / "bert")
    request = smoke_request(tmp_path, "decomfl", "tweets-noniid", fm, perturbations="2")
    record = run(prepare(request.__class__(**{**vars(request), "executor": executor})))
    assert record.communication.up is not None
    assert record.communication.up.by_kind["adapter"].elements == 2 * 2 * sum(len(r.arrived) for r in record.rounds)
    assert record.compute.trainable_parameters == 12 * 2 * 8 * 16 + 3 * 16 + 3
