"""Accuracy: of a model on labelled rows, per client, and over classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedbench.data.answers import Choices
from fedbench.data.examples import Examples
from fedbench.errors import DivergedError
from fedbench.forward.feed import forward
from fedbench.machine.device import Execution
from fedbench.machine.workers import fork_map
from fedbench.objectives.base import Objective
from fedbench.objectives.choice import chosen
from fedbench.objectives.language import without_given
from fedbench.objectives.named import CHOICE, CLASSIFICATION, objective_of
from fedbench.records.text import pack_correct


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to labelled rows: predicted and true [n], or of each token [n, T]; mean loss in nats."""

    predicted: np.ndarray
    labels: np.ndarray
    loss: float
    objective: Objective = CLASSIFICATION

    @property
    def correct(self) -> np.ndarray:
        """Which rows are answered rightly, [n]."""
        return self.objective.correct(self.predicted, self.labels)

    @property
    def shares(self) -> np.ndarray:
        """Of each row the share of its answers that are right, [n]."""
        return self.objective.shares(self.predicted, self.labels)

    @property
    def accuracy(self) -> float:
        """Share of what was asked that is answered rightly, 0 to 1."""
        return self.objective.accuracy(self.predicted, self.labels)

    @property
    def more_scores(self) -> Mapping[str, float]:
        """The objective's other scores by name: of classification, macro_f1."""
        return self.objective.more_scores(self.predicted, self.labels, self.loss)

    def block(self, rows: bool = False) -> dict[str, Any]:
        """The record's block; with `rows`, per-row correctness too, so paired tests can be made later.

        Not so of answers to each token: rows that are right as a whole say little of them, and their mean is another.
        """
        out: dict[str, Any] = {
            "accuracy": self.accuracy,
            **self.more_scores,
            "loss": self.loss,
            "rows": len(self.labels),
        }
        if rows and not self.objective.every_token:
            out["correct"] = pack_correct(self.correct)
            more = self.objective.more_outcomes(self.predicted, self.labels)
            out |= {name: pack_correct(bits) for name, bits in more.items()}
        return out


def evaluate(model: nn.Module, data: Examples, size: int, execution: Execution) -> Evaluation:
    """Run `model` over all rows of `data`, in batches of `size` rows of similar length, over worker processes.

    Rows with choices are scored by the choices, all else by their labels. Raises DivergedError where outputs are not
    finite: the largest of such numbers would pass for an answer.
    """
    if isinstance(data.answers, Choices):
        return choose(model, data, data.answers, size, execution)
    batches = data.length_sorted_batches(size)
    objective = objective_of(data.objective)

    def answer(indices: np.ndarray) -> tuple[np.ndarray, float, int]:
        with torch.inference_mode(), execution.autocast():
            batch = data.batch(indices, execution.device)
            out = passing.logits(batch, objective.padded).float()
            loss = objective.total(out, batch.labels).item()
            lost = int((~objective.finite(out)).sum())
            return objective.predict(out).cpu().numpy(), loss, lost

    model.eval()
    labels = data.labels.numpy()
    predicted = np.zeros_like(labels)
    losses, lost = [0.0] * len(batches), 0
    costs = [float(data.lengths[b].sum()) for b in batches]
    with forward(model, execution) as passing:
        for i, (answers, loss, without) in fork_map(answer, batches, execution.workers, costs):
            # A batch is as wide as its longest row, not as the longest of all.
            place: Any = (batches[i], *map(slice, answers.shape[1:]))
            predicted[place] = answers
            losses[i] = loss
            lost += without
    if lost:
        raise DivergedError(f"{lost} of {len(data)} rows have logits that are not finite")
    return Evaluation(predicted, labels, sum(losses) / objective.count(data.labels), objective)


def choose(model: nn.Module, data: Examples, choices: Choices, size: int, execution: Execution) -> Evaluation:
    """Score the choices of each row of language by their log-probability, the sum over their tokens.

    The loss is the mean of a token of the right choices, in nats. Raises DivergedError where one is not finite.
    """
    asks = objective_of(data.objective)
    tokens = [row for each in choices.tokens for row in each]
    counts = [len(each) for each in choices.tokens]
    given = np.repeat(np.asarray(choices.given), counts)
    asked = [np.arange(len(row)) >= before for row, before in zip(tokens, given, strict=True)]
    targets = without_given(asks.targets(np.zeros(len(tokens)), tokens), asked)
    rows = Examples(targets, tokens, None, data.pad_token, objective=data.objective)
    batches = rows.length_sorted_batches(size)

    def answer(indices: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), execution.autocast():
            batch = rows.batch(indices, execution.device)
            out = passing.logits(batch, asks.padded).float()
            return np.asarray(-out[..., 0].double().sum(1).cpu().numpy())

    model.eval()
    likelihoods = np.zeros(len(tokens))
    costs = [float(rows.lengths[b].sum()) for b in batches]
    with forward(model, execution) as passing:
        for i, found in fork_map(answer, batches, execution.workers, costs):
            likelihoods[batches[i]] = found
    if lost := int((~np.isfinite(likelihoods)).sum()):
        raise DivergedError(f"{lost} of {len(tokens)} choices have log-probabilities that are not finite")
    first = np.cumsum([0, *counts[:-1]])
    right = first + choices.right
    loss = -likelihoods[right].sum() / asks.count(targets[torch.from_numpy(right)])
    answers = chosen(np.split(likelihoods, first[1:]), choices.letters)
    return Evaluation(answers, choices.right, float(loss), CHOICE)


def per_client(test: Evaluation, classes: np.ndarray, label_counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Accuracy as each client would see it: the per-class test accuracy weighted by the client's label shares.

    classes: of each test row, [n], as the data set labels it, whatever the objective makes of that.

    Clients' own held-out rows are too few to tell them apart. Under feature or quantity skew, where label shares
    are alike, this says little; under label skew it is what differs. `worst_tenth` is the mean of the lowest 10%.
    """
    counts = np.asarray(label_counts, dtype=np.float64)
    by_class, shares = np.zeros(counts.shape[1]), test.shares
    for c in range(counts.shape[1]):
        rows = classes == c
        by_class[c] = shares[rows].mean() if rows.any() else np.nan
    # A class without test rows says nothing: its weight goes to the client's other classes.
    counts[:, np.isnan(by_class)] = 0.0
    totals = counts.sum(axis=1)
    values = (counts[totals > 0] @ np.nan_to_num(by_class)) / totals[totals > 0]
    return over_clients(values)


def on_own_rows(test: Evaluation, whose: np.ndarray) -> dict[str, Any]:
    """Accuracy of each client on its own test rows, of those who have any; `rows`: how many these are, by client.

    whose: the number of the client that a test row belongs to, [n]; -1 for nobody's. `worst_tenth` is the mean of the
    lowest 10%; where clients have few rows, those are low by chance too.
    """
    counts = np.bincount(whose[whose >= 0])
    of_row = test.shares
    right = np.bincount(whose[whose >= 0], weights=of_row[whose >= 0], minlength=len(counts))
    held = counts > 0
    return over_clients(right[held] / counts[held]) | {"rows": counts[held].tolist()}


def over_clients(values: np.ndarray) -> dict[str, Any]:
    """The record's block of accuracies by client, [n]: mean, deviation, mean of the lowest tenth, and themselves."""
    lowest = np.sort(values)[: max(1, round(0.1 * len(values)))]
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst_tenth": float(lowest.mean()),
        "values": [round(float(v), 6) for v in values],
    }
