"""Groups of neighbouring layers that do much the same, by what they make of public rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.data.examples import Examples
from fedbench.forward.feed import Forward
from fedbench.machine.device import Execution
from fedbench.methods._layerwise import real_tokens

ROWS = 128
"""Public rows that layers are compared on."""


@torch.no_grad()
def layer_states(model: nn.Module, layers: Sequence[int], public: Examples, execution: Execution) -> list[Tensor]:
    """The outputs of these layers on the real tokens of the first public rows, [n, d] each, on the CPU."""
    parts: list[list[Tensor]] = [[] for _ in layers]
    rows = np.arange(min(ROWS, len(public)))
    for chunk in np.array_split(rows, max(1, len(rows) // 32)):
        states, mask = Forward(model, execution.packed).layer_outputs(public.batch(chunk, execution.device))
        for own, layer in zip(parts, layers, strict=True):
            own.append(real_tokens(states[layer], mask).cpu())
    return [torch.cat(own) for own in parts]


def similarities(states: Sequence[Tensor]) -> Tensor:
    """Linear CKA of each two of these representations [n, d], from 0 to 1 (Kornblith et al. 2019), in fp64.

    ||Y'X||² / (||X'X|| ||Y'Y||) of columns whose mean is 0, in the Frobenius norm.
    """
    centred = [x.double() - x.double().mean(0) for x in states]
    norms = [(x.T @ x).norm() for x in centred]
    out = torch.ones(len(states), len(states), dtype=torch.float64)
    for i, x in enumerate(centred):
        for j in range(i):
            out[i, j] = out[j, i] = (centred[j].T @ x).square().sum() / (norms[i] * norms[j])
    return out


def grouped(similarity: Tensor, groups: int) -> list[list[int]]:
    """So many groups of neighbours: the two neighbouring groups of highest mean similarity are joined until that many.

    similarity: [L, L]. Of equals the earlier are joined.
    """
    found = [[i] for i in range(len(similarity))]
    while len(found) > groups:
        joins = [float(similarity[a][:, b].mean()) for a, b in pairwise(found)]
        i = joins.index(max(joins))
        found[i : i + 2] = [found[i] + found[i + 1]]
    return found


def centre(similarity: Tensor, group: Sequence[int]) -> int:
    """The member most like all of its group; of equals the earliest."""
    means = [float(similarity[i, list(group)].mean()) for i in group]
    return group[means.index(max(means))]
