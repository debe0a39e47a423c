"""Local training, declared: a `LocalTask` says what to train, the harness (`fedbench.training`) trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedbench.data.examples import Examples
from fedbench.models.cache import Frozen


@dataclass(frozen=True, slots=True)
class AdamW:
    """The local optimiser, made anew by every client in every round (Loshchilov & Hutter 2019)."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


Statistic = Callable[[Tensor], Tensor]
"""Maps activations [N, d] of N real tokens to a sum over them, [d]."""


@dataclass(slots=True)
class LocalTask:
    """One client's local training, declared.

    Attributes:
        frozen: the backbone to train through.
        tunables: start values by parameter name of `frozen.module`; everything else stays frozen.
        data: the client's rows.
        batches: row indices of `data`, one array a step, in order; several epochs are simply more batches.
        optimiser: AdamW settings.
        loss: (logits [B, C], labels [B]) -> loss of each row [B]; the step minimises its mean.
        clip_norm: largest L2 norm of the whole gradient, None for no clipping.
        penalty: (parameters, received) -> scalar added to the loss, both by name (FedProx).
        gradient_offset: added to the gradient of each named tunable before clipping (SCAFFOLD).
        rank_mask: multiplied into gradient and value of each named tunable (adapters of mixed ranks).
        observers: module path -> statistic of that module's output, summed over real tokens while training.
        observe_padding: sum over padding positions too; such a task is trained in padded batches, by itself.
        seed: seeds dropout, which reads torch's global generator, inside `fork_rng`.
    """

    frozen: Frozen
    tunables: Mapping[str, Tensor]
    data: Examples
    batches: Sequence[np.ndarray]
    optimiser: AdamW
    loss: Callable[[Tensor, Tensor], Tensor]
    clip_norm: float | None = None
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None
    gradient_offset: Mapping[str, Tensor] | None = None
    rank_mask: Mapping[str, Tensor] | None = None
    observers: Mapping[str, Statistic] = field(default_factory=dict)
    observe_padding: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What came of a LocalTask: tuned values, steps taken, mean loss, and the observers' sums.

    `observed[path]` is the statistic summed over `observed_tokens` tokens of all training steps: a text's real tokens
    (all positions of its padded batches with `observe_padding`), an image's patches and class token.
    """

    tunables: Mapping[str, Tensor]
    steps: int
    loss: float
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    observed_tokens: int = 0
