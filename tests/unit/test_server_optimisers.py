"""FedProx, SCAFFOLD and the server's optimisers: two clients, one tunable, numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.local import SGD, LocalResult
from fedbench.api.messages import Message
from fedbench.machine.device import Execution
from fedbench.methods._server_optimisers import OptimisingServer
from fedbench.methods.fedadagrad import FedAdagrad
from fedbench.methods.fedadam import FedAdam
from fedbench.methods.fedavg_lora import AdapterServer, LoraMethod
from fedbench.methods.fedavgm import FedAvgM
from fedbench.methods.fedprox import FedProx
from fedbench.methods.fedyogi import FedYogi
from fedbench.methods.scaffold import Scaffold, ScaffoldClient, ScaffoldServer
from fedbench.models.cache import ModuleCache
from fedbench.rng import Streams
from fedbench.training.alone import execute

CPU = torch.device("cpu")


def server_of(method: LoraMethod, tmp_path: Path) -> Any:
    server = method.server(tiny_fm(), None, context(tmp_path))
    assert isinstance(server, AdapterServer)
    return server


def moves(server: AdapterServer, *clients: tuple[float, int], round: int = 0) -> list[float]:
    """Aggregate clients who all moved by a number, and what each tunable moved by."""
    before = dict(server.values)
    uploads = {
        i: [Message("adapter", {n: v + d for n, v in before.items()}, {"num_examples": n})]
        for i, (d, n) in enumerate(clients)
    }
    server.aggregate(round, uploads)
    return [float((server.values[n] - v).mean()) for n, v in before.items()]


def test_fedavgm_adds_up_what_clients_move(tmp_path: Path) -> None:
    server = server_of(FedAvgM(beta1=0.5, server_lr=2.0), tmp_path)
    # Delta = (1·3 + 4·1) / 4 = 1.75; then m = 0.5 · 1.75 + 1 = 1.875.
    assert moves(server, (1.0, 3), (4.0, 1)) == pytest.approx([3.5] * len(server.values), rel=1e-5)
    assert moves(server, (1.0, 1)) == pytest.approx([3.75] * len(server.values), rel=1e-5)


def test_fedavgm_damped_takes_a_share_of_each_move(tmp_path: Path) -> None:
    server = server_of(FedAvgM(beta1=0.5, damped=True), tmp_path)
    assert moves(server, (1.0, 1)) == pytest.approx([0.5] * len(server.values), rel=1e-5)
    assert moves(server, (1.0, 1)) == pytest.approx([0.75] * len(server.values), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "v"),
    [
        (FedAdagrad(tau=0.5, server_lr=1.0, beta1=0.5), lambda v, d: v + d * d),
        (FedYogi(tau=0.5, server_lr=1.0, beta1=0.5), lambda v, d: v - 0.01 * d * d * (1 if v > d * d else -1)),
        (FedAdam(tau=0.5, server_lr=1.0, beta1=0.5), lambda v, d: 0.99 * v + 0.01 * d * d),
    ],
    ids=["adagrad", "yogi", "adam"],
)
def test_adaptive_steps_by_hand(method: LoraMethod, v: Callable[[float, float], float], tmp_path: Path) -> None:
    server = server_of(method, tmp_path)
    m, second = 0.0, 0.25  # v starts at tau²
    for delta in (2.0, -0.1):
        m = 0.5 * m + 0.5 * delta
        second = v(second, delta)
        expected = m / (second**0.5 + 0.5)
        assert moves(server, (delta, 5)) == pytest.approx([expected] * len(server.values), rel=1e-4)


def test_departures_of_other_suites_are_switches(tmp_path: Path) -> None:
    def first(**settings: Any) -> float:
        method = FedAdam(tau=0.5, server_lr=1.0, beta1=0.5, **settings)
        return moves(server_of(method, tmp_path), (2.0, 1))[0]

    root = lambda v: v**0.5 + 0.5  # noqa: E731
    assert first() == pytest.approx(1 / root(0.99 * 0.25 + 0.01 * 4), rel=1e-4)
    assert first(squared="momentum") == pytest.approx(1 / root(0.99 * 0.25 + 0.01 * 1), rel=1e-4)
    assert first(first_whole=True) == pytest.approx(2 / root(0.99 * 0.25 + 0.01 * 4), rel=1e-4)
    assert first(v_start=0.0) == pytest.approx(1 / root(0.04), rel=1e-4)
    corrected = (1 / (1 - 0.5**2)) / root((0.99 * 0.25 + 0.04) / (1 - 0.99**2))
    assert first(bias_correction=True) == pytest.approx(corrected, rel=1e-4)


def test_a_uniform_mean_counts_clients_alike_and_is_still_a_sum(tmp_path: Path) -> None:
    assert FedAvgM(weighting="uniform").weight(30) == 1
    assert FedAvgM().weight(30) == 30


def test_server_optimisers_go_on_from_their_state(tmp_path: Path) -> None:
    server = server_of(FedAdam(), tmp_path)
    moves(server, (1.0, 1))
    again = server_of(FedAdam(), tmp_path)
    again.restore(server.state())
    assert moves(again, (0.5, 1)) == moves(server, (0.5, 1))
    assert isinstance(again, OptimisingServer)
    assert again.steps == 2


def test_fedprox_pulls_by_half_mu_times_the_squared_distance() -> None:
    now, then = {"w": torch.tensor([[1.0, 2.0, 4.0]])}, {"w": torch.tensor([[0.0, 2.0, 1.0]])}
    assert FedProx(mu=0.2).pull(now, then).item() == pytest.approx(0.1 * (1 + 9))
    now["w"].requires_grad_(True)
    [gradient] = torch.autograd.grad(FedProx(mu=0.2).pull(now, then), [now["w"]])
    assert torch.allclose(gradient, torch.tensor([[0.2, 0.0, 0.6]]))


def scaffold_client(tmp_path: Path, method: Scaffold) -> tuple[ScaffoldServer, ScaffoldClient]:
    ctx = context(tmp_path)
    server = method.server(tiny_fm(), None, ctx)
    client = method.client(ClientContext(0, Streams(0, "unit"), ctx.federation, ModuleCache(CPU)))
    assert isinstance(server, ScaffoldServer)
    assert isinstance(client, ScaffoldClient)
    return server, client


def test_scaffolds_control_is_option_two_under_plain_sgd(tmp_path: Path) -> None:
    """c_i - c + (w_received - w) / (steps · lr), with controls that are not zero."""
    method = Scaffold(lr=0.05, lr_decay="none", clip_norm=1e6)
    server, client = scaffold_client(tmp_path, method)
    server.memory["control"] = {n: torch.full_like(t, 0.3) for n, t in server.memory["control"].items()}
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(12))
    client.memory["control"] = {n: torch.full_like(t, -0.1) for n, t in server.memory["control"].items()}
    task = replace(task, gradient_offset={n: torch.full_like(t, 0.4) for n, t in server.memory["control"].items()})
    assert isinstance(task.optimiser, SGD)
    result = execute(task, Execution())
    adapter, control = client.upload(0, result)
    assert [adapter.kind, control.kind] == ["adapter", "control"]
    for name, value in adapter.tensors.items():
        option_two = -0.1 - 0.3 + (task.tunables[name] - value) / (len(task.batches) * 0.05)
        assert torch.allclose(client.memory["control"][name], option_two, atol=1e-4)
        assert torch.allclose(control.tensors[name], option_two + 0.1, atol=1e-4)


def test_scaffolds_client_steps_by_its_gradient_minus_its_control_plus_the_common_one(tmp_path: Path) -> None:
    server, client = scaffold_client(tmp_path, Scaffold())
    server.memory["control"] = {n: torch.full_like(t, 0.3) for n, t in server.memory["control"].items()}
    client.memory["control"] = {n: torch.full_like(t, 0.5) for n, t in server.memory["control"].items()}
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(12))
    assert task.gradient_offset is not None
    assert all(torch.allclose(t, torch.full_like(t, -0.2)) for t in task.gradient_offset.values())


def test_scaffolds_server_averages_moves_and_takes_controls_over_all_four_clients(tmp_path: Path) -> None:
    server, _ = scaffold_client(tmp_path, Scaffold(server_lr=0.5))
    before = dict(server.values)

    def upload(moved: float, changed: float, rows: int) -> list[Message]:
        adapter = Message("adapter", {n: t + moved for n, t in before.items()}, {"num_examples": rows})
        return [adapter, Message("control", {n: torch.full_like(t, changed) for n, t in before.items()})]

    server.aggregate(0, {0: upload(1.0, 2.0, 3), 3: upload(5.0, 6.0, 1)})
    for name, value in before.items():
        assert torch.allclose(server.values[name] - value, torch.tensor(0.5 * (3 * 1.0 + 5.0) / 4), atol=1e-5)
        assert torch.allclose(server.memory["control"][name], torch.tensor((2.0 + 6.0) / 4))


def test_scaffolds_client_goes_on_from_its_state(tmp_path: Path) -> None:
    server, client = scaffold_client(tmp_path, Scaffold())
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(12))
    client.upload(0, LocalResult(task.tunables, 1, 0.0, mean_gradient={n: t + 1 for n, t in task.tunables.items()}))
    again = scaffold_client(tmp_path, Scaffold())[1]
    again.restore(client.state())
    assert all(torch.equal(t, again.memory["control"][n]) for n, t in client.memory["control"].items())
    assert set(again.frozen) == set(client.frozen)
