"""One class for each row: cross-entropy, accuracy and macro-F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedbench.objectives.base import Objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, [B], in nats, from logits [B, C] and labels [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


class Classification(Objective):
    """Outputs are logits [B, C], targets class numbers [B]."""

    name: ClassVar[str] = "classification"

    def targets(self, labels: np.ndarray, tokens: Sequence[np.ndarray] | None) -> Tensor:
        return torch.from_numpy(labels.astype(np.int64))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def predict(self, outputs: Tensor) -> Tensor:
        """The class of the largest logit; of equals the first."""
        return outputs.argmax(-1)

    def correct(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.asarray(predicted == targets)

    def accuracy(self, predicted: np.ndarray, targets: np.ndarray) -> float:
        return float(self.correct(predicted, targets).mean())

    def more_scores(self, predicted: np.ndarray, targets: np.ndarray, loss: float) -> Mapping[str, float]:
        """macro_f1: see there."""
        return {"macro_f1": macro_f1(predicted, targets)}


def macro_f1(predicted: np.ndarray, targets: np.ndarray) -> float:
    """F1 averaged over the classes that occur among predictions or targets, unweighted; both are class numbers [B].

    As scikit-learn has it with `average="macro", zero_division=0`; importing that costs more memory than most FMs here.
    """
    classes = np.union1d(predicted, targets)
    hits = [np.count_nonzero((predicted == c) & (targets == c)) for c in classes]
    named = [np.count_nonzero(predicted == c) + np.count_nonzero(targets == c) for c in classes]
    return float(np.mean([2 * hit / count for hit, count in zip(hits, named, strict=True)]))
