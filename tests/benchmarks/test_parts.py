"""What a round costs besides local training: messages, partition, gradient error; and a large population's start."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from helpers import save_tiny_bert
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
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.request import RunRequest
from fedbench.run.transport import Transport
from fedbench.scenario.tables import SplitSettings


@pytest.mark.benchmark(group="transport")
@pytest.mark.parametrize("clients", [1, 10])
def test_sending_a_model_of_91_megabytes(benchmark: BenchmarkFixture, clients: int) -> None:
    """A constant message is kept once: ten clients cost little more than one."""
    model = build(ModelSpec("bert", MINILM, (1536,) * 6))
    message = Message("fm", frozen_state(model))

    def send() -> int:
        transport = Transport()
        for _ in transport.download(0, {c: [message] for c in range(clients)}):
            pass
        return transport.ledger.total("down")

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


def test_ten_thousand_clients_start_like_a_hundred(tmp_path: Path) -> None:
    fm, seconds = str(save_tiny_bert(tmp_path / "bert")), {}
    for clients in (100, 10_000):
        settings = {"split.clients": str(clients), "split.min_size": "1", "federation.fraction": str(10 / clients)}
        request = RunRequest("fedavg-lora", "tweets-iid", fm=fm, settings=settings, results=tmp_path, device="cpu")
        prepared = prepare(request)
        start = time.perf_counter()
        run = Run(prepared, Silent())
        run.round(0)
        seconds[clients] = time.perf_counter() - start
        assert len(run.clients) == 10, "only clients that were sampled are made"
    assert seconds[10_000] < seconds[100] + 10
