"""Biases as tunables: what is sent as what, what they start from, and that every executor trains them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, save_tiny, smoke_request, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.local import SGD
from fedbench.check.suite import tensors_close
from fedbench.machine.device import Execution
from fedbench.methods.bitfit import BitFit
from fedbench.models.build import build
from fedbench.models.cache import ModuleCache
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import frozen_state, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.training.cohort import execute_all

CPU = torch.device("cpu")


def test_what_is_tunable_is_part_of_the_specification_and_survives_json() -> None:
    spec = tiny_fm().spec.with_biases()
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "biases" not in tiny_fm().spec.to_json(), "a specification without them is sent as it always was"
    names = tunable_names(build(spec))
    assert all(n.endswith(".bias") or n.startswith("classifier.") for n in names)
    assert sum(n.endswith(".bias") for n in names) == sum(n.endswith(".bias") for n in tiny_fm().state) + 1
    both = tunable_names(tiny_fm().tuned(tiny_fm().spec.with_lora(LoraSpec(2, 4)).with_biases(), CPU))
    assert any(".lora_A." in n for n in both)
    assert any(n.endswith("query.base_layer.bias") for n in both)


@pytest.mark.parametrize("lora", [None, LoraSpec(2, 4)], ids=["alone", "with LoRA"])
def test_a_model_with_tunable_biases_computes_what_the_fm_does(lora: LoraSpec | None) -> None:
    batch = train_rows(4).batch(np.arange(4), CPU)
    plain, tuned = tiny_fm().build(None, CPU), tiny_fm().tuned(tiny_fm().spec.with_lora(lora).with_biases(), CPU)
    states = [m.get_submodule("bert")(**batch.inputs).last_hidden_state for m in (plain, tuned)]
    assert torch.equal(*states)


def test_biases_start_as_the_fms_and_cross_as_the_adapter_alone(tmp_path: Path) -> None:
    server: Any = BitFit().server(tiny_fm(), None, context(tmp_path))
    whole, adapter = server.broadcast(0, [0])[0]
    assert not any(n.endswith(".bias") for n in whole.tensors)
    assert set(whole.tensors) | set(adapter.tensors) == set(tiny_fm().state) | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(t, tiny_fm().state[n]) for n, t in adapter.tensors.items() if n in tiny_fm().state)
    server.values = {n: t + 1 for n, t in server.values.items()}
    model = server.put_in_fm()
    assert torch.equal(model.get_parameter("bert.pooler.dense.bias"), tiny_fm().state["bert.pooler.dense.bias"] + 1)
    assert all(torch.equal(t, tiny_fm().state[n]) for n, t in frozen_state(model).items())


@pytest.mark.parametrize("executor", ["packed", "fused"])
def test_every_executor_trains_biases_as_the_reference_does(executor: str, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    server, modules = BitFit().server(tiny_fm(), None, ctx), ModuleCache(CPU)
    outbox = server.broadcast(0, [0, 1])
    clients = [BitFit().client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in (0, 1)]
    # Not AdamW, which makes steps of what is 0 but for rounding: the gradient of a key's bias.
    tasks = [replace(c.task(0, outbox[i], train_rows(12)), optimiser=SGD(0.1)) for i, c in enumerate(clients)]
    updates = []
    for each in (executor, "reference"):
        found = dict(execute_all(tasks, Execution(executor=each, workers=1)))
        updates.append([{n: t - tasks[i].tunables[n] for n, t in found[i].tunables.items()} for i in (0, 1)])
    assert all(tensors_close(b, a, 1e-4) for a, b in zip(*updates, strict=True))
    assert all(bool(updates[0][0][n].count_nonzero()) for n in updates[0][0] if "LayerNorm" in n or "query" in n)


@pytest.mark.parametrize("family", ["roberta", "vit"])
def test_the_biases_of_other_families_are_tunable_too(family: str, tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny(family, tmp_path / family)), 3, tmp_path)
    model = fm.tuned(fm.spec.with_biases(), CPU)
    tuned = set(tunable_names(model))
    assert {n for n in fm.state if n.endswith(".bias")} <= tuned
    assert set(frozen_state(model)) == {n for n in fm.state if not n.endswith(".bias")}


def test_a_run_of_bitfit_exposes_the_fm_whole(tmp_path: Path) -> None:
    fm = save_tiny("bert", tmp_path / "bert")
    record = run(prepare(smoke_request(tmp_path, "bitfit", "tweets-noniid", fm)))
    assert record.exposure is not None
    assert record.exposure.verbatim.all == 1.0
    assert record.aggregation_error is None
