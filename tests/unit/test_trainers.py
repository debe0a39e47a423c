"""Trainers: torch's row by row, those of plugins on every executor, and tasks with fields that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import random_values, save_tiny_bert, smoke_request, tiny_fm, train_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbench.api.local import SGD, AdamW, LocalTask, Trainer
from fedbench.check.suite import tensors_close
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.models.cache import Frozen
from fedbench.models.spec import LoraSpec
from fedbench.objectives.classification import cross_entropy
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.training import alone, fused
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all
from fedbench.training.fused import execute_cohort
from fedbench.training.rowwise import ROW_WISE

CPU = torch.device("cpu")
DOCUMENTED = Path(__file__).parents[2] / "docs" / "adding-a-trainer.md"


@dataclass(frozen=True)
class Adagrad:
    """A trainer of somebody else (Duchi et al. 2011), for which there is no step row by row."""

    lr: float
    name: ClassVar[str] = "adagrad"

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(parameters, lr=self.lr, initial_accumulator_value=1.0)


def client(seed: int, optimiser: Any, steps: int = 3, **changes: Any) -> LocalTask:
    """A client of a tiny BERT with LoRA, with rows and batches of its own."""
    model = backbone()
    rng = np.random.default_rng(seed)
    batches = [rng.choice(12, 4, replace=False) for _ in range(steps)]
    frozen, start = Frozen("tiny", model), random_values(model)
    return LocalTask(frozen, start, train_rows(12), batches, optimiser, cross_entropy, **changes)


@cache
def backbone() -> nn.Module:
    return tiny_fm().build(LoraSpec(r=2, alpha=4), CPU)


# ---------------------------------------------------------------- row by row


def row_by_row(trainers: Sequence[Trainer], steps: int, idle: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Values after some steps, by the optimiser of a pass and by torch's own of each row; the last row stops early.

    idle: columns whose parameter has no gradient.
    """
    generator = torch.Generator().manual_seed(steps)
    values = torch.randn(len(trainers), 7, dtype=torch.float64, generator=generator)
    rows = [[nn.Parameter(value.clone()) for value in row] for row in values]
    references = [t.make(row) for t, row in zip(trainers, rows, strict=True)]
    optimiser = ROW_WISE[type(trainers[0])](trainers, values)
    for column in idle:
        optimiser.leave_alone(range(len(trainers)), slice(column, column + 1))
    for step in range(steps):
        k = len(trainers) - (step > 1 and len(trainers) > 1)
        grads = torch.randn(k, 7, dtype=torch.float64, generator=generator)
        grads[:, idle] = 0.0
        for own, grad in zip(rows[:k], grads, strict=True):
            for i, p in enumerate(own):
                p.grad = None if i in idle else grad[i].clone()
        for reference in references[:k]:
            reference.step()
        optimiser.step(values[:k], grads)
    return values, torch.stack([torch.stack([p.detach() for p in row]) for row in rows])


STEPS = st.integers(1, 6)
RATES = st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=3)
IDLE = st.sampled_from([(), (2,), (0, 6)])


@given(
    steps=STEPS,
    lrs=RATES,
    idle=IDLE,
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)]),
    eps=st.sampled_from([1e-8, 1e-3]),
)
@settings(deadline=None)
def test_adamw_is_torchs(
    steps: int, lrs: list[float], idle: tuple[int, ...], decay: float, betas: tuple[float, float], eps: float
) -> None:
    trainers = [AdamW(lr, decay * i, betas, eps) for i, lr in enumerate(lrs)]
    assert torch.allclose(*row_by_row(trainers, steps, idle), rtol=1e-12, atol=1e-14)


@given(
    steps=STEPS,
    lrs=RATES,
    idle=IDLE,
    decay=st.sampled_from([0.0, 0.1]),
    momentum=st.sampled_from([(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.5, False), (0.9, 0.0, True)]),
)
@settings(deadline=None)
def test_sgd_is_torchs(
    steps: int, lrs: list[float], idle: tuple[int, ...], decay: float, momentum: tuple[float, float, bool]
) -> None:
    rate, dampening, nesterov = momentum
    trainers = [SGD(lr, rate, decay * i, nesterov, dampening) for i, lr in enumerate(lrs)]
    assert torch.allclose(*row_by_row(trainers, steps, idle), rtol=1e-13, atol=1e-15)


