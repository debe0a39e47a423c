"""What a task may ask for beside training: parameters held fixed, the mean gradient, gradients from losses alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_values, tiny_fm, train_rows
from torch import Tensor

from fedbench.api.directions import direction
from fedbench.api.local import SGD, AdamW, LocalTask, ZerothOrder
from fedbench.check.suite import tensors_close
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.models.cache import Frozen
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.objectives.classification import cross_entropy
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all

CPU = torch.device("cpu")
EXECUTORS = ("reference", "packed", "fused")


def task(seed: int = 0, steps: int = 3, only: str = "", **changes: object) -> LocalTask:
    """A client of a tiny BERT with LoRA; `only`: part of the names of what it trains, the rest is fixed."""
    model = tiny_fm().build(LoraSpec(r=2, alpha=4), CPU)
    values, rng = random_values(model), np.random.default_rng(seed)
    batches = [rng.choice(12, 4, replace=False) for _ in range(steps)]
    tuned = {n: v for n, v in values.items() if only in n}
    fixed = {n: v for n, v in values.items() if only not in n}
    made = LocalTask(Frozen("tiny", model), tuned, train_rows(12), batches, SGD(lr=0.1), cross_entropy, fixed=fixed)
    return replace(made, **changes)


def together(tasks: list[LocalTask], executor: str) -> list[dict[str, Tensor]]:
    module = tasks[0].frozen
    results = dict(execute_all([replace(t, frozen=module) for t in tasks], Execution(executor=executor, workers=1)))
    return [dict(results[i].tunables) for i in range(len(tasks))]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_is_fixed_takes_part_and_neither_moves_nor_comes_back(executor: str) -> None:
    tasks = [task(seed, only="lora_B") for seed in (1, 2)]
    other = {n: v + 1 for n, v in tasks[1].fixed.items()}
    tasks[1] = replace(tasks[1], fixed=other)  # clients of one pass may hold different values
    found = together(tasks, executor)
    for one, tuned in zip(tasks, found, strict=True):
        # A task that trains everything with a gradient of zero for the rest, by hand.
        whole = task(tunables={**one.tunables, **one.fixed}, fixed={}, batches=one.batches[:1])
        plain = execute(replace(whole, mean_gradient=True), Execution(executor="reference")).mean_gradient
        first = execute(replace(one, batches=one.batches[:1]), Execution(executor="reference"))
        assert set(tuned) == set(one.tunables)
        assert all(torch.allclose(first.tunables[n], one.tunables[n] - 0.1 * plain[n], atol=1e-6) for n in tuned)
    assert not torch.equal(found[0][next(iter(found[0]))], found[1][next(iter(found[1]))])


@pytest.mark.parametrize("executor", ["packed", "fused"])
def test_every_executor_trains_with_fixed_values_as_the_reference_does(executor: str) -> None:
    tasks = [task(seed, only="lora_A", optimiser=AdamW(lr=1e-2), clip_norm=1.0) for seed in (1, 2, 3)]
    for one, a, b in zip(tasks, together(tasks, executor), together(tasks, "reference"), strict=True):
        moved = [{n: v - one.tunables[n] for n, v in each.items()} for each in (b, a)]
        assert tensors_close(*moved, 1e-4)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_parameter_that_no_task_names_is_its_own_and_not_what_the_last_task_left(executor: str) -> None:
    first = task(1)
    names = tunable_names(first.frozen.module)
    before = get_tensors(first.frozen.module, names)
    together([first, task(2)], executor)
    assert all(torch.equal(v, before[n]) for n, v in get_tensors(first.frozen.module, names).items())
    # So a client with the head alone trains the same before and after somebody trained all.
    head = replace(task(3, only="classifier"), fixed={}, frozen=first.frozen)
    fresh = execute(replace(head, frozen=task().frozen), Execution())
    again = execute(head, Execution())
    assert all(torch.equal(v, again.tunables[n]) for n, v in fresh.tunables.items())


def test_a_name_that_is_trained_and_fixed_is_refused() -> None:
    one = task()
    with pytest.raises(FedbenchError, match="both trains and fixes"):
        execute(replace(one, fixed={next(iter(one.tunables)): next(iter(one.tunables.values()))}), Execution())


def test_a_frozen_weight_cannot_be_fixed_since_the_backbones_key_stands_for_it() -> None:
    one = task()
    name = next(n for n, _ in one.frozen.module.named_parameters() if n.endswith("query.base_layer.weight"))
    with pytest.raises(FedbenchError, match="a frozen weight; give it as a part of `frozen`"):
        execute(replace(one, fixed={name: one.frozen.module.get_parameter(name)}), Execution())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_mean_gradient_is_what_plain_sgd_moved_by(executor: str) -> None:
    """Whatever was added to each step's gradient: (start - end) / (steps · lr) - offset (SCAFFOLD's option II)."""
    offsets = {n: torch.full_like(v, 0.25) for n, v in task().tunables.items()}
    tasks = [task(seed, steps, mean_gradient=True, gradient_offset=offsets) for seed, steps in ((1, 3), (2, 2))]
    module = tasks[0].frozen
    results = dict(execute_all([replace(t, frozen=module) for t in tasks], Execution(executor=executor, workers=2)))
    for i, one in enumerate(tasks):
        for name, end in results[i].tunables.items():
            expected = (one.tunables[name] - end) / (len(one.batches) * 0.1) - 0.25
            assert torch.allclose(results[i].mean_gradient[name], expected, atol=2e-5)


def test_with_momentum_the_way_moved_is_no_mean_of_gradients() -> None:
    """Why control variates are made of the mean gradient, and not of the way: the two agree for plain SGD alone."""
    one = task(optimiser=SGD(lr=0.1, momentum=0.9), mean_gradient=True)
    result = execute(one, Execution())
    apart = [
        ((one.tunables[n] - end) / (3 * 0.1) - result.mean_gradient[n]).abs().max()
        for n, end in result.tunables.items()
    ]
    assert max(apart) > 0.1


def test_a_direction_is_the_same_for_one_seed_whatever_the_order_of_names() -> None:
    a = direction({"x": (2, 3), "y": (4,)}, 7)
    b = direction({"y": (4,), "x": (2, 3)}, 7)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["x"], direction({"x": (2, 3)}, 8)["x"])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_step_without_back_propagation_goes_down_the_measured_slope(executor: str) -> None:
    one = task(steps=1, zeroth_order=ZerothOrder([[5, 6]], scale=1e-3), mean_gradient=True)
    true = execute(replace(one, zeroth_order=None), Execution(executor="reference")).mean_gradient
    [(_, result)] = execute_all([one], Execution(executor=executor))
    assert result.slopes is not None
    zs = [direction({n: v.shape for n, v in one.tunables.items()}, seed) for seed in (5, 6)]
    for slope, z in zip(result.slopes[0], zs, strict=True):
        # The derivative along z, by back-propagation.
        assert slope.item() == pytest.approx(sum(float((true[n] * z[n]).sum()) for n in z), rel=2e-2, abs=1e-2)
    for name, end in result.tunables.items():
        step = sum(slope * z[name] for slope, z in zip(result.slopes[0], zs, strict=True)) / 2
        assert torch.allclose(end, one.tunables[name] - 0.1 * step, atol=1e-5)


def test_seeds_have_to_be_as_many_as_steps() -> None:
    with pytest.raises(FedbenchError, match="seeds of 1 steps, but batches of 3"):
        execute(task(zeroth_order=ZerothOrder([[5]])), Execution())
