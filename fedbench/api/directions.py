"""Random directions in the space of the tunables, by seed: what is sent of one is a number, not a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def direction(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Standard normal values by name, on the CPU in fp32: the same for one seed on every machine and device.

    shapes: of each tunable. They are drawn in the order of their names, whatever the order they are given in.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shapes[name]), generator=generator) for name in sorted(shapes)}
