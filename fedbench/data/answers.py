"""What rows are scored by beside their next tokens: answers to choose from, or answers to compare with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Choices:
    """Answers to choose from, of each row.

    tokens: [n], of each choice the tokens of the question and of the choice. given: [n], how many of them are the
    question's. letters: [n], characters of each choice. right: [n], the number of the right one.
    """

    tokens: Sequence[Sequence[np.ndarray]]
    given: Sequence[int]
    letters: Sequence[Sequence[int]]
    right: np.ndarray

    def select(self, rows: Sequence[int]) -> Choices:
        """Some rows, in this order."""
        tokens, letters = [self.tokens[i] for i in rows], [self.letters[i] for i in rows]
        return Choices(tokens, [self.given[i] for i in rows], letters, self.right[np.asarray(rows, dtype=np.int64)])

    def digest(self) -> str:
        """SHA-256 of all of it."""
        tokens = [[choice.tolist() for choice in row] for row in self.tokens]
        about = [tokens, list(self.given), [list(row) for row in self.letters], self.right.tolist()]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@dataclass(frozen=True)
class References:
    """Answers that what a model writes is compared with, of each row.

    prompts: [n], tokens of what comes before the answer. answers: [n], texts. scores, match, new_tokens: as the
    scenario's objective says. stops: tokens that end an answer. ends: texts that do, which are no part of it.
    """

    prompts: Sequence[np.ndarray]
    answers: Sequence[str]
    scores: tuple[str, ...]
    match: Literal["words", "number"]
    new_tokens: int
    stops: tuple[int, ...]
    ends: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> References:
        """Some rows, in this order."""
        return replace(self, prompts=[self.prompts[i] for i in rows], answers=[self.answers[i] for i in rows])

    def digest(self) -> str:
        """SHA-256 of prompts and answers, and where answers end; the settings are the scenario's."""
        about = [[prompt.tolist() for prompt in self.prompts], list(self.answers), self.stops, self.ends]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()
