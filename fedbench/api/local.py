"""Local training, declared: a `LocalTask` says what to train, the harness (`fedbench.training`) trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.models.cache import Frozen
from fedbench.objectives.base import Objective
from fedbench.objectives.named import objective_of


@runtime_checkable
class Trainer(Protocol):
    """How a client's gradients change its tunables: an optimiser with its settings.

    Any class with these two is one, in the package or in a plugin; a frozen dataclass of settings says it best. Every
    executor takes every trainer. An optimiser is made anew by every client in every round, so it remembers nothing of
    the round before.

    name: what messages call it.
    """

    name: ClassVar[str]

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimiser of these parameters, whose `step` takes no closure.

        It is stepped once a batch, when their gradients are in place: clipped, masked, and with whatever a task adds.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    lr: learning rate. weight_decay: share of lr by which values shrink in a step. betas: decay rates of the means of
    gradient and squared gradient. eps: added to the root of the latter. Raises FedbenchError for a negative one.
    """

    name: ClassVar[str] = "adamw"
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _not_negative(self.name, lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent as `torch.optim.SGD` does it.

    lr: learning rate. momentum: decay rate of the sum of gradients, which starts as the first of them. weight_decay:
    times the value it is added to the gradient. nesterov: step ahead by the momentum; it takes momentum and no
    dampening. dampening: share of each later gradient that is left out of the sum. Raises FedbenchError for a negative
    setting, and for nesterov without what it takes.
    """

    name: ClassVar[str] = "sgd"
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(self.name, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise FedbenchError("sgd: nesterov takes momentum above 0 and dampening 0; set these or leave nesterov out")

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


def _not_negative(trainer: str, **settings: float) -> None:
    for name, value in settings.items():
        if not value >= 0:
            raise FedbenchError(f"{trainer}: {name} is {value}, expected a number of at least 0")


Statistic = Callable[[Tensor], Tensor]
"""Maps activations [N, d] of N real tokens to a sum over them, [d]."""


@dataclass(frozen=True, slots=True)
class ZerothOrder:
    """Gradients estimated from losses, without a backward pass: (L(w + scale z) - L(w - scale z)) / (2 scale) · z.

    The estimate of a step is the mean over its directions z (`fedbench.api.directions`), and takes the gradient's place
    in the trainer's step (MeZO, Malladi et al. 2023; DeComFL, Li et al. 2025).

    seeds: those of the directions of each step, an equal number for each. scale: how far along a direction to look.
    """

    seeds: Sequence[Sequence[int]]
    scale: float = 1e-3


@dataclass(slots=True)
class LocalTask:
    """One client's local training, declared.

    A subclass may add fields, for a `Client.fit` that reads them. An executor refuses a task with a field set that it
    does not know, rather than train as if it were not there.

    Attributes:
        frozen: the backbone to train through.
        tunables: start values by parameter name of `frozen.module`; everything else stays frozen.
        data: the client's rows; what is asked of them is their `objective`.
        batches: row indices of `data`, one array a step, in order; several epochs are simply more batches.
        optimiser: the trainer: `AdamW`, `SGD`, or one of a plugin's own.
        loss: (outputs [B, ..], targets [B, ..]) -> loss of each row [B], of which a step minimises the mean; None for
            that of the objective, which for classification is cross-entropy.
        clip_norm: largest L2 norm of the whole gradient, None for no clipping.
        penalty: (parameters, received) -> scalar added to the loss, both by name (FedProx).
        gradient_offset: added to the gradient of each named tunable before clipping (SCAFFOLD).
        rank_mask: multiplied into gradient and value of each named tunable (adapters of mixed ranks).
        observers: module path -> statistic of that module's output, summed over real tokens while training.
        observe_padding: sum over padding positions too; such a task is trained in padded batches, by itself.
        fixed: values of further parameters of `frozen.module` that are put in place, are not trained, and are not in
            the result: one factor of LoRA while the other is trained (FFA-LoRA, RoLoRA). Frozen weights of linear
            layers are no such thing: they come with `frozen`. A parameter that no task names keeps its own value,
            which for adapters and head is zero.
        mean_gradient: give the mean gradient of the round in the result.
        zeroth_order: estimate gradients from losses alone; None for back-propagation.
        seed: seeds dropout, which reads torch's global generator, inside `fork_rng`.
    """

    frozen: Frozen
    tunables: Mapping[str, Tensor]
    data: Examples
    batches: Sequence[np.ndarray]
    optimiser: Trainer
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    clip_norm: float | None = None
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None
    gradient_offset: Mapping[str, Tensor] | None = None
    rank_mask: Mapping[str, Tensor] | None = None
    observers: Mapping[str, Statistic] = field(default_factory=dict)
    observe_padding: bool = False
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    mean_gradient: bool = False
    zeroth_order: ZerothOrder | None = None
    seed: int = 0

    @property
    def objective(self) -> Objective:
        """What is asked of the client's rows."""
        return objective_of(self.data.objective)

    @property
    def row_losses(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of each row: the task's, or else its objective's."""
        return self.loss or self.objective.losses


@dataclass(frozen=True, slots=True)
class PersonalModel:
    """A model of one client's own: `tunables` by parameter name of `frozen.module`, every one that is not zero."""

    frozen: Frozen
    tunables: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What came of a LocalTask: tuned values, steps taken, mean loss, and the observers' sums.

    `observed[path]` is the statistic summed over `observed_tokens` tokens of all training steps: a text's real tokens
    (all positions of its padded batches with `observe_padding`), an image's patches and class token.

    mean_gradient: where the task asks for it, the mean over steps of each tunable's gradient of loss and penalty, as it
    is before anything is added to it or cut. slopes: of a task without back-propagation, the loss's slope along each
    direction of each step, [steps, directions].
    """

    tunables: Mapping[str, Tensor]
    steps: int
    loss: float
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    observed_tokens: int = 0
    mean_gradient: Mapping[str, Tensor] = field(default_factory=dict)
    slopes: Tensor | None = None
