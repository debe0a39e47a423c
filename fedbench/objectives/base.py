"""What is asked of a row: how its target is encoded, what a wrong answer costs, what is answered, how that is scored.

Everything else in the package treats a model's outputs [B, ..] and targets [B, ..] as things with a row dimension, and
asks the objective what they mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""In targets [B, T] a place that asks for nothing: padding, or a token that is given. torch's losses skip it too."""


class Objective(ABC):
    """What is asked of a row. Objectives have no settings: one object serves all.

    name: what rows say they are for (`fedbench.data.examples.Examples.objective`).
    every_token: whether outputs and targets are of each token, [B, T, ..] and [B, T], and not of the row as a whole,
    [B, ..] and [B]. padded: whether batches are fed padded, because a packed one gives the first token of each row
    alone; not so where the model has answers for all of them. row_by_row: whether a row's loss depends on that row
    alone.
    """

    name: ClassVar[str]
    every_token: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    row_by_row: ClassVar[bool] = True

    @abstractmethod
    def targets(self, labels: np.ndarray, tokens: Sequence[np.ndarray] | None) -> Tensor:
        """The targets of all rows, from their labels [n] in the data set and their tokens; None for images.

        [n], or of each token [n, longest row], filled up with `IGNORED`.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training minimises the mean of: the loss of each row, [B]."""

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of all answers asked for; over `count`, what is reported as loss."""
        return self.losses(outputs, targets).sum()

    def count(self, targets: Tensor) -> int:
        """How many answers these targets ask for; one a row, unless an objective says otherwise."""
        return len(targets)

    def finite(self, outputs: Tensor) -> Tensor:
        """Which rows have outputs that are numbers, [B]: others must never be scored."""
        return torch.isfinite(outputs).flatten(1).all(1)

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """The answers, of the shape and kind of the targets."""

    @abstractmethod
    def correct(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Which rows are answered rightly, [n] of bool; records keep it, for paired tests."""

    def shares(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Of each row the share of its answers that are right, [n]; scores by client are means of it."""
        return self.correct(predicted, targets).astype(np.float64)

    @abstractmethod
    def accuracy(self, predicted: np.ndarray, targets: np.ndarray) -> float:
        """Share of the answers asked for that are right, 0 to 1; by it rounds are selected."""

    def more_scores(self, predicted: np.ndarray, targets: np.ndarray, loss: float) -> Mapping[str, float]:
        """What else a record says of the answers, by name; `loss` is the mean over all of them."""
        return {}

    def more_outcomes(self, predicted: np.ndarray, targets: np.ndarray) -> Mapping[str, np.ndarray]:
        """What else a record says of each row, [n] of bool by name."""
        return {}
