"""Gradients estimated from losses alone, for a device that has no memory for a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedbench.api.directions import direction


@torch.no_grad()
def estimate(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[], tuple[Tensor, Tensor]],
    seeds: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Put the estimated gradient of `loss` into each parameter's `grad`; returns the slopes [directions], and a loss.

    The slope along a direction z is the central difference (L(w + scale z) - L(w - scale z)) / (2 scale), the gradient
    the mean of slope · z (Malladi et al. 2023, section 2). `loss` gives what is minimised, and a loss to report, whose
    mean is returned.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    start = {name: p.clone() for name, p in parameters.items()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    slopes, losses = [], []
    for seed in seeds:
        z = {name: value.to(start[name]) for name, value in direction(shapes, seed).items()}
        sides = []
        for step in (scale, -scale):
            for name, p in parameters.items():
                p.copy_(start[name] + step * z[name])
            sides.append(loss())
        slope = (sides[0][0] - sides[1][0]) / (2 * scale)
        slopes.append(slope)
        losses += [reported for _, reported in sides]
        for name in parameters:
            total[name].add_(slope * z[name])
    for name, p in parameters.items():
        p.copy_(start[name])
        p.grad = total[name] / len(seeds)
    return torch.stack(slopes), torch.stack(losses).mean()
