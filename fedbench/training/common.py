"""What the ways of training a client have in common."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.local import LocalResult, LocalTask, Trainer
from fedbench.errors import DivergedError, FedbenchError
from fedbench.models.linear import FrozenLinear


def unknown_fields(task: LocalTask, known: Set[str]) -> list[str]:
    """Fields of a task, or attributes given to it, that are not `known` and are set: to anything but their default."""
    declared = {f.name: f for f in fields(task)}
    found = [name for name in getattr(task, "__dict__", {}) if name not in known and name not in declared]
    for name in declared.keys() - known:
        f, value = declared[name], getattr(task, name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        # Arrays compare element by element, so one is at its default only if it is that very object.
        if value is not default and (isinstance(value, Tensor | np.ndarray) or value != default):
            found.append(name)
    return sorted(found)


def refuse_unknown(task: LocalTask, known: Set[str], executor: str) -> None:
    """Raise FedbenchError for a task that asks for what the executor would silently leave out."""
    if found := unknown_fields(task, known):
        raise FedbenchError(
            f"a client's task ({type(task).__name__}) sets {found[0]!r}, which the {executor} executor does not know; "
            "leave it at its default, or train such a task in the client's own `fit`"
        )


def refuse_fixed(module: nn.Module, values: Container[str], fixed: Iterable[str]) -> None:
    """Raise FedbenchError for a fixed parameter that is also trained, or that the backbone's key stands for."""
    for name in fixed:
        if name in values:
            raise FedbenchError(f"a client's task both trains and fixes {name!r}; name it once")
        owner, _, role = name.rpartition(".")
        if role == "weight" and isinstance(module.get_submodule(owner), FrozenLinear):
            raise FedbenchError(f"a client's task fixes {name!r}, a frozen weight; give it as a part of `frozen`")


def made(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a trainer makes. Raises FedbenchError for what is no trainer, or makes something else."""
    if isinstance(trainer, type) or not isinstance(trainer, Trainer):
        raise FedbenchError(
            f"a client's task has {trainer!r} as its optimiser; give it a trainer: an object with `name` and `make`"
        )
    optimiser = trainer.make(parameters)
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise FedbenchError(
            f"trainer {trainer.name}: make gave a {type(optimiser).__name__}; let it return a torch.optim.Optimizer"
        )
    return optimiser


def has_dropout(module: nn.Module) -> bool:
    """Whether any dropout of `module` would drop something in training mode."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()) or any(
        value > 0
        for m in module.modules()
        if (config := getattr(m, "config", None)) is not None
        for name in ("attention_probs_dropout_prob", "attention_dropout")
        if isinstance(value := getattr(config, name, 0.0), (int, float))
    )


@dataclass
class Observed:
    """Of one client, by module path: the sum of its observer's statistic, and the tokens that went into it."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@contextmanager
def observing(
    module: nn.Module, tasks: Sequence[LocalTask], real: Callable[[Tensor], Sequence[Tensor]]
) -> Iterator[list[Observed]]:
    """What each client's observers make of its tokens that pass their modules inside the block.

    All tasks observe the same modules. `real` gives, of an activation of the batch under way, the tokens [n, d] of each
    client still training, which are the first of `tasks`.
    """
    seen = [Observed() for _ in tasks]

    def observe(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        with torch.no_grad():
            for task, own, share in zip(tasks, seen, real(output), strict=False):
                value = task.observers[path](share)
                own.sums[path] = own.sums[path] + value if path in own.sums else value
                own.tokens[path] = own.tokens.get(path, 0) + len(share)

    with ExitStack() as hooks:
        for path in tasks[0].observers:
            hooks.callback(module.get_submodule(path).register_forward_hook(partial(observe, path)).remove)
        yield seen


def result_of(tuned: dict[str, Tensor], losses: Tensor, seen: Observed) -> LocalResult:
    """What came of a task: tuned values in CPU memory of their own, the losses [steps] on the CPU, and what was seen.

    Raises DivergedError when one is not finite: such an update must never be averaged.
    """
    if not bool(torch.isfinite(losses).all()):
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise DivergedError(
            f"local training diverged: the loss of step {step} is {losses[step].item()}; lower lr, "
            "or refuse uploads that are too far off with federation.max_update_norm"
        )
    observed = {path: value.to("cpu", copy=True) for path, value in seen.sums.items()}
    return LocalResult(tuned, len(losses), float(losses.mean()), observed, max(seen.tokens.values(), default=0))