def test_the_sum_of_gradients_starts_as_the_first_of_them() -> None:
    values = torch.zeros(1, 2)
    optimiser = ROW_WISE[SGD]([SGD(lr=1.0, momentum=0.5, dampening=0.5)], values)
    optimiser.step(values, torch.tensor([[4.0, 8.0]]))
    assert values.tolist() == [[-4.0, -8.0]], "not halved by the dampening"
    optimiser.step(values, torch.tensor([[4.0, 8.0]]))
    assert values.tolist() == [[-8.0, -16.0]]


@pytest.mark.parametrize(
    "trainer", [SGD(0.5), SGD(0.1, momentum=0.9, weight_decay=0.2, nesterov=True), SGD(0.1, 0.9, dampening=0.3)]
)
def test_clients_with_sgd_are_fused_to_what_each_is_alone(trainer: SGD, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [client(i, replace(trainer, lr=trainer.lr / (i + 1)), steps=i + 1, clip_norm=1.0) for i in range(3)]
    references = [execute(task, Execution(executor="reference")) for task in tasks]
    monkeypatch.setattr(fused, "execute", None)  # nobody is trained alone
    for task, found, reference in zip(tasks, execute_cohort(tasks, Execution()), references, strict=True):
        moved = [{n: r.tunables[n] - v for n, v in task.tunables.items()} for r in (reference, found)]
        assert tensors_close(*moved, 1e-4)


def test_clients_of_unlike_trainers_keep_their_order() -> None:
    trainers = [
        AdamW(1e-2),
        SGD(0.1),
        Adagrad(1e-2),
        SGD(0.1, 0.9),
        AdamW(1e-3),
        SGD(0.2),
        Adagrad(1e-3),
        SGD(0.1, 0.9),
    ]
    tasks = [client(i, trainer) for i, trainer in enumerate(trainers)]
    for task, found in zip(tasks, execute_cohort(tasks, Execution()), strict=True):
        reference = execute(task, Execution())
        moved = [{n: r.tunables[n] - v for n, v in task.tunables.items()} for r in (reference, found)]
        assert tensors_close(*moved, 1e-4)


# ---------------------------------------------------------------- anybody's trainer


def test_a_trainer_of_a_class_that_extends_adamw_is_asked_itself() -> None:
    class Frozen(AdamW):
        def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0)

    tasks = [client(i, Frozen(1e-2)) for i in range(2)]
    for task, found in zip(tasks, execute_cohort(tasks, Execution()), strict=True):
        assert all(torch.equal(found.tunables[n], v) for n, v in task.tunables.items())


def test_a_documented_trainer_gives_one_result_on_every_executor(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENTED.read_text(), re.S | re.M)
    plugin = tmp_path / "fedavg_rmsprop.py"
    plugin.write_text(code)
    fm = save_tiny_bert(tmp_path / "bert")
    scores = {}
    for executor in ("packed", "fused", "reference"):
        asked = smoke_request(tmp_path / executor, "fedavg-rmsprop", "tweets-noniid", fm, lr="1e-3")
        record = run(prepare(replace(asked, plugins=(str(plugin),), executor=executor)))
        scores[executor] = [entry.loss for entry in record.rounds] + [record.accuracy.plug_in.loss]
    assert scores["fused"] == pytest.approx(scores["packed"], rel=1e-6)
    assert scores["reference"] == pytest.approx(scores["packed"], rel=1e-3)
    plain = run(prepare(smoke_request(tmp_path / "plain", "fedavg-lora", "tweets-noniid", fm, lr="1e-3")))
    assert plain.accuracy.plug_in.loss != pytest.approx(scores["packed"][-1], rel=1e-3), "trained with AdamW"


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "as its optimiser; give it a trainer: an object with `name` and `make`"),
        (AdamW, "as its optimiser; give it a trainer"),
        (None, "None as its optimiser; give it a trainer"),
    ],
)
def test_what_is_no_trainer_is_named(trainer: Any, message: str) -> None:
    for executor in ("packed", "fused"):
        with pytest.raises(FedbenchError, match=message):
            list(execute_all([client(0, trainer), client(1, trainer)], Execution(executor=executor)))


