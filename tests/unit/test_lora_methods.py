"""LoRA of one rank and of mixed ranks: two clients, factors by hand, weights that are not square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context, tiny_fm, train_rows
from pydantic import ValidationError
from torch import Tensor

from fedbench.api.context import ClientContext
from fedbench.api.local import LocalResult
from fedbench.api.messages import Message
from fedbench.api.sides import Method
from fedbench.errors import FedbenchError, MessageError
from fedbench.methods._products import decomposed, folded, pairs, stacked
from fedbench.methods._ranks import cut, masks, padded
from fedbench.methods.fedex_lora import FedExLora, FedExServer
from fedbench.methods.fedex_lora_official import FedExLoraOfficial
from fedbench.methods.ffa_lora import FFALora
from fedbench.methods.flexlora import FlexLora
from fedbench.methods.flora import Flora
from fedbench.methods.hetlora import HetLora, tail
from fedbench.methods.lora_fair import LoraFair
from fedbench.methods.rolora import RoLora
from fedbench.models.cache import ModuleCache
from fedbench.models.weights import frozen_state, get_tensors
from fedbench.rng import Streams

CPU = torch.device("cpu")
SCALE = 2.0
SMALL: dict[str, Any] = {"lora_r": 4, "lora_alpha": 4 * SCALE}

# Two clients' factors of a weight [3, 2]: B [3, r], A [r, 2]; ranks 1 and 2.
B1, A1 = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[1.0, -1.0]])
B2, A2 = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 4.0]])


def random_like(values: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in values.items()}


def pair(method: Method, tmp_path: Path, clients: int = 1) -> tuple[Any, list[Any]]:
    ctx = context(tmp_path)
    modules = ModuleCache(CPU)
    made = [method.client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in range(clients)]
    return method.server(tiny_fm(), None, ctx), made


def upload(values: dict[str, Tensor], rows: int = 1, **meta: int) -> list[Message]:
    return [Message("adapter", values, {"num_examples": rows, **meta})]


def effective(server: Any) -> dict[str, Tensor]:
    """W0 + s B A of every adapted weight of the tuned FM."""
    model = server.put_in_fm()
    state, values = frozen_state(model), get_tensors(model, list(server.initial))
    return {w: state[w] + SCALE * values[b] @ values[a] for a, b, w in pairs(values)}


def mean_of_products(server: Any, clients: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    state = server.original if hasattr(server, "original") else frozen_state(server.full)
    return {
        w: state[w] + SCALE * sum(p * c[b] @ c[a] for p, c in zip(shares, clients, strict=True))
        for a, b, w in pairs(clients[0])
    }


# ---------------------------------------------------------------- products


def test_a_stack_multiplies_to_the_weighted_sum_of_products_of_any_ranks() -> None:
    b, a = stacked([(B1, A1), (B2, A2)], [0.25, 0.75])
    assert (b.shape, a.shape) == ((3, 3), (3, 2))
    # 0.25 · B1 A1 = [[.25, -.25], [.5, -.5], [0, 0]]; B2 A2 = [[1, 4], [2, 0], [7, 4]].
    assert torch.allclose(b @ a, torch.tensor([[1.0, 2.75], [2.0, -0.5], [5.25, 3.0]]))


def test_what_is_folded_in_lands_where_the_product_does() -> None:
    weight = torch.arange(6.0).view(3, 2)
    assert torch.equal(folded(weight, (B1, A1)), weight + torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]))


# ---------------------------------------------------------------- one rank


def test_ffa_sends_a_once_and_only_b_and_head_in_rounds(tmp_path: Path) -> None:
    server, (client,) = pair(FFALora(), tmp_path)
    first, second = server.broadcast(0, [0])[0], server.broadcast(1, [0])[0]
    assert [m.kind for m in first] == ["fm", "adapter"]
    assert [m.kind for m in second] == ["adapter"]
    assert not any("lora_A" in n for n in second[0].tensors)
    task = client.task(0, first, train_rows(8))
    assert {n for n in task.fixed if "lora_A" in n} == set(task.fixed) == {n for n in server.initial if "lora_A" in n}
    assert all(torch.equal(t, server.initial[n]) for n, t in task.fixed.items())
    assert set(server.expected(0, 0)["adapter"]) == set(task.tunables)
    again = pair(FFALora(), tmp_path)[1][0]
    again.restore(client.state())
    assert all(torch.equal(t, again.task(1, second, train_rows(8)).fixed[n]) for n, t in task.fixed.items())


def test_ffas_mean_of_b_is_the_exact_mean_of_products(tmp_path: Path) -> None:
    server, _ = pair(FFALora(**SMALL), tmp_path)
    clients = [random_like(server.values, seed) for seed in (1, 2)]
    expected = mean_of_products(server, [{**server.initial, **c} for c in clients], [0.25, 0.75])
    server.aggregate(0, {0: upload(clients[0], 1), 1: upload(clients[1], 3)})
    assert all(torch.allclose(w, expected[n], atol=1e-5) for n, w in effective(server).items())


def test_rolora_trains_b_then_a_and_sends_what_changed(tmp_path: Path) -> None:
    server, (client,) = pair(RoLora(**SMALL), tmp_path)

    def factors(names: Any) -> str:
        return "".join(f for f in "AB" if any(f"lora_{f}" in n for n in names))

    rounds = []
    for round in range(3):
        inbox = server.broadcast(round, [0])[0]
        task = client.task(round, inbox, train_rows(8))
        rounds.append((factors(inbox[-1].tensors), factors(task.tunables), factors(task.fixed)))
        assert set(server.expected(round, 0)["adapter"]) == set(task.tunables)
        assert all(torch.equal(task.fixed[n], server.values[n]) for n in task.fixed)
        assert all(torch.equal(task.tunables[n], server.values[n]) for n in task.tunables)
        server.aggregate(round, {0: upload(random_like(task.tunables, round))})
    # Both to begin with; then of the two the one that the last round trained.
    assert rounds == [("AB", "B", "A"), ("B", "A", "B"), ("A", "B", "A")]
    assert factors(server.broadcast(3, [1])[1][-1].tensors) == "AB", "a newcomer lacks both"
    again, (client_again,) = pair(RoLora(**SMALL), tmp_path)
    again.restore(server.state())
    client_again.restore(client.state())
    inbox = again.broadcast(3, [0])[0]
    assert factors(inbox[-1].tensors) == "B"
    task = client_again.task(3, inbox, train_rows(8))
    assert all(torch.equal(task.fixed[n], again.values[n]) for n in task.fixed)


def test_rolora_is_exact_in_both_kinds_of_round(tmp_path: Path) -> None:
    server, _ = pair(RoLora(**SMALL), tmp_path)
    for round in (0, 1):
        names = server.expected(round, 0)["adapter"]
        clients = [random_like({n: server.values[n] for n in names}, seed) for seed in (1 + round, 7 + round)]
        expected = mean_of_products(server, [{**server.values, **c} for c in clients], [0.5, 0.5])
        server.aggregate(round, {i: upload(c) for i, c in enumerate(clients)})
        assert all(torch.allclose(w, expected[n], atol=1e-5) for n, w in effective(server).items())


def test_fedex_makes_the_tuned_fm_the_exact_mean(tmp_path: Path) -> None:
    server, _ = pair(FedExLora(**SMALL), tmp_path)
    clients = [random_like(server.values, seed) for seed in (1, 2)]
    server.aggregate(0, {0: upload(clients[0], 1), 1: upload(clients[1], 3)})
    expected = mean_of_products(server, clients, [0.25, 0.75])
    assert all(torch.allclose(w, expected[n], atol=1e-5) for n, w in effective(server).items())
    for a, b, _ in pairs(server.values):  # training goes on from the means of the factors
        assert torch.allclose(server.values[a], 0.25 * clients[0][a] + 0.75 * clients[1][a], atol=1e-6)
        assert torch.allclose(server.values[b], 0.25 * clients[0][b] + 0.75 * clients[1][b], atol=1e-6)


def test_fedex_clients_hold_the_servers_weights_to_the_bit_whenever_they_come(tmp_path: Path) -> None:
    server, (early, late, newcomer) = pair(FedExLora(**SMALL), tmp_path, 3)
    outbox = server.broadcast(0, [0, 1])
    early.task(0, outbox[0], train_rows(8))
    late.task(0, outbox[1], train_rows(8))
    for round in range(3):
        clients = [random_like(server.values, 10 * round + i) for i in (1, 2)]
        server.aggregate(round, {i: upload(c) for i, c in enumerate(clients)})
        inbox = server.broadcast(round + 1, [0])[0]
        assert [m.kind for m in inbox] == ["alignment", "adapter"]
        early.task(round + 1, inbox, train_rows(8))
    late.task(3, server.broadcast(3, [1])[1], train_rows(8))
    inbox = server.broadcast(3, [2])[2]
    assert [m.kind for m in inbox] == ["fm", "alignment", "adapter"]
    assert all(torch.equal(inbox[0].tensors[n], t) for n, t in tiny_fm().state.items()), "set-up is the FM as it was"
    newcomer.task(3, inbox, train_rows(8))
    now = frozen_state(server.full)
    for client in (early, late, newcomer):
        assert all(torch.equal(t, now[n]) for n, t in client.frozen.items())
    again, _ = pair(FedExLora(**SMALL), tmp_path)
    again.restore(server.state())
    assert all(torch.equal(t, now[n]) for n, t in frozen_state(again.full).items())
    before, after = server.broadcast(4, [0])[0], again.broadcast(4, [0])[0]
    assert [sorted(m.tensors) for m in before] == [sorted(m.tensors) for m in after]


def test_factors_are_sent_while_they_are_shorter_than_the_weights(tmp_path: Path) -> None:
    server, _ = pair(FedExLora(lora_r=1), tmp_path)
    server.broadcast(0, [0])
    kinds = []
    for round in range(4):
        clients = [random_like(server.values, round + 10 * i) for i in (1, 2)]
        server.aggregate(round, {i: upload(c) for i, c in enumerate(clients)})
        update = server.update_since(0)
        kinds.append("whole" if any(n.startswith("whole.") for n in update.tensors) else "factors")
        elements = sum(t.numel() for t in update.tensors.values())
        # Of a weight of 16 x 16: three pairs of 16 a round, for K = 2 of rank 1 and their mean.
        assert elements == 12 * min(256, (round + 1) * 3 * 32)
    assert kinds == ["factors", "factors", "whole", "whole"]


def test_the_official_residual_is_transposed_and_the_mean_uniform(tmp_path: Path) -> None:
    server, _ = pair(FedExLoraOfficial(**SMALL), tmp_path)
    assert FedExLoraOfficial().weight(30) == 1
    clients = [random_like(server.values, seed) for seed in (1, 2)]
    server.aggregate(0, {i: upload(c) for i, c in enumerate(clients)})
    exact = mean_of_products(server, clients, [0.5, 0.5])
    for a, b, w in pairs(server.values):
        mean = server.original[w] + SCALE * server.values[b] @ server.values[a]
        residual = exact[w] - mean
        assert torch.allclose(effective(server)[w], mean + residual.T, atol=1e-5)
        assert not torch.allclose(residual, residual.T, atol=1e-3)


def test_a_residual_of_lower_rank_is_the_best_of_that_rank() -> None:
    server = object.__new__(FedExServer)
    server.method = FedExLora(residual_rank=1)
    whole = stacked([(B1, A1), (B2, A2)], [0.25, -0.75])
    b, a = server.placed(whole)
    assert (b.shape, a.shape) == ((3, 1), (1, 2))
    lost = torch.linalg.svdvals(whole[0] @ whole[1])[1:]
    assert float((whole[0] @ whole[1] - b @ a).norm()) == pytest.approx(float(lost.norm()), abs=1e-5)


def test_a_transposed_residual_of_a_weight_that_is_not_square_is_refused() -> None:
    server = object.__new__(FedExServer)
    server.method = FedExLoraOfficial()
    with pytest.raises(FedbenchError, match="a residual of 3 x 2 cannot be added transposed"):
        server.placed((B1, A1))
    server.method = FedExLora()
    assert server.placed((B1, A1)) == (B1, A1)


def test_lora_fairs_closed_form_brings_the_product_nearest_to_the_mean_of_products() -> None:
    b, a = stacked([(B1, A1), (B2[:, :1], A2[:1])], [0.5, 0.5])
    mean_b, mean_a = (B1 + B2[:, :1]).double() / 2, (A1 + A2[:1]).double() / 2
    product = (b @ a).double()
    d = LoraFair(solve="least-squares").correction(product, mean_b, mean_a)
    # Rank 1: the best column is M aᵀ / |a|², a = [1.5, -0.5].
    assert torch.allclose(mean_b + d, product @ mean_a.T / 2.5)
    lost = [float((product - (mean_b + x) @ mean_a).norm()) for x in (torch.zeros_like(d), d)]
    assert lost[1] < lost[0]


def test_lora_fairs_gradient_steps_raise_the_cosine(tmp_path: Path) -> None:
    b, a = (t.double() for t in stacked([(B1, A1), (B2[:, :1], A2[:1])], [0.5, 0.5]))
    mean_b, mean_a, product = (B1 + B2[:, :1]).double() / 2, (A1 + A2[:1]).double() / 2, b @ a

    def cosine(d: Tensor) -> float:
        return float(torch.cosine_similarity(product.flatten(), ((mean_b + d) @ mean_a).flatten(), 0))

    best = cosine(LoraFair(solve="least-squares").correction(product, mean_b, mean_a))
    found = LoraFair().correction(product, mean_b, mean_a)
    assert cosine(torch.zeros_like(found)) < cosine(found) <= best + 1e-9
    assert cosine(LoraFair(regularisation=0, fair_steps=2000).correction(product, mean_b, mean_a)) > best - 1e-3
    assert torch.equal(LoraFair().correction(torch.zeros(3, 2), mean_b, mean_a), torch.zeros_like(mean_b))


def test_lora_fair_sends_the_corrected_b_with_the_mean_a(tmp_path: Path) -> None:
    server, _ = pair(LoraFair(solve="least-squares", **SMALL), tmp_path)
    clients = [random_like(server.values, seed) for seed in (1, 2)]
    server.aggregate(0, {0: upload(clients[0], 1), 1: upload(clients[1], 3)})
    for a, b, _ in pairs(server.values):
        product = sum(p * c[b] @ c[a] for p, c in zip((0.25, 0.75), clients, strict=True))
        assert torch.allclose(server.values[a], 0.25 * clients[0][a] + 0.75 * clients[1][a], atol=1e-6)
        assert torch.allclose(server.values[b], product @ torch.linalg.pinv(server.values[a]), atol=1e-4)


# ---------------------------------------------------------------- mixed ranks


def test_adapters_are_cut_to_a_rank_and_padded_back() -> None:
    values = {"x.lora_A.default.weight": A2, "x.lora_B.default.weight": B2, "head": torch.ones(2)}
    small = cut(values, 1)
    assert [list(t.shape) for t in small.values()] == [[1, 2], [3, 1], [2]]
    back = padded(small, 2)
    assert torch.equal(back["x.lora_A.default.weight"], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(back["x.lora_B.default.weight"], torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    mask = masks(values, 1)
    assert set(mask) == set(values) - {"head"}
    assert torch.equal(mask["x.lora_B.default.weight"], torch.tensor([[1.0, 0.0]] * 3))


def test_ranks_above_the_largest_are_refused() -> None:
    with pytest.raises(ValidationError, match="expected numbers from 1 to lora_r, which is 4"):
        FlexLora(lora_r=4, ranks=(8, 4))


@pytest.mark.parametrize("kind", [Flora, FlexLora, HetLora])
def test_clients_of_mixed_ranks_send_their_own_shapes(kind: Any, tmp_path: Path) -> None:
    server, clients = pair(kind(ranks=(4, 1), **SMALL), tmp_path, 2)
    sizes = []
    for i, client in enumerate(clients):
        task = client.task(0, server.broadcast(0, [i])[i], train_rows(8))
        assert all(t.shape == server.initial[n].shape for n, t in task.tunables.items()), "all train in one model"
        result = LocalResult(task.tunables, 1, 0.0)
        [message] = client.upload(0, result)
        specs = server.expected(0, i)["adapter"]
        assert {n: (s.shape, s.dtype) for n, s in specs.items()} == {
            n: (tuple(t.shape), t.dtype) for n, t in message.tensors.items()
        }
        sizes.append(sum(t.numel() for n, t in message.tensors.items() if ".lora_" in n))
        server.accept(0, [message])
    assert sizes == [12 * 4 * 32, 12 * 1 * 32]
    assert server.trainable(0) > server.trainable(1)


def test_flora_merges_the_exact_mean_of_mixed_ranks(tmp_path: Path) -> None:
    server, _ = pair(Flora(ranks=(4, 1), **SMALL), tmp_path)
    clients = [cut(random_like(server.initial, seed), rank) for seed, rank in ((1, 4), (2, 1))]
    server.aggregate(0, {0: upload(clients[0], 1), 1: upload(clients[1], 3)})
    expected = mean_of_products(server, clients, [0.25, 0.75])
    assert all(torch.allclose(w, expected[n], atol=1e-5) for n, w in effective(server).items())
    head = next(n for n in server.initial if n.endswith("classifier.weight"))
    assert torch.allclose(server.values[head], 0.25 * clients[0][head] + 0.75 * clients[1][head], atol=1e-6)


def test_flora_begins_each_round_with_a_fresh_a_and_b_of_zero(tmp_path: Path) -> None:
    server, (client,) = pair(Flora(**SMALL, ranks=(2,)), tmp_path)
    tasks = [client.task(round, server.broadcast(round, [0])[0], train_rows(8)) for round in (0, 1)]
    for a, b, _ in pairs(server.initial):
        assert not any(bool(task.tunables[b].count_nonzero()) for task in tasks)
        assert not torch.equal(*(task.tunables[a] for task in tasks))
        assert all(bool(task.tunables[a][:2].count_nonzero()) for task in tasks)
        assert not any(bool(task.tunables[a][2:].count_nonzero()) for task in tasks)


def test_flexlora_is_the_best_approximation_of_the_mean_of_products() -> None:
    b, a = stacked([(B1, A1), (B2, A2)], [0.25, 0.75])
    u, s, vt = decomposed((b, a), 1)
    whole = torch.linalg.svdvals((b @ a).double())
    assert s.tolist() == pytest.approx([float(whole[0])])
    assert float((b @ a - (u * s) @ vt).norm()) == pytest.approx(float(whole[1:].norm()))
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    u, s, vt = decomposed((b, a), 8)
    assert torch.allclose((u * s) @ vt, (b @ a).double())


def test_flexlora_sends_each_client_the_best_of_its_rank(tmp_path: Path) -> None:
    server, _ = pair(FlexLora(ranks=(4, 1), **SMALL), tmp_path)
    clients = [cut(random_like(server.values, seed), rank) for seed, rank in ((1, 4), (2, 1))]
    server.aggregate(0, {0: upload(clients[0], 1), 1: upload(clients[1], 3)})
    for a, b, _ in pairs(server.values):
        product = sum(p * c[b] @ c[a] for p, c in zip((0.25, 0.75), clients, strict=True))
        u, s, vt = torch.linalg.svd(product)
        for client, rank in ((0, 4), (1, 1)):
            sent = server.sent(client)
            best = u[:, :rank] * s[:rank] @ vt[:rank]
            assert torch.allclose(sent[b] @ sent[a], best, atol=1e-4)


def test_where_ranks_do_not_add_up_flexlora_goes_on_from_the_first_a(tmp_path: Path) -> None:
    server, _ = pair(FlexLora(ranks=(1,), **SMALL), tmp_path)
    server.aggregate(0, {0: upload(cut(random_like(server.values, 1), 1))})
    for a, b, _ in pairs(server.values):
        assert torch.equal(server.values[a][1:], server.initial[a][1:])
        assert not bool(server.values[b][:, 1:].count_nonzero())


def test_hetlora_weights_padded_factors_by_the_norm_of_the_clients_products(tmp_path: Path) -> None:
    server, _ = pair(HetLora(ranks=(4, 1), **SMALL), tmp_path)
    clients = [cut(random_like(server.values, seed), rank) for seed, rank in ((1, 4), (2, 1))]
    server.aggregate(0, {0: upload(clients[0], 1, rank=3), 1: upload(clients[1], 3, rank=1)})
    norms = [sum(float((c[b] @ c[a]).square().sum()) for a, b, _ in pairs(c)) ** 0.5 for c in clients]
    for a, b, _ in pairs(server.values):
        for name in (a, b):
            whole = [padded(c, 4)[name] for c in clients]
            mean = (norms[0] * whole[0] + norms[1] * whole[1]) / sum(norms)
            assert torch.allclose(server.values[name], mean, atol=1e-5)
    head = next(n for n in server.initial if n.endswith("classifier.weight"))
    assert torch.allclose(server.values[head], 0.25 * clients[0][head] + 0.75 * clients[1][head], atol=1e-6)
    assert [server.rank(client) for client in (0, 1, 2)] == [3, 1, 4], "who pruned goes on at the lower rank"


def test_hetloras_tail_is_the_product_of_the_last_ranks_norms() -> None:
    values = {"x.lora_A.default.weight": A2, "x.lora_B.default.weight": B2}
    assert tail(values, 1, 2).item() == pytest.approx((1 + 1) ** 0.5 * 17**0.5)
    zero = {**values, "x.lora_B.default.weight": torch.zeros_like(B2).requires_grad_(True)}
    [gradient] = torch.autograd.grad(tail(zero, 1, 2), [zero["x.lora_B.default.weight"]])
    assert not bool(gradient.count_nonzero()), "where B is 0, nothing but zeros"


def test_a_hetlora_client_prunes_where_its_last_ranks_shrank(tmp_path: Path) -> None:
    server, (client,) = pair(HetLora(ranks=(4,), gamma=0.5, **SMALL), tmp_path)
    server.values = random_like(server.values, 1)
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(8))
    for factor, rank in ((0.5, 2), (2.0, 4)):
        result = LocalResult({n: t * factor for n, t in task.tunables.items()}, 1, 0.0)
        assert client.upload(0, result)[0].meta["rank"] == rank
    for rank in (0, 5, "2", None):
        meta = {} if rank is None else {"rank": rank}
        with pytest.raises(MessageError, match="rank is not a whole number from 1 to 4"):
            server.accept(0, [Message("adapter", server.values, {"num_examples": 1, **meta})])
