"""Bottleneck adapters: where they lie, that they start as nothing, and that every executor trains them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import logits, random_values, save_tiny, smoke_request, tiny_fm, train_rows, updates_by
from torch.nn.functional import gelu

from fedbench.check.suite import tensors_close
from fedbench.methods.adapter import Adapter
from fedbench.models.bottleneck import Bottleneck
from fedbench.models.linear import FrozenLinear
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import frozen_state, initial_tunables, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.run.prepare import prepare
from fedbench.run.run import run

CPU = torch.device("cpu")
SPEC = tiny_fm().spec.with_bottleneck(3)


def test_a_bottleneck_adds_up_of_gelu_of_down() -> None:
    layer = Bottleneck(torch.nn.Linear(2, 4), 3)
    x = torch.tensor([[1.0, -2.0]])
    y = layer.base_layer(x)
    inner = gelu(y @ layer.adapter_down.weight.T + layer.adapter_down.bias)
    assert torch.allclose(layer(x), y + inner @ layer.adapter_up.weight.T + layer.adapter_up.bias)


def test_the_specification_says_so_and_survives_json() -> None:
    assert ModelSpec.from_json(SPEC.to_json()) == SPEC
    assert "bottleneck" not in tiny_fm().spec.to_json()


@pytest.mark.parametrize("family", ["bert", "vit", "distilbert"])
def test_it_lies_behind_attention_and_ffn_of_every_layer_and_starts_as_nothing(family: str, tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny(family, tmp_path / family)), 3, tmp_path)
    model = fm.tuned(fm.spec.with_bottleneck(3), CPU)
    found = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert len(found) == 2 * 3
    assert all(isinstance(m.base_layer, FrozenLinear) for m in found)
    assert {n: t.shape for n, t in frozen_state(model).items()} == {n: t.shape for n, t in fm.state.items()}
    start = initial_tunables(model, Streams(0, "unit"))
    assert set(start) == set(tunable_names(model))
    ups = [t for n, t in start.items() if ".adapter_up." in n or n.endswith("adapter_down.bias")]
    assert not any(bool(t.count_nonzero()) for t in ups)
    assert all(bool(t.count_nonzero()) for n, t in start.items() if n.endswith("adapter_down.weight"))


def test_it_changes_what_the_model_computes_in_every_form_alike() -> None:
    plain, model = tiny_fm().build(None, CPU), tiny_fm().tuned(SPEC, CPU)
    batch = train_rows(6).batch(np.arange(6), CPU)
    start = initial_tunables(model, Streams(0, "unit"))
    for one in (plain, model):
        set_tensors(one, {n: t for n, t in start.items() if "classifier" in n})
    set_tensors(model, start)
    assert torch.allclose(logits(model, batch), logits(plain, batch), atol=1e-6)
    set_tensors(model, random_values(model))
    assert not torch.allclose(logits(model, batch), logits(plain, batch), atol=1e-2)
    assert torch.allclose(logits(model, batch), logits(model, batch, packed=False), atol=1e-4)


@pytest.mark.parametrize("executor", ["packed", "fused"])
def test_every_executor_trains_it_as_the_reference_does(executor: str, tmp_path: Path) -> None:
    updates = updates_by(Adapter(bottleneck=3), (executor, "reference"), tmp_path)
    assert all(tensors_close(b, a, 1e-3) for a, b in zip(*updates, strict=True))


def test_a_run_with_adapters_sends_no_lora(tmp_path: Path) -> None:
    fm = save_tiny("bert", tmp_path / "bert")
    record = run(prepare(smoke_request(tmp_path, "adapter", "tweets-noniid", fm, bottleneck="3")))
    assert record.compute.trainable_parameters == 6 * (16 * 3 + 3 + 3 * 16 + 16) + 16 * 3 + 3
    assert record.aggregation_error is None