def test_a_trainer_that_makes_no_optimiser_is_named() -> None:
    class Mine:
        name: ClassVar[str] = "mine"

        def make(self, parameters: Sequence[nn.Parameter]) -> Any:
            return list(parameters)

    with pytest.raises(FedbenchError, match="trainer mine: make gave a list; let it return a torch.optim.Optimizer"):
        execute(client(0, Mine()), Execution())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-1.0), "sgd: lr is -1.0, expected a number of at least 0"),
        (lambda: AdamW(float("nan")), "adamw: lr is nan"),
        (lambda: AdamW(0.1, weight_decay=-1), "adamw: weight_decay is -1"),
        (lambda: SGD(0.1, momentum=-0.9), "sgd: momentum is -0.9"),
        (lambda: SGD(0.1, nesterov=True), "nesterov takes momentum above 0"),
        (lambda: SGD(0.1, 0.9, nesterov=True, dampening=0.1), "nesterov takes momentum above 0 and dampening 0"),
    ],
)
def test_settings_that_torch_would_refuse_are_refused_for_every_executor(make: Any, message: str) -> None:
    with pytest.raises(FedbenchError, match=message):
        make()


# ---------------------------------------------------------------- fields that nobody knows


@dataclass(slots=True)
class NoisyTask(LocalTask):
    """A task with a field of its own, as somebody's method might want it."""

    noise: Any = 0.0


def grown(task: LocalTask, **more: Any) -> NoisyTask:
    return NoisyTask(**{f.name: getattr(task, f.name) for f in fields(LocalTask)}, **more)


@pytest.mark.parametrize("noise", [0.1, torch.zeros(2), np.zeros(2), None])
@pytest.mark.parametrize("executor", ["packed", "fused", "reference"])
def test_a_field_that_an_executor_does_not_know_is_refused(executor: str, noise: Any) -> None:
    tasks = [client(0, SGD(0.1)), grown(client(1, SGD(0.1)), noise=noise)]
    message = rf"\(NoisyTask\) sets 'noise', which the {executor} executor does not know; leave it at its default"
    with pytest.raises(FedbenchError, match=message):
        list(execute_all(tasks, Execution(executor=executor)))


def test_a_field_at_its_default_is_no_matter() -> None:
    plain = [client(i, SGD(0.1)) for i in range(2)]
    for found, expected in zip(
        execute_cohort([grown(t) for t in plain], Execution()), execute_cohort(plain, Execution()), strict=True
    ):
        assert all(torch.equal(found.tunables[n], v) for n, v in expected.tunables.items())


def test_what_is_hung_on_a_task_is_refused_too() -> None:
    class Loose(LocalTask):
        pass

    task = Loose(**{f.name: getattr(client(0, SGD(0.1)), f.name) for f in fields(LocalTask)})
    execute(task, Execution())
    task.temperature = 2.0  # type: ignore[attr-defined]
    with pytest.raises(FedbenchError, match="sets 'temperature', which the packed executor does not know"):
        execute(task, Execution())


def test_every_field_of_a_task_is_known_to_the_reference() -> None:
    assert {f.name for f in fields(LocalTask)} == alone.KNOWN


def test_a_field_that_a_pass_does_not_know_keeps_a_client_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone_with: list[LocalTask] = []
    monkeypatch.setattr(fused, "execute", lambda task, *rest: alone_with.append(task) or execute(task, *rest))
    monkeypatch.setattr(fused, "TOGETHER", fused.TOGETHER - {"clip_norm"})
    tasks = [client(0, SGD(0.1)), client(1, SGD(0.1), clip_norm=0.1), client(2, SGD(0.1))]
    found = execute_cohort(tasks, Execution())
    assert [id(task) for task in alone_with] == [id(tasks[1])]
    reference = execute(tasks[1], Execution())
    assert all(torch.equal(found[1].tunables[n], v) for n, v in reference.tunables.items())
