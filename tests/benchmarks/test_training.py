"""How long the local training of a round takes, its clients in turn and together.

Weights are random and rows are drawn, so nothing is fetched. `pytest tests/benchmarks/test_training.py -m benchmarks`
takes torch's threads from OMP_NUM_THREADS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from turns import Ratio, in_turns, seconds_of

from fedbench.api.local import AdamW, LocalTask
from fedbench.data.examples import Examples
from fedbench.machine.device import Execution
from fedbench.models.build import build
from fedbench.models.cache import Frozen
from fedbench.models.checkpoint import model_spec
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.models.zoo.vit_digits import RECIPE
from fedbench.objectives.classification import cross_entropy
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


SHAPES: dict[str, tuple[int, float, float, int, int]] = {
    # tokens of a row: mean, deviation, most; rows of a batch; steps
    "sentences as in SST-2, batches of 32": (13, 7, 64, 32, 4),
    "news of up to 128 tokens, batches of 32": (58, 24, 128, 32, 2),
    "news cut at 48 tokens, batches of 16": (58, 24, 48, 16, 4),
}


def texts(mean: float, deviation: float, most: int, batch: int, steps: int) -> LocalTask:
    """A client's steps on rows of so many tokens, on a model of MiniLM's shape."""
    first = cohort("cpu")[0]
    rng = np.random.default_rng(1)
    lengths = rng.normal(mean, deviation, batch * steps).clip(4, most).astype(int)
    rows = [rng.integers(1, 30522, n, dtype=np.int32) for n in lengths]
    data = Examples(torch.tensor(rng.integers(0, 3, len(rows))), rows)
    return replace(first, data=data, batches=np.split(rng.permutation(len(rows)), steps))


def digits(steps: int = 40, batch: int = 16) -> LocalTask:
    """A client's steps on images of 16 pixels, on a ViT of the shape that comes with fedbench."""
    model = build(model_spec("vit", RECIPE["config"], 10).with_lora(LoraSpec(8, 48)))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch * steps, 1, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (batch * steps,), generator=generator)
    orders = np.split(np.arange(batch * steps), steps)
    start = get_tensors(model, tunable_names(model))
    rows = Examples(labels, pixels=pixels)
    return LocalTask(Frozen("digits", model), start, rows, orders, AdamW(lr=1e-3), cross_entropy, clip_norm=1.0)


@pytest.mark.parametrize("shape", [*SHAPES, "digits on a ViT, batches of 16"])
def test_packed_training_against_the_padded_reference(shape: str, say: Callable[[str], None]) -> None:
    task = texts(*SHAPES[shape]) if shape in SHAPES else digits()
    sides = {name: seconds_of(partial(execute, task, Execution(executor=name))) for name in ("packed", "reference")}
    in_turns(sides, 1)
    found = in_turns(sides, 5)
    ratio = Ratio.of(found["packed"], found["reference"])
    say(f"packed over reference {ratio}; {min(found['packed']):.2f} s packed, {torch.get_num_threads()} threads")
    assert ratio.mean < 1.05


@pytest.mark.benchmark(group="local training of a round")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("executor", ["in turn", "fused"])
def test_a_round_of_local_training(benchmark: BenchmarkFixture, executor: str, device: str) -> None:
    tasks, on = cohort(device), Execution(torch.device(device))

    def round_() -> list[object]:
        return execute_cohort(tasks, on) if executor == "fused" else [execute(task, on) for task in tasks]

    results = benchmark.pedantic(round_, rounds=3, warmup_rounds=1)
    assert len(results) == COHORT
