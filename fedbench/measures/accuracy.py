"""Accuracy: of a model on labelled rows, per client, and over classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F

from fedbench.data.examples import Examples
from fedbench.errors import DivergedError
from fedbench.forward.feed import forward
from fedbench.machine.device import Execution
from fedbench.machine.workers import fork_map
from fedbench.records.text import pack_correct


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to labelled rows: predicted and true class [n], mean cross-entropy in nats."""

    predicted: np.ndarray
    labels: np.ndarray
    loss: float

    @property
    def correct(self) -> np.ndarray:
        return np.asarray(self.predicted == self.labels)

    @property
    def accuracy(self) -> float:
        """Share of rows answered rightly, 0 to 1."""
        return float(self.correct.mean())

    @property
    def macro_f1(self) -> float:
        """F1 averaged over the classes that occur, unweighted."""
        return float(f1_score(self.labels, self.predicted, average="macro", zero_division=0.0))

    def block(self, rows: bool = False) -> dict[str, Any]:
        """The record's block; with `rows`, per-row correctness too, so paired tests can be made later."""
        out: dict[str, Any] = {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "loss": self.loss,
            "rows": len(self.labels),
        }
        return out | {"correct": pack_correct(self.correct)} if rows else out


def evaluate(model: nn.Module, data: Examples, size: int, execution: Execution) -> Evaluation:
    """Run `model` over all rows of `data`, in batches of `size` rows of similar length, over worker processes.

    Raises DivergedError where logits are not finite: the largest of such numbers would pass for an answer.
    """
    batches = data.length_sorted_batches(size)

    def answer(indices: np.ndarray) -> tuple[np.ndarray, float, int]:
        with torch.inference_mode(), execution.autocast():
            batch = data.batch(indices, execution.device)
            out = passing.logits(batch).float()
            loss = F.cross_entropy(out, batch.labels, reduction="sum").item()
            lost = int((~torch.isfinite(out)).any(-1).sum())
            return out.argmax(-1).cpu().numpy(), loss, lost

    model.eval()
    predicted = np.empty(len(data), dtype=np.int64)
    losses, lost = [0.0] * len(batches), 0
    costs = [float(data.lengths[b].sum()) for b in batches]
    with forward(model, execution) as passing:
        for i, (classes, loss, without) in fork_map(answer, batches, execution.workers, costs):
            predicted[batches[i]] = classes
            losses[i] = loss
            lost += without
    if lost:
        raise DivergedError(f"{lost} of {len(data)} rows have logits that are not finite")
    return Evaluation(predicted, data.labels.numpy(), sum(losses) / len(data))


def per_client(test: Evaluation, label_counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Accuracy as each client would see it: the per-class test accuracy weighted by the client's label shares.

    Clients' own held-out rows are too few to tell them apart. Under feature or quantity skew, where label shares
    are alike, this says little; under label skew it is what differs. `worst_tenth` is the mean of the lowest 10%.
    """
    counts = np.asarray(label_counts, dtype=np.float64)
    by_class = np.zeros(counts.shape[1])
    for c in range(counts.shape[1]):
        rows = test.labels == c
        by_class[c] = test.correct[rows].mean() if rows.any() else np.nan
    # A class without test rows says nothing: its weight goes to the client's other classes.
    counts[:, np.isnan(by_class)] = 0.0
    totals = counts.sum(axis=1)
    values = (counts[totals > 0] @ np.nan_to_num(by_class)) / totals[totals > 0]
    lowest = np.sort(values)[: max(1, round(0.1 * len(values)))]
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst_tenth": float(lowest.mean()),
        "values": [round(float(v), 6) for v in values],
    }
