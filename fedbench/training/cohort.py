"""Trains the clients of a round: over worker processes, or fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbench.api.local import LocalResult, LocalTask
from fedbench.machine.device import Execution
from fedbench.machine.workers import fork_map
from fedbench.models.linear import reordered
from fedbench.training.alone import execute
from fedbench.training.fused import execute_cohort


def execute_all(tasks: Sequence[LocalTask], execution: Execution) -> Iterator[tuple[int, LocalResult]]:
    """Train the clients of a round; yields (index of the task, its result) as they are done.

    On a CPU one after another over worker processes, whose results are, to the bit, those of one; a round of one client
    has nothing to spread, and takes torch's own threads instead. By the fused executor all together in this process.
    """

    def train(task: LocalTask) -> tuple[Any, ...]:
        r = execute(task, execution)
        # As numpy arrays a result passes between processes many times faster than as tensors.
        more = _numpy(r.mean_gradient), None if r.slopes is None else r.slopes.numpy()
        return _numpy(r.tunables), r.steps, r.loss, _numpy(r.observed), r.observed_tokens, *more

    if execution.fused:
        yield from enumerate(execute_cohort(tasks, execution))
    elif execution.device.type == "cpu" and len(tasks) > 1:
        costs = [float(sum(task.data.lengths[rows].sum() for rows in task.batches)) for task in tasks]
        modules = [task.frozen.module for task in tasks] if execution.packed else []
        # Here rather than in the workers, which then all use one copy; and the next round trains the same modules.
        with reordered(*modules, gradients=True, precision=execution.precision, keep=True):
            for index, (tunables, steps, loss, observed, tokens, mean, slopes) in fork_map(
                train, tasks, execution.workers, costs
            ):
                along = None if slopes is None else torch.from_numpy(slopes)
                yield (
                    index,
                    LocalResult(_tensors(tunables), steps, loss, _tensors(observed), tokens, _tensors(mean), along),
                )
    else:
        for index, task in enumerate(tasks):
            yield index, execute(task, execution)


def _numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
