"""Gradient error, exposure, accuracy and random streams, on cases small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_fm, train_rows

from fedbench.api import AdamW, Frozen, LocalTask, Source
from fedbench.evaluate import Evaluation, per_client
from fedbench.exposure import Exposure
from fedbench.gradient import aggregation_error, compare, gradient_error
from fedbench.memory import peak_memory, reset_peak
from fedbench.methods.fedavg_lora import cross_entropy
from fedbench.rng import Streams
from fedbench.training import step_flops


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_floating_point_operations_of_a_step_by_hand() -> None:
    """Of a BERT whose head alone is tuned: three layers of width 16 with 2 heads and FFN 24, three classes."""
    fm = tiny_fm()
    model = fm.build(None, torch.device("cpu"))
    data = train_rows(8)
    rows, width = 4, 3
    batches = [np.arange(rows), np.arange(rows, 2 * rows)]
    length = max(len(tokens) for tokens in (data.tokens or ())[:rows])
    task = LocalTask(
        frozen=Frozen("m", model),
        tunables={name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith("classifier")},
        data=data,
        batches=batches,
        optimiser=AdamW(lr=0.1),
        loss=cross_entropy,
    )
    tokens = rows * length
    projections, attention, ffn = 4 * 16 * 16, 2 * length * 16, 2 * 16 * 24
    forward = 3 * 2 * tokens * (projections + attention + ffn) + 2 * rows * 16 * 16 + 2 * rows * 16 * width
    assert step_flops(task, torch.device("cpu")) == forward + 2 * rows * 16 * width, "backward: the classifier's weight"


def test_relative_error_and_cosine_by_hand() -> None:
    assert compare({"w": t(3, 4)}, {"w": t(3, 4)}) == {"error": 0.0, "cosine": pytest.approx(1.0)}
    assert compare({"w": t(0, 5)}, {"w": t(5, 0)}) == {"error": pytest.approx(2**0.5), "cosine": pytest.approx(0.0)}
    assert compare({"w": t(-1, 0)}, {"w": t(1, 0)}) == {"error": pytest.approx(2.0), "cosine": pytest.approx(-1.0)}


def test_averaging_factors_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    clients = [{"q.lora_A.w": a, "q.lora_B.w": b}, {"q.lora_A.w": -a, "q.lora_B.w": -b}]
    # Both products are the same matrix, and the factors cancel: everything is lost.
    assert aggregation_error(clients, [1, 1]) == pytest.approx(1.0)
    # With shares 3/4 and 1/4 the mean factors are halves, and their product a quarter.
    assert aggregation_error(clients, [3, 1]) == pytest.approx(0.75)
    assert aggregation_error([clients[0], clients[0]], [2, 5]) == pytest.approx(0.0)
    assert aggregation_error([{"head": a}], [1]) is None
    assert aggregation_error([{"q.lora_A.w": a, "q.lora_B.w": 0 * b}], [1]) is None


def test_what_the_proxy_lacks_counts_as_zero_only_when_zero_filled() -> None:
    layer = {"l0.a": 0, "l1.a": 1}
    block = gradient_error(
        {"l0.a": t(3), "head": t(0)}, {"l0.a": t(3), "l1.a": t(4), "head": t(0)}, layer.get, lambda n: n == "head"
    )
    assert block["restricted"]["error"] == 0.0
    assert block["zero_filled"]["error"] == pytest.approx(4 / 5)
    assert block["zero_filled"]["cosine"] == pytest.approx(3 / 5)
    assert block["head"] == {"error": None, "cosine": None}, "no reference, no number"
    assert block["layers"] == [
        {"layer": 0, "error": 0.0, "cosine": pytest.approx(1.0)},
        {"layer": 1, "error": 1.0, "cosine": None},
    ]


def test_exposure_counts_elements_once_and_through_their_index() -> None:
    fm = {"emb.w": torch.ones(2, 2), "ffn.w": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    exposure = Exposure(fm, "emb")
    row = {"sub.w": torch.tensor([[5.0, 6.03]])}
    exposure.observe(row, {"sub.w": Source("ffn.w", 0, torch.tensor([2]))})
    assert exposure.block()["verbatim"] == {"all": 1 / 10, "without_embeddings": 1 / 6}
    assert exposure.block()["within_1_percent"] == {"all": 2 / 10, "without_embeddings": 2 / 6}
    exposure.observe(row, {"sub.w": Source("ffn.w", 0, torch.tensor([2]))})
    exposure.observe({"emb.w": fm["emb.w"]}, {})
    assert exposure.block()["verbatim"] == {"all": 5 / 10, "without_embeddings": 1 / 6}
    again = Exposure(fm, "emb")
    again.restore(exposure.state())
    assert again.block() == exposure.block()


def test_exposure_through_columns() -> None:
    fm = {"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    exposure = Exposure(fm, "emb")
    exposure.observe({"w": fm["w"][:, [0, 2]]}, {"w": Source("w", 1, torch.tensor([0, 2]))})
    assert exposure.block()["verbatim"]["all"] == 4 / 6


def test_accuracy_by_client_weighs_classes_by_the_clients_labels() -> None:
    test = Evaluation(np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1]), 0.5)  # class 0: 100%, class 1: 50%
    assert test.accuracy == 0.75
    assert test.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    found = per_client(test, [[4, 0], [0, 4], [2, 2]])
    assert found["values"] == [1.0, 0.5, 0.75]
    assert found["mean"] == 0.75
    assert found["worst_tenth"] == 0.5


def test_a_stream_is_its_name() -> None:
    streams = Streams(1, "s")
    first = streams.numpy("client", 3, 7).random(4)
    torch.rand(5)
    np.random.default_rng(0).random(3)
    assert np.array_equal(first, streams.numpy("client", 3, 7).random(4))
    names = [("client", 3, 7), ("client", 37), ("client", 7, 3), ("cohort", 3)]
    seeds = {streams.integer(*name) for name in names}
    seeds |= {Streams(2, "s").integer(*names[0]), Streams(1, "t").integer(*names[0])}
    assert len(seeds) == 6
    assert streams.integer("partition") == 4638982311281648264, "a stream never changes between versions"


def test_a_peak_is_since_the_run_began_and_counts_what_the_process_still_holds() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_memory(device)
    held = np.ones(200 << 17)  # each a float64
    reset_peak(device)
    after = peak_memory(device)
    assert before is not None
    assert after is not None
    assert after > before + (190 << 20)
    assert held.all()
