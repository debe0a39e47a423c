"""The steps of torch's optimisers on a matrix [clients, parameters], each row with settings of its own.

What the fused executor needs of a trainer: one step for all clients of a pass. A trainer that is not in `ROW_WISE` is
none the worse for it: its clients are trained one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedbench.api.local import SGD, AdamW


class RowWise(Protocol):
    """The optimiser of a pass, made for its clients' trainers, all of one type and with equal `shared`.

    Clients are rows, in order of falling numbers of steps: those still training are always the first.
    """

    def __init__(self, trainers: Sequence[Any], values: Tensor) -> None:
        """values: start values [C, P]; not kept."""

    @staticmethod
    def shared(trainer: Any) -> Hashable:
        """The settings that all clients of a pass have to have in common."""

    def leave_alone(self, rows: Sequence[int], columns: slice) -> None:
        """Let these parameters of these clients stay as they are, gradients of zero given.

        torch's optimisers leave a parameter without a gradient alone, decay included.
        """

    def step(self, values: Tensor, grads: Tensor) -> None:
        """One step in place: values and grads [k, P] of the k clients still training."""


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number for each client, [C, 1]."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None].to(like)


class _Decaying:
    """Learning rate [C, 1] and weight decay, [C, 1] or [C, P], of each client."""

    def __init__(self, trainers: Sequence[Any], values: Tensor) -> None:
        self.lr = _column([t.lr for t in trainers], values)
        self.decay = _column([t.weight_decay for t in trainers], values)
        self.shape = values.shape
        self.steps = 0

    def leave_alone(self, rows: Sequence[int], columns: slice) -> None:
        self.decay = self.decay.expand(self.shape).clone()
        self.decay[rows, columns] = 0.0


class RowWiseAdamW(_Decaying):
    """`torch.optim.AdamW`, in its order of operations (Loshchilov & Hutter 2019)."""

    def __init__(self, trainers: Sequence[AdamW], values: Tensor) -> None:
        super().__init__(trainers, values)
        self.betas, self.eps = trainers[0].betas, trainers[0].eps
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)

    @staticmethod
    def shared(trainer: AdamW) -> Hashable:
        return trainer.betas, trainer.eps

    def step(self, values: Tensor, grads: Tensor) -> None:
        k = len(values)
        first, second, lr, decay = self.first[:k], self.second[:k], self.lr[:k], self.decay[:k]
        betas, self.steps = self.betas, self.steps + 1
        values.mul_(1 - lr * decay)
        first.lerp_(grads, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(grads, grads, value=1 - betas[1])
        root = second.sqrt().div_((1 - betas[1] ** self.steps) ** 0.5).add_(self.eps)
        values.sub_(first.div(root).mul_(lr / (1 - betas[0] ** self.steps)))


class RowWiseSGD(_Decaying):
    """`torch.optim.SGD`, in its order of operations."""

    def __init__(self, trainers: Sequence[SGD], values: Tensor) -> None:
        super().__init__(trainers, values)
        one = trainers[0]
        self.momentum, self.dampening, self.nesterov = one.momentum, one.dampening, one.nesterov
        self.sums = torch.zeros_like(values) if self.momentum else None

    @staticmethod
    def shared(trainer: SGD) -> Hashable:
        return trainer.momentum, trainer.dampening, trainer.nesterov

    def step(self, values: Tensor, grads: Tensor) -> None:
        k = len(values)
        self.steps += 1
        change = grads.addcmul(values, self.decay[:k])
        if self.sums is not None:
            sums = self.sums[:k]
            if self.steps == 1:
                sums.copy_(change)  # the sum starts as the gradient, whatever the dampening
            else:
                sums.mul_(self.momentum).add_(change, alpha=1 - self.dampening)
            change = change.add_(sums, alpha=self.momentum) if self.nesterov else sums
        values.sub_(change * self.lr[:k])


ROW_WISE: dict[type, type[RowWise]] = {AdamW: RowWiseAdamW, SGD: RowWiseSGD}
"""Trainer -> its optimiser of a pass."""
