"""What local training costs: floating-point operations of a step, and the tokens it can see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedbench.api.local import LocalTask
from fedbench.machine.device import Execution
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
