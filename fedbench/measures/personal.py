"""Clients' own models, each on test rows of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbench.api.local import PersonalModel
from fedbench.api.messages import ClientId
from fedbench.data.examples import Examples
from fedbench.errors import DivergedError
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.training.alone import tunable

ROWS = 200
"""Test rows that are drawn for a client that has none of its own."""


def drawn_rows(classes: np.ndarray, counts: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Test rows for a client without any, in order: `ROWS` in the shares its training rows have of each class.

    classes: of each test row, [n]. counts: the client's training rows by class. Fewer where the test set has too few of
    a class. Shares are rounded by the largest remainders.
    """
    shares = ROWS * np.asarray(counts, dtype=np.float64) / sum(counts)
    wanted = shares.astype(np.int64)
    wanted[np.argsort(wanted - shares, kind="stable")[: ROWS - wanted.sum()]] += 1
    found = [rng.permutation(np.flatnonzero(classes == c))[:n] for c, n in enumerate(wanted)]
    return np.sort(np.concatenate(found))


def accuracy_of(model: PersonalModel, client: ClientId, rows: Examples, size: int, execution: Execution) -> float:
    """Share of what is asked in these rows that the model answers rightly.

    Raises DivergedError, naming the client, where an answer is not finite.
    """
    try:
        with tunable(model.frozen.module, model.tunables):
            return evaluate(model.frozen.module, rows, size, execution).accuracy
    except DivergedError as error:
        raise DivergedError(f"the model of client {client} has diverged: {error}; lower lr") from None
