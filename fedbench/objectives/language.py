"""Which token comes next: causal language modelling, and instruction tuning, where the answer alone is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedbench.objectives.base import IGNORED, Objective


class Language(Objective):
    """Targets are the token that follows each token, [B, T]; none where a row ends, and where what follows is given.

    Outputs are two numbers for each token, [B, T, 2]: the loss of its target in nats, and the token held likeliest.
    The model gives these in place of its logits (`fedbench.models.decoder.NextToken`), which for a batch would be the
    largest thing in memory: 49,152 numbers a token, of which one is asked for.

    normalised: what a row's loss is divided by in training. "row": its own tokens, so that rows count alike. "batch":
    the tokens of its batch over its rows, so that tokens count alike. Scores are over tokens either way.
    """

    every_token: ClassVar[bool] = True
    padded: ClassVar[bool] = False

    def __init__(self, normalised: Literal["row", "batch"]) -> None:
        self.name = "language" if normalised == "row" else "language-by-token"  # type: ignore[misc]
        self.row_by_row = normalised == "row"  # type: ignore[misc]

    def targets(self, labels: np.ndarray, tokens: Sequence[np.ndarray] | None) -> Tensor:
        assert tokens is not None, "images have no tokens"
        out = np.full((len(tokens), max(map(len, tokens), default=0)), IGNORED, dtype=np.int64)
        for row, own in zip(out, tokens, strict=True):
            row[: len(own) - 1] = own[1:]
        return torch.from_numpy(out)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        asked = (targets != IGNORED).sum(1)
        sums = outputs[..., 0].sum(1)  # a token that is not asked for has no loss
        if self.row_by_row:
            return sums / asked.clamp(min=1)
        return sums * (len(targets) / asked.sum().clamp(min=1))

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[..., 0].sum()

    def count(self, targets: Tensor) -> int:
        return int((targets != IGNORED).sum())

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs[..., 1].long()

    def correct(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Which rows have every token that is asked for right, given the ones before it."""
        return np.asarray(((predicted == targets) | (targets == IGNORED)).all(1))

    def shares(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        asked = targets != IGNORED
        return np.asarray(((predicted == targets) & asked).sum(1) / np.maximum(asked.sum(1), 1))

    def accuracy(self, predicted: np.ndarray, targets: np.ndarray) -> float:
        """Share of the tokens asked for that are held likeliest."""
        return float((predicted == targets)[targets != IGNORED].mean())

    def more_scores(self, predicted: np.ndarray, targets: np.ndarray, loss: float) -> Mapping[str, float]:
        """perplexity: e to the mean loss of a token; tokens: how many were asked for."""
        return {"perplexity": float(np.exp(loss)), "tokens": int((targets != IGNORED).sum())}


def without_given(targets: Tensor, asked: Sequence[np.ndarray]) -> Tensor:
    """The targets [n, T] of the tokens alone that are asked for; `asked` says of each row's tokens which, ragged."""
    out = targets.clone()
    for row, own in zip(out, asked, strict=True):
        row[: len(own) - 1][torch.from_numpy(~own[1:])] = IGNORED  # the target of a token is the one after it
    return out
