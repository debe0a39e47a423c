"""The operations of a client's round: from a formula over the shapes of its steps, held to what torch counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny, save_tiny_bert, smoke_request, tiny_fm, train_rows
from test_language import model_of, texts
from torch import nn

from fedbench.api.local import SGD, AdamW, LocalTask, ZerothOrder
from fedbench.data.examples import Examples
from fedbench.measures import cost
from fedbench.measures.cost import RoundFlops, step_flops
from fedbench.models.cache import Frozen
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.run.prepare import prepare
from fedbench.run.run import run

CPU = torch.device("cpu")


def task_of(model: nn.Module, data: Examples, *batches: list[int]) -> LocalTask:
    tunables = get_tensors(model, tunable_names(model))
    return LocalTask(Frozen("m", model), tunables, data, [np.array(rows) for rows in batches], AdamW(lr=1e-3))


def one_by_one(task: LocalTask) -> int:
    return sum(step_flops(replace(task, batches=[rows]), CPU) for rows in task.batches)


def images(folder: Path) -> LocalTask:
    fm = load_fm(str(save_tiny("vit", folder / "vit")), 3, folder)
    data = Examples(torch.tensor([0, 1, 2, 0, 1]), pixels=torch.rand(5, 3, 8, 8))
    return task_of(fm.build(LoraSpec(2, 4), CPU), data, [0, 1], [2, 3, 4], [1])


@pytest.mark.parametrize("kind", ["texts", "images", "every token", "answers alone"])
def test_the_operations_of_a_round_are_those_of_its_steps_one_by_one(kind: str, tmp_path: Path) -> None:
    if kind == "texts":
        task = task_of(tiny_fm().build(LoraSpec(2, 4), CPU), train_rows(9), [0, 1, 2], [3, 4, 5, 6], [7], [8, 0])
    elif kind == "images":
        task = images(tmp_path)
    else:
        task = task_of(model_of("llama"), texts(answers=kind == "answers alone"), [0, 1], [2, 3, 4], [5], [6, 7])
    flops = RoundFlops(CPU)
    assert flops.of(task) == one_by_one(task) > 0
    assert flops.first == step_flops(task, CPU)
    assert flops.of(replace(task, batches=[])) == 0


def test_steps_without_a_backward_pass_have_a_formula_of_their_own() -> None:
    task = task_of(tiny_fm().build(LoraSpec(2, 4), CPU), train_rows(8), [0, 1, 2], [3, 4])
    forward = replace(task, zeroth_order=ZerothOrder([[1, 2], [3, 4]]))
    flops = RoundFlops(CPU)
    found = [flops.of(each) for each in (task, forward)]
    second = replace(forward, batches=task.batches[1:])
    assert found == [one_by_one(task), step_flops(forward, CPU) + step_flops(second, CPU)]
    assert found[0] != found[1]


def test_operations_of_the_step_itself_count_once_a_step() -> None:
    """A penalty that multiplies two matrices of 16 x 16, forward and backward: three products of 2 · 16³ operations."""
    task = task_of(tiny_fm().build(LoraSpec(2, 4), CPU), train_rows(8), [0, 1, 2], [3, 4])
    name = next(name for name, value in task.tunables.items() if value.shape == (16, 2))
    pulled = replace(task, penalty=lambda now, then: (now[name].t() @ now[name]).sum())
    flops = RoundFlops(CPU)
    plain, more = flops.of(task), flops.of(pulled)
    assert plain is not None and more is not None
    assert more - plain == 2 * (3 * 2 * 2 * 16 * 2)


def test_a_task_that_no_formula_holds_for_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tiny_fm().build(LoraSpec(2, 4), CPU), train_rows(8), [0, 1, 2], [3, 4])
    honest = step_flops
    monkeypatch.setattr(cost, "step_flops", lambda task, device: honest(task, device) + len(task.data) ** 3)
    assert RoundFlops(CPU).of(task) is None


def test_steps_are_counted_once_for_tasks_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tiny_fm().build(LoraSpec(2, 4), CPU), train_rows(8), [0, 1, 2], [3, 4])
    counted, honest = [], step_flops
    monkeypatch.setattr(cost, "step_flops", lambda task, device: counted.append(1) or honest(task, device))
    flops = RoundFlops(CPU)
    flops.of(task)
    once = len(counted)
    flops.of(replace(task, frozen=Frozen("same shapes, other weights", task.frozen.module)))
    assert len(counted) == once
    flops.of(replace(task, optimiser=SGD(lr=1.0)))
    assert len(counted) > once


def test_a_record_says_what_each_client_was_sent_sent_and_computed(tmp_path: Path) -> None:
    request = smoke_request(tmp_path, "fedpft", "tweets-noniid", save_tiny_bert(tmp_path / "bert"), rounds="2")
    settings = {**request.settings, "federation.dropout": "0.4"}
    record = run(prepare(replace(request, settings=settings)))
    left = 0
    for entry in record.rounds:
        assert entry.bytes_up_by_client is not None and entry.flops_by_client is not None
        assert entry.bytes_down_by_client is not None and min(entry.bytes_down_by_client) > 0
        assert (sum(entry.bytes_up_by_client), sum(entry.bytes_down_by_client)) == (entry.bytes_up, entry.bytes_down)
        for client, sent, flops in zip(entry.cohort, entry.bytes_up_by_client, entry.flops_by_client, strict=True):
            assert (sent > 0) == (flops is not None) == (client in entry.arrived)
            left += client not in entry.arrived
    assert left > 0
    total = sum(flops or 0 for entry in record.rounds for flops in entry.flops_by_client or ())
    assert record.compute.step_flops is not None and record.compute.local_steps is not None
    assert 0.2 < total / (record.compute.step_flops * record.compute.local_steps) < 5
