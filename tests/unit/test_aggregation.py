"""Aggregation error of a round, by hand; what a server says it needs; and whole runs of the methods on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context, save_tiny_bert, smoke_request, tiny_fm
from torch import Tensor

from fedbench.api.messages import Message
from fedbench.api.sides import Method
from fedbench.api.sums import summed
from fedbench.machine.stopwatch import Stopwatch
from fedbench.measures.aggregation import AggregationErrors, _Squares, _Weight
from fedbench.methods._products import pairs
from fedbench.methods._ranks import cut
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.methods.fedex_lora import FedExLora
from fedbench.methods.fedex_lora_official import FedExLoraOfficial
from fedbench.methods.ffa_lora import FFALora
from fedbench.methods.flora import Flora
from fedbench.methods.rolora import RoLora
from fedbench.records.schema import AggregationError
from fedbench.run.prepare import prepare
from fedbench.run.run import run

B1, A1 = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[1.0, -1.0]])
B2, A2 = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 4.0]])


def test_the_mean_of_products_and_the_product_of_means_by_hand() -> None:
    weight = _Weight(torch.zeros(3, 2), [(B1, A1), (B2, A2)], [0.5 * 2, 0.5 * 2])
    assert torch.equal(weight.mean_of_products, B1 @ A1 + B2 @ A2)
    padded_b, padded_a = torch.cat([B1, torch.zeros(3, 1)], 1), torch.cat([A1, torch.zeros(1, 2)])
    assert torch.allclose(weight.product_of_means, 2 * ((padded_b + B2) / 2) @ ((padded_a + A2) / 2))


def dense(weight: _Weight, own: tuple[Tensor, Tensor]) -> _Squares:
    """The definition: matrices [out, in] are made and taken from each other."""
    return weight.of_whole(sum(weight.shares) * own[0] @ own[1])


@pytest.mark.parametrize("ranks", [(1,), (2, 2, 2), (1, 3, 2, 3)])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_norms_of_low_rank_are_those_of_the_whole_matrices(ranks: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(len(ranks))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shares = [0.5 * (k + 1) for k in range(len(ranks))]
    weight = _Weight(torch.zeros(7, 5), [(drawn(7, r), drawn(r, 5)) for r in ranks], shares)
    own = drawn(7, rank), drawn(rank, 5)
    found, wanted = weight.of_products(own), dense(weight, own)
    assert found.whole == pytest.approx(wanted.whole, rel=1e-12)
    assert found.factors == pytest.approx(wanted.factors, rel=1e-12, abs=1e-12)
    assert found.model == pytest.approx(wanted.model, rel=1e-12)


def test_a_small_error_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 4), (4, 30)))
    off = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    for size in (1e-2, 1e-5, 1e-9):
        # Two clients, as far from the mean as they are from the model, in opposite directions and in A alone.
        weight = _Weight(torch.zeros(40, 30), [(b + size * off, a), (b - size * off, a)], [1.0, 1.0])
        found = weight.of_products((b + size * off, a))
        assert found.factors == 0, "A is the same for all"
        assert found.model**0.5 == pytest.approx(2 * size * float((off @ a).norm()), rel=1e-6)


def test_a_weight_that_was_written_to_behind_torch_s_back_is_seen(tmp_path: Path) -> None:
    def found(change: float) -> dict[str, Any]:
        server: Any = FedAvgLora(lora_r=4).server(tiny_fm(), None, context(tmp_path))
        one = {n: 0.1 * torch.ones(s.shape) for n, s in server.expected(0, 0)["adapter"].items()}
        uploads = {0: [Message("adapter", one, {"num_examples": 1})]}
        measure = AggregationErrors(Stopwatch())
        measure.aggregating(0, server, uploads)
        server.aggregate(0, uploads)
        for name, parameter in server.full.named_parameters():
            if "query.base_layer.weight" in name:
                parameter.data += change
        measure.aggregated(0, server)
        return measure.points[0]

    assert found(0.0)["model"] == pytest.approx(0, abs=1e-6)
    assert found(0.1)["model"] > 1e-3


def point(method: Method, tmp_path: Path, ranks: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    """The measure of a round in which two clients, of 1 and 3 rows, send random adapters."""
    server: Any = method.server(tiny_fm(), None, context(tmp_path))
    specs = server.expected(0, 0)["adapter"]
    generator = torch.Generator().manual_seed(0)
    clients = [
        cut({n: 0.1 * torch.randn(s.shape, generator=generator) for n, s in specs.items()}, rank) for rank in ranks
    ]
    uploads = {
        i: [Message("adapter", c, {"num_examples": n})] for i, (c, n) in enumerate(zip(clients, (1, 3), strict=True))
    }
    measure = AggregationErrors(Stopwatch())
    measure.aggregating(0, server, uploads)
    server.aggregate(0, uploads)
    measure.aggregated(0, server)
    [found] = measure.points

    lost = whole = 0.0
    for a, b, _ in pairs(server.initial):
        own = [{**server.initial, **c} for c in clients]

        def mean(values: list[Tensor]) -> Tensor:
            return 0.25 * values[0] + 0.75 * values[1]

        if ranks == (4, 4):
            products = mean([c[b] @ c[a] for c in own])
            lost += float((products - mean([c[b] for c in own]) @ mean([c[a] for c in own])).square().sum())
            whole += float(products.square().sum())
    if whole:
        assert found["factors"] == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    return found


def test_averaging_factors_loses_what_is_measured(tmp_path: Path) -> None:
    found = point(FedAvgLora(lora_r=4, lora_alpha=8), tmp_path)
    assert found["model"] == pytest.approx(found["factors"], rel=1e-4)
    assert found["model"] > 0.1


@pytest.mark.parametrize("method", [FFALora(lora_r=4), RoLora(lora_r=4)], ids=["ffa-lora", "rolora"])
def test_with_one_factor_fixed_nothing_is_lost(method: Method, tmp_path: Path) -> None:
    found = point(method, tmp_path)
    assert found["factors"] == pytest.approx(0, abs=1e-6)
    assert found["model"] == pytest.approx(0, abs=1e-5)


def test_what_is_folded_into_frozen_weights_counts(tmp_path: Path) -> None:
    exact = point(FedExLora(lora_r=4), tmp_path)
    assert exact["factors"] > 0.1
    assert exact["model"] == pytest.approx(0, abs=1e-5)
    assert point(FedExLoraOfficial(lora_r=4), tmp_path)["model"] > 0.1, "a transposed residual"
    assert point(Flora(lora_r=4, ranks=(4, 1)), tmp_path, (4, 1))["model"] == pytest.approx(0, abs=1e-5)


def test_nothing_is_said_of_a_round_whose_products_are_zero() -> None:
    measure = AggregationErrors(Stopwatch())
    measure.points = [{"round": 0, "factors": None, "model": None}]
    assert measure.block(None) is None  # type: ignore[arg-type]
    measure.points.append({"round": 1, "factors": 0.5, "model": 0.25})
    assert measure.block(None) == {"points": measure.points, "mean": 0.25, "final": 0.25}  # type: ignore[arg-type]


def test_a_sum_is_the_weighted_mean_where_rows_are_counted_and_else_a_plain_sum() -> None:
    def upload(value: float, rows: int) -> list[Message]:
        return [
            Message("adapter", {"w": torch.tensor([value])}, {"num_examples": rows}),
            Message("statistics", {"n": torch.tensor([rows])}, {"tokens": 10 * rows, "what": "zeros"}),
        ]

    adapter, statistics = summed([upload(1.0, 1), upload(5.0, 3)])
    assert adapter.tensors["w"].tolist() == [4.0]
    assert dict(adapter.meta) == {"num_examples": 4}
    assert statistics.tensors["n"].tolist() == [4]
    assert dict(statistics.meta) == {"tokens": 40, "what": "zeros"}


def test_uploads_of_different_shapes_have_no_sum() -> None:
    def upload(rank: int) -> list[Message]:
        return [Message("adapter", {"w": torch.zeros(rank, 2)}, {"num_examples": 1})]

    with pytest.raises(ValueError, match="adapter: the uploads of two clients have no sum"):
        summed([upload(1), upload(2)])


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert")


@pytest.mark.parametrize("executor", ["packed", "fused"])
@pytest.mark.parametrize("method", ["fedex-lora", "flexlora", "hetlora", "rolora"])
def test_every_record_of_a_lora_method_has_it_round_by_round(
    method: str, executor: str, fm: Path, tmp_path: Path
) -> None:
    request = smoke_request(tmp_path, method, "tweets-noniid", fm)
    record = run(prepare(request.__class__(**{**vars(request), "executor": executor})))
    found = record.aggregation_error
    assert isinstance(found, AggregationError)
    assert [p.round for p in found.points] == [entry.round for entry in record.rounds]
    assert (found.mean < 1e-4) == (method in ("fedex-lora", "rolora"))
    assert record.exposure is not None
    assert record.exposure.verbatim.all == 1.0, "newcomers are sent the FM as it was, however it was changed since"


def test_a_record_without_lora_has_none(fm: Path, tmp_path: Path) -> None:
    assert run(prepare(smoke_request(tmp_path, "head-only", "tweets-noniid", fm))).aggregation_error is None
