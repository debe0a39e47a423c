"""How long the local training of a round takes, its clients in turn and together.

Weights are random and rows are drawn, so nothing is fetched. `pytest tests/benchmarks/test_training.py -m benchmarks`
takes torch's threads from OMP_NUM_THREADS.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from fedbench.api.local import AdamW, LocalTask
from fedbench.data.examples import Examples
from fedbench.machine.device import Execution
from fedbench.methods.fedavg_lora import cross_entropy
from fedbench.models.build import build
from fedbench.models.cache import Frozen
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.training.alone import execute
from fedbench.training.fused import execute_cohort

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
COHORT, BATCH, STEPS = 10, 8, 2


@cache
def cohort(device: str) -> list[LocalTask]:
    """Ten clients of two steps of eight rows of 8 to 64 tokens, as tweets have, on a model of MiniLM's shape."""
    model = build(ModelSpec("bert", MINILM, (1536,) * 6, LoraSpec(8, 48)))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=0.02, generator=generator)
    rng = np.random.default_rng(0)
    lengths = rng.normal(33, 12, 400).clip(8, 64).astype(int)
    rows = Examples(torch.tensor(rng.integers(0, 3, 400)), [rng.integers(1, 30522, n, dtype=np.int32) for n in lengths])
    start = get_tensors(model, tunable_names(model))
    frozen = Frozen("minilm", model.to(device))
    orders = [rng.permutation(400)[: STEPS * BATCH] for _ in range(COHORT)]
    return [
        LocalTask(frozen, start, rows, np.split(order, STEPS), AdamW(lr=1e-3), cross_entropy, clip_norm=1.0)
        for order in orders
    ]


@pytest.mark.benchmark(group="local training of a round")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("executor", ["in turn", "fused"])
def test_a_round_of_local_training(benchmark: BenchmarkFixture, executor: str, device: str) -> None:
    tasks, on = cohort(device), Execution(torch.device(device))

    def round_() -> list[object]:
        return execute_cohort(tasks, on) if executor == "fused" else [execute(task, on) for task in tasks]

    results = benchmark.pedantic(round_, rounds=3, warmup_rounds=1)
    assert len(results) == COHORT
