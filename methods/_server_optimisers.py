"""What FedAvgM, FedAdagrad, FedYogi and FedAdam share (Hsu et al. 2019; Reddi et al., ICLR 2021, arXiv 2003.00295).

Clients train as in FedAvg. The server takes the mean of what they moved, Delta, for a gradient, and steps with an
optimiser of its own on LoRA and head: m = b1 m + (1 - b1) Delta; v = v + Delta² (Adagrad), v - (1 - b2) Delta² sign(v -
Delta²) (Yogi) or b2 v + (1 - b2) Delta² (Adam); w += lr m / (sqrt(v) + tau). FedAvgM: m = b1 m + Delta; w += lr m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedbench.api.context import ServerContext
from fedbench.api.messages import ClientId, Message, State
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterServer, WeightedMethod
from fedbench.models.foundation import FoundationModel


class ServerOptimiser(WeightedMethod):
    """Settings that all of them share.

    server_lr, beta1: of the server's step. weighting: of the mean over clients, by sample count, or all alike as in
    OpenFedLLM's adaptive ones.
    """

    server_lr: float = Field(1.0, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return OptimisingServer(self, fm, ctx)

    def change(self, delta: Tensor, m: Tensor, v: Tensor, steps: int) -> Tensor:
        """What to add to a tunable after `steps` earlier steps; m and v change in place."""
        raise NotImplementedError

    def start(self) -> float:
        """What v starts at."""
        return 0.0


class Adaptive(ServerOptimiser):
    """Settings of the three with a step size for each parameter.

    tau: added to the root of v, and squared where v starts. v_start: another start of v; 0 in Flower. squared: whose
    square goes into v, that of Delta or, as in OpenFedLLM, of m. first_whole: let m start as the first Delta, as in
    OpenFedLLM. bias_correction: divide m and v by 1 - b^t, as in Flower, which takes t for one round more.
    """

    server_lr: float = Field(1e-2, gt=0)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: float = Field(1e-3, gt=0)
    v_start: float | None = Field(None, ge=0)
    squared: Literal["delta", "momentum"] = "delta"
    first_whole: bool = False
    bias_correction: bool = False

    def start(self) -> float:
        return self.tau**2 if self.v_start is None else self.v_start

    def second(self, v: Tensor, square: Tensor) -> None:
        """Take a square into v, in place."""
        raise NotImplementedError

    def change(self, delta: Tensor, m: Tensor, v: Tensor, steps: int) -> Tensor:
        whole = self.first_whole and steps == 0
        m.mul_(self.beta1).add_(delta, alpha=1.0 if whole else 1 - self.beta1)
        self.second(v, (delta if self.squared == "delta" else m).square())
        first, second = m, v
        if self.bias_correction:
            first, second = m / (1 - self.beta1 ** (steps + 2)), v / (1 - self.beta2 ** (steps + 2))
        return self.server_lr * first / (second.sqrt() + self.tau)


class OptimisingServer(AdapterServer):
    """FedAvg's server, which steps towards the mean rather than taking it."""

    method: ServerOptimiser

    def __init__(self, method: ServerOptimiser, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.memory["m"] = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.memory["v"] = {name: torch.full_like(value, method.start()) for name, value in self.values.items()}
        self.steps = 0

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        before, m, v = self.values, self.memory["m"], self.memory["v"]
        super().aggregate(round, uploads)
        for name, value in before.items():
            self.values[name] = value + self.method.change(self.values[name] - value, m[name], v[name], self.steps)
        self.steps += 1

    def state(self) -> State:
        state = super().state()
        return State(state.tensors, {**state.values, "steps": self.steps})

    def restore(self, state: State) -> None:
        super().restore(state)
        self.steps = state.values["steps"]
