"""What local training costs: floating-point operations of steps, and the tokens it can see."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbench.api.local import LocalTask
from fedbench.data.examples import Examples
from fedbench.machine.device import Execution
from fedbench.objectives.base import IGNORED
from fedbench.training.alone import execute


def most_tokens(task: LocalTask) -> int:
    """The most tokens that a task's observers can see: all positions of its padded batches, or of its images."""
    if task.data.tokens is not None:
        return sum(len(rows) * int(task.data.lengths[rows].max()) for rows in task.batches)
    config: Any = task.frozen.module.config
    return sum(map(len, task.batches)) * ((config.image_size // config.patch_size) ** 2 + 1)


def step_flops(task: LocalTask, device: torch.device) -> int:
    """Floating-point operations of one local step: all passes over the task's first batch, padded.

    Products and attention are counted, by torch; what goes element by element is not. Attention runs as plain products
    meanwhile: torch has no formula for the kernel that it takes on a CPU.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        first = replace(task, batches=task.batches[:1], observers={})
        if task.zeroth_order is not None:
            first.zeroth_order = replace(task.zeroth_order, seeds=task.zeroth_order.seeds[:1])
        execute(first, Execution(device, executor="reference"))
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Shape:
    """What the operations of a padded step follow from: rows, their padded length, and tokens that are asked for.

    tokens: 1 for images, which are all alike. asked: 0 where a row has one target.
    """

    rows: int
    tokens: int
    asked: int

    @classmethod
    def of(cls, data: Examples, batch: np.ndarray) -> Shape:
        """The shape of these rows of `data` as a batch."""
        asked = 0
        if data.labels.dim() > 1:
            asked = int((data.labels[torch.from_numpy(np.asarray(batch, dtype=np.int64))] != IGNORED).sum())
        return cls(len(batch), int(data.lengths[batch].max()), asked)


@dataclass(frozen=True)
class Formula:
    """Operations of a step: step + place T + rows (row + token T + pair T²) + target asked, of T tokens a row.

    The terms are what a transformer is made of: what is done once a step, once for each place in a row, whatever the
    rows (rotary positions), once a row (its head), for each token (its projections), for each pair of tokens
    (attention), and for each token that is asked for (logits).
    """

    step: Fraction
    place: Fraction
    row: Fraction
    token: Fraction
    pair: Fraction
    target: Fraction

    def of(self, shape: Shape) -> Fraction:
        a_row = self.row + self.token * shape.tokens + self.pair * shape.tokens**2
        return self.step + self.place * shape.tokens + shape.rows * a_row + self.target * shape.asked


class RoundFlops:
    """Operations of whole local trainings, padded as in `step_flops`, from the shapes of their steps.

    For each kind of task a few small steps are counted, from which the formula of its steps follows. One step of the
    task itself has to agree with it to the unit, else the number is not known: a method may train in a way that no such
    formula holds for.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.utils.flop_counter  # noqa: F401  # takes a moment, which is no part of a round

        self.device = device
        self.first: int | None = None
        """Of the first step that was asked about."""
        self._layouts: dict[str, Hashable] = {}  # by the key of a backbone: names and shapes of its parameters
        self._formulas: dict[Hashable, Formula | None] = {}

    def of(self, task: LocalTask) -> int | None:
        """Operations of all steps of `task`; None where no formula holds for them."""
        if not task.batches:
            return 0
        kind = self._kind(task)
        if kind not in self._formulas:
            counted, shape = step_flops(task, self.device), Shape.of(task.data, task.batches[0])
            self.first = counted if self.first is None else self.first
            if kind not in _fitted or _fitted[kind].of(shape) != counted:
                _fitted[kind] = fitted(task, self.device)
            self._formulas[kind] = _fitted[kind] if _fitted[kind].of(shape) == counted else None
        found = self._formulas[kind]
        return None if found is None else int(sum(found.of(Shape.of(task.data, batch)) for batch in task.batches))

    def _kind(self, task: LocalTask) -> Hashable:
        """What tasks have in common whose steps follow one formula: shapes, what is trained, and how."""
        key = task.frozen.key
        if key not in self._layouts:
            parameters = task.frozen.module.named_parameters()
            self._layouts[key] = hash(tuple((name, tuple(p.shape)) for name, p in parameters))
        directions = None if task.zeroth_order is None else len(task.zeroth_order.seeds[0])
        how = (directions, task.penalty is None, type(task.optimiser), task.data.objective, task.loss is None)
        return self._layouts[key], frozenset(task.tunables), how


_fitted: dict[Hashable, Formula] = {}
"""Formulas by kind of task, from other runs of this process."""

LENGTHS = 4, 6, 9
"""Tokens a row of the small steps; three, as a row's operations are a polynomial of degree two in them."""


def fitted(task: LocalTask, device: torch.device) -> Formula:
    """The formula that goes through small steps of `task`: of two and three rows, and of each length in `LENGTHS`."""

    def counted(rows: int, tokens: int, asked: int) -> Fraction:
        small = replace(task, data=_small(task.data, rows, tokens, asked), batches=[np.arange(rows)])
        return Fraction(step_flops(small, device))

    texts, every_token = task.data.tokens is not None, task.data.labels.dim() > 1
    a, b, c = LENGTHS if texts else (1, 1, 1)
    asked = 3 if every_token else 0  # at least one in each of three rows
    first = counted(2, a, asked)
    target = (counted(2, a, asked + 2) - first) / 2 if every_token else Fraction(0)
    row = counted(3, a, asked) - first
    once = first - 2 * row - target * asked  # step + place a
    if not texts:
        return Formula(once, Fraction(0), row, Fraction(0), Fraction(0), target)
    second = counted(2, b, asked)
    longer = counted(3, b, asked) - second
    place = (second - 2 * longer - target * asked - once) / (b - a)
    longest = (counted(2, c, asked) - once - place * (c - a) - target * asked) / 2
    pair = ((longest - row) / (c - a) - (longer - row) / (b - a)) / (c - b)  # Newton's divided differences
    token = (longer - row) / (b - a) - pair * (a + b)
    return Formula(once - place * a, place, row - token * a - pair * a * a, token, pair, target)


def _small(data: Examples, rows: int, tokens: int, asked: int) -> Examples:
    """So many rows of this kind, of so many tokens, of which `asked` are asked for; what they say is of no matter."""
    chosen = data.select(np.zeros(rows, dtype=np.int64))
    if data.tokens is None:
        return chosen
    labels: Tensor = chosen.labels
    if labels.dim() > 1:
        labels = labels.new_full((rows, tokens), IGNORED)
        labels.view(-1)[_spread(rows, tokens, asked)] = 0

    def cut(ragged: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.resize(row, tokens) for row in ragged]

    segments = None if chosen.segments is None else cut(chosen.segments)
    return replace(chosen, tokens=cut(chosen.tokens or ()), segments=segments, labels=labels)


def _spread(rows: int, tokens: int, asked: int) -> Tensor:
    """Places of `asked` targets in [rows, tokens], one in each row before any has two."""
    places = torch.arange(rows * tokens).view(rows, tokens).t().reshape(-1)
    return places[:asked]
