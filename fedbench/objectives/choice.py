"""The likeliest of several answers: multiple choice, as the task family of lm-evaluation-harness scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fedbench.objectives.classification import Classification


class Choice(Classification):
    """Answers are [n, 2], numbers of choices: the likeliest one, and the likeliest a character; targets [n].

    Accuracy is lm-evaluation-harness' `acc`, of the first, and acc_norm its `acc_norm`, of the second.
    """

    name: ClassVar[str] = "choice"

    def correct(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.asarray(predicted[:, 0] == targets)

    def more_scores(self, predicted: np.ndarray, targets: np.ndarray, loss: float) -> Mapping[str, float]:
        """acc_norm, and perplexity: e to the mean loss of a token of the right choices."""
        return {"acc_norm": float((predicted[:, 1] == targets).mean()), "perplexity": float(np.exp(loss))}

    def more_outcomes(self, predicted: np.ndarray, targets: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"correct_norm": predicted[:, 1] == targets}


def chosen(likelihoods: Sequence[np.ndarray], letters: Sequence[Sequence[int]]) -> np.ndarray:
    """The choices that are likeliest, and likeliest a character, of each row: [n, 2]; of equals the first.

    likelihoods: of each row the log-probability of each of its choices, the sum over its tokens.
    """
    pairs = [
        (int(row.argmax()), int((row / np.asarray(own)).argmax()))
        for row, own in zip(likelihoods, letters, strict=True)
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
