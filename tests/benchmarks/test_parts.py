"""What a round costs besides local training: messages, partition, gradient error."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from test_training import MINILM, cohort

from fedbench.api.messages import Message
from fedbench.data.partition import partition
from fedbench.machine.device import Execution
from fedbench.measures.gradient import gradient_error, gradients
from fedbench.models.build import build
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import frozen_state, tunable_names
from fedbench.rng import Streams
from fedbench.run.ledger import Ledger
from fedbench.run.post import Post
from fedbench.scenario.tables import SplitSettings


@pytest.mark.benchmark(group="transport")
@pytest.mark.parametrize("clients", [1, 10])
def test_sending_a_model_of_91_megabytes(benchmark: BenchmarkFixture, clients: int) -> None:
    """A constant message is kept once: ten clients cost little more than one."""
    model = build(ModelSpec("bert", MINILM, (1536,) * 6))
    message = Message("fm", frozen_state(model))

    def send() -> int:
        ledger = Ledger()
        for client, parcels in Post().pack({c: [message] for c in range(clients)}).items():
            ledger.charge(0, "down", client, parcels)
            for parcel in parcels:
                parcel.open()
        return ledger.total("down")

    size = benchmark(send)
    assert size / clients == pytest.approx(4 * sum(t.numel() for t in message.tensors.values()), rel=1e-3)


@pytest.mark.benchmark(group="partition")
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet-clients"])
def test_a_million_rows_over_ten_thousand_clients(benchmark: BenchmarkFixture, kind: str) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1_000_000)
    split = SplitSettings(kind=kind, clients=10_000, min_size=1)  # type: ignore[arg-type]

    def divide() -> int:
        return len(partition(labels, split, Streams(0, "benchmark").numpy("partition")).clients)

    assert benchmark.pedantic(divide, rounds=2) == 10_000


@pytest.mark.benchmark(group="gradient error")
def test_gradient_error_on_64_rows(benchmark: BenchmarkFixture) -> None:
    task = cohort("cpu")[0]
    fm, probe = task.frozen.module, task.data.select(np.arange(64))
    proxy = build(ModelSpec("bert", MINILM, (1536, 384, 384, 384, 384, 1536), LoraSpec(8, 48)))
    proxy.load_state_dict({n: t for n, t in fm.state_dict().items() if t.shape == proxy.state_dict()[n].shape}, False)
    parts = Parts(fm)

    def measure() -> float | None:
        mine, reference = (gradients(m, tunable_names(m), probe, Execution()) for m in (proxy, fm))
        block = gradient_error(mine, reference, parts.layer_of, parts.is_head)
        error: float | None = block["zero_filled"]["error"]
        return error

    assert benchmark.pedantic(measure, rounds=3)
